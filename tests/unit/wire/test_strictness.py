"""The corpus of tests/wire read by the parser alone: what it says we do is what we do, however the bytes are cut."""
from __future__ import annotations

import pytest

from ext.wire import door
from tests.support.reader import body_of, read
from tests.support.smuggling import NEXT, Answer, Case, Sent, requests, responses

CASES = requests()


def expected(case: Case) -> tuple[list[Sent], str]:
    if case.final:
        return list(case.ours), case.final
    return [*case.ours, Sent(b"GET", b"/CASE/next")], "close"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_we_read_a_case_as_the_corpus_says_at_every_split(case: Case) -> None:
    data = case.bytes + (NEXT % b"CASE" if case.final != "cut" else b"")
    assert read(data) == expected(case)
    for at in range(1, len(data), max(1, len(data) // 300)):
        assert read(data, [at]) == expected(case), f"split at {at}"
    if len(data) < 2000:
        assert read(data, range(len(data))) == expected(case), "byte by byte"


def test_the_corpus_is_large_and_most_of_it_is_refused() -> None:
    assert len(CASES) >= 200
    assert len([case for case in CASES if case.final.isdigit()]) > len(CASES) / 2


def read_answer(case: Answer, cut: int) -> tuple[list[tuple[int, bytes]], str]:
    """What goes to the client of a response that comes in two pieces, and how it ended; the end of the bytes is the server's end."""
    data, start, scanned_to = case.bytes, 0, 0
    while True:
        parser = door.Parser(case.ask.decode())
        head = parser.feed(data[start:max(cut, start)])
        scanned_to = max(cut, start)
        if head is None:
            head = parser.feed(data[scanned_to:])
        if not isinstance(head, dict):
            return [], "503" if head is None else "502"
        if head["framing"] == "tunnel":
            return [], "502"                # nobody asked for one: the worker refuses it
        at, body, done = start + head["size"], parser.body(), False
        if head["status"] < 200:
            start = at
            continue
        _, done = body.feed(b"")
        end = at
        for piece in (data[at:max(cut, at)], data[max(cut, at):]):
            if not done:
                taken, done = body.feed(piece)
                if taken < 0:
                    return [], "cut"
                end += taken
        if not done and not body.closed:
            return [], "cut"
        payload = body_of(head, data[at:end])
        return [(head["status"], payload)], "close" if head["framing"] == "until_close" else ""


@pytest.mark.parametrize("case", responses(), ids=lambda case: case.name)
def test_we_read_a_response_as_the_corpus_says_at_every_split(case: Answer) -> None:
    for at in range(0, len(case.bytes) + 1, max(1, len(case.bytes) // 300)):
        assert read_answer(case, at) == (list(case.seen), case.final), f"split at {at}"
