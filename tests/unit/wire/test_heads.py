"""Request and response heads: what is read, what is refused, and that no split of the bytes changes either."""
from __future__ import annotations

import time

import pytest

from ext.wire import door
from tests.unit.wire.corpus import MALFORMED, MALFORMED_RESPONSES, REQUESTS, RESPONSES


def read_whole(data: bytes, method: str | None = None):
    return door.Parser(method).feed(data)


def read_split(data: bytes, at: int, method: str | None = None):
    parser = door.Parser(method)
    first = parser.feed(data[:at])
    return first if first is not None else parser.feed(data[at:])


@pytest.mark.parametrize("name", REQUESTS)
def test_a_request_means_what_the_corpus_says(name) -> None:
    data, _, facts = REQUESTS[name]
    head = read_whole(data)
    assert isinstance(head, dict), f"refused with {head}"
    assert {key: head[key] for key in facts} == facts
    assert data[:head["size"]].endswith(b"\r\n\r\n")


@pytest.mark.parametrize("name", RESPONSES)
def test_a_response_means_what_the_corpus_says(name) -> None:
    method, data, _, facts = RESPONSES[name]
    head = read_whole(data, method)
    assert isinstance(head, dict), f"refused with {head}"
    assert {key: head[key] for key in facts} == facts


@pytest.mark.parametrize("name", REQUESTS)
def test_no_split_changes_a_request(name) -> None:
    data = REQUESTS[name][0]
    whole = read_whole(data)
    size = whole["size"]
    for at in range(len(data) + 1):
        assert read_split(data, at) == whole, f"split at {at}"
        if at < size:
            assert read_whole(data[:at]) is None, f"{at} bytes are not a head"
    parser = door.Parser()
    answers = [parser.feed(data[i:i + 1]) for i in range(size)]
    assert answers[:-1] == [None] * (size - 1)
    assert answers[-1] == whole


@pytest.mark.parametrize("name", RESPONSES)
def test_no_split_changes_a_response(name) -> None:
    method, data, _, _ = RESPONSES[name]
    whole = read_whole(data, method)
    for at in range(len(data) + 1):
        assert read_split(data, at, method) == whole, f"split at {at}"


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_request_gets_its_status_at_every_split(name) -> None:
    data, status = MALFORMED[name]
    assert read_whole(data) == -status
    step = max(1, len(data) // 400)
    for at in range(0, len(data), step):
        assert read_split(data, at) == -status, f"split at {at}"
    parser = door.Parser()
    answers = [parser.feed(data[i:i + step]) for i in range(0, len(data), step)]
    assert next(a for a in answers if a is not None) == -status


@pytest.mark.parametrize("name", MALFORMED_RESPONSES)
def test_a_malformed_response_is_a_502_at_every_split(name) -> None:
    data = MALFORMED_RESPONSES[name]
    step = max(1, len(data) // 400)
    for at in range(0, len(data), step):
        assert read_split(data, at, "GET") == -502, f"split at {at}"


def test_a_bad_request_line_is_answered_before_the_head_is_complete() -> None:
    assert read_whole(b"GET / HTTP/3.0\r\n") == -505
    assert read_whole(b"nonsense\r\n") == -400
    assert read_whole(b"\x80") == -400
    assert read_whole(b"HELO", "GET") == -502


def test_what_follows_the_head_is_left_alone() -> None:
    data = REQUESTS["length"][0]
    head = read_whole(data + b"GET / HTTP/1.1\r\nbroken")
    assert data[head["size"]:] == b"hello"


def test_hop_by_hop_fields_are_told_apart() -> None:
    head = read_whole(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close, X-Mine\r\nKeep-Alive: 1\r\nTE: gzip\r\nx-mine: 1\r\n"
                      b"Proxy-Connection: close\r\nUpgrade: x\r\nAccept: y\r\nTrailer: z\r\n\r\n")
    assert [name for name, _, hop in head["headers"] if not hop] == [b"Accept", b"Trailer"]


def test_a_head_at_the_bound_is_read_and_one_byte_more_is_not() -> None:
    frame = b"GET / HTTP/1.1\r\nHost: a\r\nX: %s\r\n\r\n"
    room = 61440 - len(frame % b"")
    assert read_whole(frame % (b"a" * room))["size"] == 61440
    assert read_whole(frame % (b"a" * (room + 1))) == -431


def test_reading_byte_by_byte_takes_time_in_proportion() -> None:
    """Ten times the bytes may take ten times the time, not a hundred: in CPU time of this thread."""
    def spent(size: int) -> float:
        data = b"GET / HTTP/1.1\r\nHost: a\r\n" + b"x: y\r\n" * 60 + b"Y: " + b"a" * size
        best = 1e9
        for _ in range(3):
            parser = door.Growing(data + b"\r\n\r\n")
            start = time.thread_time()
            assert parser.every_prefix() > 0
            best = min(best, time.thread_time() - start)
        return best

    assert spent(50_000) < 40 * spent(5_000)


def test_a_request_of_twelve_fields_is_read_in_about_a_microsecond() -> None:
    parser = door.Parser()
    fields = b"".join(b"x-header-%d: some value of usual length, %d\r\n" % (i, i) for i in range(11))
    parser.feed(b"GET /productpage?u=test HTTP/1.1\r\nHost: productpage:9080\r\n" + fields + b"\r\n")
    # 0.3 us on a quiet core; the bound leaves room for a busy one, not for another algorithm
    assert min(parser.nanoseconds(2000) for _ in range(5)) < 3000
