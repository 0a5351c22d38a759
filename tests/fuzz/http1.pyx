"""HTTP/1 heads and bodies, requests and responses, one behind the other as on a connection.

Input: one byte (0: requests; else a response to the Method of that number), one byte (sizes of the pieces), then the wire.

What must hold:
  1. Parsed at every prefix, a head gives "more" until it gives what the whole gives, and the facts are the same.
  2. No byte beyond what was given is read (the rest is poisoned).
  3. Spans lie in the buffer. Names are tokens. No value, target or reason has a CR, LF or NUL.
  4. A message has one framing: never chunked and a length; HTTP/1.0 is never chunked; CONNECT has no body.
  5. A refusal is one of the documented statuses.
  6. A body takes at most what it is given, the same number of bytes however they are cut, and nothing once it is done or bad.
  7. What the follower took of a chunked body ends with an empty line, and its payload is what an independent reading finds.
"""
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memchr, memcmp
from ext.core.text cimport Span
from ext.wire.body cimport B_BAD, Body, body_feed, body_start
from ext.wire.http1 cimport (
    F_CHUNKED, F_LENGTH, F_NONE, F_TUNNEL, F_UNTIL_CLOSE, HEAD_MAX_BYTES, HEAD_MAX_HEADERS, M_CONNECT, Head, parse_request, parse_response)
from driver cimport Curtain, Feed, claim, curtain_close, curtain_open, curtain_show, feed_byte, run as drive
from messages cimport inside, same_head

cdef int parse(const char* data, size_t size, size_t* scanned, uint8_t who, Head* head) noexcept nogil:
    if who == 0:
        return parse_request(data, size, scanned, head)
    return parse_response(data, size, scanned, who - 1, head)


cdef bint clean(Span s) noexcept nogil:
    return s.n == 0 or (memchr(s.p, 13, s.n) == NULL and memchr(s.p, 10, s.n) == NULL and memchr(s.p, 0, s.n) == NULL)


cdef void check_head(const Head* head, const char* data, size_t size, uint8_t who) noexcept nogil:
    cdef uint32_t i, k
    cdef Span name
    claim(head.size <= size and head.size <= HEAD_MAX_BYTES, b"a head is no larger than what was given, nor than its bound")
    claim(head.n_headers <= HEAD_MAX_HEADERS, b"a head has at most its bound of fields")
    claim(memcmp(data + head.size - 4, b"\r\n\r\n", 4) == 0, b"a head ends with an empty line")
    claim(inside(head.method, data, size) and inside(head.target, data, size) and inside(head.reason, data, size)
          and inside(head.query, data, size) and inside(head.authority, data, size) and inside(head.content_type, data, size),
          b"spans lie in the buffer")
    claim(clean(head.method) and clean(head.target) and clean(head.reason) and clean(head.authority), b"no control byte in the start line")
    for i in range(head.n_headers):
        name = head.headers[i].name
        claim(inside(head.headers[i].line, data, head.size) and inside(name, data, head.size)
              and inside(head.headers[i].value, data, head.size), b"fields lie in the head")
        claim(clean(head.headers[i].value), b"no CR, LF or NUL in a value")
        claim(name.n > 0, b"a field has a name")
        for k in range(name.n):
            claim(name.p[k] > 32 and name.p[k] != b':' and name.p[k] < 127, b"a name has no space, colon or control byte")
    claim(not (head.chunked and head.has_length), b"a message is not chunked and of a length")
    claim(not (head.chunked and head.version_minor == 0), b"HTTP/1.0 is not chunked")
    claim(head.framing != F_LENGTH or head.has_length, b"a length was given")
    claim(head.framing != F_CHUNKED or head.chunked, b"chunked was given")
    if who == 0:
        claim(head.framing != F_UNTIL_CLOSE and head.framing != F_TUNNEL, b"a request does not end with its connection")
        claim(head.method_id != M_CONNECT or head.framing == F_NONE, b"CONNECT has no body")
        claim(head.path.n > 0 or head.method_id == M_CONNECT, b"a request has a path")


cdef int64_t payload_of(const char* data, size_t size) noexcept nogil:
    """Payload of a whole chunked body, read line by line as RFC 9112 7.1 has it; -1: it is not one that ends at `size`."""
    cdef size_t at = 0
    cdef const char* eol
    cdef uint64_t n
    cdef int64_t total = 0
    cdef char c
    while True:
        n = 0
        eol = <const char*>memchr(data + at, 13, size - at)
        if eol == NULL or eol == data + at:
            return -1
        while data + at < eol:
            c = data[at] | 32
            n = n * 16 + (c - 48 if data[at] <= 57 else c - 87)
            at += 1
        at += 2
        if n == 0:
            break
        if n > size or at + n + 2 > size:
            return -1
        total += n
        at += n + 2
    while at + 2 < size:                        # trailers
        eol = <const char*>memchr(data + at, 10, size - at)
        if eol == NULL:
            return -1
        at = eol + 1 - data
    return total if at + 2 == size and memcmp(data + at, b"\r\n", 2) == 0 else -1


cdef int64_t check_body(const Head* head, const char* data, size_t size, uint8_t piece, bint* ended) noexcept nogil:
    """Bytes of the body in `data`; *ended: it is complete, a next message may follow."""
    cdef Body whole, cut
    cdef uint8_t done = 0, cut_done = 0
    cdef Curtain c
    cdef size_t at = 0, n
    cdef int64_t taken, got
    body_start(&whole, head)
    body_start(&cut, head)
    claim(body_feed(&whole, NULL, 0, &done) == 0, b"nothing is taken of nothing")
    body_feed(&cut, NULL, 0, &cut_done)
    claim(done == cut_done and done == (head.framing == F_NONE or (head.framing == F_LENGTH and head.content_length == 0)),
          b"an empty body is done at once")
    taken = 0 if done else body_feed(&whole, data, size, &done)
    curtain_open(&c, data, size)
    got = 0
    while at < size and not cut_done and got >= 0:
        n = (piece * 7 + at) % 13 + 1           # all sizes from 1 to 13
        if n > size - at:
            n = size - at
        curtain_show(&c, at + n)
        got = body_feed(&cut, c.data + at, n, &cut_done)
        claim(got <= <int64_t>n, b"a body takes at most what it is given")
        claim(got < 0 or cut_done or got == <int64_t>n, b"a body that is not done takes all")
        at += got if got > 0 else 0
    curtain_close(&c)
    if taken < 0:
        claim(got < 0 and cut.state == B_BAD, b"a malformed body is malformed however it is cut")
        claim(body_feed(&whole, data, size, &done) == -1 and not done, b"a malformed body stays so")
        return -1
    claim(got >= 0 and <int64_t>at == taken and done == cut_done, b"a body ends at the same byte however it is cut")
    claim(whole.payload == cut.payload, b"the payload is the same however it is cut")
    if done:
        claim(body_feed(&whole, data, size, &done) == 0 and done, b"a body that is done takes nothing more")
        if head.framing == F_CHUNKED:
            claim(payload_of(data, taken) == <int64_t>whole.payload, b"a chunked body reads the same elsewhere")
        elif head.framing == F_LENGTH:
            claim(<uint64_t>taken == head.content_length, b"a body has its length")
    ended[0] = done
    return taken


cdef int one_input(const uint8_t* raw, size_t raw_size) noexcept nogil:
    cdef Feed f
    cdef Head* at_once
    cdef Head* growing
    cdef uint8_t who, piece
    cdef const char* data
    cdef size_t size, i, scanned, growing_scanned
    cdef int whole, now
    cdef int64_t body
    cdef bint ended
    cdef Curtain c
    f.at = raw
    f.left = raw_size
    who = feed_byte(&f) % 11
    piece = feed_byte(&f)
    data = <const char*>f.at
    size = f.left
    at_once = <Head*>malloc(sizeof(Head))
    growing = <Head*>malloc(sizeof(Head))
    while size:
        scanned = growing_scanned = 0
        whole = parse(data, size, &scanned, who, at_once)
        curtain_open(&c, data, size)
        now = 0
        for i in range(1, size + 1):
            curtain_show(&c, i)
            now = parse(c.data, i, &growing_scanned, who, growing)
            if now != 0:
                break
        claim(now == whole, b"a head gives the same at every split")
        if whole <= 0:
            curtain_close(&c)
            claim(whole == 0 or (whole == -502) == (who != 0), b"a response is refused with 502, a request never")
            claim(whole == 0 or who != 0 or whole == -400 or whole == -414 or whole == -431 or whole == -501 or whole == -505,
                  b"a request is refused with a documented status")
            break
        claim(i == <size_t>whole and at_once.size == <uint32_t>whole, b"a head is known at its last byte")
        check_head(at_once, data, size, who)
        claim(same_head(at_once, growing), b"the facts are the same at every split")
        curtain_close(&c)
        data += whole
        size -= whole
        ended = False
        body = check_body(at_once, data, size, piece, &ended)
        if body < 0 or not ended:
            break
        data += body
        size -= body
    free(at_once)
    free(growing)
    return 0


def run(list words):
    return drive(words, one_input)
