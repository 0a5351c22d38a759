"""Classes of bytes (RFC 9110 5.6.2, RFC 3986) and comparisons without case. One table of 256, several bits an entry."""
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy
from ext.core.text cimport Span

cdef enum:
    CH_TOKEN = 1        # tchar
    CH_TARGET = 2       # 0x21..0x7e but '#': what a request-target may hold
    CH_HOST = 4         # of a reg-name: unreserved, sub-delims without ',', '%'
    CH_VALUE = 8        # of a field value: HTAB, 0x20..0x7e, obs-text
    CH_DIGIT = 16
    CH_HEX = 32

cdef enum:
    HTAB = 9
    LF = 10
    CR = 13
    SP = 32
    ZERO = 48

cdef extern from *:
    """
    #include <stdint.h>
    #define NRW_A(c) (((c) >= '0' && (c) <= '9') || ((c) >= 'a' && (c) <= 'z') || ((c) >= 'A' && (c) <= 'Z'))
    #define NRW_T(c) (NRW_A(c) || (c) == '!' || (c) == '#' \
        || (c) == '$' || (c) == '%' || (c) == '&' || (c) == '\\'' || (c) == '*' || (c) == '+' || (c) == '-' || (c) == '.' || (c) == '^' \
        || (c) == '_' || (c) == '`' || (c) == '|' || (c) == '~')
    #define NRW_H(c) (NRW_A(c) || (c) == '-' || (c) == '.' \
        || (c) == '_' || (c) == '~' || (c) == '!' || (c) == '$' || (c) == '&' || (c) == '\\'' || (c) == '(' || (c) == ')' || (c) == '*' \
        || (c) == '+' || (c) == ';' || (c) == '=' || (c) == '%')
    #define NRW_X(c) (((c) >= '0' && (c) <= '9') || ((c) >= 'a' && (c) <= 'f') || ((c) >= 'A' && (c) <= 'F'))
    #define NRW_C(c) ((NRW_T(c) ? 1 : 0) | ((c) > 0x20 && (c) < 0x7f && (c) != '#' ? 2 : 0) | (NRW_H(c) ? 4 : 0) \
        | ((c) == 9 || ((c) >= 0x20 && (c) != 0x7f) ? 8 : 0) | ((c) >= '0' && (c) <= '9' ? 16 : 0) | (NRW_X(c) ? 32 : 0))
    #define NRW_4(c) NRW_C(c), NRW_C((c) + 1), NRW_C((c) + 2), NRW_C((c) + 3)
    #define NRW_16(c) NRW_4(c), NRW_4((c) + 4), NRW_4((c) + 8), NRW_4((c) + 12)
    #define NRW_64(c) NRW_16(c), NRW_16((c) + 16), NRW_16((c) + 32), NRW_16((c) + 48)
    static const uint8_t CHARS[256] __attribute__((unused)) = {NRW_64(0), NRW_64(64), NRW_64(128), NRW_64(192)};
    """
    const uint8_t CHARS[256]

cdef inline uint8_t lower(uint8_t c) noexcept nogil:
    return c | 32 if <uint8_t>(c - 65) < 26 else c

# `p` has the n bytes of `literal` (lower case) in any case
cdef inline int same(const char* p, const char* literal, uint32_t n) noexcept nogil:
    cdef uint32_t i
    for i in range(n):
        if lower(<uint8_t>p[i]) != <uint8_t>literal[i]:
            return 0
    return 1

cdef inline int is_text(Span a, const char* literal, uint32_t n) noexcept nogil:
    return a.n == n and same(a.p, literal, n)

cdef inline int same_span(Span a, Span b) noexcept nogil:       # two names, either in any case
    cdef uint32_t i
    if a.n != b.n:
        return 0
    for i in range(a.n):
        if lower(<uint8_t>a.p[i]) != lower(<uint8_t>b.p[i]):
            return 0
    return 1

cdef inline int clean_value(const char* p, uint32_t n) noexcept nogil:
    """No control byte but HTAB. Eight bytes at a time: a byte below 0x20 or equal to 0x7f shows in the high bits; such a word
    (with HTABs, as a rule none) is looked at byte by byte."""
    cdef uint64_t x
    cdef uint64_t d
    cdef uint32_t i
    while n >= 8:
        memcpy(&x, p, 8)
        d = x ^ <uint64_t>0x7f7f7f7f7f7f7f7f
        if (((x - <uint64_t>0x2020202020202020) & ~x) | ((d - <uint64_t>0x0101010101010101) & ~d)) & <uint64_t>0x8080808080808080:
            for i in range(8):
                if not CHARS[<uint8_t>p[i]] & CH_VALUE:
                    return 0
        p += 8
        n -= 8
    for i in range(n):
        if not CHARS[<uint8_t>p[i]] & CH_VALUE:
            return 0
    return 1

# The next element of a comma-separated list, without white space around it; empty ones are passed over (RFC 9110 5.6.1.2).
# 0: the list is at its end. `rest` is what is still to read.
cdef inline int next_element(Span* rest, Span* out) noexcept nogil:
    while rest.n and (rest.p[0] == b',' or rest.p[0] == b' ' or rest.p[0] == b'\t'):
        rest.p += 1
        rest.n -= 1
    if rest.n == 0:
        return 0
    out.p = rest.p
    while rest.n and rest.p[0] != b',':
        rest.p += 1
        rest.n -= 1
    out.n = <uint32_t>(rest.p - out.p)
    while out.p[out.n - 1] == b' ' or out.p[out.n - 1] == b'\t':
        out.n -= 1
    return 1

cdef inline int is_token(Span a) noexcept nogil:
    cdef uint32_t i
    for i in range(a.n):
        if not CHARS[<uint8_t>a.p[i]] & CH_TOKEN:
            return 0
    return a.n != 0
