"""Opaque TCP through capture and worker, both hops, as an application sees it."""
from __future__ import annotations

import contextlib
import hashlib
import os
import select
import socket
import struct
import subprocess
import sys
import threading
from dataclasses import replace
from ipaddress import ip_address

import pytest

from agent.dataplane import blobs
from agent.model.routing import Endpoint, WeightedCluster
from agent.model.workload import Protocol
from tests.support.mesh import (
    AUTO_PORT,
    CLIENT,
    SERVER,
    SERVICE_INDEX,
    TCP_PORT,
    VIP,
    VIP6,
    Mesh,
    cluster,
    destination,
    echo,
    everything,
    receive,
    receive_all,
    workload,
)
from tests.support.wait import until
from tests.support.worker import GID, UID

pytestmark = pytest.mark.netns


def start(mesh: Mesh) -> None:
    mesh.configure(*everything(mesh), protocol=Protocol.TCP)


@pytest.mark.parametrize("size", [1, 1000, 16_384, 65_537, 16 << 20])
def test_bytes_arrive_unchanged_both_ways_and_half_close_is_passed_on(mesh: Mesh, size: int) -> None:
    def digest_then_echo(connection: socket.socket) -> None:
        got = receive_all(connection)  # ends with the client's half-close
        connection.sendall(hashlib.sha256(got).digest() + got)

    start(mesh)
    mesh.origin(8080, digest_then_echo)
    said = os.urandom(size)
    connection = mesh.dial(port=TCP_PORT)
    connection.sendall(said)
    connection.shutdown(socket.SHUT_WR)
    heard = receive_all(connection)
    assert heard[:32] == hashlib.sha256(said).digest()
    assert heard[32:] == said
    mesh.quiet()


@pytest.mark.parametrize("family", [4, 6])
def test_the_server_sees_the_clients_own_address(mesh: Mesh, family: int) -> None:
    start(mesh)
    origin = mesh.origin(8080, echo)
    server, client = mesh.pods.server, mesh.pods.client
    connection = mesh.dial(server.ip6 if family == 6 else server.ip, 8080)
    connection.sendall(b"x")
    assert receive(connection, 1) == b"x"
    assert origin.peers == [client.ip6 if family == 6 else client.ip]


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("port", [TCP_PORT, AUTO_PORT])
def test_a_service_of_both_families_is_reached_by_the_one_that_was_dialled(mesh: Mesh, family: int, port: int) -> None:
    start(mesh)  # the endpoint is the server's IPv4 address; its IPv6 one is known from the workload
    origin = mesh.origin(8080, echo)
    connection = mesh.dial(VIP6 if family == 6 else VIP, port)
    connection.sendall(b"x")
    assert receive(connection, 1) == b"x"
    client, server = mesh.pods.client, mesh.pods.server
    assert origin.peers == [client.ip6 if family == 6 else client.ip]
    connection.close()
    mesh.quiet()
    reached = {record["upstream_remote"] for record in mesh.worker.records()}
    assert reached == {f"[{server.ip6}]:8080" if family == 6 else f"{server.ip}:8080"}


def test_a_server_of_one_family_is_reached_by_it_whichever_was_dialled(mesh: Mesh) -> None:
    server = mesh.pods.server
    only4 = replace(workload("w-server", server), addresses=(ip_address(server.ip),))
    mesh.configure(*everything(mesh), blobs.put_workload(SERVER, only4, lambda _: SERVICE_INDEX), protocol=Protocol.TCP)
    mesh.origin(8080, echo)
    connection = mesh.dial(VIP6, TCP_PORT)
    connection.sendall(b"x")
    assert receive(connection, 1) == b"x"
    connection.close()
    mesh.quiet()
    assert {record["upstream_remote"] for record in mesh.worker.records()} == {f"{server.ip}:8080"}


def test_both_sides_count_a_connection_and_its_bytes(mesh: Mesh) -> None:
    start(mesh)
    mesh.origin(8080, echo)
    connection = mesh.dial(port=TCP_PORT)
    connection.sendall(b"a" * 1000)
    assert receive(connection, 1000) == b"a" * 1000

    def seen() -> dict[str, tuple[int, int, int, int]]:
        return {key["reporter"]: (values["opened"], values["closed"], values["sent"], values["received"])
                for key, values in mesh.worker.series()
                if (key["source"], key["destination"], key["service"]) == (CLIENT, SERVER, SERVICE_INDEX)}

    # while it lives its bytes show already
    until(lambda: seen() == {"source": (1, 0, 1000, 1000), "destination": (1, 0, 1000, 1000)}, "live bytes")
    connection.close()
    until(lambda: seen() == {"source": (1, 1, 1000, 1000), "destination": (1, 1, 1000, 1000)}, "the end")
    records = mesh.worker.records()
    assert sorted(record["reporter"] for record in records) == ["destination", "source"]
    assert all((record["flag"], record["received"], record["sent"]) == ("-", 1000, 1000) for record in records)


def test_a_reset_of_the_server_is_a_reset_for_the_client(mesh: Mesh) -> None:
    def reset(connection: socket.socket) -> None:
        receive(connection, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    start(mesh)
    mesh.origin(8080, reset)
    connection = mesh.dial(port=TCP_PORT)
    connection.sendall(b"x")
    with pytest.raises(ConnectionResetError):
        connection.recv(1)
    mesh.quiet()
    assert {record["flag"] for record in mesh.worker.records()} == {"UC"}


def test_a_reset_of_the_client_is_a_reset_for_the_server(mesh: Mesh) -> None:
    ends: list[str] = []

    def wait_for_the_end(connection: socket.socket) -> None:
        connection.sendall(b"hello")
        try:
            ends.append(repr(connection.recv(1)))
        except ConnectionResetError:
            ends.append("reset")

    start(mesh)
    mesh.origin(8080, wait_for_the_end)
    connection = mesh.dial(port=TCP_PORT)
    assert receive(connection, 5) == b"hello"
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
    until(lambda: ends, "the server sees the end")
    assert ends == ["reset"]
    mesh.quiet()
    assert {record["flag"] for record in mesh.worker.records()} == {"DC"}


@pytest.mark.parametrize("who", ["client", "server"])
@pytest.mark.parametrize("size", [4_000, 1_000_000])  # below and above what goes through pipes
def test_a_reset_ends_a_connection_whose_other_side_does_not_read(mesh: Mesh, who: str, size: int) -> None:
    ends: list[str] = []
    full, reset = threading.Event(), threading.Event()

    def fill_and_reset(connection: socket.socket) -> None:
        connection.settimeout(0.5)  # the kernel's buffers fill; then nothing moves any more
        with contextlib.suppress(TimeoutError):
            while True:
                connection.sendall(b"z" * size)
        full.set()
        assert reset.wait(20)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()

    def sleep_and_look(connection: socket.socket) -> None:
        poll = select.poll()
        poll.register(connection, 0)  # errors alone: nothing is read
        ends.append("reset" if poll.poll(10_000) else "nothing happened")

    start(mesh)
    mesh.origin(8080, sleep_and_look if who == "client" else fill_and_reset)
    connection = mesh.dial(port=TCP_PORT)
    filler = threading.Thread(target=fill_and_reset if who == "client" else sleep_and_look, args=(connection,))
    filler.start()
    assert full.wait(20)
    reset.set()
    until(lambda: ends, "the sleeper is told", timeout=12)
    filler.join()
    assert ends == ["reset"]
    connection.close()
    mesh.quiet()
    assert [record["flag"] for record in mesh.worker.records()] == ["DC" if who == "client" else "UC"] * 2


def test_a_sleeping_reader_stops_the_writer_and_memory_stays_bounded(mesh: Mesh) -> None:
    wake = threading.Event()
    got: list[int] = []

    def sleeper(connection: socket.socket) -> None:
        assert wake.wait(20)
        got.append(len(receive_all(connection)))

    start(mesh)
    mesh.origin(8080, sleeper)
    connections = [mesh.dial(port=TCP_PORT) for _ in range(4)]
    before = mesh.worker.resident()
    sent = [0] * 4
    for at, connection in enumerate(connections):
        connection.settimeout(0.5)  # the kernel's buffers fill; then nothing moves any more
        while sent[at] < 64 << 20:
            try:
                sent[at] += connection.send(b"z" * 1_000_000)
            except TimeoutError:
                break
    assert all(n < 64 << 20 for n in sent)
    assert mesh.worker.header["buffered_bytes"] <= 4 * 2 * 262_144  # two hops, one direction: a pipe each
    assert mesh.worker.resident() - before < 4 << 20
    wake.set()
    for connection in connections:
        connection.shutdown(socket.SHUT_WR)
    until(lambda: len(got) == 4, "all four are read to the end", timeout=20)
    assert sorted(got) == sorted(sent)
    mesh.quiet()


def pipes(mesh: Mesh) -> int:
    """Pipe ends that the worker has open."""
    folder = f"/proc/{mesh.worker.pid}/fd"
    return sum(os.readlink(f"{folder}/{fd}").startswith("pipe:") for fd in os.listdir(folder))


def test_bulk_passes_through_pipes_and_small_messages_do_not(mesh: Mesh) -> None:
    start(mesh)
    mesh.origin(8080, echo)
    before = pipes(mesh)  # standard input and output may be pipes
    connection = mesh.dial(port=TCP_PORT)
    for size in (1, 100, 4000, 1):
        connection.sendall(b"m" * size)
        assert receive(connection, size) == b"m" * size
    assert pipes(mesh) == before
    for _ in range(3):  # bulk and small in turn on one connection
        said = os.urandom(4 << 20)
        sender = threading.Thread(target=connection.sendall, args=(said,))
        sender.start()
        assert receive(connection, len(said)) == said
        sender.join()
        assert pipes(mesh) > before
        for size in (1, 100, 20_000, 1):
            connection.sendall(said[:size])
            assert receive(connection, size) == said[:size]
    connection.close()
    mesh.quiet()
    assert pipes(mesh) == before
    assert {(record["received"], record["sent"]) for record in mesh.worker.records()} == {(3 * (4 << 20) + 64_408,) * 2}


def test_bulk_is_relayed_also_when_the_kernel_refuses_pipes(mesh: Mesh) -> None:
    # another process of the worker's user takes all pipe pages that the user may have (fs.pipe-user-pages-soft)
    hog = mesh.pods.other.start("setpriv", f"--reuid={UID}", f"--regid={GID}", "--clear-groups", sys.executable, "-c", """
import fcntl, os
kept = []
while True:
    kept.append(os.pipe())
    try:
        fcntl.fcntl(kept[-1][1], fcntl.F_SETPIPE_SZ, 1 << 20)
    except PermissionError:
        if fcntl.fcntl(kept[-1][1], fcntl.F_GETPIPE_SZ) < 65536:
            break
print("full", flush=True)
input()
""", stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert hog.stdout is not None and hog.stdout.readline() == "full\n"
    start(mesh)
    mesh.origin(8080, echo)
    before = pipes(mesh)
    connection = mesh.dial(port=TCP_PORT)
    said = os.urandom(4 << 20)
    sender = threading.Thread(target=connection.sendall, args=(said,))
    sender.start()
    assert receive(connection, len(said)) == said
    sender.join()
    assert pipes(mesh) == before
    hog.kill()
    hog.wait()


def test_slow_readers_of_one_pod_leave_pipes_to_the_others(mesh: Mesh) -> None:
    wake = threading.Event()

    def sleeper(connection: socket.socket) -> None:
        receive(connection, 1 << 20)
        assert wake.wait(20)
        receive_all(connection)

    start(mesh)
    mesh.origin(7070, sleeper, netns=mesh.pods.other)
    before = pipes(mesh)
    full = [mesh.dial(mesh.pods.other.ip, 7070) for _ in range(40)]
    for connection in full:
        connection.setblocking(False)
    moved = 0

    def stuck() -> bool:
        nonlocal moved
        last = moved
        for one in full:
            with contextlib.suppress(BlockingIOError):
                while True:
                    moved += one.send(b"z" * 1_000_000)
        return moved == last

    # a worker that had no processor for a while looks stuck too: it holds what it may, or it is not over
    until(lambda: stuck() and pipes(mesh) - before >= 2 * 16, "all forty readers are asleep and everything before them is full", timeout=60)
    held = pipes(mesh) - before
    assert held <= 2 * 32  # of 64 pipes a pod holds half at most
    for connection in full:
        connection.close()
    wake.set()
    mesh.quiet()


def test_a_server_that_speaks_first_on_an_undeclared_port_does_not_hang(mesh: Mesh) -> None:
    def greet(connection: socket.socket) -> None:
        connection.sendall(b"220 hello\r\n")
        echo(connection)

    start(mesh)
    mesh.origin(8080, greet)
    connection = mesh.dial(port=AUTO_PORT)
    connection.settimeout(3)
    assert receive(connection, 11) == b"220 hello\r\n"
    connection.sendall(b"EHLO x\r\n")
    assert receive(connection, 8) == b"EHLO x\r\n"


def test_a_client_that_speaks_something_else_first_is_relayed(mesh: Mesh) -> None:
    start(mesh)
    mesh.origin(8080, echo)
    connection = mesh.dial(port=AUTO_PORT)
    connection.sendall(b"\x00\x01\x02PING")
    assert receive(connection, 7) == b"\x00\x01\x02PING"
    connection.close()
    mesh.quiet()
    # the bytes that were sniffed count like all others
    assert {(record["received"], record["sent"]) for record in mesh.worker.records()} == {(7, 7)}


def test_detection_ends_also_when_neither_speaks(mesh: Mesh) -> None:
    start(mesh)
    mesh.settings(detect_timeout_ms=200)
    mesh.origin(8080, echo)
    connection = mesh.dial(port=AUTO_PORT)
    until(lambda: any(key["protocol"] == "tcp" and key["reporter"] == "source" for key, _ in mesh.worker.series()),
          "the silent connection is opaque TCP")
    connection.sendall(b"GET / late")  # no longer looked at
    assert receive(connection, 10) == b"GET / late"


def test_a_silent_connection_that_finds_no_server_keeps_nothing_of_the_configuration(mesh: Mesh) -> None:
    """Detection dials early and finds nobody; when its time is over it chooses anew."""
    start(mesh)
    mesh.settings(detect_timeout_ms=1)
    nobody = tuple(Endpoint(ip_address("10.200.0.0") + at, 8080, healthy=False) for at in range(10_000))

    def another() -> None:
        mesh.worker.commit(cluster("all", *nobody))
        with pytest.raises(ConnectionResetError):
            mesh.dial(port=AUTO_PORT).recv(1)

    for _ in range(5):
        another()
    before = mesh.worker.resident()
    for _ in range(40):
        another()
    assert mesh.worker.resident() - before < 4 << 20, "40 clusters of 10,000 endpoints were replaced"


def test_an_unknown_destination_passes_untouched_and_is_counted_as_passthrough(mesh: Mesh) -> None:
    start(mesh)
    mesh.origin(7070, echo, netns=mesh.pods.other)
    connection = mesh.dial(mesh.pods.other.ip, 7070)
    connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
    assert receive(connection, 18) == b"GET / HTTP/1.1\r\n\r\n"
    until(lambda: any(key["service"] == 0xFFFFFFFF and values["sent"] == 18 for key, values in mesh.worker.series()),
          "counted as passthrough")


def test_a_refused_connection_is_closed_and_flagged(mesh: Mesh) -> None:
    start(mesh)
    with pytest.raises(ConnectionResetError):
        mesh.dial(mesh.pods.other.ip, 7071).recv(1)
    record = mesh.worker.record()
    assert (record["flag"], record["failure"]) == ("UF", "delayed_connect_error:_Connection_refused")


def test_no_endpoint_and_no_cluster_close_the_connection(mesh: Mesh) -> None:
    mesh.configure(cluster("none"), destination(TCP_PORT, tcp=(WeightedCluster("none", 1),)))
    with pytest.raises(ConnectionResetError):
        mesh.dial(port=TCP_PORT).recv(1)
    assert mesh.worker.record()["flag"] == "UH"
    mesh.worker.commit(destination(TCP_PORT, tcp=(WeightedCluster("absent", 1),)))
    with pytest.raises(ConnectionResetError):
        mesh.dial(port=TCP_PORT).recv(1)
    assert mesh.worker.record()["flag"] == "NC"


def test_the_listeners_themselves_are_no_destination(mesh: Mesh) -> None:
    start(mesh)
    for port in (15001, 15006):
        for netns in (mesh.pods.client, mesh.pods.other):
            with pytest.raises(OSError):
                connection = mesh.dial(mesh.pods.server.ip, port, netns=netns)
                connection.settimeout(3)
                if connection.recv(1) == b"":
                    raise ConnectionResetError
    assert all(values["failed"] or key["destination"] != SERVER for key, values in mesh.worker.series())


def test_a_pod_reaches_itself_through_its_service(mesh: Mesh) -> None:
    start(mesh)
    origin = mesh.origin(8080, echo)
    connection = mesh.dial(VIP, TCP_PORT, netns=mesh.pods.server)
    connection.sendall(b"me")
    assert receive(connection, 2) == b"me"
    assert len(origin.peers) == 1


def test_a_held_connection_goes_on_when_its_configuration_comes(mesh: Mesh) -> None:
    mesh.configure(protocol=Protocol.TCP)
    mesh.origin(8080, echo)
    first, second = mesh.dial(port=TCP_PORT), mesh.dial(port=TCP_PORT)
    for connection in (first, second):
        connection.sendall(b"wait")
    until(lambda: mesh.worker.header["held"] == 2, "both are held")
    until(lambda: mesh.worker.misses, "the worker asks")
    assert mesh.worker.misses == [f"ns=default|origin.default.svc.cluster.local:{TCP_PORT}"]  # asked once
    mesh.worker.commit(*everything(mesh))
    for connection in (first, second):
        assert receive(connection, 4) == b"wait"
    assert mesh.worker.header["held"] == 0


def test_a_connection_whose_configuration_never_comes_ends_when_the_hold_is_over(mesh: Mesh) -> None:
    mesh.configure()
    mesh.settings(hold_timeout_ms=300)
    with pytest.raises(ConnectionResetError):
        mesh.dial(port=TCP_PORT).recv(1)
    assert mesh.worker.record()["flag"] == "NC"
    mesh.quiet()


def test_held_connections_are_bounded_in_number(mesh: Mesh) -> None:
    mesh.configure()
    mesh.settings(hold_connections=4)  # a pod gets as many as are then still free
    kept = [mesh.dial(port=TCP_PORT) for _ in range(2)]
    until(lambda: mesh.worker.header["held"] == 2, "two are held")
    with pytest.raises(ConnectionResetError):
        mesh.dial(port=TCP_PORT).recv(1)
    assert mesh.worker.record()["flag"] == "UO"
    assert mesh.worker.header["held"] == len(kept)


def test_a_silent_connection_ends_by_the_idle_timeout(mesh: Mesh) -> None:
    start(mesh)
    mesh.settings(tcp_idle_timeout_ms=300)
    mesh.origin(8080, echo)
    connection = mesh.dial(port=TCP_PORT)
    connection.sendall(b"x")
    assert receive(connection, 1) == b"x"
    with pytest.raises(ConnectionResetError):
        connection.recv(1)
    mesh.quiet()
    assert "DT" in {record["flag"] for record in mesh.worker.records()}
