"""Bodies: their end is found at every split, and what is not strictly framed is refused."""
from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ext.wire import door
from tests.unit.wire.corpus import REQUESTS, RESPONSES

CHUNKED = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"


def follower(head: bytes, method: str | None = None):
    parser = door.Parser(method)
    assert isinstance(parser.feed(head), dict)
    return parser.body()


def feed_all(body, pieces):
    """(bytes taken, done); taken -1 on error. Stops at the end of the message."""
    taken = 0
    for piece in [b"", *pieces]:
        n, done = body.feed(piece)
        if n < 0:
            return -1, False
        taken += n
        if done or n < len(piece):
            return taken, done
    return taken, False


MESSAGES = ([(None, data, payload) for data, payload, _ in REQUESTS.values()]
            + [(method, data, payload) for method, data, payload, facts in RESPONSES.values()
               if facts.get("framing") not in ("until_close", "tunnel")])


@pytest.mark.parametrize(("method", "data", "payload"), MESSAGES)
def test_the_end_of_a_body_is_found_at_every_split(method, data, payload) -> None:
    size = door.Parser(method).feed(data)["size"]
    raw = data[size:]
    for at in range(len(raw) + 1):
        body = follower(data[:size], method)
        assert feed_all(body, [raw[:at], raw[at:] + b"GET / next"]) == (len(raw), True)
        assert body.payload == len(payload)
    body = follower(data[:size], method)
    assert feed_all(body, [raw[i:i + 1] for i in range(len(raw))]) == (len(raw), True)


def test_a_body_until_close_is_never_done_and_may_end() -> None:
    body = follower(b"HTTP/1.1 200 OK\r\n\r\n", "GET")
    assert body.feed(b"abc") == (3, False)
    assert body.closed
    assert body.payload == 3


def test_a_body_cut_short_is_no_proper_end() -> None:
    body = follower(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", "GET")
    assert body.feed(b"abc") == (3, False)
    assert not body.closed
    assert body.feed(b"de") == (2, True)
    assert body.closed


@pytest.mark.parametrize("raw", [
    b"\r\n", b"g\r\n", b"-1\r\n", b"+1\r\nx\r\n", b"0x1\r\nx\r\n", b" 1\r\nx\r\n", b"1 \r\nx\r\n", b"1\nx\r\n", b"1\r\r\n",
    b"1;a=b\r\nx\r\n",
    b"1;\r\nx\r\n", b"1\r\nxy\r\n", b"1\r\nx\n", b"1\r\nx0\r\n\r\n", b"00000000000000001\r\nx\r\n", b"8000000000000000\r\n",
    b"fffffffffffffffff\r\n", b"0\n\r\n", b"0\r\n\n", b"0\r\n\rx", b"0\r\nnocolon\r\n",
    b"0\r\n: v\r\n", b"0\r\na b: v\r\n", b"0\r\na : v\r\n",
    b"0\r\na: v\n", b"0\r\na: \0\r\n", b"0\r\na: b\r\n c\r\n\r\n", b"0\r\nContent-Length: 3\r\n", b"0\r\nTRANSFER-encoding: chunked\r\n",
    b"0\r\nhost: x\r\n", b"0\r\nconnection: x\r\n", b"0\r\na: " + b"b" * 9000 + b"\r\n\r\n", b"0\r\n" + b"a: b\r\n" * 2000 + b"\r\n",
])
def test_a_malformed_chunk_is_refused_at_every_split_and_stays_refused(raw) -> None:
    step = max(1, len(raw) // 200)
    for at in range(0, len(raw), step):
        body = follower(CHUNKED)
        assert feed_all(body, [raw[:at], raw[at:]])[0] == -1, f"split at {at}"
        assert body.feed(b"0\r\n\r\n") == (-1, False)
        assert not body.closed


def test_the_largest_chunk_size_is_followed() -> None:
    body = follower(CHUNKED)
    assert body.feed(b"7fffffffffffffff\r\nabc") == (21, False)
    assert body.payload == 3


@settings(max_examples=150, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=200), max_size=6), st.lists(st.integers(0, 1500), max_size=8), st.binary(max_size=20),
       st.booleans())
def test_chunked_bodies_come_out_whole_however_they_are_cut(chunks, cuts, behind, upper) -> None:
    form = b"%X" if upper else b"%x"
    raw = b"".join(form % len(c) + b"\r\n" + c + b"\r\n" for c in chunks) + b"0\r\n\r\n"
    edges = [0, *sorted(min(c, len(raw)) for c in cuts), len(raw)]
    pieces = [raw[a:b] for a, b in pairwise(edges)]
    body = follower(CHUNKED)
    pieces[-1] += behind
    assert feed_all(body, pieces) == (len(raw), True)
    assert body.payload == sum(map(len, chunks))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_as_a_chunked_body_are_taken_refused_or_waited_for(raw) -> None:
    body = follower(CHUNKED)
    taken, done = body.feed(raw)
    assert -1 <= taken <= len(raw)
    if done:
        assert raw[:taken].endswith(b"\r\n\r\n")
    elif taken >= 0:
        assert taken == len(raw)
