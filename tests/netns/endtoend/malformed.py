"""Requests that a proxy must not forward: each is a way in which two parsers could disagree (RFC 9112 sections 2.2, 3, 5, 6, 7, 11.2)."""
from __future__ import annotations

HOST = b"Host: origin\r\n"
GET = b"GET /bad HTTP/1.1\r\n"
POST = b"POST /bad HTTP/1.1\r\n" + HOST
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"

MALFORMED: list[tuple[bytes, int]] = [
    # two framings, or one that says two things
    (POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n" + END, 400),
    (POST + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n" + END, 400),
    (POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello!", 400),
    (POST + b"Content-Length: 5, 6\r\n\r\nhello!", 400),
    *[(POST + b"Content-Length: " + value + b"\r\n\r\nhello", 400)
      for value in (b"+5", b"-5", b"0x5", b"5 5", b"", b"99999999999999999999999", b"5;", b"five")],
    # codings
    (POST + b"Transfer-Encoding: xchunked\r\n\r\n" + END, 501), (POST + b"Transfer-Encoding: gzip\r\n\r\n", 501),
    *[(POST + b"Transfer-Encoding: " + value + b"\r\n\r\n" + END, 400)
      for value in (b"chunked, identity", b"chunked, chunked", b"\x0bchunked", b"chunked\r\nTransfer-Encoding: chunked")],
    (POST + b"Transfer-Encoding : chunked\r\n\r\n" + END, 400),
    (b"POST /bad HTTP/1.0\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n" + END, 400),
    # chunks
    *[(CHUNKED + chunk + b"\r\n" + END, 400)
      for chunk in (b"0x3\r\nabc", b"+3\r\nabc", b"-1\r\n", b"fffffffffffffffff\r\nabc", b"3\nabc", b"3\r\nabcd", b"zz\r\n", b"\r\nabc")],
    # the authority
    (GET + b"\r\n", 400), (GET + HOST + HOST + b"\r\n", 400), (GET + b"Host: a b\r\n\r\n", 400),
    (GET + b"Host: origin, other\r\n\r\n", 400),
    # lines
    (b"GET /bad HTTP/1.1\nHost: origin\n\n", 400), (GET + HOST + b"A: b\r\n folded\r\n\r\n", 400),
    (GET + b" A: b\r\n" + HOST + b"\r\n", 400),
    *[(GET + HOST + line + b"\r\n\r\n", 400) for line in (b"A : b", b": b", b"A", b"A: b\0c", b"A: b\rc", b"A\xff: b", b"A: \x7f")],
    # the first line
    *[(line + b"\r\n" + HOST + b"\r\n", code) for line, code in (
        (b"GET /bad", 400), (b"GET /bad HTTP/1.1 x", 400), (b"GET  /bad HTTP/1.1", 400), (b"GET\t/bad HTTP/1.1", 400),
        (b"GET bad HTTP/1.1", 400),
        (b"GET /bad http/1.1", 400), (b"GET /bad HTTP/2.0", 505), (b"GET /bad HTTP/1.11", 400), (b"GET /b\x01ad HTTP/1.1", 400),
        (b"G@T /bad HTTP/1.1", 400), (b" GET /bad HTTP/1.1", 400))],
    # other protocols
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"a" * 64, 400), (b"\0" * 100, 400), (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    # too much
    (GET + HOST + b"A: " + b"b" * 70_000 + b"\r\n\r\n", 431),
    (GET + HOST + b"".join(b"a%d: b\r\n" % i for i in range(3000)) + b"\r\n", 431),
    (b"GET /bad" + b"x" * 70_000 + b" HTTP/1.1\r\n" + HOST + b"\r\n", 414),
]
