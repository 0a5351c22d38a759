"""Netlink as it is: a question, and what comes back. For questions that are asked often, for which pyroute2 is too large and too slow."""
from __future__ import annotations

import socket
import struct
from collections.abc import Iterator

REQUEST, DUMP = 1, 0x300  # NLM_F_*
_ERROR, _DONE = 2, 3  # NLMSG_*
_RECEIVE_BYTES = 1 << 16


def answers(link: socket.socket, kind: int, flags: int, body: bytes) -> Iterator[bytes]:
    """What follows the head of each answer: one, or with DUMP as many as there are. Raises OSError when the kernel refuses."""
    link.send(struct.pack("=IHHII", 16 + len(body), kind, REQUEST | flags, 1, 0) + body)
    while True:
        data = link.recv(_RECEIVE_BYTES)
        at = 0
        while at + 16 <= len(data):
            length, type_ = struct.unpack_from("=IH", data, at)
            if type_ == _DONE:
                return
            if type_ == _ERROR:
                (number,) = struct.unpack_from("=i", data, at + 16)
                raise OSError(-number, "netlink refuses")
            yield data[at + 16:at + length]
            at += max((length + 3) & ~3, 16)
        if not flags:
            return


def attributes(data: bytes) -> dict[int, bytes]:
    """By kind, nested ones as they are."""
    found, at = {}, 0
    while at + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, at)
        found[kind & 0x3FFF] = data[at + 4:at + length]
        at += max((length + 3) & ~3, 4)
    return found
