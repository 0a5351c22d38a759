"""Capture with the whole mesh running: both families, loops, what is not ours, strangers' edits, load and churn."""
from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.lab import Lab, more, narrows
from tests.support.wait import until

pytestmark = pytest.mark.netns
RULES = "about rules; of hooks tests/netns/agent/test_ebpf.py and tests/bpf/test_clean.py have the same"

# Asks each HOST:PORT of the command line who answers and who is seen, over IPv4 and IPv6; prints {"4 http far:80": [name, address]}.
ASK = """
import http.client, json, socket, sys
found = {}
for target in sys.argv[1:]:
    host, port = target.rsplit(":", 1)
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            address = socket.getaddrinfo(host, port, family, socket.SOCK_STREAM)[0][4][0]
        except socket.gaierror:
            continue
        key = f"{4 if family == socket.AF_INET else 6} {target}"
        try:
            if port == "9000":
                with socket.create_connection((address, port), 5) as plug:
                    plug.sendall(b"who\\n")
                    answer = plug.makefile().readline()
            else:
                c = http.client.HTTPConnection(address, int(port), timeout=5)
                c.request("GET", "/", headers={"Host": host})
                answer = c.getresponse().read().decode()
                c.close()
        except OSError as error:
            answer = f"{type(error).__name__} - -"
        name, _, seen = answer.split()
        found[key] = [name, seen]
print(json.dumps(found))
"""

CONNECT = """
import socket, sys
for target in sys.argv[1:]:
    host, port = target.rsplit(" ", 1)
    try:
        with socket.create_connection((host, int(port)), 3) as plug: plug.recv(1)
        print("connected")
    except OSError as error:
        print(type(error).__name__)
"""

# SIZE bytes there and back over each of N connections that are all open at once; prints how many came back unharmed.
ECHO = """
import asyncio, hashlib, os, sys
n, size, hosts = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
async def one(number, opened):
    reader, writer = await asyncio.open_connection(hosts[number % len(hosts)], 9001)
    opened.append(number)
    while len(opened) < n: await asyncio.sleep(0.01)
    sent, got = hashlib.sha256(), hashlib.sha256()
    async def send():
        left = size
        while left:
            block = os.urandom(min(left, 65536)); left -= len(block)
            sent.update(block); writer.write(block); await writer.drain()
        writer.write_eof()
    sending = asyncio.create_task(send())
    while block := await reader.read(65536): got.update(block)
    await sending; writer.close()
    return sent.digest() == got.digest()
async def main():
    opened = []
    async with asyncio.timeout(30):
        print(sum(await asyncio.gather(*(one(number, opened) for number in range(n)))))
asyncio.run(main())
"""


def python(lab: Lab, pod: str, script: str, *argv: str) -> str:
    return lab.exec(pod, "/usr/bin/python3", "-c", script, *argv).stdout


def ask(lab: Lab, pod: str, *targets: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = json.loads(python(lab, pod, ASK, *targets))
    return found


@pytest.mark.parametrize("server", ["near", "far"])
def test_a_server_on_the_same_or_another_node_sees_the_clients_address_and_both_sides_count(servers: Lab, server: str) -> None:
    four, six = servers.pod("client")["ips"]
    labels = {"source_workload": "client", "destination_workload": server}
    before = servers.counts(**labels)
    found = ask(servers, "client", f"{server}-both:80", f"{server}-both:9000")
    assert set(found) == {f"{family} {server}-both:{port}" for family in (4, 6) for port in (80, 9000)}
    assert all(name == server and seen in (four, six) for name, seen in found.values()), found
    assert [found[f"4 {server}-both:{port}"][1] for port in (80, 9000)] == [four, four]
    expected = {(what, reporter): 2 for what in ("http", "tcp") for reporter in ("source", "destination")}
    until(lambda: more(before, servers.counts(**labels)) == expected, "two requests and two connections from both reporters")


def test_a_service_of_ipv6_alone_is_captured_counted_and_keeps_the_clients_address(servers: Lab) -> None:
    labels = {"source_workload": "client", "destination_workload": "far", "destination_service_name": "far-six"}
    before = servers.counts(source_workload="client", destination_workload="far")
    by_name = servers.counts(reporter="source", **labels)
    six = servers.pod("client")["ips"][1]
    assert ask(servers, "client", "far-six:80", "far-six:9000") == {
        "6 far-six:80": ["far", six], "6 far-six:9000": ["far", six]}
    until(lambda: more(by_name, servers.counts(reporter="source", **labels)) == {("http", "source"): 1, ("tcp", "source"): 1},
          "counted under the service's name")
    assert more(before, servers.counts(source_workload="client", destination_workload="far")) == {
        (what, reporter): 1 for what in ("http", "tcp") for reporter in ("source", "destination")}


def test_a_pods_own_addresses_work_in_both_families_on_a_port_that_no_service_has(servers: Lab) -> None:
    addresses, own = servers.pod("far")["ips"], servers.pod("client")["ips"]
    labels = {"source_workload": "client", "destination_workload": "far", "destination_service_name": "unknown"}
    before = servers.counts(**labels)
    found = ask(servers, "client", *(f"{address}:7000" for address in addresses))
    assert list(found.values()) == [["far", own[0]], ["far", own[1]]]
    until(lambda: more(before, servers.counts(**labels)) == {("tcp", "source"): 2, ("tcp", "destination"): 2},
          "opaque connections between known workloads")


def test_a_pod_that_calls_itself_through_its_service_is_answered_once_and_there_is_no_loop(servers: Lab) -> None:
    before = servers.counts(source_workload="far")
    found = ask(servers, "far", "far-both:80", "far-both:9000")
    assert len(found) == 4
    own = servers.pod("far")["ips"]
    assert all(name == "far" and seen in own for name, seen in found.values()), found
    assert more(before, servers.counts(source_workload="far")) == {("http", "source"): 2, ("tcp", "source"): 2}


def test_our_ports_are_refused_from_everywhere(servers: Lab) -> None:
    targets = [f"{address} {port}" for address in servers.pod("near")["ips"] for port in (15001, 15006)]
    refused = ["ConnectionRefusedError"] * len(targets)
    assert python(servers, "outsider", CONNECT, *targets).split() == refused
    for pod in ("client", "near"):
        assert python(servers, pod, CONNECT, *targets).split() == refused, pod
    for address in ("127.0.0.1", "::1"):
        assert python(servers, "near", CONNECT, f"{address} 15001", f"{address} 15006").split() == refused[:2]
    node = ["ip", "netns", "exec", f"narrows.{servers.name}.node.n1", "/usr/bin/python3", "-c", CONNECT, *targets]
    assert subprocess.run(node, capture_output=True, text=True, timeout=20, check=True).stdout.split() == refused


def test_an_address_outside_the_mesh_is_passed_through_untouched_and_counted_as_that(servers: Lab) -> None:
    labels = {"source_workload": "client", "destination_service_name": "PassthroughCluster"}
    before = servers.counts(**labels)
    server = ("import socket\ns = socket.create_server(('172.31.0.2', 0)); print(s.getsockname()[1], flush=True)\n"
              "c, a = s.accept(); d = c.recv(99); c.sendall(a[0].encode() + b' ' + d); c.close()")
    with subprocess.Popen(["ip", "netns", "exec", f"narrows.{servers.name}.node.n2", "/usr/bin/python3", "-c", server],
                          stdout=subprocess.PIPE, text=True) as outside:
        assert outside.stdout is not None
        port = outside.stdout.readline().strip()
        client = ("import socket, sys\ns = socket.create_connection(('172.31.0.2', int(sys.argv[1])), 5)\n"
                  "s.sendall(b'\\x00\\xffGET'); print(s.recv(99))")
        assert python(servers, "client", client, port).strip() == repr(
            servers.pod("client")["ip"].encode() + b" \x00\xffGET")
    until(lambda: more(before, servers.counts(**labels)) == {("tcp", "source"): 1}, "one connection passed through")


def test_datagrams_go_their_way_past_us(servers: Lab) -> None:
    script = ("import socket\nfor family in (socket.AF_INET, socket.AF_INET6):\n"
              " a = socket.getaddrinfo('far-both', 9001, family, socket.SOCK_DGRAM)[0][4]\n"
              " s = socket.socket(family, socket.SOCK_DGRAM); s.settimeout(5); s.sendto(b'x' * 1200, a); print(len(s.recv(2000)))")
    before = servers.counts()
    assert python(servers, "client", script).split() == ["1200", "1200"]
    assert more(before, servers.counts()) == {}


def test_five_hundred_connections_at_once_and_two_large_ones_come_back_unharmed(servers: Lab) -> None:
    labels = {"source_workload": "client"}
    before = servers.counts(**labels)
    assert python(servers, "client", ECHO, "500", "20011", "near-both", "far-both") == "500\n"
    assert python(servers, "client", ECHO, "2", "20000003", "near-both", "far-both") == "2\n"
    until(lambda: more(before, servers.counts(**labels)) == {("tcp", "source"): 502, ("tcp", "destination"): 502},
          "every connection counted by both sides")


@pytest.fixture
def near(servers: Lab) -> Iterator[str]:
    """The namespace of the pod `near`, captured as planned again when a test is through with it."""
    yield f"narrows.{servers.name}.pod.default.near"
    until(lambda: verify(servers).returncode == 0, "captured as planned", 30, 0.3)


def verify(lab: Lab) -> subprocess.CompletedProcess[str]:
    return narrows("capture", "verify", "--netns", f"/run/netns/narrows.{lab.name}.pod.default.near",
                   "--instance", f"/run/narrows/lab/{lab.name}/nodes/n1", check=False)


def rules(namespace: str, family: int) -> list[str]:
    done = subprocess.run(["ip", "netns", "exec", namespace, f"ip{'6' if family == 6 else ''}tables-legacy-save"],
                          capture_output=True, text=True, check=True)
    return [line for line in done.stdout.splitlines() if line.startswith("-A NARROWS")]


@pytest.mark.redirects(RULES)
def test_the_printed_plan_is_what_the_kernel_has(servers: Lab, near: str) -> None:
    instance = f"/run/narrows/lab/{servers.name}/nodes/n1"
    for family, address in ((4, "192.0.2.1"), (6, "2001:db8::1")):
        text = narrows("capture", "plan", "--instance", instance, "--pod-ip", address).stdout
        planned = [line for line in text.splitlines() if line.startswith("-A")]
        assert len(planned) > 5
        assert sorted(rules(near, family)) == sorted(planned)


@pytest.mark.redirects(RULES)
def test_rules_that_somebody_flushed_are_put_back_and_the_event_names_the_pod(servers: Lab, near: str) -> None:
    inside = ["ip", "netns", "exec", near]
    (agent,) = servers.processes(f"agent --run-dir /run/narrows/lab/{servers.name}/nodes/n1 ")
    os.kill(agent, signal.SIGSTOP)  # or it may be quicker than we look
    try:
        for argv in (["iptables-legacy", "-t", "nat", "-F"], ["ip6tables-legacy", "-t", "filter", "-F"],
                     ["ip", "rule", "del", "priority", "32764"]):
            subprocess.run([*inside, *argv], check=True, timeout=10)
        wrong = verify(servers)
    finally:
        os.kill(agent, signal.SIGCONT)
    assert wrong.returncode == 1
    for words in ("IPv4 nat", "IPv6 filter", "IPv4 rule 32764"):
        assert words in wrong.stdout
    until(lambda: verify(servers).returncode == 0, "captured as planned again", 30, 0.3)
    assert [line for line in servers.run("events").stdout.splitlines() if "pod default/near: somebody changed" in line]
    assert ask(servers, "client", "near-both:9000")["4 near-both:9000"][0] == "near"


@pytest.mark.redirects(RULES)
def test_clean_removes_every_rule_and_the_agent_puts_them_back(servers: Lab, near: str) -> None:
    (agent,) = servers.processes(f"agent --run-dir /run/narrows/lab/{servers.name}/nodes/n1 ")
    os.kill(agent, signal.SIGSTOP)
    try:
        narrows("capture", "clean", "--netns", f"/run/netns/{near}")
        left = subprocess.run(["ip", "netns", "exec", near, "ip", "rule"], capture_output=True, text=True, check=True).stdout
        assert "0x111" not in left
        assert rules(near, 4) == rules(near, 6) == []
    finally:
        os.kill(agent, signal.SIGCONT)
    until(lambda: verify(servers).returncode == 0, "captured as planned again", 30, 0.3)


def test_a_pod_made_again_under_its_name_gets_the_next_connection(servers: Lab, tmp_path: Path) -> None:
    manifest = servers.manifest("Pod", "near")
    path = tmp_path / "near.yaml"
    path.write_text(json.dumps(manifest))
    seen = {python(servers, "client", ONE_ANSWER, "near-both")}
    for turn in range(3):
        servers.run("delete", "pod/near")
        servers.apply(path)
        assert servers.pod("near")["captured"], turn
        for host in ("near-both", servers.pod("near")["ip"]):
            answer = python(servers, "client", ONE_ANSWER, host)
            assert answer not in seen or host != "near-both", "an answer from a pod that is gone"
            seen.add(answer)
    assert len(seen) == 4, seen


ONE_ANSWER = """
import socket, sys
with socket.create_connection((sys.argv[1], 9000), 5) as plug:
    plug.sendall(b"who\\n"); print(plug.makefile().readline().split()[1])
"""
