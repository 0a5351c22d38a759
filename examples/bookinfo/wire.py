"""What crosses a link: every TCP stream put together again, and asked whether it is TLS and whether it holds a marker.

    nsenter --net=/run/netns/NODE -- python3 wire.py LINK MARKER

says `listening`, reads the link (packet(7)) until stdin ends, and prints what it saw as JSON. The standard library alone.
"""
from __future__ import annotations

import json
import select
import socket
import struct
import sys
from dataclasses import dataclass, field
from typing import Any

EVERY_PROTOCOL = 0x0003  # ETH_P_ALL
ETHERNET = 14  # bytes of the header
FRAME = 1 << 17  # bytes: between namespaces a frame may be as large as 64 KiB
KEPT = 64 << 20  # bytes of frames that may wait for us
BINDING = {"IPv4": 0x0800, "IPv6": 0x86DD}
TCP = 6
RECORDS = range(20, 24)  # RFC 8446 5.1: change_cipher_spec, alert, handshake, application_data
APPLICATION_DATA = 23
RECORD_LIMIT = 16384 + 256  # RFC 8446 5.2

Address = tuple[bytes, int]


@dataclass(slots=True)
class Stream:
    """One direction of a TCP connection. `begins`: the number of its first byte, when its beginning was seen."""

    begins: int | None = None
    pieces: dict[int, bytes] = field(default_factory=dict)  # by sequence number: what is sent twice is there once

    def data(self) -> bytes:
        """In order; what was sent before the capture began is missing."""
        if not self.pieces:
            return b""
        first = self.begins if self.begins is not None else next(iter(self.pieces))
        found = b""
        for number, piece in sorted(((number - first) % (1 << 32), piece) for number, piece in self.pieces.items()):
            found += piece[max(0, len(found) - number):] if number <= len(found) else b"\0" + piece  # a gap makes it no TLS
        return found


@dataclass(slots=True)
class Records:
    """How far a stream is TLS: records, application data among them, and the bytes from the first one that is none."""

    all: int = 0
    application: int = 0
    other: int = 0


def records(data: bytes) -> Records:
    """The last record may be cut off by the end of the capture."""
    found, at = Records(), 0
    while at < len(data):
        head = data[at:at + 5]
        if head[0] not in RECORDS or (len(head) == 5 and not (head[1] == 3 and 1 <= head[2] <= 4 and
                                                              int.from_bytes(head[3:5], "big") <= RECORD_LIMIT)):
            found.other = len(data) - at
            break
        found.all += 1
        found.application += head[0] == APPLICATION_DATA
        at += 5 + int.from_bytes(head[3:5], "big")
    return found


class Wire:
    """Everything that was seen so far."""

    def __init__(self) -> None:
        self.frames = 0
        self.streams: dict[tuple[Address, Address], Stream] = {}

    def frame(self, data: bytes) -> None:
        self.frames += 1
        kind = int.from_bytes(data[12:14], "big")
        if kind == BINDING["IPv4"] and data[ETHERNET + 9] == TCP:
            top = ETHERNET + (data[ETHERNET] & 15) * 4
            source, destination = data[ETHERNET + 12:ETHERNET + 16], data[ETHERNET + 16:ETHERNET + 20]
            end = ETHERNET + int.from_bytes(data[ETHERNET + 2:ETHERNET + 4], "big")
        elif kind == BINDING["IPv6"] and data[ETHERNET + 6] == TCP:
            top = ETHERNET + 40
            source, destination = data[ETHERNET + 8:ETHERNET + 24], data[ETHERNET + 24:ETHERNET + 40]
            end = top + int.from_bytes(data[ETHERNET + 4:ETHERNET + 6], "big")
        else:
            return
        from_port, to_port, number, _, offset, flags = struct.unpack_from("!HHIIBB", data, top)
        stream = self.streams.setdefault(((source, from_port), (destination, to_port)), Stream())
        if flags & 2:  # SYN counts as one
            stream.begins = (number + 1) % (1 << 32)
        if piece := data[top + (offset >> 4) * 4:end]:
            stream.pieces[number] = max(stream.pieces.get(number, b""), piece, key=len)

    def told(self, marker: bytes) -> dict[str, Any]:
        found: dict[str, Any] = {"frames": self.frames, "connections": len({frozenset(pair) for pair in self.streams}), "bytes": 0,
                                 "records": 0, "applicationData": 0, "otherBytes": 0, "marker": 0}
        for stream in self.streams.values():
            data = stream.data()
            seen = records(data)
            found["bytes"] += len(data)
            found["records"] += seen.all
            found["applicationData"] += seen.application
            found["otherBytes"] += seen.other
            found["marker"] += data.count(marker)
        return found


def main() -> None:
    link, marker = sys.argv[1], sys.argv[2].encode()
    wire = Wire()
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as plug:  # nothing of another link before bind
        plug.setsockopt(socket.SOL_SOCKET, 33, KEPT)  # SO_RCVBUFFORCE
        plug.bind((link, EVERY_PROTOCOL))
        print("listening", flush=True)
        ended = False
        while not ended:
            ready, _, _ = select.select([plug, sys.stdin], [], [])
            ended = sys.stdin in ready
            while select.select([plug], [], [], 0)[0]:
                wire.frame(plug.recv(FRAME))
        _, dropped = struct.unpack("II", plug.getsockopt(263, 6, 8))  # SOL_PACKET, PACKET_STATISTICS
    print(json.dumps(wire.told(marker) | {"dropped": dropped}))


if __name__ == "__main__":
    main()
