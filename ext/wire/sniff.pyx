"""See sniff.pxd.

TCP is said at the first byte that rules out the rest. HTTP/1 is said only at the end of a request line that ends in HTTP/1.x, or when
the longest line that is waited for still looks like one with a method everybody knows: then it is a long URL.
"""
from libc.stdint cimport uint8_t, uint32_t
from libc.string cimport memcmp
from ext.wire.chars cimport CH_TARGET, CHARS, same

cdef enum:
    METHOD_MAX = 20     # the longest registered is 16 (UPDATEREDIRECTREF is 17)

cdef const char* PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


cdef int known(const uint8_t* m, size_t n) noexcept nogil:
    return ((n == 3 and (memcmp(m, b"GET", 3) == 0 or memcmp(m, b"PUT", 3) == 0))
            or (n == 4 and (memcmp(m, b"POST", 4) == 0 or memcmp(m, b"HEAD", 4) == 0))
            or (n == 5 and (memcmp(m, b"PATCH", 5) == 0 or memcmp(m, b"TRACE", 5) == 0))
            or (n == 6 and memcmp(m, b"DELETE", 6) == 0)
            or (n == 7 and (memcmp(m, b"OPTIONS", 7) == 0 or memcmp(m, b"CONNECT", 7) == 0)))


cdef inline int starts(const uint8_t* data, size_t size, const char* text, size_t n) noexcept nogil:
    """As far as both go."""
    return memcmp(data, text, size if size < n else n) == 0


cdef inline int starts_any_case(const uint8_t* data, size_t size, const char* text, size_t n) noexcept nogil:
    return same(<const char*>data, text, <uint32_t>(size if size < n else n))


cdef int request_line(const uint8_t* data, size_t size) noexcept nogil:
    cdef size_t i = 0
    cdef size_t method
    cdef uint8_t c
    cdef int connect
    while i < size and (b'A' <= data[i] <= b'Z' or (i and (data[i] == b'-' or data[i] == b'_'))):
        i += 1
        if i > METHOD_MAX:
            return SNIFF_TCP
    if i == size:
        return SNIFF_MORE
    if i < 3 or data[i] != b' ':
        return SNIFF_TCP
    method = i
    connect = method == 7 and memcmp(data, b"CONNECT", 7) == 0
    i += 1
    if i == size:
        return SNIFF_MORE
    c = data[i]
    if not connect and c != b'/' and not (c == b'*' and method == 7):
        # absolute-form; a scheme is the same in any case (RFC 3986 3.1)
        if not starts_any_case(data + i, size - i, b"http://", 7) and not starts_any_case(data + i, size - i, b"https://", 8):
            return SNIFF_TCP
    while i < size and CHARS[data[i]] & CH_TARGET:
        i += 1
    if i >= SNIFF_MAX:
        return SNIFF_HTTP1 if known(data, method) else SNIFF_TCP
    if i == size:
        return SNIFF_MORE
    if data[i] != b' ' or data[i - 1] == b' ':
        return SNIFF_TCP
    i += 1
    if not starts(data + i, size - i, b"HTTP/1.", 7):
        return SNIFF_TCP
    if size - i < 10:
        if size - i > 7 and not (b'0' <= data[i + 7] <= b'9'):
            return SNIFF_TCP
        if size - i > 8 and data[i + 8] != b'\r':
            return SNIFF_TCP
        if size < SNIFF_MAX:
            return SNIFF_MORE
        return SNIFF_HTTP1 if known(data, method) else SNIFF_TCP
    return SNIFF_HTTP1 if b'0' <= data[i + 7] <= b'9' and data[i + 8] == b'\r' and data[i + 9] == b'\n' else SNIFF_TCP


cdef int sniff(const uint8_t* data, size_t size) noexcept nogil:
    if size == 0:
        return SNIFF_MORE
    if size > SNIFF_MAX:
        size = SNIFF_MAX
    if data[0] == 0x16:
        # handshake record, version 3.0 to 3.4 (RFC 8446 5.1), then a ClientHello
        if (size > 1 and data[1] != 3) or (size > 2 and data[2] > 4) or (size > 5 and data[5] != 1):
            return SNIFF_TCP
        return SNIFF_TLS if size > 5 else SNIFF_MORE
    if starts(data, size, PREFACE, 24):
        return SNIFF_HTTP2 if size >= 24 else SNIFF_MORE
    return request_line(data, size)
