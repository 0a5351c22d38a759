"""What do the first bytes speak: an answer for every protocol, bounded, and the same however the bytes come."""
from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ext.wire import door

SPEAKS = {
    "get": (b"GET / HTTP/1.1\r\nHost: a\r\n", "http1"),
    "http10": (b"HEAD /x?y HTTP/1.0\r\n", "http1"),
    "odd-method": (b"PROPFIND /dav HTTP/1.1\r\n", "http1"),
    "msearch": (b"M-SEARCH * HTTP/1.1\r\n", "tcp"),
    "options-star": (b"OPTIONS * HTTP/1.1\r\n", "http1"),
    "connect": (b"CONNECT a:1 HTTP/1.1\r\n", "http1"),
    "absolute": (b"GET http://a/ HTTP/1.1\r\n", "http1"),
    "absolute-any-case": (b"GET HtTpS://a/ HTTP/1.1\r\n", "http1"),
    "long-url": (b"GET /" + b"a" * 2000 + b" HTTP/1.1\r\n", "http1"),
    "long-unknown": (b"XYZ /" + b"a" * 2000 + b" HTTP/1.1\r\n", "tcp"),
    "h2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0", "http2"),
    "tls": (bytes.fromhex("1603010200010001fc0303"), "tls"),
    "tls-alert": (bytes.fromhex("16030102000200"), "tcp"),
    "redis": (b"*1\r\n$4\r\nPING\r\n", "tcp"),
    "redis-inline": (b"PING\r\n", "tcp"),
    "redis-set": (b"SET k v\r\n", "tcp"),
    "postgres": (b"\0\0\0\x08\x04\xd2\x16\x2f", "tcp"),
    "ssh": (b"SSH-2.0-OpenSSH_9.2\r\n", "tcp"),
    "smtp": (b"EHLO mail.example\r\n", "tcp"),
    "ftp": (b"USER anonymous\r\n", "tcp"),
    "irc": (b"NICK somebody\r\n", "tcp"),
    "memcached": (b"get key\r\n", "tcp"),
    "rtsp": (b"OPTIONS * RTSP/1.0\r\n", "tcp"),
    "sip": (b"OPTIONS sip:a@b SIP/2.0\r\n", "tcp"),
    "proxy-protocol": (b"PROXY TCP4 10.0.0.1 10.0.0.2 1 2\r\n", "tcp"),
    "http09": (b"GET /\r\n", "tcp"),
    "http3": (b"GET / HTTP/3.0\r\n", "tcp"),
    "bare-lf": (b"GET / HTTP/1.1\n", "tcp"),
    "zeros": (bytes(10), "tcp"),
    "mongo": (b"\x3a\0\0\0\1\0\0\0\0\0\0\0\xd4\7\0\0", "tcp"),
}


@pytest.mark.parametrize("name", SPEAKS)
def test_a_protocol_is_told_and_no_prefix_says_another(name) -> None:
    data, answer = SPEAKS[name]
    assert door.sniff(data) == answer
    for at in range(len(data)):
        assert door.sniff(data[:at]) in ("more", answer), f"first {at} bytes"


@pytest.mark.parametrize("first", [b"", b"G", b"GET", b"GET ", b"GET /a", b"GET / HTTP/1.", b"PRI * HTTP/2.0\r\n", b"\x16", b"\x16\x03"])
def test_what_may_still_become_http_or_tls_is_waited_for(first) -> None:
    assert door.sniff(first) == "more"


@settings(max_examples=300, deadline=None)
@given(st.binary(min_size=1024, max_size=1100) | st.text("ABC /:.", min_size=1024, max_size=1100).map(str.encode))
def test_there_is_an_answer_after_the_bound(data) -> None:
    assert door.sniff(data) != "more"


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(SPEAKS)), st.integers(0, 60), st.integers(0, 255), st.integers(0, 80))
def test_an_answer_once_given_does_not_change_with_more_bytes(name, at, byte, cut) -> None:
    data = bytearray(SPEAKS[name][0])
    data[at % len(data)] = byte
    early = door.sniff(bytes(data[:cut]))
    if early != "more":
        assert door.sniff(bytes(data)) == early


@pytest.mark.parametrize("target", [b"/" + b"a" * 1023, b"http://" + b"a" * 1020])
def test_lines_that_end_at_the_bound_have_an_answer(target) -> None:
    for size in range(1000, 1024):
        line = b"GET " + target[:size - 4]
        assert door.sniff((line + b" HTTP/1.1\r\n" + b"x" * 40)[:1024]) == "http1"
