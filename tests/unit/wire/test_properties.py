"""For any bytes: how they are cut changes nothing, and what is written for the next hop is the same message to an independent parser."""
from __future__ import annotations

import h11
from hypothesis import given, settings
from hypothesis import strategies as st

from ext.wire import door
from tests.support.reader import read
from tests.support.smuggling import requests

CASES = [case.bytes for case in requests() if len(case.bytes) < 2000]
TOKEN = st.text("!#$%&'*+-.^_`|~0123456789abcXYZ", min_size=1, max_size=8)
TARGET = st.text("/abc%?=&.;:@!$'()*+,~-_[]{}|^`<>\\\"", max_size=12).map(lambda rest: "/" + rest)
VALUE = st.text("ab ,;=:\"\t\x80\xff()", max_size=12)
FIELDS = st.lists(st.tuples(TOKEN, VALUE), max_size=5)
BODY = st.one_of(st.none(), st.binary(max_size=40), st.lists(st.binary(min_size=1, max_size=20), max_size=4))
PIECES = st.sampled_from([
    b"\r\n", b"\n", b"\r", b"\r\n\r\n", b" ", b"\t", b"\0", b":", b",", b";", b"0", b"5", b"-", b"+", b"0x", b"\x0b", b"\x80", b"0\r\n\r\n",
    b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n", b"Host: b\r\n", b"Connection: close\r\n",
    b"GET /x HTTP/1.1\r\nHost: h\r\n\r\n"])
# what the proxy itself speaks of is put in by `framed`, once
OURS = {"host", "content-length", "transfer-encoding", "connection", "te", "upgrade", "expect", "trailer", "keep-alive", "proxy-connection"}


def framed(method: str, target: str, fields: list[tuple[str, str]], body: bytes | list[bytes] | None) -> bytes:
    lines = [f"{method} {target} HTTP/1.1", "Host: h", *(f"{name}: {value}" for name, value in fields if name.lower() not in OURS)]
    behind = b""
    if isinstance(body, bytes):
        lines.append(f"Content-Length: {len(body):03d}")
        behind = body
    elif body is not None:
        lines.append("Transfer-Encoding: Chunked")
        behind = b"".join(b"%X\r\n%s\r\n" % (len(part), part) for part in body) + b"0\r\n\r\n"
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + behind


MESSAGES = st.builds(framed, TOKEN.filter(lambda name: name != "CONNECT"), TARGET, FIELDS, BODY)
CUTS = st.lists(st.integers(0, 400), max_size=6)


@settings(max_examples=150, deadline=None)
@given(st.lists(MESSAGES, min_size=1, max_size=4).map(b"".join), CUTS)
def test_sound_messages_are_read_however_they_are_cut(data: bytes, cuts: list[int]) -> None:
    whole = read(data)
    assert whole[1] == "" and whole[0]
    assert read(data, cuts) == whole
    assert read(data, range(len(data))) == whole


@settings(max_examples=400, deadline=None)
@given(st.one_of(st.sampled_from(CASES), MESSAGES), PIECES, st.integers(0, 2000), st.integers(0, 3), CUTS)
def test_broken_messages_are_read_however_they_are_cut(data: bytes, piece: bytes, at: int, gone: int, cuts: list[int]) -> None:
    at %= len(data)
    broken = data[:at] + piece + data[at + gone:]
    assert read(broken, cuts) == read(broken)


def message_of_h11(data: bytes) -> tuple[h11.Request, bytes, bytes]:
    """(head, body, what is behind it); ValueError for what h11 does not read as one whole message."""
    h = h11.Connection(h11.SERVER, max_incomplete_event_size=200_000)
    h.receive_data(data)
    request, body = h.next_event(), b""
    if not isinstance(request, h11.Request):
        raise ValueError(f"h11 reads {request}")
    while isinstance(event := h.next_event(), h11.Data):
        body += bytes(event.data)
    if not isinstance(event, h11.EndOfMessage):
        raise ValueError(f"h11 reads {event}")
    return request, body, h.trailing_data[0]


@settings(max_examples=400, deadline=None)
@given(st.one_of(MESSAGES, st.sampled_from(CASES)), st.one_of(st.just(b""), PIECES), st.integers(0, 2000), st.integers(0, 3))
def test_what_is_passed_on_is_the_same_message_to_h11(data: bytes, piece: bytes, at: int, gone: int) -> None:
    """forward(parse(x)): method, target, host, end-to-end fields in order, body and end, as we read them."""
    at %= len(data)
    data = data[:at] + piece + data[at + (gone if piece else 0):]
    parser = door.Parser()
    head = parser.feed(data)
    if not isinstance(head, dict) or head["upgrade"]:   # h11 waits there for a switch
        return
    body = parser.body()
    _, done = body.feed(b"")
    taken, done = (0, True) if done else body.feed(data[head["size"]:])
    if taken < 0 or not done:
        return
    raw = data[head["size"]:head["size"] + taken]
    written = parser.forward()
    target = head["path"] + (b"?" + head["query"] if head["query"] is not None else b"")
    if head["method_id"] == "CONNECT":
        target = head["target"]
    request, payload, behind = message_of_h11(written + raw + b"GET /behind")
    assert (request.method, request.target, behind) == (head["method"], target, b"GET /behind")
    assert len(payload) == body.payload
    if head["framing"] != "chunked":
        assert payload == raw
    seen = [(name, value) for name, value in request.headers]
    assert [value for name, value in seen if name == b"host"] == ([head["authority"]] if head["version_minor"] or head["authority"] else [])
    assert sum(name in (b"content-length", b"transfer-encoding") for name, _ in seen) == (head["framing"] != "none")
    kept = [(name.lower(), value) for name, value, hop in head["headers"] if not hop]
    assert [one for one in seen if one in kept] == kept
    rest = {name for name, value in seen if (name, value) not in kept}
    assert rest <= {b"host", b"content-length", b"transfer-encoding", b"te", b"connection", b"upgrade"}
