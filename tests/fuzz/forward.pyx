"""A head on its way to the next hop, with edits, and answers of our own.

Input: one byte (0: a request; else a response to the Method of that number), one byte (close, keep-alive, peer speaks HTTP/1.0, ids), one
byte (edits), then per edit a kind byte and two lengths with name and value, then the head as it stood on the wire.

What must hold, of any head that our parser takes:
  1. It fits into head.size + FORWARD_EXTRA + ids + edits, and no byte is written beyond what is reported.
  2. Too little room, however little, is an error, and nothing is written beyond it.
  3. What is written is parsed again as one head that ends where the writing ended, with the same method, path, query, authority (or the
     edit's), status, framing, length, upgrade, and with `close` if asked.
  4. End-to-end fields come through as they were and in order; those of the hop, and those that an edit takes away, do not; each edit's
     field is there.
  5. Forwarded once more without edits, the bytes are the same: another hop of ours changes nothing.
  6. An answer of our own is parsed, has its length, and asks for close if told.
"""
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcmp, memset
from ext.core.text cimport Span
from ext.wire.chars cimport CH_TOKEN, CHARS, clean_value, is_text, lower, same_span
from ext.wire.edit cimport EDIT_ADD, EDIT_REMOVE, HeaderOp
from ext.wire.forward cimport FORWARD_EXTRA, Forward, forward_request, forward_response, local_reply
from ext.wire.http1 cimport (
    F_CHUNKED, F_LENGTH, F_TUNNEL, F_UNTIL_CLOSE, H_CONNECTION, H_CONTENT_LENGTH, H_HOST,
    H_TE, H_TRANSFER_ENCODING, H_UPGRADE, H_X_FORWARDED_PROTO, H_X_REQUEST_ID, M_HEAD,
    M_OTHER, Head, parse_request, parse_response)
from driver cimport Feed, claim, feed_byte, run as drive
from messages cimport same_text

cdef enum:
    OPS = 4
    NAME = 12
    VALUE = 20

cdef struct Edits:
    HeaderOp ops[4]
    char names[48]
    uint32_t n
    uint32_t size


cdef bint framing_name(Span name) noexcept nogil:
    """What ext/route refuses as the name of an edit: fields that frame a message or belong to one hop."""
    return (is_text(name, b"connection", 10) or is_text(name, b"content-length", 14) or is_text(name, b"transfer-encoding", 17)
            or is_text(name, b"keep-alive", 10) or is_text(name, b"proxy-connection", 16) or is_text(name, b"te", 2)
            or is_text(name, b"trailer", 7) or is_text(name, b"upgrade", 7) or is_text(name, b"expect", 6))


cdef void read_edits(Feed* f, Edits* e) noexcept nogil:
    """At most OPS, as ext/wire/edit.pxd promises them: lower-case tokens, clean values without white space around."""
    cdef uint32_t wanted = feed_byte(f) % (OPS + 1)
    cdef uint32_t n, i
    cdef HeaderOp* op
    cdef uint8_t kind
    cdef bint good
    e.n = e.size = 0
    for _ in range(wanted):
        op = &e.ops[e.n]
        kind = feed_byte(f)
        op.op = <uint8_t>(EDIT_REMOVE + kind % 3)
        n = feed_byte(f) % NAME + 1
        if n > f.left:
            return
        op.name.p = e.names + e.n * NAME
        op.name.n = n
        good = True
        for i in range(n):
            good = good and CHARS[f.at[i]] & CH_TOKEN
            e.names[e.n * NAME + i] = lower(f.at[i])
        f.at += n
        f.left -= n
        n = feed_byte(f) % VALUE
        if n > f.left:
            return
        op.value.p = <const char*>f.at
        op.value.n = n if op.op != EDIT_REMOVE else 0
        f.at += n
        f.left -= n
        good = good and clean_value(op.value.p, op.value.n) and not framing_name(op.name)
        if op.value.n and (op.value.p[0] <= 32 or op.value.p[op.value.n - 1] <= 32):
            good = False
        if is_text(op.name, b"host", 4):
            good = False                # an authority has rules of its own: host_edit
        if good:
            e.n += 1
            e.size += op.name.n + op.value.n + 4


cdef int write(const Head* head, const Forward* how, char* out, size_t room, bint request) noexcept nogil:
    """Into `room` bytes; what lies behind them is poisoned meanwhile."""
    cdef int64_t n
    n = forward_request(head, how, out, room) if request else forward_response(head, how, out, room)
    return <int>n


cdef bint taken_away(const Edits* e, Span name, uint32_t start) noexcept nogil:
    cdef uint32_t i
    for i in range(start, e.n):
        if e.ops[i].op != EDIT_ADD and same_span(e.ops[i].name, name):
            return True
    return False


cdef void check_fields(const Head* a, const Head* b, const Edits* e) noexcept nogil:
    """b is a as forwarded."""
    cdef uint32_t i, at = 0
    cdef uint8_t id
    while at < b.n_headers and b.headers[at].id == H_HOST:
        at += 1                         # written anew from the authority
    for i in range(a.n_headers):
        if a.headers[i].hop or taken_away(e, a.headers[i].name, 0):
            continue
        claim(at < b.n_headers and same_text(a.headers[i].line, b.headers[at].line), b"end-to-end fields come through in order")
        at += 1
    for i in range(e.n):
        if e.ops[i].op == EDIT_REMOVE or taken_away(e, e.ops[i].name, i + 1):
            continue
        claim(at < b.n_headers and same_text(e.ops[i].name, b.headers[at].name) and same_text(e.ops[i].value, b.headers[at].value),
              b"each edit's field is there")
        at += 1
    while at < b.n_headers:
        id = b.headers[at].id
        claim(id == H_X_REQUEST_ID or id == H_X_FORWARDED_PROTO or id == H_CONTENT_LENGTH or id == H_TRANSFER_ENCODING
              or id == H_UPGRADE or id == H_TE or id == H_CONNECTION, b"nothing else is said")
        at += 1


cdef void check_message(const Head* a, const Head* b, const Forward* how, uint8_t method, bint request) noexcept nogil:
    if request:
        claim(same_text(a.method, b.method) and same_text(a.path, b.path) and a.has_query == b.has_query
              and same_text(a.query, b.query) and same_text(a.authority, b.authority), b"a request asks for the same")
        claim(a.version_minor == b.version_minor, b"a request keeps its version")
        claim(a.framing == b.framing and a.upgrade == b.upgrade and a.te_trailers == b.te_trailers, b"a request is framed the same")
    else:
        claim(a.status == b.status and same_text(a.reason, b.reason), b"a response says the same")
        claim(a.framing == b.framing or (a.framing == F_UNTIL_CLOSE and b.framing == F_UNTIL_CLOSE), b"a response is framed the same")
        claim(a.framing != F_UNTIL_CLOSE or not b.keep_alive, b"who ends with the connection says so")
    claim(a.framing != F_LENGTH or (b.has_length and a.content_length == b.content_length), b"the length is the same")
    if how.close and (request or (a.status >= 200 and a.framing != F_TUNNEL)):
        claim(not b.keep_alive, b"close is said if asked")


cdef void check_reply(uint8_t a, uint8_t b) noexcept nogil:
    cdef uint16_t[16] all = [400, 403, 404, 408, 413, 414, 417, 421, 429, 431, 500, 501, 502, 503, 504, 505]
    cdef char[320] out
    cdef Head* head = <Head*>malloc(sizeof(Head))
    cdef size_t scanned = 0
    cdef Span words
    cdef int64_t n
    words.p = b"sixteen or fewer"
    words.n = b & 15
    n = local_reply(all[a & 15], words, b & 16, b & 32, out, 256 + words.n)
    claim(n > 0, b"256 bytes and the text suffice for an answer of our own")
    claim(parse_response(out, n, &scanned, M_HEAD if b & 32 else M_OTHER, head) > 0, b"an answer of our own is a response")
    claim(head.status == all[a & 15] and head.has_length, b"an answer of our own has its status and length")
    claim(head.size + (0 if b & 32 else head.content_length) == <uint64_t>n, b"an answer of our own ends where it says")
    claim(not (b & 16) or not head.keep_alive, b"an answer of our own says close if told")
    free(head)


cdef int one_input(const uint8_t* raw, size_t raw_size) noexcept nogil:
    cdef Feed f
    cdef Forward how, plain
    cdef Edits e
    cdef Head* first
    cdef Head* second
    cdef uint8_t who, flags, method
    cdef size_t room, scanned = 0
    cdef char* out
    cdef char* again
    cdef int n, m, got
    f.at = raw
    f.left = raw_size
    who = feed_byte(&f) % 11
    flags = feed_byte(&f)
    method = who - 1 if who else 0
    read_edits(&f, &e)
    check_reply(who, flags)
    first = <Head*>malloc(sizeof(Head))
    if who == 0:
        got = parse_request(<const char*>f.at, f.left, &scanned, first)
    else:
        got = parse_response(<const char*>f.at, f.left, &scanned, method, first)
    if got <= 0:
        free(first)
        return 0
    memset(&how, 0, sizeof(Forward))
    memset(&plain, 0, sizeof(Forward))
    how.ops = e.ops
    how.n_ops = e.n
    how.close = flags & 1
    how.keep_alive = not how.close and (flags >> 1) & 1
    how.peer_http10 = (flags >> 2) & 1
    if who == 0 and flags & 8:
        how.request_id.p = b"0123456789abcdef0123456789abcdef0123"
        how.request_id.n = 36
        how.forwarded_proto.p = b"http"
        how.forwarded_proto.n = 4
    room = first.size + FORWARD_EXTRA + 36 + 4 + e.size
    out = <char*>malloc(room)
    second = <Head*>malloc(sizeof(Head))
    n = write(first, &how, out, room, who == 0)
    if n == -2:
        claim(who != 0 and how.peer_http10 and first.framing == F_CHUNKED, b"only a chunked body cannot be said to HTTP/1.0")
    else:
        claim(n > 0 and <size_t>n <= room, b"a forwarded head fits its bound")
        scanned = 0
        if who == 0:
            got = parse_request(out, n, &scanned, second)
        else:
            got = parse_response(out, n, &scanned, method, second)
        claim(got == n or (got == -431 and first.n_headers + e.n + 5 > 100) or (got == -502 and first.n_headers + e.n + 5 > 100)
              or n > 61440, b"what is forwarded is one head and nothing after its end")
        if got == n:
            check_message(first, second, &how, method, who == 0)
            check_fields(first, second, &e)
            again = <char*>malloc(n + FORWARD_EXTRA)
            plain.close = how.close
            plain.keep_alive = how.keep_alive
            m = write(second, &plain, again, n + FORWARD_EXTRA, who == 0)
            claim(m == n and memcmp(out, again, n) == 0, b"another hop of ours changes nothing")
            free(again)
        # less room: never written beyond (the allocation is exactly that large)
        room = flags * 37 % n
        free(out)
        out = <char*>malloc(room)
        claim(write(first, &how, out, room, who == 0) == -1, b"too little room is an error")
    free(out)
    free(second)
    free(first)
    return 0


def run(list words):
    return drive(words, one_input)
