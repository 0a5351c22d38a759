"""A bounded cursor over bytes that somebody else wrote: integers little-endian, `str` and `list` as in ARCHITECTURE.md.

Every take checks what is left. Once something did not fit, `bad` stays set, every further take gives zeros, and the
decoder looks at `bad` at the end of each item. Works on little-endian machines, which is all that is supported.
"""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy
from ext.core.text cimport Span

cdef struct Cursor:
    const char* at
    const char* end
    uint8_t bad

cdef inline void cursor_init(Cursor* c, const char* data, size_t size) noexcept nogil:
    c.at = data
    c.end = data + size
    c.bad = 0

cdef inline size_t cursor_left(const Cursor* c) noexcept nogil:
    return <size_t>(c.end - c.at)

cdef inline const char* take_bytes(Cursor* c, size_t size) noexcept nogil:
    # NULL when there are fewer
    cdef const char* at = c.at
    if c.bad or size > cursor_left(c):
        c.bad = 1
        return NULL
    c.at += size
    return at

cdef inline uint8_t take_u8(Cursor* c) noexcept nogil:
    cdef const char* at = take_bytes(c, 1)
    return <uint8_t>at[0] if at != NULL else 0

cdef inline uint16_t take_u16(Cursor* c) noexcept nogil:
    cdef uint16_t value = 0
    cdef const char* at = take_bytes(c, 2)
    if at != NULL:
        memcpy(&value, at, 2)
    return value

cdef inline uint32_t take_u32(Cursor* c) noexcept nogil:
    cdef uint32_t value = 0
    cdef const char* at = take_bytes(c, 4)
    if at != NULL:
        memcpy(&value, at, 4)
    return value

cdef inline uint64_t take_u64(Cursor* c) noexcept nogil:
    cdef uint64_t value = 0
    cdef const char* at = take_bytes(c, 8)
    if at != NULL:
        memcpy(&value, at, 8)
    return value

cdef inline Span take_str(Cursor* c) noexcept nogil:
    # borrowed from the bytes; p is NULL when bad
    cdef Span text
    text.n = take_u32(c)
    text.p = take_bytes(c, text.n)
    if text.p == NULL:
        text.n = 0
    return text

cdef inline uint32_t take_count(Cursor* c, size_t least) noexcept nogil:
    # Number of items that follow, each at least `least` bytes: a count that cannot be true is caught before anybody
    # allocates for it.
    cdef uint32_t n = take_u32(c)
    if c.bad or n > cursor_left(c) / least:
        c.bad = 1
        return 0
    return n
