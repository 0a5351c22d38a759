"""A real worker process without a keeper: this plays the keeper over a socket pair, with sockets made in a test's namespaces.

    with Worker() as worker:
        worker.commit(put_pod(...), put_service(...), ...)      applied, or AssertionError with the worker's text
        worker.attach(1, netns)                                 listeners 15001 and 15006 inside, sockets on demand
"""
from __future__ import annotations

import array
import contextlib
import fcntl
import importlib.util
import mmap
import os
import select
import socket
import struct
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from agent import netlink
from agent.dataplane.blobs import Entry, encode_transaction
from tests.support.netns import Netns
from tests.support.wait import until

MARK = 0x539
OUTBOUND, INBOUND, HBONE = 15001, 15006, 15008
KINDS = {OUTBOUND: 1, INBOUND: 2, HBONE: 3}
COMMIT, READY, APPLIED, FAILED, ATTACH, DETACH, SOCKETS, NEED, DRAINED, DRAIN, MISS = \
    7, 64, 65, 66, 67, 68, 69, 70, 71, 10, 32
START = "import sys; sys.path.insert(0, {!r}); from ext.proxy.worker import main; main()"
UID = GID = 64_321  # nobody else's


def library() -> str:
    """The folder that holds the built `ext`."""
    spec = importlib.util.find_spec("ext.proxy.worker")
    assert spec is not None and spec.origin is not None, "the extension is not built"
    return str(Path(spec.origin).parents[2])


def prepared_socket(family: int) -> socket.socket:
    """As the keeper makes them; to be called inside the pod's namespace."""
    made = socket.socket(socket.AF_INET6 if family == 6 else socket.AF_INET)
    made.setblocking(False)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, MARK)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if family == 6:
        made.setsockopt(socket.IPPROTO_IPV6, 75, 1)  # IPV6_TRANSPARENT
        made.setsockopt(socket.IPPROTO_IPV6, 78, 1)  # IPV6_FREEBIND
    else:
        made.setsockopt(socket.IPPROTO_IP, socket.IP_TRANSPARENT, 1)
        made.setsockopt(socket.IPPROTO_IP, 15, 1)  # IP_FREEBIND
    made.setsockopt(socket.IPPROTO_IP, 24, 1)  # IP_BIND_ADDRESS_NO_PORT
    return made


def prepared_listener(port: int, backlog: int = 512) -> socket.socket:
    made = socket.socket(socket.AF_INET6)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    made.setblocking(False)
    made.bind(("::", port))
    made.listen(backlog)
    return made


class Worker:
    """One worker. `misses` holds the keys it asked for; `on_miss` may commit at once (it runs in the keeper's thread)."""

    def __init__(self, *, index: int = 0, stock: bool = True, rlimit: int | None = None) -> None:
        from ext.core import ring, shm

        self.misses: list[str] = []
        self.on_miss: Callable[[str], None] | None = None
        self.stock = stock
        self.wanted: list[tuple[int, int, int]] = []
        self.answers: dict[int, tuple[int, bytes]] = {}
        self.events: list[int] = []
        self._pods: dict[int, Netns] = {}
        self._sequence = 0
        self._transaction = 0
        self._lock = threading.Lock()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.control = ours
        stats_fd, log_fd = (os.memfd_create(name) for name in ("stats", "log"))
        os.ftruncate(stats_fd, shm.stats_bytes())
        os.ftruncate(log_fd, ring.log_bytes())
        self.stats, self.log = mmap.mmap(stats_fd, 0), mmap.mmap(log_fd, 0)
        shm.format_stats(self.stats)
        ring.format_log(self.log)
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 100) for fd in (theirs.fileno(), stats_fd, log_fd)]
        actions = [(os.POSIX_SPAWN_DUP2, fd, at) for fd, at in zip(high, (3, 4, 5), strict=True)]
        argv = [sys.executable, "-I", "-S", "-c", START.format(library()), str(index), str(UID), str(GID)]
        if rlimit is not None:
            argv = ["prlimit", f"--nofile={rlimit}", "--", *argv]
        self.pid = os.posix_spawnp(argv[0], argv, os.environ, file_actions=actions)
        self.status: int | None = None
        for fd in (*high, stats_fd, log_fd):
            os.close(fd)
        theirs.close()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._thread.start()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- what a keeper says ------------------------------------------------------------------------------------

    def send(self, kind: int, payload: bytes = b"", fds: list[int] | None = None) -> int:
        with self._lock:
            self._sequence += 1
            sequence = self._sequence
        control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.control.sendmsg([struct.pack("<HHI", kind, 1, sequence) + payload], control)
        return sequence

    def offer(self, *entries: Entry) -> int:
        """Sends a transaction and returns its sequence number; its answer comes to `answers`."""
        self._transaction += 1
        return self.offer_raw(encode_transaction(self._transaction, entries))

    def offer_raw(self, data: bytes) -> int:
        fd = os.memfd_create("transaction", os.MFD_ALLOW_SEALING)
        os.write(fd, data)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
        try:
            return self.send(COMMIT, b"", [fd])
        finally:
            os.close(fd)

    def commit(self, *entries: Entry) -> None:
        sequence = self.offer(*entries)
        kind, payload = until(lambda: self.answers.get(sequence), "the worker answers the commit", timeout=5)
        assert kind == APPLIED, payload[12:].decode()

    def attach(self, handle: int, netns: Netns, ports: tuple[int, ...] = (OUTBOUND, INBOUND, HBONE)) -> None:
        made = [self._listener(netns, port) for port in ports]
        self._pods[handle] = netns
        kinds = bytes(KINDS[port] for port in ports)
        self.send(ATTACH, struct.pack("<II", handle, len(kinds)) + kinds, [s.fileno() for s in made])
        for one in made:
            one.close()

    @staticmethod
    def _listener(netns: Netns, port: int) -> socket.socket:
        """A worker that was told to detach closes its listener in its next turn; the port is free from then on."""
        def made() -> socket.socket | None:
            with contextlib.suppress(OSError):
                if netns.maker is not None:
                    return netns.maker("listener", netns, port)[0]
                return netlink.in_netns(netns.path, lambda: prepared_listener(port))
            return None

        listener = until(made, f"port {port} is free")
        assert listener is not None
        return listener

    def detach(self, handle: int) -> None:
        self.send(DETACH, struct.pack("<I", handle))

    def drain(self, milliseconds: int) -> int:
        return self.send(DRAIN, struct.pack("<I", milliseconds))

    def give(self, handle: int, family: int, many: int) -> None:
        netns = self._pods[handle]
        made = netns.maker("upstream", netns, family, many) if netns.maker is not None else \
            netlink.in_netns(netns.path, lambda: [prepared_socket(family) for _ in range(many)])
        self.send(SOCKETS, struct.pack("<IB", handle, family), [s.fileno() for s in made])
        for one in made:
            one.close()

    def _keep(self) -> None:
        poll = select.poll()
        poll.register(self.control, select.POLLIN)
        while not self._stop.is_set():
            if not poll.poll(50):
                continue
            try:
                data = self.control.recv(65536)
            except OSError:
                return
            if not data:
                return
            kind, _, sequence = struct.unpack_from("<HHI", data)
            self._hear(kind, sequence, data[8:])

    def _hear(self, kind: int, sequence: int, payload: bytes) -> None:
        if kind == NEED:
            handle, family, many = struct.unpack("<IBH", payload)
            self.wanted.append((handle, family, many))
            if self.stock:
                with contextlib.suppress(OSError):
                    self.give(handle, family, many)
        elif kind == MISS:
            key = payload[4:].decode()
            self.misses.append(key)
            if self.on_miss is not None:
                self.on_miss(key)
        elif sequence:
            self.answers[sequence] = (kind, payload)
        else:
            self.events.append(kind)

    # ---- what can be seen of it -------------------------------------------------------------------------------------

    @property
    def header(self) -> dict[str, Any]:
        from ext.core import shm

        return dict(shm.read_header(self.stats))

    def series(self) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        from ext.core import shm

        return list(shm.read_series(self.stats))

    def records(self) -> list[dict[str, Any]]:
        """Log records since the last call."""
        from ext.core import ring

        return list(ring.drain_log(self.log)[0])

    def record(self, timeout: float = 5) -> dict[str, Any]:
        """The one log record that comes next."""
        found: list[dict[str, Any]] = until(self.records, "a log record", timeout=timeout)
        assert len(found) == 1, found
        return found[0]

    def status_field(self, name: str) -> str:
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return line.split(":", 1)[1].strip()
        raise AssertionError(f"no {name} in the worker's status")

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def resident(self) -> int:
        """Bytes."""
        return int(self.status_field("VmRSS").split()[0]) * 1024

    def ended(self) -> bool:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = status
        return self.status is not None

    def close(self) -> None:
        self._stop.set()
        if not self.ended():
            os.kill(self.pid, 9)
            os.waitpid(self.pid, 0)
            self.status = 9
        self._thread.join(5)
        self.control.close()
        self.stats.close()
        self.log.close()
