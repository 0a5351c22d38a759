"""Observation of TCP connections by bpf/observe.c: whose are told, and the reader of what the kernel tells.

A connection is told when it ends, if its cgroup is linked and its network namespace stands in the map `watched`. For a captured pod
the proxy's cgroup is linked, not the pod's: the pod's own socket ends at the proxy in the same pod and measures loopback. For a pod
without capture it is the pod's cgroup. Nothing here blocks.

Its pins are an instance's, beside those of capture: PART of pins.py, loaded with OBSERVE's hooks.
"""
from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from contextlib import AbstractContextManager, suppress
from mmap import MAP_SHARED, PAGESIZE, PROT_READ, PROT_WRITE, mmap
from pathlib import Path
from typing import Protocol

from agent.capture import bpf_call, links
from agent.capture.egress import NETNS_KEY, POD_VALUE, netns_cookie
from agent.capture.loader import OBSERVE
from agent.capture.pins import Pins
from agent.model.telemetry import EndedConnection
from agent.model.workload import IPAddress

# bpf/narrows.h; a test holds these against it
CONNECTION = struct.Struct("=QQQQ16sI16sIIIIBBH")
TALLY = struct.Struct("=QQ")

(HOOK,) = OBSERVE
PART = "observe"
# Kernel: Documentation/bpf/ringbuf.rst. A record has a head of its length and two flags, and starts at a multiple of 8.
_BUSY, _DISCARDED = 1 << 31, 1 << 30
_RECORD = struct.Struct("=8x" + CONNECTION.format[1:-1] + "2x")  # as it lies in the ring, without what says nothing
_WORDS = _RECORD.size // 4


class Order(Protocol):
    """Loads and stores of 64-bit words in the order that the kernel's side relies on, as ext/core/order has them: Python promises none."""

    def load_acquire(self, memory: memoryview, at: int) -> int: ...

    def store_release(self, memory: memoryview, at: int, value: int) -> None: ...

    def fence_acquire(self) -> None: ...


class ObserveError(Exception):
    """Says which pod or cgroup, what the kernel said and what to do."""


def is_ours(pins: Pins) -> bool:
    """Whether these are observation's, of whatever layout."""
    return pins.root.name.endswith(f"-{PART}")


class Watch:
    """Whose connections are told. ObserveError when a cgroup is not linked or a map is not there. Again with the same is a no-op."""

    def __init__(self, pins: Pins) -> None:
        self._pins = pins

    def serve(self, cgroup: str) -> None:
        """The proxy's, whose sockets in captured pods' namespaces are told. It must hold no pod: theirs would be told as well."""
        links.to_cgroup(self._pins, (HOOK,), cgroup, ObserveError)

    def add(self, netns: str, addresses: Iterable[IPAddress], cgroup: str | None = None) -> int:
        """A pod's. `cgroup`: of a pod without capture. Returns the namespace's cookie, which its records have."""
        cookie = netns_cookie(netns)
        own = {address.version: address.packed for address in addresses}
        if cgroup is not None:
            links.to_cgroup(self._pins, (HOOK,), cgroup, ObserveError)
        with _opened(self._pins.maps / "watched") as fd:
            bpf_call.update(fd, NETNS_KEY.pack(cookie), POD_VALUE.pack(own.get(4, bytes(4)), 0, own.get(6, bytes(16))))
        return cookie

    def remove(self, cookie: int, cgroup_id: int | None = None) -> None:
        """Connections that live are not told any more. What is not there is no error."""
        with _opened(self._pins.maps / "watched") as fd:
            bpf_call.delete(fd, NETNS_KEY.pack(cookie))
        if cgroup_id is not None:
            self.unlink(cgroup_id)

    def unlink(self, cgroup_id: int) -> None:
        (self._pins.links / HOOK.link(cgroup_id)).unlink(missing_ok=True)

    def linked(self) -> set[int]:
        """Ids of cgroups."""
        return {int(path.name.partition("_")[0]) for path in self._pins.links.iterdir()}

    def watched(self) -> list[int]:
        """Cookies."""
        with _opened(self._pins.maps / "watched") as fd:
            return sorted(NETNS_KEY.unpack(key)[0] for key in bpf_call.keys(fd, NETNS_KEY.size))


class Records:
    """The only reader of an instance's ring. Its descriptor is readable (level-triggered, by poll) when many records wait; few wait
    silently, so whoever reads looks from time to time as well.

    The kernel stores the producer's position, and clears a record's busy flag, with release; it loads ours with acquire before it writes
    over what was read (kernel/bpf/ringbuf.c; libbpf's reader does as this one).
    """

    def __init__(self, pins: Pins, order: Order) -> None:
        self._order = order
        with _opened(pins.maps / "tally") as fd:
            self._tally = os.dup(fd)
        with _opened(pins.maps / "ended") as fd:
            self._fd = os.dup(fd)
        self._size = bpf_call.map_shape(self._fd).entries
        # the consumer's page is ours to write; the producer's and the data's are not, and the data lies there twice, end to end
        self._mine = mmap(self._fd, PAGESIZE, MAP_SHARED, PROT_READ | PROT_WRITE)
        self._theirs = mmap(self._fd, PAGESIZE + 2 * self._size, MAP_SHARED, PROT_READ, offset=PAGESIZE)
        self._views = [memoryview(self._mine), memoryview(self._theirs)]
        self._data = self._views[1][PAGESIZE:]
        self._heads = self._data.cast("I")

    def fileno(self) -> int:
        return self._fd

    def read(self, limit: int) -> list[EndedConnection]:
        """At most `limit` of the oldest records, which are gone from the ring then."""
        mine, theirs = self._views
        at = self._order.load_acquire(mine, 0)  # nobody else writes it
        start = at % self._size
        count = min((self._order.load_acquire(theirs, 0) - at) // _RECORD.size, limit)
        # All heads before any data: a record whose head says that it is written is whole.
        heads = self._heads[start // 4:start // 4 + count * _WORDS:_WORDS].tolist()
        self._order.fence_acquire()
        whole = next((number for number, head in enumerate(heads) if head & _BUSY), count)
        if any(head != CONNECTION.size for head in heads[:whole]):
            raise RuntimeError(f"the ring holds a record of another size than {CONNECTION.size}: another program writes into it")
        found = [EndedConnection._make(one) for one in _RECORD.iter_unpack(self._data[start:start + whole * _RECORD.size])]
        self._order.store_release(mine, 0, at + whole * _RECORD.size)
        return found

    def counted(self) -> tuple[int, int]:
        """(records written, records lost because the ring was full), since the maps were made."""
        values = bpf_call.lookup(self._tally, bytes(4), TALLY.size * _possible_cpus()) or b""
        each = list(TALLY.iter_unpack(values))
        return sum(written for written, _ in each), sum(lost for _, lost in each)

    def close(self) -> None:
        for view in (self._heads, self._data, *self._views):
            view.release()
        self._mine.close()
        self._theirs.close()
        for fd in (self._fd, self._tally):
            with suppress(OSError):
                os.close(fd)


def _opened(path: Path) -> AbstractContextManager[int]:
    return links.opened(path, ObserveError)


def _possible_cpus() -> int:
    """As many values a per-CPU map has; `0-3,8` in a file of the kernel's."""
    ranges = [part.partition("-") for part in Path("/sys/devices/system/cpu/possible").read_text().strip().split(",")]
    return sum(int(last or first) - int(first) + 1 for first, _, last in ranges)
