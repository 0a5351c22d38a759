"""Under which addresses namespaces are reached, asked often: rtnetlink without pyroute2, some 0.1 ms a namespace."""
from __future__ import annotations

import socket
import struct
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address

from agent.model.workload import IPAddress
from agent.netlink.inside import visit
from agent.netlink.raw import DUMP, answers, attributes

_GET_ADDRESS = 22  # RTM_GETADDR, linux/rtnetlink.h; what follows is of linux/if_addr.h
_HEAD = struct.Struct("=BBBBI")  # family, prefix, flags, scope, index
_ADDRESS, _LOCAL, _FLAGS = 1, 2, 8  # IFA_*
_SECONDARY, _OPTIMISTIC, _FAILED, _DEPRECATED, _TENTATIVE = 0x01, 0x04, 0x08, 0x20, 0x40  # IFA_F_*; SECONDARY is IPv6's TEMPORARY
_SECONDS = 1.0  # the kernel answers in microseconds


def own_addresses(paths: Iterable[str]) -> dict[str, tuple[IPAddress, ...]]:
    """By the path of each namespace its addresses of global scope that can be used now: who is likely to stay comes first.

    A namespace that is gone is missing. Blocks.
    """
    return visit(paths, lambda _: _read())


def _read() -> tuple[IPAddress, ...]:
    found: list[tuple[int, IPAddress]] = []
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as link:
        link.settimeout(_SECONDS)
        for answer in answers(link, _GET_ADDRESS, DUMP, bytes(_HEAD.size)):
            _, _, short, scope, _ = _HEAD.unpack_from(answer)
            about = attributes(answer[_HEAD.size:])
            flags = struct.unpack("=I", about[_FLAGS])[0] if _FLAGS in about else short
            address = about.get(_LOCAL) or about.get(_ADDRESS) or b""
            usable = flags & _OPTIMISTIC or not flags & _TENTATIVE
            if scope == 0 and usable and not flags & _FAILED and len(address) in (4, 16):
                rank = bool(flags & _DEPRECATED) * 2 + bool(flags & _SECONDARY)
                found.append((rank, IPv4Address(address) if len(address) == 4 else IPv6Address(address)))
    return tuple(address for _, address in sorted(found, key=lambda one: one[0]))
