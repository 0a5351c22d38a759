"""The request line: method, target in its four forms, version (RFC 9112 3). In a .pxd, to be compiled into the parser's own code."""
from libc.stdint cimport uint8_t, uint32_t
from libc.string cimport memchr, memcmp
from ext.core.text cimport Span
from ext.wire.chars cimport CH_DIGIT, CH_HEX, CH_HOST, CH_TARGET, CH_TOKEN, CHARS, SP, ZERO, same
from ext.wire.http1 cimport (
    M_CONNECT, M_DELETE, M_GET, M_HEAD, M_OPTIONS, M_OTHER, M_PATCH, M_POST, M_PUT, M_TRACE, Head)

cdef extern from *:
    """
    static const char nrw_slash[] = "/", nrw_star[] = "*";
    """
    const char* nrw_slash
    const char* nrw_star


cdef inline uint8_t method_of(Span m) noexcept nogil:
    if m.n == 3:
        if memcmp(m.p, b"GET", 3) == 0:
            return M_GET
        if memcmp(m.p, b"PUT", 3) == 0:
            return M_PUT
    elif m.n == 4:
        if memcmp(m.p, b"POST", 4) == 0:
            return M_POST
        if memcmp(m.p, b"HEAD", 4) == 0:
            return M_HEAD
    elif m.n == 5:
        if memcmp(m.p, b"PATCH", 5) == 0:
            return M_PATCH
        if memcmp(m.p, b"TRACE", 5) == 0:
            return M_TRACE
    elif m.n == 6:
        if memcmp(m.p, b"DELETE", 6) == 0:
            return M_DELETE
    elif m.n == 7:
        if memcmp(m.p, b"OPTIONS", 7) == 0:
            return M_OPTIONS
        if memcmp(m.p, b"CONNECT", 7) == 0:
            return M_CONNECT
    return M_OTHER


cdef inline int authority_ok(const char* p, uint32_t n, int need_port) noexcept nogil:
    """uri-host [":" port] (RFC 3986 3.2.2): no userinfo, no zone, a port up to 65535."""
    cdef uint32_t i = 0
    cdef uint32_t port = 0
    if n == 0:
        return 0
    if p[0] == b'[':
        i = 1
        while i < n and (CHARS[<uint8_t>p[i]] & CH_HEX or p[i] == b':' or p[i] == b'.'):
            i += 1
        if i < 3 or i == n or p[i] != b']':
            return 0
        i += 1
    else:
        while i < n and CHARS[<uint8_t>p[i]] & CH_HOST:
            i += 1
        if i == 0:
            return 0
    if i == n:
        return not need_port
    if p[i] != b':' or n - i > 6:
        return 0
    i += 1
    if i == n:
        return not need_port
    while i < n:
        if not CHARS[<uint8_t>p[i]] & CH_DIGIT:
            return 0
        port = port * 10 + <uint8_t>(p[i] - ZERO)
        i += 1
    return port <= 65535


cdef inline void split_query(Head* head, const char* p, uint32_t n) noexcept nogil:
    cdef const char* mark = <const char*>memchr(p, b'?', n)
    head.path.p = p
    if mark == NULL:
        head.path.n = n
        return
    head.path.n = <uint32_t>(mark - p)
    head.query.p = mark + 1
    head.query.n = n - head.path.n - 1
    head.has_query = 1


cdef inline int absolute_form(Head* head) noexcept nogil:
    """`http://authority/path?query` -> authority, path, query (RFC 9112 3.2.2)."""
    cdef const char* p = head.target.p
    cdef uint32_t n = head.target.n
    cdef uint32_t i
    if n > 7 and same(p, b"http://", 7):
        i = 7
    elif n > 8 and same(p, b"https://", 8):
        i = 8
    else:
        return -400
    head.authority.p = p + i
    while i < n and p[i] != b'/' and p[i] != b'?':
        i += 1
    head.authority.n = <uint32_t>(p + i - head.authority.p)
    if not authority_ok(head.authority.p, head.authority.n, 0):
        return -400
    if i < n and p[i] == b'/':
        split_query(head, p + i, n - i)
        return 0
    # an empty path: `/`, but `*` of OPTIONS without a query asks about the server itself (RFC 9112 3.2.4)
    split_query(head, p + i, n - i)
    head.path.p = nrw_star if head.method_id == M_OPTIONS and not head.has_query else nrw_slash
    head.path.n = 1
    return 0


cdef inline int request_line(const char* p, const char* end, Head* head) noexcept nogil:
    """method SP request-target SP HTTP-version; `end` is the line's CR. 0 or -status."""
    cdef const char* q = p
    while CHARS[<uint8_t>q[0]] & CH_TOKEN:
        q += 1
    head.method.p = p
    head.method.n = <uint32_t>(q - p)
    if q == p or q[0] != SP:
        return -400
    q += 1
    head.target.p = q
    while CHARS[<uint8_t>q[0]] & CH_TARGET:
        q += 1
    head.target.n = <uint32_t>(q - head.target.p)
    if head.target.n == 0 or q[0] != SP:
        return -400
    q += 1
    if end - q != 8 or memcmp(q, b"HTTP/", 5) != 0 or q[6] != b'.':
        return -400
    if not CHARS[<uint8_t>q[5]] & CH_DIGIT or not CHARS[<uint8_t>q[7]] & CH_DIGIT:
        return -400
    if q[5] != b'1' or q[7] > b'1':
        return -505
    head.version_minor = <uint8_t>(q[7] - ZERO)
    head.method_id = method_of(head.method)
    head.query.n = head.authority.n = head.path.n = 0
    head.query.p = head.authority.p = head.path.p = head.target.p
    head.has_query = 0
    if head.method_id == M_CONNECT:
        head.authority = head.target
        return 0 if authority_ok(head.target.p, head.target.n, 1) else -400
    if head.target.p[0] == b'/':
        split_query(head, head.target.p, head.target.n)
        return 0
    if head.target.n == 1 and head.target.p[0] == b'*':
        head.path = head.target
        return 0 if head.method_id == M_OPTIONS else -400
    return absolute_form(head)
