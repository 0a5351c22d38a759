"""Tells a client that its resolver's port is closed, in the kernel's way: ICMP port unreachable, so that its socket says "connection
refused".

The message names the datagram as it came to us; the kernel turns its addresses back as it does with our answers (nf_nat, RFC 5508), so
the client finds in it what it sent. Source: RFC 792, RFC 4443 3.1.
"""
from __future__ import annotations

import socket
import struct

_CLOSED4, _CLOSED6 = (3, 3), (1, 4)  # type, code: port unreachable
_TTL = 64


class Unreachable:
    """Make it inside the pod's namespace. Sends what it can, and nothing when it cannot: the client times out then."""

    def __init__(self) -> None:
        self._raw: dict[int, socket.socket] = {}
        for family, protocol, local in ((socket.AF_INET, socket.IPPROTO_ICMP, "127.0.0.1"),
                                        (socket.AF_INET6, socket.IPPROTO_ICMPV6, "::1")):
            made = None
            try:
                made = socket.socket(family, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, protocol)
                made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 0)
                made.bind((local, 0))
                self._raw[family] = made
            except OSError:  # the pod has no IPv6
                if made is not None:
                    made.close()

    def tell(self, local: tuple[str, int], peer: tuple[str, int], size: int) -> None:
        """`peer` sent a datagram of `size` bytes to `local`, which nobody takes."""
        family = socket.AF_INET6 if ":" in peer[0] else socket.AF_INET
        raw = self._raw.get(family)
        if raw is None:
            return
        udp = struct.pack(">HHHH", peer[1], local[1], 8 + size, 0)
        source, destination = (socket.inet_pton(family, address) for address in (peer[0], local[0]))
        try:
            if family == socket.AF_INET:
                head = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 28 + size, 0, 0, _TTL, socket.IPPROTO_UDP, 0, source, destination)
                head = head[:10] + _checksum(head) + head[12:]
                message = struct.pack(">BBHI", *_CLOSED4, 0, 0) + head + udp
                message = message[:2] + _checksum(message) + message[4:]
            else:  # the kernel writes the checksum of ICMPv6
                message = struct.pack(">BBHI", *_CLOSED6, 0, 0) + struct.pack(
                    ">IHBB16s16s", 6 << 28, 8 + size, socket.IPPROTO_UDP, _TTL, source, destination) + udp
            raw.sendto(message, (peer[0], 0))
        except OSError:
            pass

    def close(self) -> None:
        for raw in self._raw.values():
            raw.close()


def _checksum(data: bytes) -> bytes:
    """RFC 1071; of an even number of bytes."""
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total >> 16) + (total & 0xFFFF)
    return struct.pack(">H", ~total & 0xFFFF)
