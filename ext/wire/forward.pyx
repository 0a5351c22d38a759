"""See forward.pxd."""
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, strlen
from ext.core.text cimport Span
from ext.wire.chars cimport is_text, same_span
from ext.wire.edit cimport EDIT_REMOVE, EDIT_SET
from ext.wire.http1 cimport (
    F_CHUNKED, F_LENGTH, F_NONE, F_TUNNEL, F_UNTIL_CLOSE, H_UPGRADE, H_X_FORWARDED_PROTO, H_X_REQUEST_ID, M_CONNECT, Head,
    Header)

cdef struct Out:
    char* p
    size_t left
    uint8_t full


cdef inline void put(Out* out, const char* p, size_t n) noexcept nogil:
    if n > out.left:
        out.full = 1
        out.left = 0
        return
    if n:
        memcpy(out.p, p, n)
    out.p += n
    out.left -= n


cdef inline void put_span(Out* out, Span s) noexcept nogil:
    put(out, s.p, s.n)


cdef void put_number(Out* out, uint64_t value) noexcept nogil:
    cdef char digits[20]
    cdef uint32_t at = 20
    while True:
        at -= 1
        digits[at] = <char>(48 + value % 10)
        value //= 10
        if value == 0:
            break
    put(out, digits + at, 20 - at)


cdef inline void put_field(Out* out, Span name, Span value) noexcept nogil:
    put_span(out, name)
    put(out, b": ", 2)
    put_span(out, value)
    put(out, b"\r\n", 2)


cdef int overwritten(const Forward* how, Span name, uint32_t start) noexcept nogil:
    """An edit from `start` on removes or replaces fields of that name."""
    cdef uint32_t i
    for i in range(start, how.n_ops):
        if (how.ops[i].op == EDIT_REMOVE or how.ops[i].op == EDIT_SET) and same_span(how.ops[i].name, name):
            return 1
    return 0


cdef int edited(const Forward* how, Span name) noexcept nogil:
    cdef uint32_t i
    for i in range(how.n_ops):
        if same_span(how.ops[i].name, name):
            return 1
    return 0


cdef inline int is_host(Span name) noexcept nogil:
    return is_text(name, b"host", 4)


cdef void put_end_to_end(Out* out, const Head* head, const Forward* how) noexcept nogil:
    """Fields that go on, as received; then those that edits add."""
    cdef const Header* h
    cdef uint32_t i
    for i in range(head.n_headers):
        h = &head.headers[i]
        if h.hop == 0 and not (how.n_ops and overwritten(how, h.name, 0)):
            put_span(out, h.line)
    for i in range(how.n_ops):
        if how.ops[i].op != EDIT_REMOVE and not is_host(how.ops[i].name) and not overwritten(how, how.ops[i].name, i + 1):
            put_field(out, how.ops[i].name, how.ops[i].value)


cdef void put_absent(Out* out, const Head* head, const Forward* how, uint8_t id, Span name, Span value) noexcept nogil:
    """A field of the proxy's own, unless the message or an edit speaks of it."""
    cdef uint32_t i
    if value.n == 0 or edited(how, name):
        return
    if head.first[id] != 0:
        for i in range(head.first[id] - 1, head.n_headers):
            if head.headers[i].id == id and head.headers[i].hop == 0:
                return
    put_field(out, name, value)


cdef void put_connection(Out* out, uint8_t close, uint8_t keep_alive, uint8_t upgrade, uint8_t te) noexcept nogil:
    if not (close or keep_alive or upgrade or te):
        return
    put(out, b"connection: ", 12)
    if close:
        put(out, b"close, ", 7)
    elif keep_alive:
        put(out, b"keep-alive, ", 12)
    if upgrade:
        put(out, b"upgrade, ", 9)
    if te:
        put(out, b"te, ", 4)
    if not out.full:
        out.p -= 2                              # the last comma and blank
        out.left += 2
    put(out, b"\r\n", 2)


cdef void put_upgrade(Out* out, const Head* head) noexcept nogil:
    cdef uint32_t i
    for i in range(head.n_headers):
        if head.headers[i].id == H_UPGRADE:
            put_span(out, head.headers[i].line)


cdef inline Span literal(const char* text) noexcept nogil:
    cdef Span s
    s.p = text
    s.n = <uint32_t>strlen(text)
    return s


cdef inline int64_t written(Out* out, const char* start) noexcept nogil:
    return -1 if out.full else out.p - start


cdef int64_t forward_request(const Head* head, const Forward* how, char* out_p, size_t room) noexcept nogil:
    cdef Out out
    cdef Span host = head.authority
    cdef uint8_t te = head.te_trailers
    cdef uint32_t i
    out.p = out_p
    out.left = room
    out.full = 0
    for i in range(how.n_ops):
        if how.ops[i].op == EDIT_SET and is_host(how.ops[i].name):
            host = how.ops[i].value
    put_span(&out, head.method)
    put(&out, b" ", 1)
    if head.method_id == M_CONNECT:
        put_span(&out, head.target)
    else:
        put_span(&out, head.path)
        if head.has_query:
            put(&out, b"?", 1)
            put_span(&out, head.query)
    put(&out, b" HTTP/1.", 8)
    put_number(&out, head.version_minor)
    put(&out, b"\r\n", 2)
    if host.n or head.version_minor:
        put_field(&out, literal(b"host"), host)
    put_end_to_end(&out, head, how)
    put_absent(&out, head, how, H_X_REQUEST_ID, literal(b"x-request-id"), how.request_id)
    put_absent(&out, head, how, H_X_FORWARDED_PROTO, literal(b"x-forwarded-proto"), how.forwarded_proto)
    if head.framing == F_LENGTH:
        put(&out, b"content-length: ", 16)
        put_number(&out, head.content_length)
        put(&out, b"\r\n", 2)
    elif head.framing == F_CHUNKED:
        put(&out, b"transfer-encoding: chunked\r\n", 28)
    if head.upgrade:
        put_upgrade(&out, head)
    if te:
        put(&out, b"te: trailers\r\n", 14)
    put_connection(&out, how.close, how.keep_alive, head.upgrade, te)
    put(&out, b"\r\n", 2)
    return written(&out, out_p)


cdef int64_t forward_response(const Head* head, const Forward* how, char* out_p, size_t room) noexcept nogil:
    cdef Out out
    cdef uint8_t body = head.status >= 200 and head.status != 204 and head.framing != F_TUNNEL
    cdef uint8_t close = how.close or (head.framing == F_UNTIL_CLOSE)
    cdef uint8_t upgrade = head.status == 101
    if how.peer_http10 and head.framing == F_CHUNKED:
        return -2
    out.p = out_p
    out.left = room
    out.full = 0
    put(&out, b"HTTP/1.1 ", 9)
    put_number(&out, head.status)
    put(&out, b" ", 1)
    put_span(&out, head.reason)
    put(&out, b"\r\n", 2)
    put_end_to_end(&out, head, how)
    # a length (coding) without a body stands where the answer is to HEAD, or 304: it tells of the representation
    if head.framing == F_LENGTH or (head.framing == F_NONE and head.has_length and body):
        put(&out, b"content-length: ", 16)
        put_number(&out, head.content_length)
        put(&out, b"\r\n", 2)
    elif head.framing == F_CHUNKED or (head.framing == F_NONE and head.chunked and body and not how.peer_http10):
        put(&out, b"transfer-encoding: chunked\r\n", 28)
    if upgrade:
        put_upgrade(&out, head)
    if head.status >= 200 or upgrade:
        put_connection(&out, close and not upgrade, how.keep_alive and not upgrade, upgrade, 0)
    put(&out, b"\r\n", 2)
    return written(&out, out_p)


cdef const char* phrase(uint16_t status) noexcept nogil:
    if status == 400:
        return b"Bad Request"
    if status == 403:
        return b"Forbidden"
    if status == 404:
        return b"Not Found"
    if status == 408:
        return b"Request Timeout"
    if status == 413:
        return b"Content Too Large"
    if status == 414:
        return b"URI Too Long"
    if status == 417:
        return b"Expectation Failed"
    if status == 421:
        return b"Misdirected Request"
    if status == 429:
        return b"Too Many Requests"
    if status == 431:
        return b"Request Header Fields Too Large"
    if status == 501:
        return b"Not Implemented"
    if status == 502:
        return b"Bad Gateway"
    if status == 503:
        return b"Service Unavailable"
    if status == 504:
        return b"Gateway Timeout"
    if status == 505:
        return b"HTTP Version Not Supported"
    return b"Internal Server Error"


cdef int64_t local_reply(uint16_t status, Span text, uint8_t close, uint8_t head_only, char* out_p, size_t room) noexcept nogil:
    cdef Out out
    cdef Span words = literal(phrase(status))
    out.p = out_p
    out.left = room
    out.full = 0
    put(&out, b"HTTP/1.1 ", 9)
    put_number(&out, status)
    put(&out, b" ", 1)
    put_span(&out, words)
    put(&out, b"\r\ncontent-type: text/plain\r\ncontent-length: ", 44)
    if text.n == 0:
        text = words
    put_number(&out, text.n)
    put(&out, b"\r\n", 2)
    put_connection(&out, close, 0, 0, 0)
    put(&out, b"\r\n", 2)
    if not head_only:
        put_span(&out, text)
    return written(&out, out_p)


cdef int same_name(Span field, Span name) noexcept nogil:
    return same_span(field, name)
