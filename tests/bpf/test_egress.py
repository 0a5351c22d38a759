"""Egress captured by socket hooks, with a real worker: what an application sees, and what the kernel says."""
from __future__ import annotations

import socket
from ipaddress import ip_address
from pathlib import Path

import pytest

from agent.model.pod import CaptureSettings
from tests.support import conntrack
from tests.support.egress import Stage
from tests.support.hooks import MANY, digest
from tests.support.mesh import TCP_PORT, VIP, VIP6
from tests.support.wait import until

pytestmark = pytest.mark.netns


@pytest.mark.parametrize("size", [1, 65_537, 16 << 20])
@pytest.mark.parametrize("family", [4, 6])
def test_bytes_arrive_unchanged_through_the_proxy_and_no_connection_is_tracked(stage: Stage, family: int, size: int) -> None:
    stage.capture()
    seen = stage.talk(VIP6 if family == 6 else VIP, size=size)  # routed to nowhere: only the mesh answers there
    own = stage.client.ip6 if family == 6 else stage.client.ip
    assert seen == {"peer": [VIP6 if family == 6 else VIP, TCP_PORT], "own": own}
    assert stage.mesh.origins[1].peers == [own]
    assert stage.taken_out() == 1
    assert conntrack.count(stage.client) == 0
    assert conntrack.count(stage.server) > 0  # what iptables costs, where it captures


@pytest.mark.parametrize("how", ["non-blocking", "fastopen"])
def test_every_way_to_connect_is_captured(stage: Stage, how: str) -> None:
    stage.capture()
    assert stage.talk(VIP, how=how)["peer"] == [VIP, TCP_PORT]
    assert stage.talk(VIP6, how=how)["peer"] == [VIP6, TCP_PORT]
    assert stage.taken_out() == 2


def test_multipath_tcp_does_not_escape(stage: Stage) -> None:
    """The hook sees the subflow's socket, not the application's: which is told the proxy's address as its peer's."""
    if not Path("/proc/sys/net/mptcp").exists():
        with pytest.raises(OSError, match="not supported"):     # this kernel has none, so no application has
            socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_MPTCP)
        return
    stage.capture()
    stage.talk(VIP, how="mptcp")
    stage.talk(VIP6, how="mptcp")
    assert stage.taken_out() == 2


def test_an_ipv6_socket_that_calls_an_ipv4_address_is_captured(stage: Stage) -> None:
    stage.capture()
    assert stage.talk(f"::ffff:{VIP}", family=6) == {"peer": [f"::ffff:{VIP}", TCP_PORT], "own": f"::ffff:{stage.client.ip}"}
    assert stage.mesh.origins[1].peers == [stage.client.ip]
    assert stage.taken_out() == 1


@pytest.mark.parametrize("family", [4, 6])
def test_an_address_outside_the_mesh_is_passed_through_by_the_proxy(stage: Stage, family: int) -> None:
    stage.capture()
    address = stage.other.ip6 if family == 6 else stage.other.ip
    assert stage.talk(address, 9000)["peer"] == [address, 9000]
    assert stage.taken_out() == 1


def test_who_calls_itself_or_loopback_is_not_captured(stage: Stage) -> None:
    stage.capture()
    own = stage.mesh.origin(9100, stage.outside.behaviour, stage.client)
    for address in ("127.0.0.1", "127.9.9.9", "::1", "0.0.0.0", "::", stage.client.ip, stage.client.ip6):
        stage.talk(address, 9100)
    assert len(own.peers) == 7
    assert stage.taken_out() == 0


def test_with_no_listener_a_connect_is_refused_and_does_not_escape(stage: Stage) -> None:
    stage.capture()
    stage.mesh.worker.detach(1)
    until(lambda: stage.attempt(stage.other.ip, 9000) == "ECONNREFUSED", "the listener has gone")
    assert stage.attempt(stage.other.ip6, 9000) == "ECONNREFUSED"
    assert stage.outside.peers == []


@pytest.mark.parametrize("port", [15001, 15006])
def test_the_proxys_ports_are_refused_here_and_in_other_pods(stage: Stage, port: int) -> None:
    """As redirects refuse them, and where somebody does listen on such a port, or only one family is known, too."""
    there = stage.mesh.origin(port, stage.outside.behaviour, stage.other)
    places = [stage.client.ip, stage.client.ip6, "127.0.0.1", "::1", "0.0.0.0", "::", f"::ffff:{stage.client.ip}", stage.server.ip,
              stage.server.ip6, stage.other.ip, stage.other.ip6, f"::ffff:{stage.other.ip}", VIP, "192.0.2.1"]
    stage.capture()
    assert [stage.attempt(place, port) for place in places] == ["ECONNREFUSED"] * len(places)
    assert there.peers == [] and stage.taken_out() == 0
    stage.egress.capture(stage.client.path, stage.app.path, (ip_address(stage.client.ip),), CaptureSettings())
    assert [stage.attempt(place, port) for place in places] == ["ECONNREFUSED"] * len(places)
    stage.capture(exclude_outbound_ports=(port,))
    assert [stage.attempt(place, port) for place in (stage.other.ip, stage.other.ip6, stage.client.ip)] == [
        "connected", "connected", "ECONNREFUSED"], "what is excluded is not the proxy's business, but its own listener is nobody's"
    stage.talk(VIP)


def test_udp_is_left_alone(stage: Stage) -> None:
    stage.capture()
    code = """if True:
        import socket, sys
        s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        s.connect((sys.argv[1], 9000))
        print(*s.getpeername())"""
    assert stage.app.python(stage.client, code, stage.other.ip) == f"{stage.other.ip} 9000"


def test_one_socket_may_connect_again_to_somewhere_else(stage: Stage) -> None:
    """After a failure, and after it was disconnected (AF_UNSPEC): each time as a new one would."""
    stage.capture(exclude_outbound_ports=(9001,))
    code = """if True:
        import ctypes, socket, struct, sys
        vip, port, other = sys.argv[1], int(sys.argv[2]), sys.argv[3]
        libc = ctypes.CDLL(None, use_errno=True)
        s = socket.socket()
        s.settimeout(10)
        def again(address, port):
            assert libc.connect(s.fileno(), struct.pack("=HHIQ", 0, 0, 0, 0), 16) == 0
            s.connect((address, port))
            s.sendall(b"x")
            assert s.recv(1) == b"x"
            return s.getpeername()
        try:
            s.connect((other, 9001))
        except ConnectionRefusedError:
            print("refused")
        print(*again(vip, port))
        print(*again(other, 9000))
        print(*again("127.0.0.1", 9100))"""
    stage.mesh.origin(9100, stage.outside.behaviour, stage.client)
    said = stage.app.python(stage.client, code, VIP, str(TCP_PORT), stage.other.ip).splitlines()
    assert said == ["refused", f"{VIP} {TCP_PORT}", f"{stage.other.ip} 9000", "127.0.0.1 9100"]


def test_a_name_with_several_addresses_is_reached_by_one_that_answers(stage: Stage) -> None:
    """As clients do it: one after the other, until a connection stands. The first is outside of capture, and refuses."""
    stage.capture()
    code = """if True:
        import socket, sys
        def resolve(*_):
            port = int(sys.argv[1])
            return [(socket.AF_INET, 1, 6, "", ("127.0.0.1", port)), (socket.AF_INET6, 1, 6, "", (sys.argv[2], port))]
        socket.getaddrinfo = resolve
        print(socket.create_connection(("name", 1), timeout=10).getpeername()[0])"""
    assert stage.app.python(stage.client, code, str(TCP_PORT), VIP6) == VIP6


def test_many_connections_at_once_each_reach_what_they_dialled(stage: Stage) -> None:
    """Two destinations that answer differently: an original that was mixed up would be heard."""
    stage.capture()
    stage.mesh.origin(9002, digest, stage.other)
    assert stage.app.python(stage.client, MANY, "50", f"{VIP} {TCP_PORT}", f"{stage.other.ip} 9002", timeout=300) == "[]"
    assert stage.taken_out() == 800
    assert conntrack.count(stage.client) == 0
