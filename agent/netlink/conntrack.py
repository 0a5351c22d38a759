"""How full a namespace's table of tracked connections is, and what the kernel dropped for that: ctnetlink, read only.

`nf_conntrack_max` is the machine's, but every namespace is counted on its own against it. A packet of a new connection that finds
the table full is dropped before any rule sees it: what the table holds goes on, and nothing passes by a redirect.

Source: linux/netfilter/nfnetlink_conntrack.h, and `drop`, `early_drop` of nf_conntrack_core.c. /proc/net/stat/nf_conntrack says
the same only in kernels that were built with it.
"""
from __future__ import annotations

import socket
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from agent import netlink

_NETLINK_NETFILTER = 12
_CONNTRACK = 1 << 8  # NFNL_SUBSYS_CTNETLINK
_GET_STATS_CPU, _GET_STATS = _CONNTRACK | 4, _CONNTRACK | 5
_REQUEST, _DUMP = 1, 0x300
_ERROR, _DONE = 2, 3
_CPU_DROP, _CPU_EARLY_DROP = 10, 11  # CTA_STATS_*
_ENTRIES, _MAX_ENTRIES = 1, 2  # CTA_STATS_GLOBAL_*
_RECEIVE_BYTES = 1 << 16
_SECONDS = 1.0  # the kernel answers in microseconds


@dataclass(frozen=True, slots=True)
class Table:
    """One namespace's. `dropped` (packets) and `evicted` (entries that gave way to others) count from its making, modulo 2**32 per CPU."""

    entries: int
    limit: int
    dropped: int
    evicted: int

    @property
    def used(self) -> float:
        """0 to 1 and a little more."""
        return self.entries / self.limit if self.limit else 0.0


def tables(paths: Iterable[str]) -> dict[str, Table]:
    """The table of each namespace by its path; what is gone or cannot be asked is missing. Blocks for 0.08 ms a namespace."""
    return netlink.visit(paths, lambda _: _read())


def _read() -> Table:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER) as link:
        link.settimeout(_SECONDS)
        (whole,) = _ask(link, _GET_STATS, 0)
        cpus = list(_ask(link, _GET_STATS_CPU, _DUMP))
    return Table(whole.get(_ENTRIES, 0), whole.get(_MAX_ENTRIES, 0), sum(cpu.get(_CPU_DROP, 0) for cpu in cpus),
                 sum(cpu.get(_CPU_EARLY_DROP, 0) for cpu in cpus))


def _ask(link: socket.socket, kind: int, flags: int) -> Iterator[Mapping[int, int]]:
    """The attributes of each answer. Raises OSError when the kernel refuses (it was built without ctnetlink)."""
    link.send(struct.pack("=IHHII", 20, kind, _REQUEST | flags, 1, 0) + bytes(4))  # nfgenmsg: AF_UNSPEC, version 0
    while True:
        data = link.recv(_RECEIVE_BYTES)
        at = 0
        while at + 16 <= len(data):
            length, type_ = struct.unpack_from("=IH", data, at)
            if type_ == _DONE:
                return
            if type_ == _ERROR:
                (number,) = struct.unpack_from("=i", data, at + 16)
                raise OSError(-number, "ctnetlink refuses")
            yield dict(_attributes(data[at + 20:at + length]))
            at += max((length + 3) & ~3, 16)
        if not flags:
            return


def _attributes(data: bytes) -> Iterator[tuple[int, int]]:
    at = 0
    while at + 8 <= len(data):
        length, kind = struct.unpack_from("=HH", data, at)
        if length == 8:  # u32, big-endian; all that is asked for are such
            yield kind & 0x3FFF, struct.unpack_from(">I", data, at + 4)[0]
        at += max((length + 3) & ~3, 4)
