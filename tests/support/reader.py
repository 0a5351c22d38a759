"""What Narrows' parser makes of the bytes of a client's connection, as a worker would: message after message until one is refused."""
from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ext.wire import door
from tests.support.smuggling import Sent


def body_of(head: dict[str, Any], raw: bytes) -> bytes:
    """The payload of a whole body that is known to be good; by hand, since the follower only counts."""
    if head["framing"] != "chunked":
        return raw
    payload = b""
    while size := int(raw[:raw.index(b"\r\n")], 16):
        start = raw.index(b"\r\n") + 2
        payload, raw = payload + raw[start:start + size], raw[start + size + 2:]
    return payload


def read(data: bytes, cuts: Iterable[int] = ()) -> tuple[list[Sent], str]:
    """Requests as they would be passed on, and how it ended; the bytes come in pieces, cut at `cuts`."""
    edges = sorted({0, len(data), *(cut for cut in cuts if 0 < cut < len(data))})
    found: list[Sent] = []
    start = 0
    while True:
        parser, fed, head = door.Parser(), start, None
        for edge in [edge for edge in edges if edge > start]:
            head = parser.feed(data[fed:edge])
            fed = edge
            if head is not None:
                break
        if head is None:
            return found, "" if fed == start else "cut"
        if isinstance(head, int):
            return found, str(-head)
        at, body, done = start + head["size"], parser.body(), False
        payload_at = at
        _, done = body.feed(b"")
        for edge in [edge for edge in edges if edge >= fed] if not done else []:
            taken, done = body.feed(data[at:edge])
            if taken < 0:
                return found, "400"
            at += taken
            if done:
                break
        if not done:
            return found, "cut"
        target = head["path"] + (b"?" + head["query"] if head["query"] is not None else b"")
        connect = head["method_id"] == "CONNECT"
        found.append(Sent(head["method"], head["target"] if connect else target, body_of(head, data[payload_at:at])))
        if not head["keep_alive"]:
            return found, "close"
        start = at
