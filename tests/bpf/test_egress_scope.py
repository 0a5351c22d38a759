"""What egress capture takes and what it leaves: ports, ranges, cgroups, namespaces; and how that changes while a pod lives."""
from __future__ import annotations

import os
import socket
import subprocess
import sys
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest

from agent import netlink
from agent.capture.egress import LAYOUT, Egress, EgressError, netns_cookie
from agent.capture.loader import load
from agent.capture.pins import pins_of
from agent.model.pod import CaptureSettings
from tests.support.cgroup import Cgroups
from tests.support.egress import Stage
from tests.support.mesh import TCP_PORT, VIP
from tests.support.wait import until

pytestmark = pytest.mark.netns


def via_proxy(stage: Stage, address: str, port: int) -> bool:
    """Whether a connection from the pod is captured; it arrives in any case."""
    before = stage.taken_out()
    stage.talk(address, port)
    return stage.taken_out() > before


def test_an_excluded_port_is_reached_directly(stage: Stage) -> None:
    stage.mesh.origin(9001, stage.outside.behaviour, stage.other)
    stage.capture(exclude_outbound_ports=(9000,))
    for address in (stage.other.ip, stage.other.ip6):
        assert not via_proxy(stage, address, 9000)
        assert via_proxy(stage, address, 9001)


@pytest.mark.parametrize("family", [4, 6])
def test_an_excluded_range_is_reached_directly(stage: Stage, family: int) -> None:
    address = stage.other.ip6 if family == 6 else stage.other.ip
    one = ip_network(address)
    stage.capture(exclude_outbound_ranges=(one,))
    assert not via_proxy(stage, address, 9000)
    stage.capture(exclude_outbound_ranges=(one.supernet(8),))
    assert not via_proxy(stage, address, 9000)
    stage.capture(exclude_outbound_ranges=(ip_network("198.18.0.0/15"), ip_network("2001:db8::/32")))
    assert via_proxy(stage, address, 9000)


def test_only_included_ranges_are_captured_and_an_exclusion_comes_first(stage: Stage) -> None:
    everything, one = ip_network("0.0.0.0/0"), ip_network(stage.other.ip)
    stage.capture(include_outbound_ranges=(one,))
    assert via_proxy(stage, stage.other.ip, 9000)
    assert not via_proxy(stage, stage.other.ip6, 9000)
    stage.capture(include_outbound_ranges=(one,), exclude_outbound_ranges=(everything,))
    assert not via_proxy(stage, stage.other.ip, 9000)
    stage.capture(include_outbound_ranges=())
    assert not via_proxy(stage, stage.other.ip, 9000)
    stage.capture()
    assert via_proxy(stage, stage.other.ip6, 9000)


@pytest.mark.parametrize("known", [4, 6])
def test_a_family_without_an_address_is_refused_and_never_passes_by_the_proxy(stage: Stage, known: int) -> None:
    def capture(**settings: Any) -> None:
        own = stage.client.ip if known == 4 else stage.client.ip6
        stage.egress.capture(stage.client.path, stage.app.path, (ip_address(own),), CaptureSettings(**settings))

    capture()
    there, canary = (stage.other.ip, stage.other.ip6) if known == 4 else (stage.other.ip6, stage.other.ip)
    dialled = [canary] if known == 4 else [canary, f"::ffff:{canary}"]
    assert via_proxy(stage, there, 9000)
    before = stage.taken_out(), len(stage.outside.peers)
    assert [stage.attempt(address, 9000) for address in dialled] == ["EPERM"] * len(dialled)
    for address in dialled:
        with pytest.raises(AssertionError, match="PermissionError"):
            stage.talk(address, 9000, how="fastopen")
    assert (stage.taken_out(), len(stage.outside.peers)) == before
    capture(exclude_outbound_ports=(9000,))
    assert [via_proxy(stage, address, 9000) for address in dialled] == [False] * len(dialled)
    capture(exclude_outbound_ranges=(ip_network(canary),))
    assert [via_proxy(stage, address, 9000) for address in dialled] == [False] * len(dialled)
    capture(include_outbound_ranges=(ip_network(there),))
    assert [via_proxy(stage, address, 9000) for address in dialled] == [False] * len(dialled)
    capture(include_outbound_ranges=(ip_network(canary),))
    assert [stage.attempt(address, 9000) for address in dialled] == ["EPERM"] * len(dialled)


@pytest.mark.parametrize("known", [4, 6])
def test_what_stays_inside_and_what_is_no_tcp_is_not_refused_in_a_family_without_an_address(stage: Stage, known: int) -> None:
    own = stage.client.ip if known == 4 else stage.client.ip6
    stage.egress.capture(stage.client.path, stage.app.path, (ip_address(own),), CaptureSettings())
    stage.mesh.origin(9002, stage.outside.behaviour, stage.client)
    for address in ("127.0.0.1", "::1", "0.0.0.0", "::", "::ffff:127.0.0.1", own):
        stage.talk(address, 9002)
    code = """if True:
        import socket, sys
        with socket.socket(socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET, socket.SOCK_DGRAM) as s:
            s.settimeout(20)
            s.connect((sys.argv[1], 9003))
            s.send(b"question")
            print(s.recv(100).decode())"""
    for place in (stage.other.ip, stage.other.ip6):
        family = socket.AF_INET6 if ":" in place else socket.AF_INET
        with netlink.in_netns(stage.other.path, lambda family=family: socket.socket(family, socket.SOCK_DGRAM)) as server:
            server.bind((place, 9003))
            server.settimeout(20)
            asking = stage.app.start(stage.client, sys.executable, "-c", code, place, stdout=subprocess.PIPE, text=True)
            server.sendto(b"answer", server.recvfrom(100)[1])
            assert asking.communicate(timeout=20)[0] == "answer\n"
    assert stage.taken_out() == 0


def test_a_process_of_another_cgroup_in_the_pods_namespace_is_not_captured(stage: Stage, cgroups: Cgroups) -> None:
    stage.capture()
    stage.talk(stage.other.ip, 9000, cgroup=cgroups.make("debug"))
    assert stage.taken_out() == 0


def test_a_process_of_the_pods_cgroup_in_another_namespace_is_not_captured(stage: Stage) -> None:
    stage.capture()
    stage.talk(stage.server.ip, 8080, netns=stage.other)
    assert stage.taken_out() == 0


def test_a_container_of_the_pod_in_a_cgroup_below_is_captured(stage: Stage) -> None:
    stage.capture()
    below = f"{stage.app.path}/container"
    os.mkdir(below)
    code = "import socket, sys; print(socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=10).getpeername()[0])"
    done = subprocess.run(["sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', below, "nsenter", f"--net={stage.client.path}", "--",
                           sys.executable, "-c", code, VIP, str(TCP_PORT)], capture_output=True, text=True, timeout=60, check=False)
    until(lambda: "populated 0" in Path(below, "cgroup.events").read_text(), "the container has ended")
    os.rmdir(below)
    assert done.stdout.strip() == VIP, done.stderr


def test_a_pod_that_is_released_connects_directly_and_its_open_connection_goes_on(stage: Stage) -> None:
    stage.capture()
    code = """if True:
        import socket, sys
        s = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=30)
        for line in sys.stdin:
            s.sendall(line.encode())
            print(s.recv(100).decode().strip(), *s.getpeername(), flush=True)"""
    talker = stage.app.start(stage.client, sys.executable, "-c", code, VIP, str(TCP_PORT), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                             text=True)
    assert talker.stdin is not None and talker.stdout is not None
    try:
        talker.stdin.write("one\n")
        talker.stdin.flush()
        assert talker.stdout.readline() == f"one {VIP} {TCP_PORT}\n"
        stage.egress.release(netns_cookie(stage.client.path), stage.app.id)
        stage.talk(stage.other.ip, 9000)
        assert stage.taken_out() == 1
        talker.stdin.write("two\n")
        talker.stdin.flush()
        assert talker.stdout.readline().startswith("two ")
    finally:
        talker.stdin.close()
        talker.wait(20)
        talker.stdout.close()
    assert list(stage.pins.links.glob(f"{stage.app.id}_*")) == []
    assert stage.egress.captured() == []
    stage.egress.release(netns_cookie(stage.client.path), stage.app.id)  # again: nothing to do


def test_capture_begins_anew_after_a_release(stage: Stage) -> None:
    for _ in range(2):
        stage.capture(exclude_outbound_ports=(9001,))
        assert via_proxy(stage, stage.other.ip, 9000)
        stage.egress.release(netns_cookie(stage.client.path), stage.app.id)
        assert not via_proxy(stage, stage.other.ip, 9000)


def test_a_cgroup_that_was_removed_leaves_pins_that_can_be_taken_away(stage: Stage, cgroups: Cgroups) -> None:
    gone = cgroups.make("gone")
    stage.egress.capture(stage.other.path, gone.path, (ip_address(stage.other.ip),), CaptureSettings())
    number, cookie = gone.id, netns_cookie(stage.other.path)
    gone.remove()
    assert list(stage.pins.links.glob(f"{number}_*"))
    stage.egress.release(cookie, number)
    assert not list(stage.pins.links.glob(f"{number}_*"))


def test_what_is_no_cgroup_is_refused_and_said(stage: Stage) -> None:
    stage.app.path, path = "/tmp", stage.app.path
    with pytest.raises(EgressError, match=r"cgroup /tmp: sockops: .*only cgroup v2 has these hooks"):
        stage.capture()
    stage.app.path = "/none"
    with pytest.raises(EgressError, match=r"cgroup /none: No such file.*must be a directory of cgroup v2"):
        stage.capture()
    stage.app.path = path
    assert stage.egress.captured() == []


def test_two_instances_on_one_cgroup_do_not_disturb_each_other(stage: Stage, cache: Path) -> None:
    """Another program on the same hooks, linked first; its maps know nothing of this pod."""
    other = pins_of(stage.pins.root.parents[2], "other", LAYOUT)
    load(other, cache)
    Egress(other).capture(stage.other.path, stage.app.path, (ip_address(stage.other.ip),), CaptureSettings())
    stage.capture()
    for address in (stage.other.ip, stage.other.ip6):
        assert via_proxy(stage, address, 9000)
    other.remove()
    assert via_proxy(stage, stage.other.ip, 9000)


def test_an_application_may_not_set_our_mark_and_any_other(stage: Stage) -> None:
    stage.capture()
    code = """if True:
        import errno, socket
        for mark in (0x539, 0x1539, 0x538, 0x111):
            with socket.socket() as s:
                try:
                    s.setsockopt(socket.SOL_SOCKET, 36, mark)
                    print(hex(mark), s.getsockopt(socket.SOL_SOCKET, 36) == mark)
                except OSError as error:
                    print(hex(mark), errno.errorcode[error.errno])"""
    assert stage.app.python(stage.client, code).splitlines() == ["0x539 EPERM", "0x1539 EPERM", "0x538 True", "0x111 True"]
    with socket.socket() as ours:  # of the proxy's cgroup
        ours.setsockopt(socket.SOL_SOCKET, 36, 0x539)
        assert ours.getsockopt(socket.SOL_SOCKET, 36) == 0x539


def test_options_longer_than_a_page_pass_both_hooks(stage: Stage) -> None:
    """iptables writes and reads its tables by them."""
    stage.capture()
    rules = "".join(f"-A INPUT -s 198.18.0.{number} -j ACCEPT\n" for number in range(100))
    for cgroup in (stage.app, stage.proxy):  # setsockopt's hook, getsockopt's hook
        done = cgroup.run(stage.client, "iptables-legacy-restore", input=f"*filter\n{rules}COMMIT\n")
        assert done.returncode == 0, done.stderr
        done = cgroup.run(stage.client, "iptables-legacy-save")
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("-j ACCEPT") == 100
