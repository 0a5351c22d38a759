"""What protocol do the first bytes speak? Bounded: never needs more than SNIFF_MAX bytes, and always ends in an answer."""
from libc.stdint cimport uint8_t

cdef enum:
    SNIFF_MAX = 1024

cdef enum Sniffed:
    SNIFF_MORE = 0      # could still become HTTP: give more bytes (or time out: TCP)
    SNIFF_HTTP1 = 1
    SNIFF_HTTP2 = 2     # RFC 9113 preface; opaque for now
    SNIFF_TLS = 3       # opaque for now
    SNIFF_TCP = 4

cdef int sniff(const uint8_t* data, size_t size) noexcept nogil
