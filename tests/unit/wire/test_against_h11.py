"""Whatever we accept, an independent parser (h11) reads with the same meaning: same target, fields, length and end."""
from __future__ import annotations

import h11
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ext.wire import door
from tests.unit.wire.corpus import MALFORMED, REQUESTS, RESPONSES


def drain(connection) -> tuple[bytes, bool]:
    """Body bytes until the end of the message, and whether the end came."""
    body = b""
    while True:
        event = connection.next_event()
        if type(event) is h11.Data:
            body += bytes(event.data)
        elif type(event) is h11.EndOfMessage:
            return body, True
        else:
            return body, False


def h11_request(data: bytes, with_body: bool):
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=100_000)
    connection.receive_data(data.removeprefix(b"\r\n"))
    request = connection.next_event()
    assert isinstance(request, h11.Request), f"h11 read {request!r}"
    body, ended = drain(connection) if with_body else (b"", False)
    return request, body, ended, connection.trailing_data[0]


def our_request(data: bytes):
    """(head or answer, payload bytes, done, end of the message or -1 for a malformed body)."""
    parser = door.Parser()
    head = parser.feed(data)
    if not isinstance(head, dict):
        return head, 0, False, 0
    body = parser.body()
    body.feed(b"")
    taken, done = body.feed(data[head["size"]:])
    return head, body.payload, done, head["size"] + taken if taken >= 0 else -1


def fields(head) -> list[tuple[bytes, bytes]]:
    """As h11 shows them: names in lower case, and the coding's name too."""
    return [(name.lower(), value.lower() if name.lower() == b"transfer-encoding" else value) for name, value, _ in head["headers"]]


def hold_together(data: bytes) -> None:
    """Nothing to hold where we refuse or wait."""
    head, payload, done, end = our_request(data)
    if not isinstance(head, dict):
        return
    request, body, ended, trailing = h11_request(data, end >= 0)
    assert request.method == head["method"]
    assert request.target == head["target"]
    assert [(name, value) for name, value in request.headers] == fields(head)
    if done:
        assert ended
        assert len(body) == payload
        assert trailing == data[end:]


@pytest.mark.parametrize("name", REQUESTS)
def test_requests_of_the_corpus(name) -> None:
    data = REQUESTS[name][0]
    assert isinstance(our_request(data)[0], dict)
    hold_together(data)
    if name not in ("upgrade", "connect", "connect-v6", "upgrade-h2c-is-not-taken"):     # h11 pauses there by itself
        hold_together(data + b"GET /next HTTP/1.1\r\nHost: b\r\n\r\n")


@pytest.mark.parametrize("name", RESPONSES)
def test_responses_of_the_corpus(name) -> None:
    method, data, payload, facts = RESPONSES[name]
    connection = h11.Connection(h11.CLIENT)
    sent = [("Host", "a")]
    if facts.get("status") == 101 or name == "101":
        sent += [("Connection", "upgrade"), ("Upgrade", "websocket")]
    connection.send(h11.Request(method=method, target="a:1" if method == "CONNECT" else "/", headers=sent))
    connection.send(h11.EndOfMessage())
    connection.receive_data(data)
    response = connection.next_event()
    head = door.Parser(method).feed(data)
    assert response.status_code == head["status"]
    assert [(n, v) for n, v in response.headers] == fields(head)
    if head["framing"] == "tunnel" or head["status"] < 200:
        return
    if head["framing"] == "until_close":
        connection.receive_data(b"abc")
        connection.receive_data(b"")
        payload = b"abc"
    body, ended = drain(connection)
    assert ended
    assert body == payload


@pytest.mark.parametrize("name", MALFORMED)
def test_what_we_refuse_may_pass_h11_but_never_the_other_way_round(name) -> None:
    data, _ = MALFORMED[name]
    hold_together(data)
    assert not isinstance(our_request(data)[0], dict)


FRAGMENTS = st.sampled_from([
    b"GET ", b"POST ", b"/", b"/a?b", b" HTTP/1.1", b" HTTP/1.0", b"\r\n", b"\n", b"\r", b"Host: a", b"Host:", b"Content-Length: 3",
    b"Content-Length: 03", b"Content-Length: 3,3", b"Transfer-Encoding: chunked", b"Transfer-Encoding: gzip, chunked",
    b"Transfer-Encoding:",
    b"Connection: close", b"Connection: host", b"X: y", b" ", b"\t", b"abc", b"3\r\nabc\r\n0\r\n\r\n", b"\x00", b"\x80", b":", b"\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\n", b"POST / HTTP/1.1\r\nHost: a\r\n", b"0\r\n\r\n", b"3;x\r\nabc\r\n", b"chunked", b"\x0b",
    b"0\r\nA: b\r\n\r\n",
])


@settings(max_examples=1500, deadline=None)
@given(st.lists(FRAGMENTS, max_size=14).map(b"".join))
@example(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabcGET / HTTP/1.1\r\nHost: a\r\n\r\n")
@example(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\nX")
def test_pieces_put_together_at_random(data) -> None:
    hold_together(data)


@settings(max_examples=800, deadline=None)
@given(st.sampled_from([data for data, _, _ in REQUESTS.values()]), st.integers(0, 400), st.integers(0, 255), st.integers(0, 2))
def test_one_byte_changed_removed_or_put_in(data, at, byte, how) -> None:
    at %= len(data)
    hold_together(data[:at] + (bytes([byte]) if how < 2 else b"") + data[at + (how != 1):])
