"""Structs of one size from a free list. Memory is zeroed when taken; at most KEEP free ones are kept."""
from libc.stdint cimport uint32_t

cdef enum:
    SLAB_KEEP = 1024

cdef struct FreeItem:
    FreeItem* next

cdef struct Slab:
    FreeItem* items
    uint32_t size           # of one, at least a pointer
    uint32_t n_free
    uint32_t live

cdef void* slab_take(Slab* slab) noexcept nogil         # NULL: no memory
cdef void slab_give(Slab* slab, void* item) noexcept nogil
cdef void slab_free(Slab* slab) noexcept nogil          # the free ones
