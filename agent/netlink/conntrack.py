"""How full a namespace's table of tracked connections is, what the kernel dropped for that, and where a redirected datagram was meant
to go: ctnetlink, read only.

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
from ipaddress import IPv4Address, IPv6Address

from agent import netlink
from agent.netlink.raw import DUMP, REQUEST, answers, attributes

_NETLINK_NETFILTER = 12
_CONNTRACK = 1 << 8  # NFNL_SUBSYS_CTNETLINK
_GET_STATS_CPU, _GET_STATS = _CONNTRACK | 4, _CONNTRACK | 5
_CPU_DROP, _CPU_EARLY_DROP = 10, 11  # CTA_STATS_*
_ENTRIES, _MAX_ENTRIES = 1, 2  # CTA_STATS_GLOBAL_*
_RECEIVE_BYTES = 1 << 16
_SECONDS = 1.0  # the kernel answers in microseconds
_GET, _NEW = _CONNTRACK | 1, _CONNTRACK
_TUPLE_ORIG, _TUPLE_REPLY = 1, 2  # CTA_*
_TUPLE_IP, _TUPLE_PROTO = 1, 2  # CTA_TUPLE_*
_PROTO_NUM, _PROTO_SRC, _PROTO_DST = 1, 2, 3  # CTA_PROTO_*
_NESTED = 0x8000  # NLA_F_NESTED


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
        cpus = list(_ask(link, _GET_STATS_CPU, DUMP))
    return Table(whole.get(_ENTRIES, 0), whole.get(_MAX_ENTRIES, 0), sum(cpu.get(_CPU_DROP, 0) for cpu in cpus),
                 sum(cpu.get(_CPU_EARLY_DROP, 0) for cpu in cpus))


def _ask(link: socket.socket, kind: int, flags: int) -> Iterator[Mapping[int, int]]:
    """The attributes of each answer. Raises OSError when the kernel refuses (it was built without ctnetlink)."""
    for answer in answers(link, kind, flags, bytes(4)):  # nfgenmsg: AF_UNSPEC, version 0
        # big-endian; those of 32 bits are all that is asked for
        yield {number: int.from_bytes(value, "big") for number, value in attributes(answer[4:]).items() if len(value) == 4}


class Originals:
    """Asks one namespace's table where redirected datagrams were meant to go: UDP has no SO_ORIGINAL_DST. 15 us a question.

    Make it inside the namespace (`netlink.in_netns`); ask from anywhere, one question at a time. Never waits: the kernel answers while
    it is asked.
    """

    def __init__(self) -> None:
        self._link = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, _NETLINK_NETFILTER)
        self._sequence = 0

    def find(self, local: tuple[str, int], peer: tuple[str, int]) -> tuple[str, int] | None:
        """Where a datagram that came from `peer` to the UDP address `local` was sent; None when no entry says so (any more)."""
        family, source, destination = socket.AF_INET, b"", b""
        try:
            if ":" in local[0]:
                family = socket.AF_INET6
            source, destination = (socket.inet_pton(family, address) for address in (local[0], peer[0]))
            self._sequence = self._sequence + 1 & 0xFFFFFFFF
            self._link.send(_question(family, self._sequence, source, local[1], destination, peer[1]))
            while True:  # what an earlier question left unread is passed over
                data = self._link.recv(_RECEIVE_BYTES)
                if len(data) >= 20 and struct.unpack_from("=I", data, 8)[0] == self._sequence:
                    return _original(data)
        except OSError:
            return None

    def close(self) -> None:
        self._link.close()


def _question(family: int, sequence: int, source: bytes, source_port: int, destination: bytes, port: int) -> bytes:
    """IPCTNL_MSG_CT_GET by the reply's tuple: it goes from the local address to the peer."""
    first = 1 if family == socket.AF_INET else 3  # CTA_IP_V4_SRC, CTA_IP_V6_SRC; the destination's is one more
    addresses = _attribute(first, source) + _attribute(first + 1, destination)
    protocol = (_attribute(_PROTO_NUM, bytes((socket.IPPROTO_UDP,))) + _attribute(_PROTO_SRC, struct.pack(">H", source_port))
                + _attribute(_PROTO_DST, struct.pack(">H", port)))
    body = struct.pack("=BBH", family, 0, 0) + _attribute(_NESTED | _TUPLE_REPLY, _attribute(
        _NESTED | _TUPLE_IP, addresses) + _attribute(_NESTED | _TUPLE_PROTO, protocol))
    return struct.pack("=IHHII", 16 + len(body), _GET, REQUEST, sequence, 0) + body


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def _original(data: bytes) -> tuple[str, int] | None:
    """The original tuple's destination."""
    length, kind = struct.unpack_from("=IH", data)
    if kind != _NEW:
        return None
    original = attributes(attributes(data[20:length]).get(_TUPLE_ORIG, b""))
    addresses, protocol = attributes(original.get(_TUPLE_IP, b"")), attributes(original.get(_TUPLE_PROTO, b""))
    address, port = addresses.get(2) or addresses.get(4), protocol.get(_PROTO_DST)
    if address is None or len(address) not in (4, 16) or port is None or len(port) != 2:
        return None
    return str(IPv4Address(address) if len(address) == 4 else IPv6Address(address)), int.from_bytes(port, "big")
