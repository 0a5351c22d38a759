"""Connections to a pod captured by sk_lookup, with a real worker: what both ends see, and what the kernel says."""
from __future__ import annotations

import socket
import struct
from pathlib import Path

import pytest

from agent import netlink
from agent.capture import bpf_call
from agent.capture.egress import NETNS_KEY
from agent.capture.ingress import FWMARK_ACCEPT, INSIDE_VALUE
from tests.support import conntrack
from tests.support.hooks import MANY, digest
from tests.support.ingress import Inward
from tests.support.mesh import receive, receive_all
from tests.support.netns import Netns
from tests.support.wait import until

pytestmark = pytest.mark.netns


@pytest.mark.parametrize("size", [1, 65_537, 16 << 20])
@pytest.mark.parametrize("family", [4, 6])
def test_bytes_arrive_unchanged_with_the_clients_address_and_no_connection_is_tracked(inward: Inward, family: int, size: int) -> None:
    inward.capture()
    address, own = (inward.server.ip6, inward.client.ip6) if family == 6 else (inward.server.ip, inward.client.ip)
    assert inward.talk(address, size=size) == {"peer": [address, 8080], "own": own}
    assert inward.own.peers == [own]
    assert inward.taken_in() == 1
    assert conntrack.count(inward.server) == 0


@pytest.mark.parametrize(("where", "families"), [("0.0.0.0", (4,)), ("::", (4, 6)), ("pod's", (4,)), ("pod's IPv6", (6,))])
def test_an_application_is_reached_however_it_is_bound(inward: Inward, where: str, families: tuple[int, ...]) -> None:
    inward.capture()
    place = {"pod's": inward.server.ip, "pod's IPv6": inward.server.ip6}.get(where, where)
    with inward.app.visited():
        listener = netlink.in_netns(inward.server.path, lambda: socket.create_server(
            (place, 9001), family=socket.AF_INET6 if ":" in place else socket.AF_INET, dualstack_ipv6=place == "::"))
    with listener:
        listener.settimeout(20)
        for family in families:
            address = inward.server.ip6 if family == 6 else inward.server.ip
            with inward.mesh.dial(address, 9001, inward.client) as dialled:
                taken, peer = listener.accept()
                with taken:
                    assert peer[0].removeprefix("::ffff:") == (inward.client.ip6 if family == 6 else inward.client.ip)
                    assert taken.getsockname()[0].removeprefix("::ffff:") == address
                    dialled.sendall(b"question")
                    assert receive(taken, 8) == b"question"
                    taken.sendall(b"answer")
                    assert receive(dialled, 6) == b"answer"
    assert inward.taken_in() == len(families)


def test_an_application_on_loopback_alone_stays_out_of_reach(inward: Inward) -> None:
    inward.capture()
    with netlink.in_netns(inward.server.path, lambda: socket.create_server(("127.0.0.1", 9001))):
        with pytest.raises(ConnectionResetError):  # within connect(2), even: the refusal is that quick
            receive_all(inward.mesh.dial(inward.server.ip, 9001, inward.client))
        assert inward.talk(inward.server.ip)  # and the pod goes on


def test_who_listens_on_any_address_gets_no_udp_through_us(inward: Inward) -> None:
    inward.capture()
    with netlink.in_netns(inward.server.path, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as there, \
            netlink.in_netns(inward.client.path, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as here:
        there.bind(("0.0.0.0", 8080))
        there.settimeout(20)
        here.sendto(b"x", (inward.server.ip, 8080))
        data, peer = there.recvfrom(10)
        assert (data, peer[0]) == (b"x", inward.client.ip)
    assert inward.taken_in() == 0


def test_what_a_pod_dials_at_itself_is_not_captured(inward: Inward) -> None:
    inward.capture()
    netlink.add_address(inward.server.path, "eth0", "10.244.1.200/24")
    for address in ("127.0.0.1", "127.9.9.9", "::1", "0.0.0.0", "::", inward.server.ip, inward.server.ip6, "10.244.1.200"):
        inward.talk(address, netns=inward.server)
    bound = netlink.in_netns(inward.server.path, lambda: socket.create_connection(
        ("10.244.1.200", 8080), timeout=20, source_address=(inward.server.ip, 0)))
    with bound:
        bound.sendall(b"x")
        assert receive(bound, 1) == b"x"
    assert inward.taken_in() == 0
    assert inward.via_proxy("10.244.1.200", 8080)  # from outside it is


def test_a_link_local_client_is_captured_and_its_address_ends_at_its_link(inward: Inward) -> None:
    """As with rules: a last hop cannot have an address that means something on another link alone."""
    inward.capture()

    def link_local(netns: Netns) -> str:
        return next((one["local"] for link in netns.ip_json("-6", "addr", "show", "dev", "eth0") for one in link["addr_info"]
                     if one["scope"] == "link" and not one.get("tentative")), "")

    place = until(lambda: link_local(inward.server), "duplicate addresses were looked for")
    until(lambda: link_local(inward.client), "the client's too")
    with inward.mesh.dial(f"{place}%eth0", 8080, inward.client) as one:
        one.sendall(b"x")
        assert receive(one, 1) == b"x"
    assert inward.taken_in() == 1
    assert inward.own.peers == [place]  # the pod's own: the proxy dialled without a source


@pytest.mark.parametrize("address", ["ip", "ip6"])
def test_the_proxys_ports_lead_nowhere_and_tunnels_to_their_listener(inward: Inward, address: str) -> None:
    inward.capture()
    place = getattr(inward.server, address)
    for port in (15001, 15006):
        assert inward.attempt(place, port) == "ECONNREFUSED"
    assert inward.attempt(place, 15006, inward.server) == "ECONNREFUSED"
    assert inward.attempt(place, 15008) in ("connected", "ECONNRESET")  # by who expects TLS there
    assert inward.own.peers == []


@pytest.mark.parametrize("address", ["ip", "ip6"])
def test_without_a_listener_a_connection_is_refused_and_does_not_reach_the_application(inward: Inward, address: str) -> None:
    inward.capture()
    place = getattr(inward.server, address)
    inward.mesh.worker.detach(2)
    until(lambda: inward.attempt(place, 8080) == "ECONNREFUSED", "the listener has gone")
    assert inward.own.peers == []
    inward.mesh.attach_one(2)  # nobody told anybody
    assert inward.via_proxy(place, 8080)


def test_what_is_connected_before_capture_and_after_it_goes_on(inward: Inward) -> None:
    with inward.mesh.dial(inward.server.ip, 8080, inward.client) as before:
        inward.capture()
        assert inward.taken_in() == 0
        with inward.mesh.dial(inward.server.ip, 8080, inward.client) as captured:
            for one in (before, captured):
                one.sendall(b"x")
                assert receive(one, 1) == b"x"
            assert inward.taken_in() == 1
            inward.ingress.release(inward.ingress.captured()[0], inward.server.path)
            for one in (before, captured):
                one.sendall(b"y" * 100_000)
                assert receive(one, 100_000) == b"y" * 100_000
    assert not inward.via_proxy(inward.server.ip, 8080)
    assert netlink.read_sysctl(inward.server.path, FWMARK_ACCEPT) == "0"


@pytest.mark.parametrize("address", ["ip", "ip6"])
def test_no_last_hop_has_the_numbers_of_a_live_connection_of_its_client(inward: Inward, address: str) -> None:
    """The ports that are next are the client's own; the kernel would give the SYN to the connection that has them."""
    ports: list[int] = []

    def tell(connection: socket.socket) -> None:
        ports.append(connection.getpeername()[1])
        connection.sendall(connection.recv(1))
        connection.recv(1)

    cookie = inward.capture()
    inward.mesh.origin(9001, tell, inward.server)
    place, mine = getattr(inward.server, address), getattr(inward.client, address)
    # seven turns from the first of each lane on are taken, and the eighth try is free
    firsts, wide = [20_000 + lane * 12_288 for lane in range(4)], 7
    held = []
    for port in (first + at for first in firsts for at in range(wide)):
        held.append(netlink.in_netns(inward.client.path, lambda port=port: socket.create_connection(  # type: ignore[misc]
            (place, 9001), timeout=20, source_address=(mine, port))))
        held[-1].sendall(b"x")
        assert receive(held[-1], 1) == b"x"
    with bpf_call.opened(inward.pins.maps / "inbound") as inbound:
        raw = bpf_call.lookup(inbound, NETNS_KEY.pack(cookie), INSIDE_VALUE.size)
        assert raw is not None
        value = list(INSIDE_VALUE.unpack(raw))
        value[3] = firsts[0] - 16_384 - 1
        bpf_call.update(inbound, NETNS_KEY.pack(cookie), INSIDE_VALUE.pack(*value))
    with inward.mesh.dial(place, 9001, inward.client) as one:
        one.sendall(b"x")
        assert receive(one, 1) == b"x"
    assert ports[-1] - wide in firsts
    for one in held:
        one.sendall(b"x")
        one.close()


def test_many_connections_at_once_each_reach_what_they_dialled(inward: Inward) -> None:
    """Two applications that answer differently, both families: an original that was mixed up would be heard."""
    inward.capture()
    inward.mesh.origin(9002, digest, inward.server)
    places = [f"{address} {port}" for address in (inward.server.ip, inward.server.ip6) for port in (8080, 9002)]
    assert inward.client.python(MANY, "130", *places, timeout=300).stdout.strip() == "[]"
    assert inward.taken_in() == 16 * 130
    assert conntrack.count(inward.server) == 0


def test_a_client_that_resets_and_one_that_dials_again_from_its_port_are_served(inward: Inward) -> None:
    inward.capture()
    for _ in range(30):
        one = netlink.in_netns(inward.client.path, socket.socket)
        with one:
            one.settimeout(20)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 0))
            one.bind((inward.client.ip, 45_000))
            one.connect((inward.server.ip, 8080))
            one.sendall(b"x")
            assert receive(one, 1) == b"x"
    assert inward.taken_in() == 30


def test_nothing_about_the_listener_can_be_claimed_from_inside_the_pod(inward: Inward) -> None:
    """An application that listens on 15006 while the proxy does not is not given what comes in."""
    inward.capture()
    inward.mesh.worker.detach(2)
    until(lambda: inward.attempt(inward.server.ip, 8080) == "ECONNREFUSED", "the listener has gone")
    with inward.app.visited():
        claimed = netlink.in_netns(inward.server.path, lambda: socket.create_server(("0.0.0.0", 15006)))
    with claimed:
        assert inward.attempt(inward.server.ip, 8080) == "ECONNREFUSED"
        assert inward.attempt(inward.server.ip, 15006) == "ECONNREFUSED"
    assert Path(inward.pins.maps / "listeners").exists()
    assert inward.own.peers == []


@pytest.mark.parametrize("address", ["ip", "ip6"])
def test_a_port_that_nobody_listens_on_is_refused_to_the_proxy_at_once(inward: Inward, address: str) -> None:
    """The refusal is the kernel's, without a socket that would have our mark."""
    inward.capture()
    with pytest.raises(ConnectionResetError):  # within connect(2), even
        inward.mesh.dial(getattr(inward.server, address), 8081, inward.client).recv(1)
    record = inward.mesh.worker.record()
    assert (record["reporter"], record["flag"], record["failure"]) == ("destination", "UF", "delayed_connect_error:_Connection_refused")
