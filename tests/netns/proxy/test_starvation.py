"""One pod attacks, another lives on the same worker: the bound holds, every request of the other succeeds, and memory comes back.

What the attacker and the victim share is the worker alone: each has a client pod of its own, and servers outside the mesh. How much
slower the victim gets is measured by tests/bench/starvation.py; here it must be served.
"""
from __future__ import annotations

import contextlib
import fcntl
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator
from ipaddress import ip_address

import pytest

from agent import netlink
from agent.dataplane import blobs
from agent.model.routing import Endpoint
from tests.support import conntrack
from tests.support.halfopen import half_open
from tests.support.mesh import AUTO_PORT, HTTP_PORT, VIP, Mesh, Web, cluster, destination, everything, read_message, request, response
from tests.support.victim import DEADLINE, VICTIM_PORT, Victim
from tests.support.wait import until

pytestmark = pytest.mark.netns

MEBIBYTE = 1 << 20


@pytest.fixture
def victim(mesh: Mesh) -> Iterator[Victim]:
    """The server's pod as a client: its outbound way is captured by the worker that the attacker's is captured by.

    The service's only server is in the unmeshed pod: behind the victim's own inbound way an attack would fill the victim's share too.
    """
    mesh.configure(*everything(mesh), cluster("all", Endpoint(ip_address(mesh.pods.other.ip), 8080)))
    mesh.origin(VICTIM_PORT, Web(), mesh.pods.other)
    made = Victim(mesh, mesh.pods.server, mesh.pods.other.ip)
    try:
        made.served()
        yield made
    finally:
        made.stop()


def attack(mesh: Mesh, many: int, say: bytes = b"", port: int = 8080, *, receive_buffer: int = 0) -> list[socket.socket]:
    """Connections of the attacker's pod to the unmeshed pod: connects that are not yet done are kept too."""
    def dial() -> list[socket.socket]:
        made = []
        for _ in range(many):
            one = socket.socket()
            if receive_buffer:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            one.setblocking(False)
            one.connect_ex((mesh.pods.other.ip, port))
            made.append(one)
        return made

    made = netlink.in_netns(mesh.pods.client.path, dial)
    mesh.sockets += made
    if say:
        for one in made:
            with contextlib.suppress(OSError):
                one.settimeout(2)
                one.sendall(say)
    return made


def close(connections: list[socket.socket]) -> None:
    for one in connections:
        with contextlib.suppress(OSError):
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        one.close()


def comes_back(mesh: Mesh, resident: int) -> None:
    until(lambda: mesh.worker.header["downstream_open"] <= 8, "the attacker's connections are gone", timeout=DEADLINE)
    until(lambda: mesh.worker.header["buffered_bytes"] <= 8 * 65_536, "its buffers too", timeout=DEADLINE)
    until(lambda: mesh.worker.resident() < resident + 8 * MEBIBYTE, "and the memory", timeout=DEADLINE)


class Silent:
    """Takes connections and says nothing."""

    def __call__(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while connection.recv(65_536):
                pass


class Flood:
    """Sends without end to whoever connects."""

    def __call__(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection.sendall(bytes(65_536))


def blocked(connection: socket.socket) -> None:
    """Neither reads nor ends until the peer does."""
    connection.settimeout(None)
    poll = select.poll()
    poll.register(connection, select.POLLRDHUP)
    poll.poll(20_000)


def http_attack(mesh: Mesh, many: int, say: bytes) -> list[socket.socket]:
    """Requests through the service: the attacker's pod is the client of a meshed HTTP service."""
    made = [mesh.dial() for _ in range(many)]
    for one in made:
        one.sendall(say)
    return made


# ---- number -------------------------------------------------------------------------------------------------------------------

def test_a_pod_that_floods_with_connections_gets_its_bound_and_is_told_why(mesh: Mesh, victim: Victim) -> None:
    mesh.settings(connections_per_pod=64, hold_timeout_ms=500)
    mesh.origin(8080, Silent(), mesh.pods.other)
    resident = mesh.worker.resident()
    flood = attack(mesh, 400)
    victim.served()
    until(lambda: mesh.worker.header["refused_connections"] > 100, "those beyond are refused", timeout=DEADLINE)
    victim.served()
    header = mesh.worker.header
    assert header["pod_connections"] <= header["pod_connections_limit"] == 64
    told = [record for record in mesh.worker.records() if record["details"] == "overload{pod_connections}"]
    assert 0 < len(told) <= 3 * 64, "logged, but a bounded number of times"
    assert {record["flag"] for record in told} == {"UO"}
    assert {record["source"] for record in told} == {1}
    close(flood)
    comes_back(mesh, resident)


def test_inbound_connections_leave_a_pod_its_own_way_out(mesh: Mesh, victim: Victim) -> None:
    mesh.settings(connections_per_pod=16)
    mesh.origin(8088, blocked)
    flood = [mesh.dial(mesh.pods.server.ip, 8088, mesh.pods.other) for _ in range(12)]
    until(lambda: mesh.worker.header["downstream_open"] >= 13, "three quarters of the pod's connections are inbound")
    late = mesh.dial(mesh.pods.server.ip, 8088, mesh.pods.other)
    victim.served()
    close([*flood, late])


def test_idle_kept_connections_give_way_to_new_ones(mesh: Mesh) -> None:
    mesh.configure(*everything(mesh))
    mesh.settings(connections_per_pod=4, hold_timeout_ms=10_000)
    mesh.origin(8080, Web())
    kept = [mesh.dial() for _ in range(3)]
    for one in kept:
        one.sendall(request())
        assert read_message(one).status == 200
    fresh = mesh.dial()
    fresh.sendall(request())
    assert read_message(fresh).status == 200
    assert mesh.worker.header["shed_idle"] >= 1
    assert mesh.worker.header["refused_connections"] == 0


def test_a_pod_that_takes_descriptors_leaves_half_to_the_others(mesh: Mesh, victim: Victim) -> None:
    mesh.settings(descriptors_per_worker=120, hold_timeout_ms=500)
    mesh.origin(8080, Silent(), mesh.pods.other)
    flood = attack(mesh, 300)
    until(lambda: mesh.worker.header["refused_descriptors"] > 50, "those beyond are refused", timeout=DEADLINE)
    victim.served()
    header = mesh.worker.header
    assert header["descriptors"] <= header["descriptors_limit"] == 120
    assert header["pod_connections"] * 2 <= 60, "half is the most that one pod gets"
    assert header["accept_errors"] == 0
    close(flood)


@pytest.mark.redirects("raw SYNs are none of a socket: hooks do not turn them to us, and nothing is kept of them")
def test_a_hundred_thousand_half_open_connections_harm_only_their_pod(mesh: Mesh, victim: Victim) -> None:
    """SYNs to a service, whose answers never come: what the kernel keeps of them is the namespace's own, and the worker sees none."""
    mesh.settings(connections_per_pod=64)
    resident, accepted = mesh.worker.resident(), mesh.worker.header["accepted"]
    with half_open(mesh.pods.client, VIP, HTTP_PORT):
        for _ in range(10):
            victim.served(5)
        waiting = mesh.pods.client.run("ss", "-Htn", "state", "syn-recv").stdout.splitlines()
        assert 100 < len(waiting) < 1_024, "no more than about the backlog of 512"
        assert conntrack.count(mesh.pods.client) > 90_000
        assert mesh.worker.resident() < resident + 8 * MEBIBYTE
        assert mesh.worker.header["pod_connections"] <= 64
        assert mesh.worker.header["accepted"] - accepted <= victim.asked + 1
    connection = until(lambda: reached(mesh), "the attacker's own connections are served again", timeout=DEADLINE)
    connection.close()
    mesh.pods.client.run("conntrack", "-F")


def reached(mesh: Mesh) -> socket.socket | None:
    with contextlib.suppress(TimeoutError):
        return netlink.in_netns(mesh.pods.client.path, lambda: socket.create_connection((VIP, HTTP_PORT), timeout=2))
    return None


# ---- bytes --------------------------------------------------------------------------------------------------------------------

def test_a_pod_that_opens_and_never_reads_holds_its_share_of_buffers(mesh: Mesh, victim: Victim) -> None:
    mesh.settings(buffered_bytes_per_pod=2 * MEBIBYTE, hold_timeout_ms=500)
    mesh.origin(8080, Flood(), mesh.pods.other)
    resident = mesh.worker.resident()
    flood = attack(mesh, 200, receive_buffer=4_096)
    until(lambda: mesh.worker.header["pod_buffered"] > MEBIBYTE, "the attacker's buffers fill", timeout=DEADLINE)
    victim.served()
    header = mesh.worker.header
    assert header["pod_buffered"] <= header["pod_buffered_limit"] * 5 // 4
    assert mesh.worker.resident() < resident + 16 * MEBIBYTE
    close(flood)
    comes_back(mesh, resident)


def pipes(mesh: Mesh) -> int:
    """What the pipes of the worker may hold, in bytes, asked of the kernel. What it inherited is among them."""
    folder = f"/proc/{mesh.worker.pid}/fd"
    sizes: dict[str, int] = {}
    for fd in os.listdir(folder):
        with contextlib.suppress(FileNotFoundError):  # the victim's connections come and go
            name = os.readlink(f"{folder}/{fd}")
            if name.startswith("pipe:") and name not in sizes:
                with open(f"{folder}/{fd}", "rb", opener=lambda path, _: os.open(path, os.O_RDONLY | os.O_NONBLOCK)) as end:
                    sizes[name] = fcntl.fcntl(end, fcntl.F_GETPIPE_SZ)
    return sum(sizes.values())


@pytest.mark.parametrize(("share", "most"), [(128 * MEBIBYTE, 32 * 262_144), (2 * MEBIBYTE, MEBIBYTE + 262_144)])
def test_bulk_to_readers_that_sleep_counts_with_all_that_its_pipes_may_hold(mesh: Mesh, victim: Victim, share: int, most: int) -> None:
    """Half of the share at most goes to pipes; what is relayed beyond it goes through buffers, which are counted too."""
    mesh.settings(buffered_bytes_per_pod=share, hold_timeout_ms=500)
    wake = threading.Event()

    def sleeper(connection: socket.socket) -> None:
        connection.recv(1 << 20, socket.MSG_WAITALL)
        wake.wait(20)

    mesh.origin(8080, sleeper, mesh.pods.other)
    before = pipes(mesh)
    full = attack(mesh, 60)
    moved = 0

    def stuck() -> bool:
        nonlocal moved
        last = moved
        for one in full:
            with contextlib.suppress(OSError):
                while True:
                    moved += one.send(b"z" * MEBIBYTE)
        return moved == last > 60 * MEBIBYTE

    until(stuck, "all readers sleep, and everything before them is full", timeout=30)
    until(lambda: mesh.worker.header["pod_buffered"] >= pipes(mesh) - before > 0, "every pipe is counted")
    assert most // 2 <= pipes(mesh) - before <= most
    assert mesh.worker.header["pod_buffered"] <= share * 5 // 4
    victim.served()
    wake.set()
    close(full)
    until(lambda: mesh.worker.header["downstream_open"] <= 8, "the attacker's connections are gone", timeout=DEADLINE)
    until(lambda: mesh.worker.header["buffered_bytes"] <= 8 * 65_536, "and what was counted for them", timeout=DEADLINE)


def test_bodies_that_a_server_does_not_take_are_shed_and_say_why(mesh: Mesh, victim: Victim) -> None:
    """Zero windows on the server's side, HTTP: the connection whose peer has not read for longest makes room for the others."""
    mesh.settings(buffered_bytes_per_pod=MEBIBYTE, hold_timeout_ms=500)
    mesh.origin(8080, blocked, mesh.pods.other)
    head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\n\r\n"
    flood = [mesh.dial() for _ in range(150)]
    for one in flood:
        one.setblocking(False)
        with contextlib.suppress(OSError):
            one.send(head + bytes(4 * MEBIBYTE))
    until(lambda: mesh.worker.header["shed_stalled"] > 0, "the longest stalled ends", timeout=DEADLINE)
    victim.served()
    assert mesh.worker.header["pod_buffered"] <= MEBIBYTE * 5 // 4
    until(lambda: ("overload{stalled}", "OM") in {(record["details"], record["flag"]) for record in mesh.worker.records()},
          "its reason is logged")
    close(flood)


def test_requests_that_wait_for_their_answers_give_up_their_copies_before_anybody_is_refused(mesh: Mesh, victim: Victim) -> None:
    mesh.settings(buffered_bytes_per_pod=MEBIBYTE, hold_timeout_ms=5_000)
    go = threading.Event()

    def late(connection: socket.socket) -> None:
        read_message(connection)
        go.wait(20)
        connection.sendall(response())

    mesh.origin(8080, late, mesh.pods.other)
    waiting = http_attack(mesh, 100, request())
    until(lambda: mesh.worker.header["shed_replay"] > 0, "copies go", timeout=DEADLINE)
    victim.served()
    go.set()
    for one in waiting:
        assert read_message(one).status == 200
    assert mesh.worker.header["refused_memory"] == 0


def test_who_cannot_be_read_for_want_of_memory_is_told_so_in_time(mesh: Mesh) -> None:
    """Heads that do not end hold all that the pod may have: requests on connections that were open before are answered, not forgotten."""
    mesh.settings(buffered_bytes_per_pod=MEBIBYTE, hold_timeout_ms=500, detect_timeout_ms=60_000)
    mesh.configure(*everything(mesh))
    mesh.origin(8080, Web())
    kept, fresh = mesh.dial(), mesh.dial(port=AUTO_PORT)
    kept.sendall(request())
    assert read_message(kept).status == 200
    until(lambda: mesh.worker.header["accepted"] >= 3, "both are taken, and the other hop", timeout=DEADLINE)
    peers = {"{}:{}".format(*one.getsockname()) for one in (kept, fresh)}
    flood = http_attack(mesh, 64, b"GET / HTTP/1.1\r\nHost: x\r\nX-Long: a")
    until(lambda: mesh.worker.header["pod_buffered"] >= MEBIBYTE, "no buffer is left", timeout=DEADLINE)
    kept.sendall(request("/late"))
    fresh.sendall(b"G")
    assert read_message(kept).status == 503
    with contextlib.suppress(ConnectionResetError):
        assert fresh.recv(1) == b""
    told: dict[str, str] = {}

    def both() -> bool:
        told.update({record["downstream_remote"]: record["flag"] for record in mesh.worker.records()
                     if record["details"] == "overload{pod_memory}"})
        return peers <= told.keys()

    until(both, "both are logged", timeout=DEADLINE)
    assert [told[one] for one in peers] == ["OM", "OM"]
    close(flood)
    until(lambda: mesh.worker.header["downstream_open"] <= 4, "the flood is over", timeout=DEADLINE)
    with mesh.dial() as again:
        again.sendall(request())
        assert read_message(again).status == 200


# ---- time ---------------------------------------------------------------------------------------------------------------------

def test_slow_heads_end_with_408_and_hold_nothing_of_others(mesh: Mesh, victim: Victim) -> None:
    mesh.settings(request_head_timeout_ms=700)
    mesh.origin(8080, Web(), mesh.pods.other)
    slow = http_attack(mesh, 50, b"GET / HTTP/1.1\r\nHost: x\r\n")
    victim.served()
    for one in slow:
        with contextlib.suppress(OSError):
            one.sendall(b"X-A: b\r\n")      # a byte now and then does not help: the bound is on the whole head
    for one in slow:
        assert read_message(one).status == 408
    assert mesh.worker.header["refused_head_timeout"] == 50


def test_slow_bodies_end_with_408(mesh: Mesh, victim: Victim) -> None:
    mesh.settings(request_body_timeout_ms=500)
    mesh.origin(8080, Silent(), mesh.pods.other)
    slow = http_attack(mesh, 20, b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nab")
    for one in slow:
        assert read_message(one).status == 408
    until(lambda: mesh.worker.header["refused_body_timeout"] >= 20, "counted")
    assert any(record["details"] == "request_body_timeout" for record in mesh.worker.records())
    victim.served()


def test_bodies_that_trickle_may_take_for_ever_within_their_pods_share_and_harm_nobody_else(mesh: Mesh, victim: Victim) -> None:
    """A byte now and then is no silence: as with Envoy and nginx an upload may last for hours. Who fills the share with such bodies gets no
    more connections; others get theirs as before."""
    mesh.settings(connections_per_pod=64, request_body_timeout_ms=1_000, hold_timeout_ms=500)
    mesh.origin(8080, Silent(), mesh.pods.other)
    slow = http_attack(mesh, 48, b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n")   # three quarters: all that go out
    until(lambda: mesh.worker.header["pod_connections"] >= 48, "the share is full", timeout=DEADLINE)
    slowest = victim.slowest
    end = time.monotonic() + 4                      # four times the bound on silence
    while time.monotonic() < end:
        for one in slow:
            one.sendall(b"x")
        victim.served(2)
        with contextlib.suppress(ConnectionResetError), mesh.dial() as late:
            late.settimeout(3)
            late.sendall(request())
            assert late.recv(1) == b"", "beyond the share"
    for one in slow:
        one.setblocking(False)
        with pytest.raises(BlockingIOError):        # neither answered nor ended
            one.recv(1)
    header = mesh.worker.header
    assert header["refused_body_timeout"] == 0 and header["refused_connections"] > 0
    assert header["pod_connections"] <= 64
    assert victim.slowest < max(1.0, 20 * slowest)
    for one in slow[:10]:                           # and who falls silent ends
        one.setblocking(True)
        assert read_message(one).status == 408
    close(slow)


def test_heads_of_a_mebibyte_are_refused_as_soon_as_they_are_too_long(mesh: Mesh, victim: Victim) -> None:
    mesh.origin(8080, Web(), mesh.pods.other)
    for _ in range(20):
        one = mesh.dial()
        one.settimeout(5)
        with contextlib.suppress(ConnectionError):
            one.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * MEBIBYTE)
        with contextlib.suppress(ConnectionError):
            assert read_message(one).status == 431
    assert mesh.worker.header["refused_head_size"] == 20
    victim.served()


def test_giant_pipelines_are_cut_into_turns(mesh: Mesh, victim: Victim) -> None:
    """Ten connections with 2,000 requests each in flight; the victim's wait is a part of what they take in all."""
    mesh.origin(8080, Web(), mesh.pods.other)
    pipelines = [mesh.dial() for _ in range(10)]
    for one in pipelines:
        one.setblocking(False)
        with contextlib.suppress(OSError):
            one.send(request() * 2_000)
    victim.served(50)
    until(lambda: mesh.worker.header["turns_cut"] > 0, "the attacker had more to do than its turn", timeout=DEADLINE)
    close(pipelines)


def test_a_pod_that_dials_what_nobody_knows_does_not_take_the_others_places(mesh: Mesh, victim: Victim) -> None:
    mesh.worker.commit(blobs.Delete(blobs.Kind.DESTINATION, destination(HTTP_PORT).key))
    mesh.settings(hold_connections=20, hold_timeout_ms=10_000)
    for _ in range(30):
        with contextlib.suppress(ConnectionResetError):  # told while it connects
            mesh.dial(port=HTTP_PORT).sendall(request())
    until(lambda: mesh.worker.header["refused_held"] > 0, "those beyond its share are refused", timeout=DEADLINE)
    assert mesh.worker.header["held"] <= 10
    victim.served()
    assert any(record["details"] == "configuration_overflow" for record in mesh.worker.records())


