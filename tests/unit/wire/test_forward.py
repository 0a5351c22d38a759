"""A forwarded head reads the same to us and to h11, minus what belonged to the hop that ended."""
from __future__ import annotations

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ext.wire import door
from tests.unit.wire.corpus import REQUESTS, RESPONSES

REMOVE, SET, ADD = 1, 2, 3


def parsed(data: bytes, method: str | None = None):
    parser = door.Parser(method)
    head = parser.feed(data)
    assert isinstance(head, dict), f"refused with {head}"
    return parser, head


def forwarded(data: bytes, method: str | None = None, **how) -> bytes:
    out = parsed(data, method)[0].forward(**how)
    assert isinstance(out, bytes), f"forward returned {out}"
    return out


def lines(data: bytes) -> list[bytes]:
    assert data.endswith(b"\r\n\r\n")
    return data[:-4].split(b"\r\n")


def end_to_end(head) -> list[tuple[bytes, bytes]]:
    return [(name, value) for name, value, hop in head["headers"] if not hop]


SAME_OF_REQUEST = ("method", "path", "query", "authority", "framing", "content_length", "version_minor", "upgrade", "te_trailers",
                   "expect_continue", "content_type")


@pytest.mark.parametrize("name", REQUESTS)
def test_a_forwarded_request_means_the_same(name) -> None:
    data = REQUESTS[name][0]
    _, before = parsed(data)
    out = forwarded(data)
    _, after = parsed(out)
    assert {key: after[key] for key in SAME_OF_REQUEST} == {key: before[key] for key in SAME_OF_REQUEST}
    assert end_to_end(after) == end_to_end(before)
    assert len(out) == after["size"]
    assert len(out) <= before["size"] + 512


@pytest.mark.parametrize("name", RESPONSES)
def test_a_forwarded_response_means_the_same(name) -> None:
    method, data, _, _ = RESPONSES[name]
    _, before = parsed(data, method)
    out = forwarded(data, method)
    _, after = parsed(out, method)
    for key in ("status", "reason", "framing", "upgrade"):
        assert after[key] == before[key], key
    if before["framing"] not in ("tunnel",) and before["status"] not in (204,) and before["status"] >= 200:
        assert (after["has_length"], after["content_length"]) == (before["has_length"], before["content_length"])
    assert end_to_end(after) == end_to_end(before)


def test_lines_go_on_untouched_and_in_order() -> None:
    out = forwarded(b"GET /x HTTP/1.1\r\nB:  two  \r\nHost: a\r\nA:one\r\nb: three\r\nConnection: keep-alive\r\nKeep-Alive: 5\r\n\r\n")
    assert lines(out) == [b"GET /x HTTP/1.1", b"host: a", b"B:  two  ", b"A:one", b"b: three"]


def test_the_target_is_rebuilt_in_origin_form_with_the_authority_as_host() -> None:
    out = forwarded(b"GET http://b.example:81/p?q HTTP/1.1\r\nHost: a\r\n\r\n")
    assert lines(out) == [b"GET /p?q HTTP/1.1", b"host: b.example:81"]
    assert lines(forwarded(b"OPTIONS http://b.example HTTP/1.1\r\nHost: a\r\n\r\n"))[0] == b"OPTIONS * HTTP/1.1"
    assert lines(forwarded(b"CONNECT a:1 HTTP/1.1\r\nHost: b\r\n\r\n"))[:2] == [b"CONNECT a:1 HTTP/1.1", b"host: a:1"]


def test_fields_that_connection_names_end_here() -> None:
    out = forwarded(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: X-Secret\r\nx-secret: 1\r\nX-Open: 2\r\nProxy-Connection: close\r\n\r\n")
    assert lines(out) == [b"GET / HTTP/1.1", b"host: a", b"X-Open: 2"]


def test_an_upgrade_and_te_trailers_are_said_again() -> None:
    out = forwarded(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, TE\r\nUpgrade: websocket\r\nTE: trailers, gzip\r\n"
                    b"Sec-WebSocket-Key: x\r\n\r\n")
    assert lines(out) == [b"GET / HTTP/1.1", b"host: a", b"Sec-WebSocket-Key: x", b"Upgrade: websocket", b"te: trailers",
                          b"connection: upgrade, te"]


def test_an_h2c_offer_is_dropped_whole() -> None:
    out = forwarded(REQUESTS["upgrade-h2c-is-not-taken"][0])
    assert lines(out) == [b"GET / HTTP/1.1", b"host: a.example"]


def test_close_and_keep_alive_are_said_when_asked() -> None:
    request = b"GET / HTTP/1.0\r\n\r\n"
    assert lines(forwarded(request, close=True)) == [b"GET / HTTP/1.0", b"connection: close"]
    assert lines(forwarded(request, keep_alive=True)) == [b"GET / HTTP/1.0", b"connection: keep-alive"]
    assert b"connection" not in forwarded(request)


def test_a_response_framed_by_close_says_so() -> None:
    assert lines(forwarded(b"HTTP/1.0 200 OK\r\nX: y\r\n\r\n", "GET")) == [b"HTTP/1.1 200 OK", b"X: y", b"connection: close"]


def test_a_chunked_response_cannot_be_told_to_http10() -> None:
    data = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert parsed(data, "GET")[0].forward(peer_http10=True) == -2
    assert b"chunked" in forwarded(data, "GET")


def test_ids_are_added_only_where_there_are_none() -> None:
    how = {"request_id": b"new", "forwarded_proto": b"http"}
    assert lines(forwarded(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", **how))[2:] == [b"x-request-id: new", b"x-forwarded-proto: http"]
    assert lines(forwarded(b"GET / HTTP/1.1\r\nHost: a\r\nX-Request-ID: old\r\nX-Forwarded-Proto: https\r\n\r\n", **how))[2:] == [
        b"X-Request-ID: old", b"X-Forwarded-Proto: https"]
    # an edit that takes it away has the last word
    assert lines(forwarded(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", ops=[(REMOVE, b"x-request-id", b"")], request_id=b"new"))[2:] == []


def test_edits_apply_in_order() -> None:
    data = b"GET / HTTP/1.1\r\nHost: a\r\nX-A: 1\r\nx-a: 2\r\nKeep: k\r\n\r\n"

    def after(*ops) -> list[bytes]:
        return lines(forwarded(data, ops=list(ops)))[2:]

    assert after((REMOVE, b"x-a", b"")) == [b"Keep: k"]
    assert after((SET, b"x-a", b"3")) == [b"Keep: k", b"x-a: 3"]
    assert after((ADD, b"x-a", b"3")) == [b"X-A: 1", b"x-a: 2", b"Keep: k", b"x-a: 3"]
    assert after((ADD, b"x-a", b"3"), (REMOVE, b"x-a", b"")) == [b"Keep: k"]
    assert after((ADD, b"x-b", b"3"), (SET, b"x-b", b"4"), (ADD, b"x-b", b"5")) == [b"X-A: 1", b"x-a: 2", b"Keep: k", b"x-b: 4", b"x-b: 5"]


def test_setting_host_replaces_the_authority_and_nothing_can_double_it() -> None:
    data = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
    assert lines(forwarded(data, ops=[(SET, b"host", b"b")])) == [b"GET / HTTP/1.1", b"host: b"]
    assert lines(forwarded(data, ops=[(ADD, b"host", b"b"), (REMOVE, b"host", b"")])) == [b"GET / HTTP/1.1", b"host: a"]


@pytest.mark.parametrize("name", ["chunked", "upgrade", "te-trailers"])
def test_too_little_room_is_said_at_every_size(name) -> None:
    parser, _ = parsed(REQUESTS[name][0])
    full = parser.forward(request_id=b"id", close=True)
    for room in range(len(full)):
        assert parser.forward(request_id=b"id", close=True, room=room) == -1
    assert parser.forward(request_id=b"id", close=True, room=len(full)) == full


TOKENS = st.text("abcXYZ09-_!#$%&'*+.^`|~", min_size=1, max_size=12).map(str.encode)
VALUES = st.text(st.characters(min_codepoint=0x20, max_codepoint=0xFF, exclude_characters="\x7f"), max_size=30).map(
    lambda text: text.encode("latin-1").strip(b" \t"))


@settings(max_examples=300, deadline=None)
@given(TOKENS, st.lists(st.tuples(TOKENS, VALUES), max_size=12), st.booleans(), st.integers(0, 3))
def test_any_accepted_request_reads_the_same_after_forwarding(method, fields, close, length) -> None:
    data = b"\r\n".join([method + b" /p?q HTTP/1.1", b"Host: a:1", *(n + b": " + v for n, v in fields),
                         b"Content-Length: %d" % length, b"", b""])
    parser = door.Parser()
    head = parser.feed(data)
    if not isinstance(head, dict):      # a name that acts, with a value that it may not have
        return
    out = parser.forward(close=close, request_id=b"id")
    again = parsed(out)[1]
    assert again["framing"] == head["framing"]
    assert again["content_length"] == head["content_length"]
    assert again["keep_alive"] is not close
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(out)
    request = connection.next_event()
    assert request.method == method
    expected = [(n.lower(), v) for n, v in end_to_end(head)]
    ours = {b"host", b"content-length", b"x-request-id", b"connection", b"te", b"transfer-encoding"}
    assert [(n, v) for n, v in request.headers if n not in ours] == [(n, v) for n, v in expected if n not in ours]


@pytest.mark.parametrize("status", [400, 403, 404, 408, 413, 414, 417, 421, 429, 431, 500, 501, 502, 503, 504, 505])
def test_answers_of_our_own_are_whole_responses(status) -> None:
    for words, close, head_only in ((b"", True, False), (b"no healthy upstream", False, False), (b"", True, True)):
        data = door.reply(status, words, close=close, head_only=head_only)
        connection = h11.Connection(h11.CLIENT)
        connection.send(h11.Request(method="HEAD" if head_only else "GET", target="/", headers=[("Host", "a")]))
        connection.send(h11.EndOfMessage())
        connection.receive_data(data)
        response = connection.next_event()
        assert response.status_code == status
        assert response.reason
        body = connection.next_event()
        if head_only:
            assert isinstance(body, h11.EndOfMessage)
        else:
            assert bytes(body.data) == (words or response.reason)
            assert isinstance(connection.next_event(), h11.EndOfMessage)
        assert connection.their_state is (h11.MUST_CLOSE if close else h11.DONE)


def test_an_answer_without_room_is_refused() -> None:
    full = door.reply(503, b"text")
    assert all(door.reply(503, b"text", room=room) == -1 for room in range(len(full)))
