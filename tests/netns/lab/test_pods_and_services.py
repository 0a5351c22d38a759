"""Pods, names and cluster IPs of a lab without mesh work as in a cluster."""
from __future__ import annotations

import collections
import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.support.lab import Lab
from tests.support.wait import until

pytestmark = pytest.mark.netns

CURL = ("curl", "-sS", "-m", "5")


def test_every_pod_is_ready_on_its_node_with_an_address_of_the_nodes_range(plain: Lab) -> None:
    pods = plain.status()
    assert len(pods) == 5
    for pod in pods:
        assert pod["ready"] is True
        assert pod["captured"] is False
        assert pod["reason"] == "the lab runs without a mesh"
        assert pod["ip"].startswith(f"10.244.{pod['node'][1:]}.")
    assert plain.pod("client")["node"] == "n1"
    assert plain.pod("nobody")["node"] == "n2"
    assert {pod["node"] for pod in pods if pod["workload"] == "web"} == {"n1", "n2"}


def test_a_service_is_reached_by_every_form_of_its_name_over_both_families(plain: Lab) -> None:
    for name in ("web", "web.default", "web.default.svc", "web.default.svc.cluster.local"):
        for family in ("-4", "-6"):
            answer = plain.exec("client", *CURL, family, f"http://{name}/").stdout.split()
            assert answer[0].startswith("web-")
            assert answer[1].removeprefix("::ffff:") in plain.pod("client")["ips"]  # the client's own address


def test_a_cluster_ip_spreads_over_all_ready_pods(plain: Lab) -> None:
    seen = collections.Counter(plain.exec("client", "sh", "-c", "for i in $(seq 60); do curl -sS -m 5 http://web/; done")
                               .stdout.split()[::2])
    assert len(seen) == 3
    assert min(seen.values()) >= 6  # 20 are expected; fewer than 6 of 60 has a chance of one in 100,000


def test_a_headless_service_has_the_addresses_of_its_pods(plain: Lab) -> None:
    script = "import socket; print(*sorted({a[4][0] for a in socket.getaddrinfo('web-pods', 80)}))"
    found = plain.exec("client", "python3", "-c", script).stdout.split()
    assert found == sorted(pod["ip"] for pod in plain.status() if pod["workload"] == "web")


def test_a_pod_of_a_headless_service_has_a_name_of_its_own_and_an_exec_probe_runs_as_its_user(plain: Lab) -> None:
    pod = plain.pod("nobody")
    assert pod["ready"]
    assert plain.exec("nobody", "pwd").stdout == "/usr\n"
    for name in ("nobodies", "first.nobodies", "first.nobodies.default.svc.cluster.local"):
        assert plain.exec("client", "getent", "ahostsv4", name).stdout.split()[0] == pod["ip"]


def test_a_pod_and_a_command_in_it_share_mounts_and_processes_that_are_not_the_hosts(plain: Lab) -> None:
    spaces = [f"/proc/self/ns/{kind}" for kind in ("mnt", "pid", "net", "ipc", "uts")]
    inside = plain.exec("client", "readlink", *spaces).stdout.split()
    assert inside == plain.exec("client", "readlink", *(path.replace("self", "1") for path in spaces)).stdout.split()
    assert not set(inside) & {os.readlink(path) for path in spaces}


def test_logs_follow_what_is_written_from_now_on(plain: Lab) -> None:
    from tests.support.lab import NARROWS
    web = next(pod["name"] for pod in plain.status() if pod["workload"] == "web")
    with subprocess.Popen([NARROWS, "lab", "logs", "--name", plain.name, web, "-f"], stdout=subprocess.PIPE,
                          text=True) as following:
        assert following.stdout is not None
        plain.exec("client", *CURL, f"http://{plain.pod(web)['ip']}:8080/follow-me")
        assert any("/follow-me" in line for line in following.stdout)
        following.terminate()


def test_a_name_that_is_not_there_is_an_answer_at_once(plain: Lab) -> None:
    assert plain.exec("client", "getent", "hosts", "nobody-there", check=False).returncode == 2
    done = plain.exec("client", *CURL, "http://nobody-there/", check=False)
    assert done.returncode == 6  # could not resolve; 28 would be a time-out


def test_names_are_answered_over_tcp_too(plain: Lab) -> None:
    script = ("import dnslib, sys\nq = dnslib.DNSRecord.question('web.default.svc.cluster.local')\n"
              "print(dnslib.DNSRecord.parse(q.send('10.244.1.1', tcp=True, timeout=5)).short())")
    import dnslib
    where = str(Path(dnslib.__file__).parent.parent)
    address = plain.exec("client", "env", f"PYTHONPATH={where}", "python3", "-c", script).stdout.strip()
    services = json.loads(plain.run("status", "-o", "json").stdout)["services"]
    assert [address] == [one["clusterIPs"][0] for one in services if one["name"] == "web"]


def test_a_service_without_endpoints_and_a_port_nobody_serves_are_refused_not_hung(plain: Lab) -> None:
    for url in ("http://empty/", "http://web:81/"):
        assert plain.exec("client", *CURL, url, check=False).returncode == 7


def test_a_pod_reaches_itself_through_its_service(plain: Lab) -> None:
    web = next(pod for pod in plain.status() if pod["workload"] == "web")
    answers = plain.exec(web["name"], "sh", "-c", "for i in $(seq 30); do curl -sS -m 5 http://web/; done").stdout.split()
    assert web["name"] in answers[::2]


def test_a_pod_has_a_containers_capabilities_and_no_way_to_more(plain: Lab) -> None:
    status = plain.exec("client", "cat", "/proc/self/status").stdout
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    docker = "00000000a80425fb"  # what `docker run debian grep Cap /proc/self/status` prints
    assert (fields["CapPrm"], fields["CapEff"], fields["CapBnd"]) == (docker, docker, docker)
    assert (fields["CapInh"], fields["CapAmb"], fields["NoNewPrivs"]) == ("0" * 16, "0" * 16, "1")
    first = dict(line.split(":\t", 1) for line in plain.exec("client", "cat", "/proc/1/status").stdout.splitlines()
                 if ":\t" in line)
    assert (first["CapEff"], first["CapBnd"], first["NoNewPrivs"]) == (docker, docker, "1")
    assert plain.exec("client", "mount", "-t", "tmpfs", "none", "/mnt", check=False).returncode != 0
    assert plain.exec("client", "ip", "link", "set", "lo", "down", check=False).returncode != 0
    assert plain.exec("client", "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward", check=False).returncode != 0


def test_run_as_user_is_that_user_without_capabilities_but_with_low_ports(plain: Lab) -> None:
    status = plain.exec("nobody", "cat", "/proc/self/status").stdout
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert fields["Uid"].split() == ["65534"] * 4
    assert fields["CapEff"] == "0" * 16
    bind = "import socket; s = socket.socket(); s.bind(('', 80)); print('bound')"
    assert plain.exec("nobody", "python3", "-c", bind).stdout == "bound\n"


def test_a_pod_sees_its_own_processes_links_and_name_and_nothing_of_the_mesh(plain: Lab) -> None:
    assert plain.exec("client", "sh", "-c", "ls -d /proc/[0-9]* | wc -l").stdout.strip() in {"3", "4", "5"}
    assert plain.exec("client", "ls", "/sys/class/net").stdout.split() == ["eth0", "lo"]
    assert plain.exec("client", "hostname").stdout == "client\n"
    assert plain.exec("client", "ls", "-A", "/run/narrows").stdout == ""
    assert plain.exec("client", "cat", "/etc/resolv.conf").stdout == (
        "nameserver 10.244.1.1\nsearch default.svc.cluster.local svc.cluster.local cluster.local\noptions ndots:5\n")


def test_exec_passes_status_input_and_signals_and_joins_the_pods_cgroup(plain: Lab) -> None:
    assert plain.exec("client", "sh", "-c", "exit 7", check=False).returncode == 7
    assert plain.exec("client", "sh", "-c", "kill -9 $$", check=False).returncode == 137
    missing = plain.exec("client", "no-such-program", check=False)
    assert missing.returncode == 127
    assert "no such program" in missing.stderr
    cgroup = plain.exec("client", "cat", "/proc/self/cgroup").stdout
    assert f"/narrows.lab/{plain.name}/nodes/n1/default.client" in cgroup
    from tests.support.lab import NARROWS
    done = subprocess.run([NARROWS, "lab", "exec", "--name", plain.name, "client", "--", "cat"], input="hello",
                          capture_output=True, text=True, timeout=20, check=True)
    assert done.stdout == "hello"


def test_exec_on_a_terminal_is_on_that_terminal(plain: Lab) -> None:
    from tests.support.lab import NARROWS
    argv = f"{NARROWS} lab exec --name {plain.name} client -- sh -c 'test -t 0 && test -t 1 && echo terminal'"
    done = subprocess.run(["script", "-qec", argv, os.devnull], capture_output=True, text=True, timeout=20, check=True,
                          stdin=subprocess.DEVNULL)
    assert "terminal" in done.stdout


def test_logs_are_what_the_container_wrote(plain: Lab) -> None:
    pod = plain.pod("client")
    assert plain.run("logs", "default/client").stdout == f"client is client at {pod['ip']}\n"


def test_logs_follow_what_it_writes_from_now_on(plain: Lab) -> None:
    from tests.support.lab import NARROWS
    with subprocess.Popen([NARROWS, "lab", "logs", "--name", plain.name, "client", "-f"], stdout=subprocess.PIPE,
                          text=True) as follower:
        assert follower.stdout is not None
        assert follower.stdout.readline().startswith("client is client at")
        plain.exec("client", "sh", "-c", "echo said later > /proc/1/fd/1")
        assert follower.stdout.readline() == "said later\n"
        follower.terminate()


def test_probes_come_from_the_address_that_capture_lets_pass(plain: Lab) -> None:
    web = next(pod["name"] for pod in plain.status() if pod["workload"] == "web")
    until(lambda: "169.254.7.127" in plain.run("logs", web).stdout, "a probe in the server's log")


def test_a_pod_that_is_not_ready_gets_no_traffic_until_it_is(plain: Lab) -> None:
    web = next(pod["name"] for pod in plain.status() if pod["workload"] == "web")
    flag = Path(f"/tmp/sick.{web}")
    try:
        flag.touch()
        until(lambda: not plain.pod(web)["ready"], "the pod not ready")
        answers = plain.exec("client", "sh", "-c", "for i in $(seq 30); do curl -sS -m 5 http://web/x; done").stdout
        assert web not in answers
    finally:
        flag.unlink()
    until(lambda: plain.pod(web)["ready"], "the pod ready again")


def test_a_container_that_ends_is_started_again(plain: Lab) -> None:
    before = plain.pod("client")["restarts"]
    plain.exec("client", "kill", "1", check=False)  # the command may end with the container
    until(lambda: plain.pod("client")["restarts"] == before + 1 and plain.pod("client")["ready"], "one restart")
    assert "container main ended with 0" in plain.run("logs", "client").stdout
    assert "ended with 0" in plain.run("events").stdout


def test_a_pod_that_is_not_there_is_named_with_those_that_are(plain: Lab) -> None:
    done = plain.exec("clint", "true", check=False)
    assert done.returncode == 65
    assert "there is no pod clint" in done.stderr
    assert "default/client" in done.stderr
