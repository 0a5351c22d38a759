"""A borrowed run of bytes. Whoever hands out a Span says how long it stays valid."""
from libc.stdint cimport uint32_t

cdef struct Span:
    const char* p
    uint32_t n
