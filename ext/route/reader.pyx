from libc.stdint cimport uint16_t, uint32_t, uint64_t
from libc.stdio cimport snprintf
from libc.string cimport memchr, memcmp, memcpy
from ext.core.arena cimport arena_copy, arena_take
from ext.core.blob cimport take_bytes, take_count, take_str, take_u8, take_u16


cdef int refuse(Reader* r, const char* reason) noexcept nogil:
    if r.reason[0] == 0:
        snprintf(r.reason, REASON_BYTES, b"%s", reason)
    return -1


cdef int refuse_text(Reader* r, const char* reason, Span text) noexcept nogil:
    if r.reason[0] == 0:
        snprintf(r.reason, REASON_BYTES, b"%s: %.*s", reason, <int>(text.n if text.n < 100 else 100), text.p)
    return -1


cdef int refuse_number(Reader* r, const char* reason, uint64_t number) noexcept nogil:
    if r.reason[0] == 0:
        snprintf(r.reason, REASON_BYTES, b"%s: %llu", reason, <unsigned long long>number)
    return -1


cdef int no_memory(Reader* r) noexcept nogil:
    return refuse(r, b"out of memory")


cdef int cut(Reader* r) noexcept nogil:
    return refuse(r, b"the payload ends early or a count is larger than what follows")


cdef void* take(Reader* r, uint32_t n, size_t size) noexcept nogil:
    cdef void* items = arena_take(r.arena, <size_t>n * size)
    if items == NULL:
        no_memory(r)
    return items


cdef int read_text(Reader* r, Span* out, bint lower) noexcept nogil:
    cdef Span text = take_str(&r.c)
    cdef char* copy
    cdef uint32_t i
    if r.c.bad:
        return cut(r)
    copy = arena_copy(r.arena, text.p, text.n)
    if copy == NULL:
        return no_memory(r)
    if lower:
        for i in range(text.n):
            if c'A' <= copy[i] <= c'Z':
                copy[i] += 32
    out.p = copy
    out.n = text.n
    return 0


cdef bint text_is(Span text, const char* word, size_t size) noexcept nogil:
    return text.n == size and memcmp(text.p, word, size) == 0


cdef bint is_token(Span text) noexcept nogil:
    # RFC 9110 5.6.2
    cdef uint32_t i
    cdef char ch
    for i in range(text.n):
        ch = text.p[i]
        if not (c'a' <= ch <= c'z' or c'A' <= ch <= c'Z' or c'0' <= ch <= c'9'
                or (ch != 0 and memchr(b"!#$%&'*+-.^_`|~", ch, 15) != NULL)):
            return False
    return text.n > 0


cdef int read_address(Reader* r, Address* out) noexcept nogil:
    cdef const char* bytes
    out.family = take_u8(&r.c)
    if out.family == 4 or out.family == 6:
        bytes = take_bytes(&r.c, 4 if out.family == 4 else 16)
        if bytes == NULL:
            return cut(r)
        memcpy(out.ip, bytes, 4 if out.family == 4 else 16)
        return 0
    if r.c.bad:
        return cut(r)
    return refuse_number(r, b"address family", out.family)


cdef int read_ports(Reader* r, Ports* out) noexcept nogil:
    cdef uint32_t i
    out.n = take_count(&r.c, 2)
    out.items = <uint16_t*>take(r, out.n, sizeof(uint16_t))
    if out.items == NULL:
        return -1
    for i in range(out.n):
        out.items[i] = take_u16(&r.c)
    return 0
