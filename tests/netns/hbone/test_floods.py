"""Somebody whom the mesh believes, or nobody, attacks a pod by its port 15008: other pods of the worker are served meanwhile, the pod's
bounds hold, the operator is told why (a bounded number of times), and what it cost comes back.

How much slower others get is measured by tests/bench/starvation.py.
"""
from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent import netlink
from agent.model.workload import Protocol
from tests.support.hbone import configure, enrol
from tests.support.mesh import Mesh, Web
from tests.support.pki import Authority
from tests.support.victim import DEADLINE, VICTIM_PORT, Victim
from tests.support.wait import PATIENCE, until

pytestmark = pytest.mark.netns
ROOT = Authority()
REMOTE_ID = "spiffe://cluster.local/ns/default/sa/remote"
MEBIBYTE = 1 << 20
TUNNELS_UNREAD, LEFT = 8, 327_680  # bytes that wait for one socket (LEFT_BYTES of ext/proxy/tunnel.pyx)
TUNNELS = 1024  # of a pod (TUNNELS_POD of ext/proxy/state.pxd)
TOLD_A_SECOND = 64  # of a pod (TELL_A_SECOND of ext/proxy/tunnel_in.pyx)
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEADERS, PRIORITY, RESET, SETTINGS, PING, UPDATE, CONTINUATION = 1, 2, 3, 4, 6, 8, 9
HEADERS_END, STREAM_END = 4, 1


def frame(kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


def setting(which: int, value: int) -> bytes:
    return frame(SETTINGS, payload=which.to_bytes(2, "big") + value.to_bytes(4, "big"))


def update(stream: int, by: int) -> bytes:
    return frame(UPDATE, stream=stream, payload=by.to_bytes(4, "big"))


@pytest.fixture
def pair(mesh: Mesh) -> Mesh:
    enrol(mesh, ROOT)
    configure(mesh, protocol=Protocol.TCP)
    return mesh


@pytest.fixture
def victim(pair: Mesh) -> Iterator[Victim]:
    """The client's pod, on its way to the pod without mesh; the server's is attacked."""
    pair.origin(VICTIM_PORT, Web(), pair.pods.other)
    made = Victim(pair, pair.pods.client, pair.pods.other.ip)
    try:
        made.served()
        yield made
    finally:
        made.stop()


class Attacker:
    """Connections to the server's port 15008 from the pod without mesh."""

    def __init__(self, mesh: Mesh, folder: Path) -> None:
        self.mesh = mesh
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self.context.check_hostname = False
        self.context.load_verify_locations(ROOT.pem(folder))
        self.context.set_alpn_protocols(["h2"])
        self.context.load_cert_chain(ROOT.issue(REMOTE_ID).pem(folder))
        self.target = f"{mesh.pods.server.ip}:8080".encode()

    def plain(self, *, receive_buffer: int = 0) -> socket.socket:
        def dial() -> socket.socket:
            one = socket.socket()
            one.settimeout(DEADLINE)
            if receive_buffer:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            one.connect((self.mesh.pods.server.ip, 15008))
            return one

        made = netlink.in_netns(self.mesh.pods.other.path, dial)
        self.mesh.sockets.append(made)
        return made

    def tunnel(self, *, receive_buffer: int = 0, settings: bytes = b"") -> ssl.SSLSocket:
        made = self.context.wrap_socket(self.plain(receive_buffer=receive_buffer))
        self.mesh.sockets.append(made)
        made.sendall(PREFACE + frame(SETTINGS, payload=settings))
        return made

    def connect(self, stream: int, *, ended: bool = False) -> bytes:
        block = b"\x02\x07CONNECT\x01" + bytes((len(self.target),)) + self.target
        return frame(HEADERS, HEADERS_END | (STREAM_END if ended else 0), stream, block)


@pytest.fixture
def attacker(pair: Mesh, tmp_path: Path) -> Attacker:
    return Attacker(pair, tmp_path)


def statuses(tunnel: ssl.SSLSocket, many: int) -> list[int]:
    """First bytes of so many responses: 0x88 is 200 (RFC 7541, appendix A)."""
    data, found = b"", []
    while len(found) < many:
        more = tunnel.recv(65_536)
        assert more, "the tunnel was closed"
        data += more
        while len(data) >= 9 and len(data) >= 9 + int.from_bytes(data[:3], "big"):
            size = int.from_bytes(data[:3], "big")
            if data[3] == HEADERS:
                found.append(data[9])
            data = data[9 + size:]
    return found


def served_through(attacker: Attacker) -> None:
    """Somebody with good intentions gets through to the pod that is attacked."""
    tunnel = attacker.tunnel()
    tunnel.sendall(attacker.connect(1))
    assert statuses(tunnel, 1) == [0x88]
    tunnel.close()


def tunnels(mesh: Mesh) -> int:
    return len(mesh.pods.server.run("ss", "-Htn", "state", "established", "sport = :15008").stdout.splitlines())


def comes_back(mesh: Mesh, resident: int, mebibytes: int = 24) -> None:
    until(lambda: tunnels(mesh) == 0, "the tunnels are gone", timeout=DEADLINE)
    until(lambda: mesh.worker.header["downstream_open"] <= 8, "and what they carried", timeout=DEADLINE)
    until(lambda: mesh.worker.header["buffered_bytes"] <= 8 * 65_536, "and its buffers", timeout=DEADLINE)
    until(lambda: mesh.worker.resident() < resident + mebibytes * MEBIBYTE, "and the memory", timeout=60)  # malloc_trim: once in 10 s


def close(mesh: Mesh) -> None:
    for one in mesh.sockets:
        one.close()


# ---- handshakes -------------------------------------------------------------------------------------------------------------------------

def stall(attacker: Attacker, say: bytes) -> None:
    for _ in range(2 * TUNNELS):
        one = attacker.plain()
        if say:
            with contextlib.suppress(ConnectionError):      # it has given way already
                one.sendall(say)


def distrusted(mesh: Mesh) -> int:
    return sum(values["closed"] for key, values in mesh.worker.series() if "DPE" in str(key))


@pytest.mark.parametrize("say, mebibytes", [(b"", 64), (b"\x16\x03\x01\x02\x00\x01\x00", 160)], ids=["silent", "begun"])
def test_handshakes_that_stall_are_bounded_and_keep_nobody_out(pair: Mesh, victim: Victim, attacker: Attacker, say: bytes,
                                                               mebibytes: int) -> None:
    """`mebibytes`: what 1,024 may have, with gaps in the heap; 4,096 that are lost would be 100 and 270."""
    pair.origin(8080, lambda connection: connection.recv(1))
    resident = pair.worker.resident()
    began = time.monotonic()
    stall(attacker, say)
    victim.served()
    until(lambda: tunnels(pair) <= TUNNELS, "no more than its bound are open", timeout=DEADLINE)
    served_through(attacker)
    assert pair.worker.resident() < resident + mebibytes * MEBIBYTE
    until(lambda: tunnels(pair) == 0, "they are ended after 10 s", timeout=40)
    victim.served()
    until(lambda: distrusted(pair) >= TUNNELS, "those that gave way and those that were ended are counted", timeout=DEADLINE)
    told = [record for record in pair.worker.records() if "handshake was not finished in time" in record["failure"]]
    assert told and all(record["flag"] == "DPE" for record in told)
    assert len(told) <= TOLD_A_SECOND * (time.monotonic() - began + 1), "logged, but a bounded number of times"
    stall(attacker, say)
    close(pair)
    comes_back(pair, resident, 24 if PATIENCE == 1 else mebibytes)  # a sanitizer keeps what was freed


# ---- frames ----------------------------------------------------------------------------------------------------------------------------

def resets(attacker: Attacker, stream: int) -> bytes:
    return attacker.connect(stream) + frame(RESET, stream=stream, payload=(8).to_bytes(4, "big"))


def makes_us_reset(attacker: Attacker, stream: int) -> bytes:
    return attacker.connect(stream) + update(stream, 0x7fffffff)


def bomb(attacker: Attacker, stream: int) -> bytes:
    """A field of 3,800 bytes in the table, then 8,000 times its number."""
    return frame(HEADERS, HEADERS_END, stream, b"\x40\x01x\x7f\xd9\x1c" + b"y" * 3_800 + b"\xbe" * 8_000)


def continuations(attacker: Attacker, stream: int) -> bytes:
    return frame(HEADERS, 0, stream, b"\x00\x01a\x01b") + frame(CONTINUATION, 0, stream, b"\x00\x01a\x01b" * 3_000) * 40


def each(said: bytes) -> object:
    return lambda attacker, stream: said


FRAMES = {
    "resets": resets, "makes_us_reset": makes_us_reset, "bomb": bomb, "continuations": continuations,
    "ping": each(frame(PING, payload=bytes(8)) * 50), "settings": each(setting(4, 1_000) * 50),
    "priority": each(frame(PRIORITY, stream=5, payload=b"\0\0\0\x03\x10") * 50),
    "window": each(update(0, 0x7fffffff)), "streams": lambda attacker, stream: attacker.connect(stream),
    "noise": each(b"\xff" * 4_096),
}
LOGGED_MUCH = {"resets", "makes_us_reset", "streams"}  # each stream is a connection with a record; the log keeps what it has room for


@pytest.mark.parametrize("kind", FRAMES)
def test_a_flood_of_frames_ends_its_tunnel_and_harms_nobody(pair: Mesh, victim: Victim, attacker: Attacker, kind: str) -> None:
    pair.origin(8080, lambda connection: connection.recv(1))
    resident = pair.worker.resident()
    for _ in range(5):
        tunnel = attacker.tunnel()
        tunnel.sendall(attacker.connect(1))
        with contextlib.suppress(ConnectionError, ssl.SSLError):    # which is how it ends; what takes too long is TimeoutError
            for number in range(1, 20_000):
                tunnel.sendall(FRAMES[kind](attacker, 2 * number + 1))  # type: ignore[operator]
            while tunnel.recv(65_536):
                pass
        tunnel.close()
    victim.served()
    assert pair.worker.resident() < resident + 24 * MEBIBYTE
    told: list[dict[str, Any]] = []

    def seen() -> list[dict[str, Any]]:
        told.extend(record for record in pair.worker.records() if record["details"] == "http2.codec_error")
        return told

    if kind not in LOGGED_MUCH:
        assert len(until(seen, "it is told", timeout=DEADLINE)) <= 5
        assert told[0]["flag"] == "DPE" and told[0]["downstream_remote"].startswith(pair.pods.other.ip)
        assert "carry nothing" in told[0]["failure"] or "broke HTTP/2" in told[0]["failure"]
    until(lambda: distrusted(pair) == 5, "and counted", timeout=DEADLINE)
    comes_back(pair, resident)


# ---- streams --------------------------------------------------------------------------------------------------------------

def flood(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            connection.sendall(bytes(65_536))


@pytest.mark.parametrize("window", ["closed", "tiny", "wide"])
def test_streams_that_are_not_read_hold_a_share_of_buffers(pair: Mesh, victim: Victim, attacker: Attacker, window: str) -> None:
    """Closed or tiny windows; or wide ones, and a socket that is not read."""
    pair.settings(buffered_bytes_per_pod=2 * MEBIBYTE, hold_timeout_ms=500)
    pair.origin(8080, flood)
    resident = pair.worker.resident()
    initial = {"closed": 0, "tiny": 1, "wide": 0x7fffffff}[window]
    for _ in range(12):
        with contextlib.suppress(OSError):      # refused when the pod has what it may have
            tunnel = attacker.tunnel(receive_buffer=4_096, settings=b"\0\x04" + initial.to_bytes(4, "big"))
            tunnel.sendall(update(0, 0x7fff0000 - 65_535) + b"".join(attacker.connect(2 * number + 1) for number in range(20)))
    until(lambda: pair.worker.header["pod_buffered"] > MEBIBYTE, "the pod's buffers fill", timeout=DEADLINE)
    victim.served()
    assert pair.worker.header["pod_buffered"] <= pair.worker.header["pod_buffered_limit"] * 5 // 4
    assert pair.worker.resident() < resident + 24 * MEBIBYTE
    close(pair)
    comes_back(pair, resident)


def test_what_a_socket_did_not_take_is_counted_as_the_pods(pair: Mesh, attacker: Attacker) -> None:
    """Encrypted bytes wait for each socket in memory of its own, beside the buffers of its one stream."""
    pair.origin(8080, flood)
    for _ in range(TUNNELS_UNREAD):
        tunnel = attacker.tunnel(receive_buffer=4_096, settings=b"\0\x04" + (0x7fffffff).to_bytes(4, "big"))
        tunnel.sendall(update(0, 0x7fff0000 - 65_535) + attacker.connect(1))
    until(lambda: pair.worker.header["pod_buffered"] >= TUNNELS_UNREAD * LEFT, "all of it is counted", timeout=DEADLINE)
    close(pair)
    until(lambda: pair.worker.header["pod_buffered"] <= 8 * 65_536, "and no more when they are gone", timeout=DEADLINE)


def test_half_closed_streams_are_connections_of_the_pod(pair: Mesh, victim: Victim, attacker: Attacker) -> None:
    pair.settings(connections_per_pod=64, hold_timeout_ms=500)
    done = threading.Event()
    origin = pair.origin(8080, lambda connection: (done.wait(4 * DEADLINE), None)[1])
    tunnel = attacker.tunnel()
    tunnel.sendall(b"".join(attacker.connect(2 * number + 1, ended=True) for number in range(150)))
    assert statuses(tunnel, 150).count(0x88) == 48, "three quarters of 64 are for one direction"
    victim.served()
    until(lambda: origin.open == 48, "the application has no more", timeout=DEADLINE)
    until(lambda: pair.worker.header["pod_connections"] >= 48, "the worker tells them", timeout=DEADLINE)
    assert pair.worker.header["pod_connections"] <= 64
    until(lambda: pair.worker.header["refused_connections"] == 102, "the others are counted", timeout=DEADLINE)
    told = [record for record in pair.worker.records() if record["details"] == "overload{pod_connections}"]
    assert {record["flag"] for record in told} == {"UO"} and len(told) <= 102
    done.set()
    until(lambda: origin.open == 0, "they end", timeout=DEADLINE)
    served_through(attacker)
    close(pair)
