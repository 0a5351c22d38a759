"""Connections kept for the next request: what ends or speaks out of turn on them never reaches the next client.

A worker that is stopped for a moment finds all events of that moment at once, the client's first: the order that a busy worker sees.
"""
from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import threading
from collections.abc import Iterator
from fcntl import ioctl
from pathlib import Path

import pytest

from tests.support.mesh import Mesh, everything, read_message, receive_until, request, response
from tests.support.wait import until

pytestmark = pytest.mark.netns

TIOCOUTQ = 0x5411


@contextlib.contextmanager
def stopped(mesh: Mesh) -> Iterator[None]:
    os.kill(mesh.worker.pid, signal.SIGSTOP)
    try:
        until(lambda: Path(f"/proc/{mesh.worker.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T", "stopped")
        yield
    finally:
        os.kill(mesh.worker.pid, signal.SIGCONT)


def arrived(connection: socket.socket) -> bool:
    """The other side's kernel has acknowledged all that was sent."""
    return struct.unpack("i", ioctl(connection, TIOCOUTQ, b"\0" * 4)) == (0,)


class Servers:
    """An origin that answers with the number of its connection; `connections` are the test's to close or to speak on."""

    def __init__(self) -> None:
        self.connections: list[socket.socket] = []
        self.turns = threading.Semaphore(0)

    def __call__(self, connection: socket.socket) -> None:
        number = len(self.connections)
        self.connections.append(connection)
        while True:
            try:
                asked = read_message(connection)
            except ConnectionError:
                return
            if "/in-turn" in asked.first:
                assert self.turns.acquire(timeout=10)
            connection.sendall(response(str(number).encode()))


def idle_connections(mesh: Mesh, many: int) -> tuple[Servers, socket.socket]:
    """Clients outside the mesh dial the server's pod, so that one hop lies between; its pool holds `many` connections."""
    servers = Servers()
    mesh.configure(*everything(mesh))
    mesh.origin(8080, servers)
    clients = [mesh.dial(mesh.pods.server.ip, 8080, mesh.pods.other) for _ in range(many)]
    for client in clients:
        client.sendall(request("/in-turn"))
    until(lambda: len(servers.connections) == many, "each has a connection of its own")
    for kept in range(1, many + 1):
        servers.turns.release()
        until(lambda: mesh.worker.header["upstream_idle"] == kept, f"{kept} are kept")  # noqa: B023 - done before the next turn
    for client in clients:
        read_message(client)
    return servers, clients[0]


@pytest.mark.parametrize("left", range(3))
def test_a_post_passes_over_kept_connections_that_ended_just_now(mesh: Mesh, left: int) -> None:
    servers, client = idle_connections(mesh, 3)
    with stopped(mesh):
        client.sendall(request("/", method="POST", body=b"x"))
        until(lambda: arrived(client), "the request is there")
        for number in {0, 1, 2} - {left}:
            servers.connections[number].shutdown(socket.SHUT_RDWR)
    assert read_message(client).body == str(left).encode()
    until(lambda: (mesh.worker.header["upstream_idle"], mesh.worker.header["upstream_open"]) == (1, 1), "one is left")
    for connection in mesh.sockets:
        connection.close()
    mesh.quiet()


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_bytes_that_nobody_asked_for_are_nobodys_answer(mesh: Mesh, method: str) -> None:
    servers, client = idle_connections(mesh, 1)
    with stopped(mesh):
        client.sendall(request("/", method=method))
        until(lambda: arrived(client), "the request is there")
        servers.connections[0].sendall(response(b"somebody else's"))
        until(lambda: arrived(servers.connections[0]), "the bytes are there")
    assert read_message(client).body == b"1", "answered on another connection"


@pytest.mark.parametrize("raw", [
    response(b"own") + response(b"alien"),
    response(b"own") + b"x",
    b"HTTP/1.1 204 No Content\r\ncontent-length: 5\r\n\r\nalien",
    b"HTTP/1.1 304 Not Modified\r\ncontent-length: 5\r\n\r\nalien",
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nown\r\n0\r\n\r\n" + response(b"alien"),
])
def test_more_than_the_response_ends_the_servers_connection(mesh: Mesh, raw: bytes) -> None:
    seen = []

    def origin(connection: socket.socket) -> None:
        seen.append(connection)
        read_message(connection)
        connection.sendall(raw if len(seen) == 1 else response(b"second"))
        with contextlib.suppress(OSError):
            connection.recv(1)

    mesh.configure(*everything(mesh))
    mesh.origin(8080, origin)
    client = mesh.dial(mesh.pods.server.ip, 8080, mesh.pods.other)
    client.sendall(request("/1"))
    assert read_message(client).body in (b"own", b"")
    client.sendall(request("/2"))
    assert read_message(client).body == b"second"


def test_a_head_that_waits_for_room_goes_out_when_the_client_reads(mesh: Mesh) -> None:
    hints = b"HTTP/1.1 103 Early Hints\r\nlink: " + b"h" * 30_000 + b"\r\n\r\n"
    many = 300

    def origin(connection: socket.socket) -> None:
        receive_until(connection, b"\r\n\r\n")
        connection.sendall(hints * many + response(b"", "200 OK", "x-long: " + "l" * 33_000))
        with contextlib.suppress(OSError):
            connection.recv(1)

    mesh.configure(*everything(mesh))
    mesh.origin(8080, origin)
    client = mesh.dial(mesh.pods.server.ip, 8080, mesh.pods.other)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
    client.sendall(request())
    turns = -1

    def waits() -> bool:
        nonlocal turns
        before, turns = turns, mesh.worker.header["loop_turns"]
        return turns - before < 3

    until(waits, "the worker waits for the client", interval=0.2)
    got = b""
    while b"200 OK" not in got or not got.endswith(b"\r\n\r\n"):
        data = client.recv(262_144)
        assert data, "closed before the answer"
        got = got[-70_000:] + data


def test_a_tunnel_in_which_nothing_moves_ends_by_the_idle_timeout(mesh: Mesh) -> None:
    def origin(connection: socket.socket) -> None:
        receive_until(connection, b"\r\n\r\n")
        connection.sendall(b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: echo\r\n\r\n")
        while data := connection.recv(100):
            connection.sendall(data)

    mesh.configure(*everything(mesh))
    mesh.settings(tcp_idle_timeout_ms=700)
    mesh.origin(8080, origin)
    client = mesh.dial(mesh.pods.server.ip, 8080, mesh.pods.other)
    client.sendall(request("/", "Connection: upgrade", "Upgrade: echo"))
    assert b" 101 " in receive_until(client, b"\r\n\r\n")
    threading.Timer(0.3, client.sendall, (b"x",)).start()       # a byte in the middle of the first period
    assert client.recv(10) == b"x"
    client.settimeout(4)
    with contextlib.suppress(ConnectionResetError):
        assert client.recv(1) == b""


def test_a_raised_bound_of_connections_lets_in_who_waited(mesh: Mesh) -> None:
    servers = Servers()
    mesh.configure(*everything(mesh))
    mesh.settings(connections_per_pod=1)
    mesh.origin(8080, servers)
    first, second = (mesh.dial(mesh.pods.server.ip, 8080, mesh.pods.other) for _ in range(2))
    first.sendall(request())
    assert read_message(first).body == b"0"
    second.sendall(request())
    second.settimeout(0.3)
    with pytest.raises(TimeoutError):
        second.recv(1)
    mesh.settings(connections_per_pod=2)
    second.settimeout(5)
    assert read_message(second).body == b"0"
