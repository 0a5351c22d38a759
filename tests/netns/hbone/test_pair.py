"""A connection through two proxies of ours: captured in one pod, through a tunnel, to the application in another."""
from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time

import pytest

from agent.dataplane import blobs
from agent.model.workload import Protocol
from tests.support.hbone import CLIENT_ID, SERVER_ID, UIDS, addresses, certificate, configure, enrol, give_key
from tests.support.mesh import (
    AUTO_PORT,
    CLIENT,
    CUT,
    SCOPE,
    SERVER,
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
)
from tests.support.pki import Authority
from tests.support.wait import until

pytestmark = pytest.mark.netns
ROOT = Authority()


@pytest.fixture
def pair(mesh: Mesh) -> Mesh:
    enrol(mesh, ROOT)
    return mesh


def test_bytes_pass_through_a_tunnel_and_the_client_keeps_its_address(pair: Mesh) -> None:
    configure(pair, protocol=Protocol.TCP)
    origin = pair.origin(8080, echo)
    connection = pair.dial(port=TCP_PORT)
    connection.sendall(b"hello")
    assert receive(connection, 5) == b"hello"
    assert origin.peers == [pair.pods.client.ip]
    listed = pair.pods.server.run("ss", "-Htn", "sport = :15008").stdout
    assert pair.pods.client.ip in listed, "there is a tunnel"
    connection.close()
    pair.quiet()


@pytest.mark.parametrize("address", [VIP, VIP6])
def test_http_passes_through_a_tunnel(pair: Mesh, address: str) -> None:
    configure(pair)
    web = Web(response(b"one"), response(b"two"))
    origin = pair.origin(8080, web)
    connection = pair.dial(address)
    for body in (b"one", b"two"):
        connection.sendall(request("/x"))
        assert read_message(connection).body == body
    client = pair.pods.client
    assert set(origin.peers) == {client.ip6 if address == VIP6 else client.ip}
    connection.close()
    pair.quiet()
    series = {(key["reporter"], key["mutual_tls"]): values["closed"] for key, values in pair.worker.series()}
    assert series == {("source", True): 2, ("destination", True): 2}


def tunnels(mesh: Mesh) -> int:
    return len(mesh.pods.server.run("ss", "-Htn", "state", "established", "sport = :15008").stdout.splitlines())


def test_many_connections_share_few_tunnels(pair: Mesh) -> None:
    configure(pair, protocol=Protocol.TCP)
    origin = pair.origin(8080, echo)
    connections = [pair.dial(port=TCP_PORT) for _ in range(150)]
    for number, connection in enumerate(connections):
        connection.sendall(str(number).encode())
    for number, connection in enumerate(connections):
        assert receive(connection, len(str(number))) == str(number).encode()
    assert origin.open == 150 and tunnels(pair) == 2, "at most 100 in each"
    for connection in connections:
        connection.close()
    until(lambda: origin.open == 0, "the ends came through")
    pair.quiet()


def test_each_side_ends_for_itself(pair: Mesh) -> None:
    configure(pair, protocol=Protocol.TCP)

    def server(connection: socket.socket) -> None:
        question = receive_all(connection)
        connection.sendall(question[::-1])

    pair.origin(8080, server)
    connection = pair.dial(port=TCP_PORT)
    connection.sendall(b"abc" * 50_000)
    connection.shutdown(socket.SHUT_WR)
    assert receive_all(connection) == b"cba" * 50_000
    pair.quiet()


def test_a_server_that_speaks_first_is_heard(pair: Mesh) -> None:
    configure(pair, protocol=Protocol.TCP)

    def server(connection: socket.socket) -> None:
        connection.sendall(b"220 ready\r\n")
        echo(connection)

    pair.origin(8080, server)
    for port in (TCP_PORT, AUTO_PORT):
        connection = pair.dial(port=port)
        assert receive(connection, 11) == b"220 ready\r\n"
        connection.close()
    pair.quiet()


def test_a_reset_is_passed_on(pair: Mesh) -> None:
    configure(pair, protocol=Protocol.TCP)
    seen: list[BaseException] = []

    def server(connection: socket.socket) -> None:
        try:
            echo(connection)
        except ConnectionResetError as error:
            seen.append(error)
            raise

    pair.origin(8080, server)
    connection = pair.dial(port=TCP_PORT)
    connection.sendall(b"x")
    assert receive(connection, 1) == b"x"
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
    until(lambda: seen, "the server sees the reset")
    pair.quiet()


def test_an_answer_that_is_cut_arrives_as_far_as_it_came(pair: Mesh) -> None:
    configure(pair)
    assert ask_what_is_cut(pair) == CUT, "not a 503: the server did answer"
    found: list[tuple[str, int, str]] = []

    def both() -> bool:
        found.extend((record["reporter"], record["code"], record["flag"]) for record in pair.worker.records())
        return len(found) == 2

    until(both, "records of both sides")
    assert sorted(found) == [("destination", 200, "UC"), ("source", 200, "UC")]
    pair.quiet()


def test_bulk_passes_whole_both_ways_at_once(pair: Mesh) -> None:
    configure(pair, protocol=Protocol.TCP)
    total = 64 << 20

    def server(connection: socket.socket) -> None:
        sender = threading.Thread(target=lambda: (send_pattern(connection, total), connection.shutdown(socket.SHUT_WR)))
        sender.start()
        assert count_pattern(connection) == total
        sender.join()

    pair.origin(8080, server)
    connection = pair.dial(port=TCP_PORT)
    connection.settimeout(60)
    sender = threading.Thread(target=lambda: (send_pattern(connection, total), connection.shutdown(socket.SHUT_WR)))
    sender.start()
    assert count_pattern(connection) == total
    sender.join()
    pair.quiet()
    both = {key["reporter"]: (values["sent"], values["received"]) for key, values in pair.worker.series() if values["closed"]}
    assert both == {"source": (total, total), "destination": (total, total)}


PATTERN = bytes(range(251)) * 261  # 65,511: no multiple of any buffer


def send_pattern(connection: socket.socket, total: int) -> None:
    while total > 0:
        connection.sendall(PATTERN[:total])
        total -= min(total, len(PATTERN))


def count_pattern(connection: socket.socket) -> int:
    at = 0
    while data := connection.recv(262_144):
        start = at % 251
        assert data == (PATTERN * 6)[start:start + len(data)], f"other bytes at {at}"
        at += len(data)
    return at


def test_a_reader_that_sleeps_stops_the_writer_and_costs_bounded_memory(pair: Mesh) -> None:
    configure(pair, protocol=Protocol.TCP)
    awake, asked = threading.Event(), threading.Event()
    total = 256 << 20

    def server(connection: socket.socket) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        asked.set()
        assert awake.wait(60)
        while connection.recv(1 << 20):
            pass

    pair.origin(8080, server)
    before = pair.worker.resident()
    connection = pair.dial(port=TCP_PORT)
    connection.setblocking(False)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
    sent, last = 0, time.monotonic()
    while time.monotonic() - last < 1.5:  # nothing for so long: stopped
        try:
            sent += connection.send(bytes(1 << 20))
            last = time.monotonic()
        except BlockingIOError:
            time.sleep(0.01)
    assert asked.is_set() and sent < total
    assert pair.worker.header["buffered_bytes"] < 3 << 20
    assert pair.worker.resident() - before < 12 << 20
    awake.set()
    connection.close()
    pair.quiet()


def test_a_download_does_not_starve_small_requests(pair: Mesh) -> None:
    configure(pair)
    stop = threading.Event()
    big = response(bytes(8 << 20))

    def server(connection: socket.socket) -> None:
        while True:
            try:
                asked = read_message(connection)
            except ConnectionError:
                return
            connection.sendall(big if "/big" in asked.first else response(b"small"))

    pair.origin(8080, server)

    def download() -> None:
        connection = pair.dial()
        connection.settimeout(30)
        while not stop.is_set():
            connection.sendall(request("/big"))
            assert len(read_message(connection).body) == 8 << 20

    downloads = [threading.Thread(target=download) for _ in range(2)]
    for one in downloads:
        one.start()
    try:
        until(lambda: pair.worker.header["buffered_bytes"] > 0, "the download runs")
        time.sleep(1.2)
        took = []
        connection = pair.dial()
        for _ in range(50):
            begun = time.monotonic()
            connection.sendall(request("/small"))
            assert read_message(connection).body == b"small"
            took.append(time.monotonic() - begun)
        assert tunnels(pair) >= 2, "small requests have a tunnel of their own"
        assert sorted(took)[25] < 0.25
    finally:
        stop.set()
        for one in downloads:
            one.join(30)
        for one in pair.sockets:
            one.close()
    pair.quiet()


# ---- what is refused ------------------------------------------------------------------------------------------------------------

def test_an_application_that_is_not_there_is_told_to_the_client(pair: Mesh) -> None:
    configure(pair)
    connection = pair.dial()
    connection.sendall(request())
    assert read_message(connection).status == 503
    connection.close()
    pair.quiet()
    records = {record["reporter"]: record for record in pair.worker.records()}
    assert records["source"]["flag"] == "UF" and "answered 503" in records["source"]["failure"]
    assert records["destination"]["flag"] == "UF" and "refused" in records["destination"]["failure"].lower()


def fails(mesh: Mesh, *texts: str, flag: str = "UF") -> None:
    """A connection of the client comes to nothing, and the record of its side says so in these words; the server never sees a byte."""
    seen: list[int] = []

    def server(connection: socket.socket) -> None:
        seen.append(1)

    mesh.origin(8080, server)
    with contextlib.suppress(ConnectionError):
        connection = mesh.dial(port=TCP_PORT)
        connection.sendall(b"secret")
        assert receive_all(connection) == b""
    records = until(lambda: [r for r in mesh.worker.records() if r["reporter"] == "source"], "a record of the source")
    assert records[0]["flag"] == flag
    for text in texts:
        assert text in records[0]["failure"], records[0]["failure"]
    assert seen == [], "never in plain text instead"


def test_a_server_of_another_identity_is_refused(pair: Mesh) -> None:
    configure(pair, protocol=Protocol.TCP, expected="somebody-else")
    fails(pair, "spiffe://cluster.local/ns/default/sa/server", "not the identity that the destination must have")


def test_a_pod_without_certificate_fails_closed(mesh: Mesh) -> None:
    enrol(mesh, ROOT, who=(SERVER,))
    configure(mesh, protocol=Protocol.TCP)
    mesh.settings(hold_timeout_ms=300)
    fails(mesh, "no certificate was signed for its identity")
    mesh.quiet()


def test_a_pod_without_identity_fails_closed(pair: Mesh) -> None:
    configure(pair, protocol=Protocol.TCP)
    pair.worker.commit(blobs.put_pod("pod-c", 1, UIDS[CLIENT], SCOPE, addresses(pair.pods.client)))
    fails(pair, "the destination wants a tunnel, and this pod has no identity")


def test_a_server_without_certificate_is_not_reached_in_plain_text(mesh: Mesh) -> None:
    enrol(mesh, ROOT, who=(CLIENT,))
    configure(mesh, protocol=Protocol.TCP)
    mesh.settings(hold_timeout_ms=30_000)  # who serves the server's 15008 waits longer than the client does
    fails(mesh, "did not finish the handshake in time")


def test_a_server_of_another_root_is_refused(mesh: Mesh) -> None:
    enrol(mesh, Authority("stranger"), who=(SERVER,))
    enrol(mesh, ROOT, who=(CLIENT,))
    configure(mesh, protocol=Protocol.TCP)
    # both in one worker: the last trust counts for both, so the server's own certificate does not chain for the client
    fails(mesh, "does not chain to a root")


def test_an_expired_certificate_is_refused(mesh: Mesh) -> None:
    enrol(mesh, ROOT, who=(CLIENT,))
    old = ROOT.issue(SERVER_ID, days=(-3, -1))
    give_key(mesh.worker, 102, SERVER_ID, old.key)
    mesh.worker.commit(certificate(old, SERVER_ID, 102))
    configure(mesh, protocol=Protocol.TCP)
    fails(mesh)


# ---- over time ----------------------------------------------------------------------------------------------------------------------

def test_renewed_credentials_get_new_tunnels_and_open_connections_live_on(pair: Mesh) -> None:
    configure(pair, protocol=Protocol.TCP)
    pair.origin(8080, echo)
    first = pair.dial(port=TCP_PORT)
    first.sendall(b"a")
    assert receive(first, 1) == b"a"
    renewed = ROOT.issue(CLIENT_ID)
    give_key(pair.worker, 201, CLIENT_ID, renewed.key)
    pair.worker.commit(certificate(renewed, CLIENT_ID, 201))
    second = pair.dial(port=TCP_PORT)  # finds the old one, and has the new one dialled
    second.sendall(b"b")
    assert receive(second, 1) == b"b"
    until(lambda: (tunnels(pair), pair.worker.header["tunnels_opened"]) == (2, 4), "there is a tunnel with the new certificate")
    third = pair.dial(port=TCP_PORT)
    third.sendall(b"d")
    assert receive(third, 1) == b"d"
    first.sendall(b"c")
    assert receive(first, 1) == b"c"
    first.close()
    second.close()
    until(lambda: tunnels(pair) == 1, "the old tunnel ends with its last connection")
    third.sendall(b"e")
    assert receive(third, 1) == b"e"
    assert pair.worker.header["tunnels_waited"] == 1, "nobody waited for the new one"
    third.close()
    pair.quiet()


def test_a_pod_that_leaves_lets_open_connections_end(pair: Mesh) -> None:
    configure(pair, protocol=Protocol.TCP)
    pair.origin(8080, echo)
    connection = pair.dial(port=TCP_PORT)
    connection.sendall(b"a")
    assert receive(connection, 1) == b"a"
    pair.worker.detach(2)
    pair.worker.detach(1)
    time.sleep(1.5)  # both GOAWAYs are out
    connection.sendall(b"b" * 100_000)
    assert receive(connection, 100_000) == b"b" * 100_000
    connection.close()
    until(lambda: tunnels(pair) == 0, "the tunnel ended with its last connection")
    until(lambda: pair.worker.header["downstream_open"] == 0, "no connection is left")
    pair.attach()
