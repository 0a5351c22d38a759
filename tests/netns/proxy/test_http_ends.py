"""HTTP/1.1 connections that die, clients and servers that are slow, and many at once: nobody gets another's answer and nothing is left."""
from __future__ import annotations

import socket
import struct
import threading

import pytest

from tests.support.mesh import (
    AUTO_PORT,
    Mesh,
    ask,
    everything,
    read_message,
    request,
    response,
    start,
)
from tests.support.wait import until

pytestmark = pytest.mark.netns


def test_a_request_on_a_pooled_connection_that_died_is_sent_again(mesh: Mesh) -> None:
    """The server closes after each answer without saying so, at any moment: no request may be lost."""
    def one_shot(connection: socket.socket) -> None:
        read_message(connection)
        connection.sendall(response())

    mesh.configure(*everything(mesh))
    origin = mesh.origin(8080, one_shot)
    connection = mesh.dial()
    for _ in range(100):
        connection.sendall(request())
        assert read_message(connection).status == 200
    assert len(origin.peers) == 100


EXCHANGE = request("/x", "X-A: b", method="POST", body=b"0123456789")


@pytest.mark.parametrize("reset", [False, True])
def test_a_client_may_vanish_at_every_byte_of_a_request(mesh: Mesh, reset: bool) -> None:
    start(mesh)
    for cut in range(1, len(EXCHANGE) + 1):
        connection = mesh.dial()
        connection.sendall(EXCHANGE[:cut])
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
    mesh.quiet()
    assert ask(mesh).status == 200
    mesh.sockets[-1].close()
    mesh.quiet()
    codes = {(record["code"], record["flag"]) for record in mesh.worker.records()}
    assert codes <= {(0, "DC"), (200, "-"), (400, "DPE")}, codes


ANSWER = b"HTTP/1.1 200 OK\r\nx-a: b\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"


def test_a_server_may_vanish_at_every_byte_of_a_response(mesh: Mesh) -> None:
    cut = [0]

    def vanish(connection: socket.socket) -> None:
        read_message(connection)
        connection.sendall(ANSWER[:cut[0]])

    mesh.configure(*everything(mesh))
    mesh.origin(8080, vanish)
    head = ANSWER.index(b"\r\n\r\n") + 4
    for at in range(len(ANSWER) + 1):
        cut[0] = at
        connection = mesh.dial()
        connection.sendall(request())
        if at == len(ANSWER):
            assert read_message(connection).body == b"hello"
        elif at < head:
            assert read_message(connection).status == 503, at
        else:
            with pytest.raises((ConnectionError, ValueError)):
                read_message(connection)
        connection.close()
    mesh.quiet()


def test_a_thousand_requests_leave_nothing_behind(mesh: Mesh) -> None:
    start(mesh)

    def burst() -> int:
        for _ in range(50):
            connection = mesh.dial()
            for _ in range(2):
                connection.sendall(request())
                assert read_message(connection).status == 200
            connection.close()
        return mesh.quiet()

    descriptors, memory = burst(), mesh.worker.resident()
    for _ in range(9):
        assert burst() == descriptors
    assert mesh.worker.resident() - memory < 512 * 1024


def test_a_slow_client_stops_the_server_and_memory_stays_bounded(mesh: Mesh) -> None:
    sent = [0]

    def flood(connection: socket.socket) -> None:
        read_message(connection)
        connection.sendall(f"HTTP/1.1 200 OK\r\ncontent-length: {256 << 20}\r\n\r\n".encode())
        connection.settimeout(1)
        for _ in range(256):
            connection.sendall(b"x" * (1 << 20))
            sent[0] += 1 << 20

    mesh.configure(*everything(mesh))
    mesh.origin(8080, flood)
    before = mesh.worker.resident()
    connection = mesh.dial()
    connection.sendall(request())
    until(lambda: mesh.origins[0].open == 0, "the server's send timed out", timeout=15)
    assert sent[0] < 64 << 20
    assert mesh.worker.resident() - before < 2 << 20


def test_a_post_is_never_sent_twice(mesh: Mesh) -> None:
    """The server dies with the second request in hand, on a pooled connection: a GET comes again, a POST does not."""
    seen: list[str] = []

    def second_dies(connection: socket.socket) -> None:
        seen.append(read_message(connection).first.split(" ")[0])
        connection.sendall(response())
        seen.append(read_message(connection).first.split(" ")[0])

    mesh.configure(*everything(mesh))
    mesh.origin(8080, second_dies)
    connection = mesh.dial()
    for method, status, wanted in (("POST", 503, ["GET", "POST"]), ("GET", 200, ["GET", "GET", "GET"])):
        seen.clear()
        connection.sendall(request())
        assert read_message(connection).status == 200
        connection.sendall(request(method=method, body=b"x" if method == "POST" else b""))
        assert read_message(connection).status == status
        assert seen == wanted
        connection.close()
        mesh.quiet()
        connection = mesh.dial()


def test_many_clients_at_once_each_get_their_own_answer(mesh: Mesh) -> None:
    def mirror(connection: socket.socket) -> None:
        while True:
            try:
                seen = read_message(connection)
            except ConnectionError:
                return
            body = (seen.first.split(" ")[1] + "|").encode() * 300 + seen.body
            connection.sendall(response(body))

    mesh.configure(*everything(mesh))
    mesh.origin(8080, mirror)
    wrong: list[str] = []

    def client(number: int) -> None:
        connection = mesh.dial()
        for turn in range(20):
            path, body = f"/{number}-{turn}", f"body {number} {turn}".encode() * 50
            connection.sendall(request(path, method="POST", body=body))
            if read_message(connection).body != (path + "|").encode() * 300 + body:
                wrong.append(path)
        connection.close()

    threads = [threading.Thread(target=client, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert wrong == []
    mesh.quiet()


def test_a_sniffed_request_uses_the_connection_that_was_dialled_meanwhile(mesh: Mesh) -> None:
    start(mesh)
    connection = mesh.dial(port=AUTO_PORT)
    until(lambda: mesh.origins[0].open == 1 or mesh.worker.header["upstream_open"] >= 1, "dialled for a server that speaks first")
    connection.sendall(request())
    assert read_message(connection).body == b"ok"
