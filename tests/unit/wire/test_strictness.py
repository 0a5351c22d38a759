"""The corpus of tests/wire read by the parser alone: what it says we do is what we do, however the bytes are cut."""
from __future__ import annotations

import pytest

from ext.wire import door
from tests.support.smuggling import NEXT, Case, Sent, requests

CASES = requests()


def body_of(head: dict, raw: bytes) -> bytes:
    """The payload of a whole body that is known to be good; by hand, since the follower only counts."""
    if head["framing"] != "chunked":
        return raw
    payload = b""
    while size := int(raw[:raw.index(b"\r\n")], 16):
        start = raw.index(b"\r\n") + 2
        payload, raw = payload + raw[start:start + size], raw[start + size + 2:]
    return payload


def read(data: bytes, cut: int | None = None) -> tuple[list[Sent], str]:
    """Requests as they would be passed on, and how it ended; the bytes come in two pieces, or in pieces of one byte (cut -1)."""
    edges = list(range(len(data) + 1)) if cut == -1 else sorted({0, cut or 0, len(data)})
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


def expected(case: Case) -> tuple[list[Sent], str]:
    if case.final:
        return list(case.ours), case.final
    return [*case.ours, Sent(b"GET", b"/CASE/next")], "close"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_we_read_a_case_as_the_corpus_says_at_every_split(case: Case) -> None:
    data = case.bytes + (NEXT % b"CASE" if case.final != "cut" else b"")
    assert read(data) == expected(case)
    for at in range(1, len(data), max(1, len(data) // 300)):
        assert read(data, at) == expected(case), f"split at {at}"
    if len(data) < 2000:
        assert read(data, -1) == expected(case), "byte by byte"


def test_the_corpus_is_large_and_most_of_it_is_refused() -> None:
    assert len(CASES) >= 200
    assert len([case for case in CASES if case.final.isdigit()]) > len(CASES) / 2
