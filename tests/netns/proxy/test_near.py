"""Connections between two pods of one worker: one hop less on the wire, and everything else as with two."""
from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import replace
from ipaddress import ip_address

import pytest

from agent import netlink
from agent.dataplane import blobs
from agent.model.policy import Action
from agent.model.settings import ProxySettings
from agent.model.workload import Protocol, Tunnel, spiffe
from tests.netns.proxy.near import BOTH, CLIENT_ID, counted, hops, opened, put, put_pod, records, start, talks
from tests.support.mesh import (
    AUTO_PORT,
    CLIENT,
    CUT,
    HTTP_PORT,
    SCOPE,
    SERVER,
    SERVICE_INDEX,
    TCP_PORT,
    VIP,
    VIP6,
    Mesh,
    Web,
    ask_what_is_cut,
    echo,
    read_message,
    receive,
    receive_all,
    request,
    response,
    workload,
)
from tests.support.policies import EMPTY, rule
from tests.support.wait import until

pytestmark = pytest.mark.netns

# ---- it is one connection, and it says who it is from ----------------------------------------------------------------

@pytest.mark.parametrize("address", [VIP, VIP6])
@pytest.mark.parametrize("port", [TCP_PORT, AUTO_PORT])
def test_tcp_goes_straight_into_the_destinations_namespace(mesh: Mesh, address: str, port: int) -> None:
    start(mesh, Protocol.TCP)
    origin = mesh.origin(8080, echo)
    connection = mesh.dial(address, port)
    connection.sendall(b"hello")
    assert receive(connection, 5) == b"hello"
    client, server = mesh.pods.client, mesh.pods.server
    assert origin.peers == [client.ip6 if address == VIP6 else client.ip]
    assert hops(mesh, server) == [] and hops(mesh, client) == []
    seen = server.run("ss", "-Htn", "state", "established", "sport = :8080").stdout.splitlines()
    assert len(seen) == 1, "the application has one connection"
    connection.close()
    until(lambda: origin.open == 0, "the end came through")
    source, = [one for one in records(mesh, 2) if one["reporter"] == "source"]
    assert (source["flag"], source["source"], source["destination"]) == ("-", CLIENT, SERVER)
    for field, value in (("opened", 1), ("closed", 1), ("sent", 5), ("received", 5)):
        assert counted(mesh, field) == dict.fromkeys(BOTH, value), field
    mesh.quiet()


@pytest.mark.parametrize("address", [VIP, VIP6])
def test_http_does_too_request_after_request(mesh: Mesh, address: str) -> None:
    start(mesh)
    web = Web(response(b"one"), response(b"two"))
    origin = mesh.origin(8080, web)
    connection = mesh.dial(address)
    for body in (b"one", b"two"):
        connection.sendall(request("/x", method="POST", body=b"question"))
        assert read_message(connection).body == body
    assert [one.body for one in web.seen] == [b"question"] * 2
    client, server = mesh.pods.client, mesh.pods.server
    assert origin.peers == [client.ip6 if address == VIP6 else client.ip] and hops(mesh, server) == []
    told = records(mesh, 4)
    assert [one["reporter"] for one in told] == ["destination"] * 2 + ["source"] * 2
    assert {(one["source"], one["destination"], one["code"], one["received"]) for one in told} == {(CLIENT, SERVER, 200, 8)}
    assert counted(mesh, "closed") == dict.fromkeys(BOTH, 2)
    connection.close()
    mesh.quiet()


def test_a_pod_is_reached_by_its_own_address_too(mesh: Mesh) -> None:
    start(mesh, Protocol.TCP)
    origin = mesh.origin(8080, echo)
    for address in (mesh.pods.server.ip, mesh.pods.server.ip6):
        opened(mesh, address, 8080)
        assert hops(mesh, mesh.pods.server) == []
    assert origin.peers == [mesh.pods.client.ip, mesh.pods.client.ip6]


def test_a_workload_that_takes_tunnels_is_reached_without_one(mesh: Mesh) -> None:
    """No key, no certificate is there: a tunnel could not be made."""
    start(mesh, Protocol.TCP, tunnel=Tunnel.HBONE)
    mesh.origin(8080, echo)
    assert talks(mesh)
    assert {(one["reporter"], one["flag"]) for one in records(mesh, 2)} == {("source", "-"), ("destination", "-")}


def test_bytes_of_any_size_pass_whole_both_ways_at_once(mesh: Mesh) -> None:
    start(mesh, Protocol.TCP)
    total = 48 << 20
    pattern = bytes(range(251)) * 261

    def send(connection: socket.socket) -> None:
        left = total
        while left > 0:
            connection.sendall(pattern[:left])
            left -= min(left, len(pattern))
        connection.shutdown(socket.SHUT_WR)

    def look(connection: socket.socket) -> int:
        at = 0
        while data := connection.recv(262_144):
            assert data == (pattern * 6)[at % 251:at % 251 + len(data)], f"other bytes at {at}"
            at += len(data)
        return at

    def server(connection: socket.socket) -> None:
        sender = threading.Thread(target=send, args=(connection,))
        sender.start()
        assert look(connection) == total
        sender.join()

    mesh.origin(8080, server)
    connection = mesh.dial(port=TCP_PORT)
    connection.settimeout(60)
    sender = threading.Thread(target=send, args=(connection,))
    sender.start()
    assert look(connection) == total
    sender.join()
    mesh.quiet()
    assert counted(mesh, "sent") == counted(mesh, "received") == dict.fromkeys(BOTH, total)


def test_each_side_ends_for_itself_and_a_server_may_speak_first(mesh: Mesh) -> None:
    start(mesh, Protocol.TCP)

    def server(connection: socket.socket) -> None:
        connection.sendall(b"220 ready\r\n")
        connection.sendall(receive_all(connection)[::-1])

    mesh.origin(8080, server)
    for port in (TCP_PORT, AUTO_PORT):
        connection = mesh.dial(port=port)
        assert receive(connection, 11) == b"220 ready\r\n"
        connection.sendall(b"abc" * 50_000)
        connection.shutdown(socket.SHUT_WR)
        assert receive_all(connection) == b"cba" * 50_000
    mesh.quiet()


def test_a_reset_is_passed_on_both_ways(mesh: Mesh) -> None:
    start(mesh, Protocol.TCP)
    seen: list[str] = []

    def server(connection: socket.socket) -> None:
        try:
            while data := connection.recv(100):
                if data == b"reset":
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    return
                connection.sendall(data)
        except ConnectionResetError:
            seen.append("reset")

    mesh.origin(8080, server)
    connection = opened(mesh)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
    until(lambda: seen == ["reset"], "the server sees the client's reset")
    connection = opened(mesh)
    connection.sendall(b"reset")
    with pytest.raises(ConnectionResetError):
        connection.recv(1)
    mesh.quiet()


def test_an_answer_that_is_cut_arrives_as_far_as_it_came(mesh: Mesh) -> None:
    start(mesh)
    assert ask_what_is_cut(mesh) == CUT
    assert [(one["code"], one["flag"]) for one in records(mesh, 2)] == [(200, "UC")] * 2
    mesh.quiet()


def test_a_reader_that_sleeps_stops_the_writer(mesh: Mesh) -> None:
    start(mesh, Protocol.TCP)
    awake = threading.Event()

    def server(connection: socket.socket) -> None:
        assert awake.wait(60)
        total = 0
        while data := connection.recv(1 << 20):
            total += len(data)
        connection.sendall(str(total).encode())

    mesh.origin(8080, server)
    connection = mesh.dial(port=TCP_PORT)
    connection.settimeout(2)  # nothing for so long: stopped
    sent = 0
    with pytest.raises(TimeoutError):
        while sent < 1 << 30:
            sent += connection.send(bytes(1 << 18))
    assert mesh.worker.header["buffered_bytes"] < 2 << 20
    awake.set()
    connection.settimeout(20)
    connection.shutdown(socket.SHUT_WR)
    assert receive_all(connection) == str(sent).encode()
    mesh.quiet()


# ---- what is not known for certain takes the other way ---------------------------------------------------------------

def passed(mesh: Mesh) -> bool:
    """Whether a connection of now goes through 15006."""
    connection = opened(mesh)
    found = hops(mesh, mesh.pods.server)
    connection.close()
    return found != []


def test_an_excluded_port_is_nobodys_business(mesh: Mesh) -> None:
    """The pod's rules do not exclude it here, so that its listener still shows who came; the worker alone was told."""
    start(mesh, Protocol.TCP, excluded=(9999, 8080))
    mesh.origin(8080, echo)
    assert passed(mesh)


@pytest.mark.parametrize("changed", [
    lambda mesh: put_pod(mesh, SERVER, excluded=None),
    lambda mesh: blobs.put_pod("pod-w-client", CLIENT, "w-client", SCOPE, (ip_address("10.1.1.1"),), CLIENT_ID, ()),
    lambda mesh: blobs.put_settings(ProxySettings(same_node_tunnel=True)),
], ids=["it leaves", "an address that is not the client's", "the setting"])
def test_the_other_way(mesh: Mesh, changed: Callable[[Mesh], blobs.Entry]) -> None:
    start(mesh, Protocol.TCP)
    mesh.origin(8080, echo)
    assert not passed(mesh)
    mesh.worker.commit(changed(mesh))
    assert passed(mesh)


def test_a_pod_that_nobody_told_of_is_closed(mesh: Mesh) -> None:
    start(mesh, Protocol.TCP)
    origin = mesh.origin(8080, echo)
    mesh.worker.commit(blobs.Delete(blobs.Kind.POD, "pod-w-server"))
    assert not talks(mesh) and origin.peers == []


def test_an_unknown_workload_is_never_reached_past_its_policies(mesh: Mesh) -> None:
    start(mesh, Protocol.TCP)
    mesh.settings(hold_timeout_ms=300)
    origin = mesh.origin(8080, echo)
    mesh.worker.commit(blobs.Delete(blobs.Kind.WORKLOAD, "w-server"))
    assert not talks(mesh, mesh.pods.server.ip, 8080)
    assert origin.peers == []


def test_a_pod_that_another_identity_is_expected_of_is_not_reached_directly(mesh: Mesh) -> None:
    start(mesh, Protocol.TCP)
    mesh.origin(8080, echo)
    impostor = replace(workload("w-impostor", mesh.pods.server), tunnel=Tunnel.HBONE, service_account="admin")
    mesh.worker.commit(blobs.put_workload(9, impostor, lambda _: SERVICE_INDEX))
    assert not talks(mesh, mesh.pods.server.ip, 8080), "no tunnel can be made, and nothing else will do"


def test_a_full_destination_takes_new_ones_through_its_backlog(mesh: Mesh) -> None:
    start(mesh, Protocol.TCP)
    mesh.origin(8080, echo)
    mesh.settings(connections_per_pod=4, hold_timeout_ms=30_000)
    held = [opened(mesh) for _ in range(3)]
    late = mesh.dial(port=TCP_PORT)
    late.sendall(b"y")
    held[0].close()
    assert receive(late, 1) == b"y"
    for connection in [*held, late]:
        connection.close()
    mesh.quiet()


# ---- pools -----------------------------------------------------------------------------------------------------------

def test_addresses_and_identities_do_not_meet_in_a_pool(mesh: Mesh) -> None:
    """One request each, one after the other, so that the kept connection of the one before is there to be taken."""
    start(mesh)
    origin = mesh.origin(8080, Web())
    client = mesh.pods.client

    def ask(bound: str) -> None:
        connection = netlink.in_netns(client.path, lambda: socket.create_connection((VIP, HTTP_PORT), 10, (bound, 0)))
        connection.sendall(request())
        assert read_message(connection).status == 200
        connection.close()

    second = client.ip.rsplit(".", 1)[0] + ".77"
    client.run("ip", "address", "add", f"{second}/32", "dev", "lo")
    try:
        addresses = (ip_address(client.ip), ip_address(client.ip6), ip_address(second))
        mesh.worker.commit(blobs.put_pod("pod-w-client", CLIENT, "w-client", SCOPE, addresses, CLIENT_ID, ()))
        for bound in (client.ip, second, client.ip, second):
            ask(bound)
        assert origin.peers == [client.ip, second]
        mesh.worker.commit(put(Action.ALLOW, rule(principals=["cluster.local/ns/default/sa/*"])))
        other = spiffe("cluster.local", "default", "renamed")
        mesh.worker.commit(blobs.put_pod("pod-w-client", CLIENT, "w-client", SCOPE, addresses, other, ()))
        mesh.worker.commit(put(Action.ALLOW, rule(principals=["cluster.local/ns/default/sa/renamed"])))
        ask(client.ip)
    finally:
        client.run("ip", "address", "del", f"{second}/32", "dev", "lo")


@pytest.mark.parametrize(("service", "of", "mapped"), [(VIP, "ip", ""), (VIP, "ip", "::ffff:"), (VIP6, "ip6", "")])
def test_an_address_that_is_not_the_pods_is_not_passed_on(mesh: Mesh, service: str, of: str, mapped: str) -> None:
    """Whoever may bind to any address (CAP_NET_RAW) is seen under the pod's own by the destination."""
    start(mesh, Protocol.TCP)
    origin = mesh.origin(8080, echo)
    client, own = mesh.pods.client, getattr(mesh.pods.client, of)
    false = str(ip_address(own) + 60)
    extra = [f"{false}/128", "dev", "lo", "nodad"] if of == "ip6" else [f"{false}/32", "dev", "lo"]
    client.run("ip", "address", "add", *extra)
    try:
        connection = netlink.in_netns(client.path, lambda: socket.create_connection(
            (mapped + service, TCP_PORT), 10, (mapped + false, 0)))
        connection.sendall(b"x")
        assert receive(connection, 1) == b"x" and connection.getsockname()[0] == mapped + false
        connection.close()
        assert origin.peers == [own]
    finally:
        client.run("ip", "address", "del", *extra[:3])


# ---- ends ------------------------------------------------------------------------------------------------------------

def test_a_server_that_is_not_there_is_told_of(mesh: Mesh) -> None:
    start(mesh, Protocol.TCP)
    assert not talks(mesh)
    destination, source = records(mesh, 2)
    refused = ("UF", "delayed_connect_error:_Connection_refused")
    assert (destination["flag"], destination["failure"]) == (source["flag"], source["failure"]) == refused


def test_a_destination_that_leaves_keeps_what_is_open(mesh: Mesh) -> None:
    start(mesh, Protocol.TCP)
    mesh.origin(8080, echo)
    connection = opened(mesh)
    mesh.worker.commit(put_pod(mesh, SERVER, excluded=None))
    mesh.worker.detach(2)
    mesh.worker.commit(blobs.Delete(blobs.Kind.POD, "pod-w-server"), put(Action.DENY, EMPTY))
    connection.sendall(b"y")
    assert receive(connection, 1) == b"y", "what it has may finish"
    connection.close()
    until(lambda: mesh.worker.header["upstream_open"] == 0, "nothing is left")
    mesh.attach_one(2)


def test_a_kept_connection_ends_with_the_next_answer_when_its_destination_has_left(mesh: Mesh) -> None:
    start(mesh)
    release = threading.Event()

    def server(connection: socket.socket) -> None:
        read_message(connection)
        assert release.wait(20)
        connection.sendall(response(b"late"))
        assert connection.recv(1) == b""

    mesh.origin(8080, server)
    connection = mesh.dial()
    connection.sendall(request())
    until(lambda: mesh.worker.header["upstream_open"] == 2, "the request is at the server")
    mesh.worker.detach(2)
    release.set()
    assert read_message(connection).body == b"late"
    until(lambda: mesh.worker.header["upstream_open"] == 0, "neither hop keeps it")
    mesh.attach_one(2)


def test_clients_that_go_away_at_any_moment_leave_nothing(mesh: Mesh) -> None:
    start(mesh)
    mesh.origin(8080, Web(response(bytes(300_000))))
    for round_ in range(60):
        connection = mesh.dial(port=(HTTP_PORT, TCP_PORT, AUTO_PORT)[round_ % 3])
        raw = request("/x", method="POST", body=bytes(5000))
        connection.sendall(raw[:(round_ * 97) % len(raw)])
        if round_ % 2:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
    mesh.quiet()
