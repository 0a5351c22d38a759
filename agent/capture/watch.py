"""What capture left in a namespace, read raw and cheaply: whether anything there is different from the last time.

A full comparison with the plan takes a child and milliseconds; this takes 0.2 ms for a pod of both families (eight tables,
rules and routes), so that every pod is looked at every other second. It says that something changed, not what: who sees
another print than before compares in full. Counters are left out, or every packet would be a change. Of nftables the number
of transactions says enough. The legacy tables have no notification at all, and a held netlink socket per pod for the rest would
keep the namespaces of dead pods alive.

Layouts: linux/netfilter_ipv4/ip_tables.h, linux/netfilter_ipv6/ip6_tables.h (64 bit), linux/rtnetlink.h, linux/fib_rules.h.
"""
from __future__ import annotations

import ctypes
import os
import socket
import struct
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from typing import NamedTuple

from agent import netlink
from agent.capture.nftables import generation
from agent.capture.plan import ROUTE_TABLE

_GET_INFO, _GET_ENTRIES = 64, 65  # IPT_SO_*, IP6T_SO_*
_INFO_BYTES, _HEAD_BYTES = 84, 40  # struct ipt_getinfo; struct ipt_get_entries before its entries
_RTM_GETROUTE, _RTM_GETRULE = 26, 34
_REQUEST_DUMP = 0x301  # NLM_F_REQUEST | NLM_F_ROOT | NLM_F_MATCH
_NLMSG_DONE, _NLMSG_ERROR = 3, 2
_RTA_TABLE = 15
_SOL_NETLINK, _STRICT_CHECK = 270, 12  # without it the kernel dumps the routes of every table
_RECEIVE_BYTES = 1 << 16
_RECEIVES = 64  # a dump of more than 4 MiB of rules is nobody's pod


class Layout(NamedTuple):
    """One family's socket level and where an entry of its tables has its length and its counters."""

    af: int
    level: int
    next_offset: int
    comefrom: int  # four bytes the kernel scribbles on
    counters: int


LAYOUTS = {4: Layout(socket.AF_INET, socket.SOL_IP, 90, 92, 96),
           6: Layout(socket.AF_INET6, socket.IPPROTO_IPV6, 142, 144, 152)}
_COUNTERS_BYTES = 16
_IPV6_SWITCH = "/proc/sys/net/ipv6/conf/lo/disable_ipv6"


class Target(NamedTuple):
    """What is looked at in one namespace: families and, of the legacy tables, these names; or nftables (None)."""

    families: tuple[int, ...]
    tables: tuple[str, ...] | None


def prints(targets: Mapping[str, Target]) -> dict[str, bytes]:
    """The print of each namespace by path. One that is gone or cannot be read is missing. Blocks for 0.2 ms a namespace."""
    return netlink.visit(targets, lambda path: _read(targets[path]))


def _read(target: Target) -> bytes:
    digest = blake2b(digest_size=16)
    digest.update(_switch())
    if target.tables is None:
        digest.update(generation().to_bytes(4, "big"))
    for family in target.families:
        layout = LAYOUTS[family]
        if target.tables:
            with socket.socket(layout.af, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.IPPROTO_RAW) as raw:
                for name in target.tables:
                    for part in _table(raw.fileno(), layout, name):
                        digest.update(part)
        for part in _ways(layout.af):
            digest.update(part)
    return digest.digest()


def _switch() -> bytes:
    """IPv6 may be switched on or off while a pod runs, and its plan is for what was on (netlink.families)."""
    try:
        with open(_IPV6_SWITCH, "rb") as switch:
            return switch.read()
    except FileNotFoundError:  # a kernel without IPv6
        return b""


def _table(fd: int, layout: Layout, name: str) -> Iterable[bytes]:
    label = name.encode().ljust(32, b"\0")
    info = _ask(fd, layout.level, _GET_INFO, label.ljust(_INFO_BYTES, b"\0"))
    (size,) = struct.unpack_from("=I", info, 80)
    entries = bytearray(_ask(fd, layout.level, _GET_ENTRIES, struct.pack("=32sI4x", label, size).ljust(_HEAD_BYTES + size, b"\0")))
    at, end = _HEAD_BYTES, _HEAD_BYTES + size
    while at < end:
        (length,) = struct.unpack_from("=H", entries, at + layout.next_offset)
        if length == 0:
            break
        entries[at + layout.comefrom:at + layout.comefrom + 4] = bytes(4)
        entries[at + layout.counters:at + layout.counters + _COUNTERS_BYTES] = bytes(_COUNTERS_BYTES)
        at += length
    return info, bytes(entries)


_libc = ctypes.CDLL(None, use_errno=True)


def _ask(fd: int, level: int, option: int, given: bytes) -> bytes:
    """getsockopt(2) whose buffer is read too, which socket.getsockopt does not do."""
    buffer = ctypes.create_string_buffer(given, len(given))
    length = ctypes.c_uint(len(given))
    if _libc.getsockopt(fd, level, option, buffer, ctypes.byref(length)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return buffer.raw


def _ways(af: int) -> Iterable[bytes]:
    """Policy rules and the routes of our table, as the kernel dumps them; sequence and port are always the same."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as link:
        link.settimeout(1.0)  # s; the kernel answers in microseconds
        link.setsockopt(_SOL_NETLINK, _STRICT_CHECK, 1)
        yield from _dump(link, _RTM_GETRULE, struct.pack("=B11x", af))
        yield from _dump(link, _RTM_GETROUTE, struct.pack("=B11xHHI", af, 8, _RTA_TABLE, ROUTE_TABLE))


def _dump(link: socket.socket, kind: int, body: bytes) -> Iterable[bytes]:
    link.send(struct.pack("=IHHII", 16 + len(body), kind, _REQUEST_DUMP, 1, 0) + body)
    for _ in range(_RECEIVES):
        data = link.recv(_RECEIVE_BYTES)
        at = 0
        while at + 16 <= len(data):
            length, type_ = struct.unpack_from("=IH", data, at)
            if type_ in (_NLMSG_DONE, _NLMSG_ERROR):
                return
            yield data[at:at + 12] + data[at + 16:at + length]  # without nlmsg_pid, which is the socket's
            at += max((length + 3) & ~3, 16)
    raise OSError("the namespace has too many rules to look at")
