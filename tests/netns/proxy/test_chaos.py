"""Clients and servers that do everything wrong at once, by chance but from a seed: nobody gets another's answer, nothing is left.

Again with the same script: NARROWS_CHAOS_SEED=... (the failing run prints it). Threads make the timing differ, not the choices.
"""
from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
import threading
import time
from pathlib import Path

import pytest

from tests.support.mesh import AUTO_PORT, HTTP_PORT, TCP_PORT, VIP, Mesh, everything, half_close, read_message, request
from tests.support.wait import until

pytestmark = pytest.mark.netns

CLIENTS = 6
SECONDS = 8.0
SERVER_WAYS = ("length", "chunked", "close", "slow", "cut", "reset", "garbage", "extra", "early", "interim", "no-body")
CLIENT_WAYS = ("kept", "pipelined", "half-closed", "cut", "reset", "garbage", "framing", "slow", "leaves")
FRAMING = (b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n", b"Content-Length: 1\r\nContent-Length: 2\r\n",
           b"Transfer-Encoding: gzip\r\n", b"Content-Length: -1\r\n", b"Bad Name: x\r\n", b" folded\r\n")


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def slowly(connection: socket.socket, data: bytes, dice: random.Random) -> None:
    while data:
        n = dice.randint(1, 1 + len(data) // 3)
        connection.sendall(data[:n])
        data = data[n:]
        time.sleep(0.002)       # the slowness itself, nothing is waited for


def body_of(mark: str) -> bytes:
    """Each body says whose it is, in every part."""
    return f"{mark};".encode() * (1 + int(mark.split("-")[1]) * 37 % 900)


class Server:
    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, connection: socket.socket) -> None:
        while True:
            try:
                asked = read_message(connection)
            except (ConnectionError, ValueError, AssertionError):
                return
            _, mark, way = asked.first.split(" ")[1].split("/")
            if not self.answer(connection, mark, way, random.Random(f"{self.seed}{mark}")):
                return

    def answer(self, connection: socket.socket, mark: str, way: str, dice: random.Random) -> bool:
        """False: the connection is to be closed."""
        body = body_of(mark)
        whole = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body
        if way == "chunked":
            whole = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n%x\r\n" % len(body) + body + b"\r\n0\r\n\r\n"
        elif way == "close":
            whole = b"HTTP/1.1 200 OK\r\n\r\n" + body
        elif way == "cut":
            whole = whole[:dice.randrange(len(whole))]
        elif way == "garbage":
            whole = dice.randbytes(dice.randint(1, 300))
        elif way == "extra":
            whole += b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nalien"
        elif way == "interim":
            whole = b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n" * dice.randint(1, 20) + whole
        elif way == "no-body":
            whole = b"HTTP/1.1 204 No Content\r\ncontent-length: 5\r\n\r\nalien"
        if way == "slow":
            slowly(connection, whole, dice)
        else:
            connection.sendall(whole)
        if way == "reset":
            reset(connection)
        return way not in ("close", "cut", "reset", "garbage", "early")


class Client:
    def __init__(self, mesh: Mesh, number: int, seed: int) -> None:
        self.mesh = mesh
        self.number = number
        self.dice = random.Random(f"{seed}-{number}")
        self.asked = self.answered = 0
        self.error: BaseException | None = None

    def run(self) -> None:
        end = time.monotonic() + SECONDS
        try:
            while time.monotonic() < end and self.error is None:
                self.turn()
        except BaseException as error:
            self.error = error

    def next(self) -> tuple[str, bytes]:
        self.asked += 1
        mark = f"{self.number}-{self.asked}"
        way = self.dice.choice(("length", "chunked", "interim") if self.dice.random() < 0.5 else SERVER_WAYS)
        method, body = self.dice.choice((("GET", b""), ("POST", self.dice.randbytes(self.dice.randint(1, 40_000)))))
        return mark, request(f"/{mark}/{way}", method=method, body=body)

    def read(self, connection: socket.socket, mark: str) -> None:
        answer = read_message(connection)
        while answer.status == 103:
            answer = read_message(connection)
        assert answer.status in (200, 204, 400, 408, 431, 502, 503, 504), answer.first
        if answer.status == 200:
            assert answer.body == body_of(mark), f"asked for {mark}, got {answer.body[:40]!r}"
            self.answered += 1

    def turn(self) -> None:
        dice = self.dice
        way = dice.choice(CLIENT_WAYS)
        port = dice.choice((HTTP_PORT, AUTO_PORT, TCP_PORT, 8080))
        address, pod = (self.mesh.pods.server.ip, self.mesh.pods.other) if port == 8080 else (VIP, None)
        connection = self.mesh.dial(address, port, pod)
        self.mesh.sockets.remove(connection)
        connection.settimeout(15)
        # opaque TCP passes garbage of servers on: what cannot be read is no wrong answer
        with contextlib.closing(connection), contextlib.suppress(ConnectionError, ValueError if port == TCP_PORT else ConnectionError):
            self.talk(connection, "kept" if port == TCP_PORT and way == "pipelined" else way)

    def talk(self, connection: socket.socket, way: str) -> None:
        dice = self.dice
        if way in ("kept", "slow"):
            for _ in range(dice.randint(1, 6)):
                mark, asked = self.next()
                if way == "slow":
                    slowly(connection, asked, dice)
                else:
                    connection.sendall(asked)
                self.read(connection, mark)
        elif way == "pipelined":
            asked = [self.next() for _ in range(dice.randint(2, 5))]
            connection.sendall(b"".join(one for _, one in asked))
            for mark, _ in asked:
                self.read(connection, mark)
        else:
            mark, whole = self.next()
            if way == "half-closed":
                connection.sendall(whole)
                half_close(connection)
                self.read(connection, mark)
            elif way == "garbage":
                connection.sendall(dice.randbytes(dice.randint(1, 2_000)))
                half_close(connection)
                while connection.recv(65_536):
                    pass
            elif way == "framing":
                connection.sendall(b"POST / HTTP/1.1\r\nHost: x\r\n" + dice.choice(FRAMING) + b"\r\nhello")
                half_close(connection)
                while connection.recv(65_536):
                    pass
            else:
                connection.sendall(whole if way == "leaves" else whole[:dice.randrange(len(whole))])
                if way == "reset":
                    reset(connection)


def processor_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return int(fields[11]) + int(fields[12])


def test_chaos_crosses_no_answers_and_leaves_nothing(mesh: Mesh) -> None:
    seed = int(os.environ.get("NARROWS_CHAOS_SEED") or random.SystemRandom().randrange(1 << 32))
    print(f"NARROWS_CHAOS_SEED={seed}")
    mesh.configure(*everything(mesh))
    mesh.settings(stream_idle_timeout_ms=3_000, tcp_idle_timeout_ms=3_000, http_idle_timeout_ms=3_000, request_head_timeout_ms=2_000)
    mesh.origin(8080, Server(seed))
    descriptors, resident = mesh.quiet(), mesh.worker.resident()
    clients = [Client(mesh, number, seed) for number in range(CLIENTS)]
    threads = [threading.Thread(target=client.run, daemon=True) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS + 40)
        assert not thread.is_alive(), "a client hangs"
    for client in clients:
        if client.error is not None:
            raise client.error
    assert sum(client.answered for client in clients) > 30, "most of it must have worked, or nothing was tried"
    assert not mesh.worker.ended()
    assert mesh.quiet() == descriptors
    assert mesh.worker.resident() < resident + (64 << 20)
    before, turns = processor_ticks(mesh.worker.pid), mesh.worker.header["loop_turns"]
    until(lambda: mesh.worker.header["loop_turns"] > turns + 1, "two heartbeats")
    assert processor_ticks(mesh.worker.pid) - before <= 5, "busy without work"
