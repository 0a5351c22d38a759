"""See http1.pxd.

A head is searched for its end first (memchr from `scanned`, so that growing buffers stay linear), then read once, line by line.
Early answers come from two looks while more is awaited: at the first byte, and at the request line once it is there.
"""
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memchr, memcmp
from ext.core.text cimport Span
from ext.wire.chars cimport (
    CH_DIGIT, CH_TOKEN, CHARS, CR, HTAB, LF, SP, ZERO, clean_value, is_text, is_token, lower, next_element, same, same_span)
from ext.wire.target cimport authority_ok, request_line

cdef extern from "<string.h>" nogil:
    void* memrchr(const void* s, int c, size_t n)


# ---- where the head ends ---------------------------------------------------------------------------------------


cdef inline int64_t head_end(const char* data, size_t start, size_t size, size_t* scanned, const char** first_line) noexcept nogil:
    """Offset behind the empty line; 0: not there yet; -1: a bare LF, or an empty start line.

    *first_line is set to the CR of the start line if that line was completed since the last call.
    """
    cdef size_t at = scanned[0] if scanned[0] > start else start
    cdef const char* found
    cdef size_t i
    cdef int looked = 0
    first_line[0] = NULL
    while at < size:
        found = <const char*>memchr(data + at, LF, size - at)
        if found == NULL:
            break
        i = found - data
        if i == start or data[i - 1] != CR:
            return -1
        if not looked:
            # one look back over one line: each line is looked back over at most once, so this is linear too
            looked = 1
            if memrchr(data + start, LF, i - start) == NULL:
                first_line[0] = found - 1
                if i - 1 == start:
                    return -1
        if i >= start + 2 and data[i - 2] == LF:
            return i + 1
        at = i + 1
    scanned[0] = size
    return 0


# ---- fields ----------------------------------------------------------------------------------------------------


cdef inline uint8_t header_id(const char* p, uint32_t n) noexcept nogil:
    cdef uint8_t c = lower(<uint8_t>p[0])
    if n == 4:
        return H_HOST if c == b'h' and same(p, b"host", 4) else H_OTHER
    if n == 2:
        return H_TE if c == b't' and same(p, b"te", 2) else H_OTHER
    if n == 6:
        return H_EXPECT if c == b'e' and same(p, b"expect", 6) else H_OTHER
    if n == 7:
        if c == b'u':
            return H_UPGRADE if same(p, b"upgrade", 7) else H_OTHER
        return H_TRAILER if c == b't' and same(p, b"trailer", 7) else H_OTHER
    if n == 10:
        if c == b'c':
            return H_CONNECTION if same(p, b"connection", 10) else H_OTHER
        if c == b'u':
            return H_USER_AGENT if same(p, b"user-agent", 10) else H_OTHER
        return H_KEEP_ALIVE if c == b'k' and same(p, b"keep-alive", 10) else H_OTHER
    if n == 11:
        return H_GRPC_STATUS if c == b'g' and same(p, b"grpc-status", 11) else H_OTHER
    if n == 12:
        if c == b'c':
            return H_CONTENT_TYPE if same(p, b"content-type", 12) else H_OTHER
        return H_X_REQUEST_ID if c == b'x' and same(p, b"x-request-id", 12) else H_OTHER
    if n == 14:
        return H_CONTENT_LENGTH if c == b'c' and same(p, b"content-length", 14) else H_OTHER
    if n == 15:
        return H_X_FORWARDED_FOR if c == b'x' and same(p, b"x-forwarded-for", 15) else H_OTHER
    if n == 16:
        return H_PROXY_CONNECTION if c == b'p' and same(p, b"proxy-connection", 16) else H_OTHER
    if n == 17:
        if c == b't':
            return H_TRANSFER_ENCODING if same(p, b"transfer-encoding", 17) else H_OTHER
        return H_X_FORWARDED_PROTO if c == b'x' and same(p, b"x-forwarded-proto", 17) else H_OTHER
    return H_OTHER


cdef int content_length(Span value, uint64_t* out) noexcept nogil:
    cdef uint32_t i
    cdef uint64_t sum = 0
    if value.n == 0 or value.n > 18:            # 18 digits: below 2^63, and more than anybody sends
        return -400
    for i in range(value.n):
        if not CHARS[<uint8_t>value.p[i]] & CH_DIGIT:
            return -400
        sum = sum * 10 + <uint8_t>(value.p[i] - ZERO)
    out[0] = sum
    return 0


cdef int transfer_coding(Span value) noexcept nogil:
    """0: exactly `chunked`. -501: codings that we do not know, `chunked` last or not there. -400: the rest (RFC 9112 6.3)."""
    cdef Span rest = value
    cdef Span one
    cdef uint32_t chunked = 0
    cdef uint32_t elements = 0
    if is_text(value, b"chunked", 7):
        return 0
    while next_element(&rest, &one):
        elements += 1
        if chunked or not is_token(one):
            return -400
        chunked = is_text(one, b"chunked", 7)
    return -501 if elements > chunked else -400


cdef int parse_fields(const char* p, const char* end, Head* head) noexcept nogil:
    """The field lines between start line and empty line; every LF in them has its CR. 0 or -status."""
    cdef const char* eol
    cdef const char* q
    cdef const char* last
    cdef Header* h
    cdef uint8_t id
    cdef uint32_t n = 0
    cdef uint32_t i
    cdef int bad
    head.n_headers = 0
    head.framing = F_NONE
    head.expect_continue = head.upgrade = head.has_length = head.chunked = head.te_trailers = 0
    head.content_length = 0
    head.content_type.n = 0
    head.content_type.p = NULL
    for i in range(H_COUNT):
        head.first[i] = 0
    while p < end:
        if n == HEAD_MAX_HEADERS:
            return -431
        eol = <const char*>memchr(p, LF, end - p)
        h = &head.headers[n]
        q = p
        while CHARS[<uint8_t>q[0]] & CH_TOKEN:
            q += 1
        if q == p or q[0] != b':':              # also a folded line, and white space before the colon
            return -400
        h.name.p = p
        h.name.n = <uint32_t>(q - p)
        h.line.p = p
        h.line.n = <uint32_t>(eol + 1 - p)
        q += 1
        last = eol - 1
        while q < last and (q[0] == SP or q[0] == HTAB):
            q += 1
        while last > q and ((last - 1)[0] == SP or (last - 1)[0] == HTAB):
            last -= 1
        h.value.p = q
        h.value.n = <uint32_t>(last - q)
        if not clean_value(q, h.value.n):
            return -400
        id = header_id(p, h.name.n)
        h.id = id
        h.hop = 0
        n += 1
        p = eol + 1
        if id == H_OTHER:
            continue
        if head.first[id] == 0:
            head.first[id] = <uint16_t>n
        elif id == H_HOST or id == H_CONTENT_LENGTH or id == H_TRANSFER_ENCODING:
            return -400
        if id == H_CONTENT_LENGTH:
            h.hop = 1
            head.has_length = 1
            bad = content_length(h.value, &head.content_length)
            if bad:
                return bad
        elif id == H_TRANSFER_ENCODING:
            h.hop = 1
            head.chunked = 1
            bad = transfer_coding(h.value)
            if bad:
                return bad
        elif id == H_CONTENT_TYPE:
            if head.content_type.n == 0:
                head.content_type = h.value
        elif id == H_HOST or id == H_CONNECTION or id == H_KEEP_ALIVE or id == H_PROXY_CONNECTION or id == H_TE or id == H_UPGRADE:
            h.hop = 1
    head.n_headers = n
    if head.chunked and (head.has_length or head.version_minor == 0):
        return -400
    return connection_fields(head)


cdef int connection_fields(Head* head) noexcept nogil:
    """Connection, TE, Upgrade: what this hop was told, and which fields end here (RFC 9110 7.6.1). 0 or -status."""
    cdef Span rest
    cdef Span one
    cdef Header* h
    cdef uint32_t i
    cdef uint32_t k
    cdef uint32_t options = 0
    cdef uint8_t close = 0
    cdef uint8_t keep = 0
    cdef uint8_t upgrade = 0
    cdef uint8_t h2c = 0
    head.keep_alive = head.version_minor
    if head.first[H_CONNECTION] == 0 and head.first[H_TE] == 0:
        return 0
    for i in range(head.n_headers):
        h = &head.headers[i]
        rest = h.value
        if h.id == H_TE:
            while next_element(&rest, &one):
                if is_text(one, b"trailers", 8):
                    head.te_trailers = 1
        elif h.id == H_UPGRADE:
            while next_element(&rest, &one):
                if is_text(one, b"h2c", 3):
                    h2c = 1
        elif h.id == H_CONNECTION:
            while next_element(&rest, &one):
                options += 1
                if options > HEAD_MAX_OPTIONS or not is_token(one):
                    return -400
                if is_text(one, b"close", 5):
                    close = 1
                elif is_text(one, b"keep-alive", 10):
                    keep = 1
                elif is_text(one, b"upgrade", 7):
                    upgrade = 1
                elif is_text(one, b"host", 4) or is_text(one, b"content-length", 14) or is_text(one, b"transfer-encoding", 17):
                    return -400                 # nobody who means well takes these off
                else:
                    for k in range(head.n_headers):
                        if same_span(head.headers[k].name, one):
                            head.headers[k].hop = 1
    if close:
        head.keep_alive = 0
    elif keep:
        head.keep_alive = 1
    head.upgrade = upgrade and not h2c and head.first[H_UPGRADE] != 0 and head.version_minor == 1
    return 0


# ---- whole heads -----------------------------------------------------------------------------------------------


cdef int too_large(const char* data, size_t start, size_t limit) noexcept nogil:
    return -431 if memchr(data + start, LF, limit - start) != NULL else -414


cdef int parse_request(const char* data, size_t size, size_t* scanned, Head* head) noexcept nogil:
    cdef size_t start = 0
    cdef size_t limit = size if size < HEAD_MAX_BYTES else HEAD_MAX_BYTES
    cdef const char* first_line
    cdef int64_t end
    cdef int bad
    if size == 0:
        return PARSE_MORE
    if data[0] == CR:
        if size == 1:
            return PARSE_MORE
        if data[1] != LF:
            return -400
        start = 2
        if size == 2:
            return PARSE_MORE
    if not CHARS[<uint8_t>data[start]] & CH_TOKEN:
        return -400
    end = head_end(data, start, limit, scanned, &first_line)
    if end <= 0:
        if first_line != NULL:
            bad = request_line(data + start, first_line, head)
            if bad:
                return bad
        if end < 0:
            return -400
        return PARSE_MORE if limit < HEAD_MAX_BYTES else too_large(data, start, limit)
    if first_line == NULL:
        first_line = <const char*>memchr(data + start, LF, limit - start) - 1
    bad = request_line(data + start, first_line, head)
    if bad:
        return bad
    head.size = <uint32_t>end
    head.status = 0
    head.reason.n = 0
    head.reason.p = NULL
    bad = parse_fields(first_line + 2, data + end - 2, head)
    if bad:
        return bad
    bad = request_meaning(head)
    return bad if bad else <int>end


cdef int request_meaning(Head* head) noexcept nogil:
    """Host, framing and Expect of a request whose fields are read. 0 or -status."""
    cdef Header* host = head_find(head, H_HOST)
    cdef Header* expect = head_find(head, H_EXPECT)
    if host == NULL:
        if head.version_minor == 1:
            return -400
    else:
        if host.value.n and not authority_ok(host.value.p, host.value.n, 0):
            return -400
        if head.authority.n == 0:
            head.authority = host.value
    if head.method_id == M_CONNECT:
        # RFC 9110 9.3.6: no content; a length here would be read differently by different peers
        return -400 if head.chunked or head.has_length else 0
    if head.chunked:
        head.framing = F_CHUNKED
    elif head.has_length:
        head.framing = F_LENGTH
    head.expect_continue = expect != NULL and head.version_minor == 1 and is_text(expect.value, b"100-continue", 12)
    return 0


cdef int parse_response(const char* data, size_t size, size_t* scanned, uint8_t request_method, Head* head) noexcept nogil:
    cdef size_t limit = size if size < HEAD_MAX_BYTES else HEAD_MAX_BYTES
    cdef const char* line
    cdef const char* first_line
    cdef int64_t end
    if size and memcmp(data, b"HTTP/", size if size < 5 else 5) != 0:
        return -502
    end = head_end(data, 0, limit, scanned, &first_line)
    if end < 0:
        return -502
    if end == 0:
        return PARSE_MORE if limit < HEAD_MAX_BYTES else -502
    line = <const char*>memchr(data, LF, limit) - 1
    if status_line(data, line, head) != 0 or parse_fields(line + 2, data + end - 2, head) != 0:
        return -502
    head.size = <uint32_t>end
    return <int>end if response_meaning(head, request_method) == 0 else -502


cdef int status_line(const char* p, const char* end, Head* head) noexcept nogil:
    """HTTP-version SP 3DIGIT [SP reason]; the last blank is forgiven where there is no reason. 0 or -502."""
    cdef uint32_t i
    if end - p < 12 or memcmp(p, b"HTTP/1.", 7) != 0 or (p[7] != b'0' and p[7] != b'1') or p[8] != SP:
        return -502
    head.version_minor = <uint8_t>(p[7] - ZERO)
    head.status = 0
    for i in range(9, 12):
        if not CHARS[<uint8_t>p[i]] & CH_DIGIT:
            return -502
        head.status = head.status * 10 + <uint8_t>(p[i] - ZERO)
    if head.status < 100:
        return -502
    head.reason.p = p + 12
    head.reason.n = 0
    if end - p > 12:
        if p[12] != SP:
            return -502
        head.reason.p = p + 13
        head.reason.n = <uint32_t>(end - p - 13)
        if not clean_value(head.reason.p, head.reason.n):
            return -502
    head.method.n = head.target.n = head.path.n = head.query.n = head.authority.n = 0
    head.method.p = head.target.p = head.path.p = head.query.p = head.authority.p = NULL
    head.method_id = M_OTHER
    head.has_query = 0
    return 0


cdef int response_meaning(Head* head, uint8_t request_method) noexcept nogil:
    """RFC 9112 6.3 in its order. 0 or -502."""
    if head.status == 101:
        if not head.upgrade:
            return -502
        head.framing = F_TUNNEL
    elif request_method == M_CONNECT and 200 <= head.status < 300:
        head.framing = F_TUNNEL
    elif request_method == M_HEAD or head.status < 200 or head.status == 204 or head.status == 304:
        head.framing = F_NONE
    elif head.chunked:
        head.framing = F_CHUNKED
    elif head.has_length:
        head.framing = F_LENGTH
    else:
        head.framing = F_UNTIL_CLOSE
        head.keep_alive = 0
    return 0
