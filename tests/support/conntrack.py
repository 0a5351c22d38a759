"""Filling one namespace's connection tracking table with real entries, and emptying it again.

The limit `nf_conntrack_max` is the machine's and each namespace has a count of its own, so a table is filled, and the limit left alone:
nobody else on the machine notices. Entries are made by ctnetlink (linux/netfilter/nfnetlink_conntrack.h) and are assured, or the kernel
would evict them for new connections. They are UDP between addresses for benchmarks (RFC 2544, 198.18.0.0/15) and carry a mark.
"""
from __future__ import annotations

import errno
import socket
import struct
from pathlib import Path

from agent import netlink
from tests.support.netns import Netns

MARK = 0x7E57
AT_MOST = 1 << 21  # entries, of some 400 bytes each: a machine with a higher limit would lose too much memory to this
_CT_NEW, _REQUEST, _EXCLUSIVE_CREATE = 0x100, 1, 0x600  # NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_NEW; NLM_F_*
_SEEN_REPLY_ASSURED_CONFIRMED = 2 | 4 | 8
_NETLINK_NETFILTER = 12
_SECONDS = 300  # an entry's life, should a test not take it away
_SENT_AT_ONCE = 256  # messages


def _attribute(kind: int, value: bytes, nested: bool = False) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind | 0x8000 * nested) + value + bytes(-len(value) % 4)


def _tuple(kind: int, source: bytes, target: bytes, source_port: int, target_port: int) -> bytes:
    ends = _attribute(1, _attribute(1, source) + _attribute(2, target), nested=True)
    ports = _attribute(1, bytes([socket.IPPROTO_UDP])) + _attribute(2, struct.pack(">H", source_port)) + \
        _attribute(3, struct.pack(">H", target_port))
    return _attribute(kind, ends + _attribute(2, ports, nested=True), nested=True)


def _message(number: int) -> bytes:
    here, there = struct.pack(">BBH", 198, 18, number >> 16), bytes([198, 19, 0, 1])
    port = number & 0xFFFF
    body = struct.pack(">BBH", socket.AF_INET, 0, 0) + _tuple(1, here, there, port, 9) + _tuple(2, there, here, 9, port) + \
        _attribute(3, struct.pack(">I", _SEEN_REPLY_ASSURED_CONFIRMED)) + _attribute(7, struct.pack(">I", _SECONDS)) + \
        _attribute(8, struct.pack(">I", MARK))
    return struct.pack("=IHHII", 16 + len(body), _CT_NEW, _REQUEST | _EXCLUSIVE_CREATE, number, 0) + body


def count(netns: Netns) -> int:
    return int(netlink.read_sysctl(netns.path, "net.netfilter.nf_conntrack_count"))


def limit() -> int:
    return int(Path("/proc/sys/net/netfilter/nf_conntrack_max").read_text())


def fill(netns: Netns) -> None:
    """Make entries until the kernel says that there is no room."""
    most = limit()
    assert most <= AT_MOST, f"nf_conntrack_max is {most}: filling a table would take {most * 400 >> 20} MiB"

    def work() -> None:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER) as link:
            link.setblocking(False)
            for first in range(1, most + 4 * _SENT_AT_ONCE, _SENT_AT_ONCE):
                link.send(b"".join(map(_message, range(first, first + _SENT_AT_ONCE))))
                try:
                    answer = link.recv(65_536)
                except BlockingIOError:
                    continue  # no error: all were made
                (number,) = struct.unpack_from("=i", answer, 16)
                assert number == -errno.ENOMEM, f"ctnetlink: {number}"
                return
        raise AssertionError(f"{most} entries were made, and the table is not full")

    netlink.in_netns(netns.path, work)


def empty(netns: Netns) -> None:
    """Take away what `fill` made, and nothing else."""
    netns.run("conntrack", "-D", "-m", str(MARK), timeout=60)
