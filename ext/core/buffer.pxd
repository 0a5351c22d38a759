"""Bytes on their way. A Buffer has memory only while it holds bytes: idle connections cost none.

    [ gone | start .. end | room .. size ]

Memory comes in three sizes from free lists of the worker. What is above KEEP_FREE goes back to the allocator, and of the rest what is
not needed for a while (`buffers_trim`), so that a rush does not stay in memory. The sum is bounded (`limit`): beyond it a take fails,
and the caller answers with flag OM. Below it is `soft`: who wants to read more looks there first and waits, so that heads and answers
of what was read already still find room.

A share counts one pod's part of a pool (`whole`) and has bounds of its own.
"""
from libc.stdint cimport uint32_t, uint64_t

cdef enum:
    # a message in a tunnel until it is sent: thousands may wait at one time, which in blocks of 16 KiB, all with the same low bits of
    # their addresses, would use the same few lines of the caches
    BUFFER_TINY = 2048
    BUFFER_SMALL = 16384        # most requests and responses: one read
    BUFFER_LARGE = 65536        # a head of up to 60 KiB, and bulk
    KEEP_FREE = 256             # per size: 0.5, 4 and 16 MiB

cdef struct FreeBlock:
    FreeBlock* next

cdef struct Buffers:
    FreeBlock* tiny
    FreeBlock* small
    FreeBlock* large
    uint32_t n_tiny
    uint32_t n_small
    uint32_t n_large
    uint32_t idle_tiny          # free ones that nobody needed since the last trim
    uint32_t idle_small
    uint32_t idle_large
    uint64_t taken              # bytes now in buffers, and what was counted with them
    uint64_t soft
    uint64_t limit
    Buffers* whole              # of a share: the pool that it is a part of

cdef struct Buffer:
    char* data                  # NULL: no memory
    uint32_t start
    uint32_t end
    uint32_t size

cdef inline uint32_t buffer_used(const Buffer* b) noexcept nogil:
    return b.end - b.start

cdef inline uint32_t buffer_room(const Buffer* b) noexcept nogil:
    return b.size - b.end

# Memory of a connection that is not in a Buffer (a pipe's pages, which are the kernel's) counts like one. False: it does not fit.
cdef inline bint buffers_count(Buffers* share, uint32_t size) noexcept nogil:
    cdef Buffers* pool = share.whole if share.whole != NULL else share
    if pool.taken + size > pool.limit or share.taken + size > share.limit:
        return False
    pool.taken += size
    if pool != share:
        share.taken += size
    return True

cdef inline void buffers_uncount(Buffers* share, uint32_t size) noexcept nogil:
    cdef Buffers* pool = share.whole if share.whole != NULL else share
    pool.taken -= size
    if pool != share:
        share.taken -= size

# Memory for at least `size` bytes in all (0: any), keeping what is in it, moved to the front when that makes the room. 0, or -1: no memory.
cdef int buffer_reserve(Buffers* pool, Buffer* b, uint32_t size) noexcept nogil
# BUFFER_TINY bytes for one that has no memory. 0, or -1: no memory.
cdef int buffer_tiny(Buffers* pool, Buffer* b) noexcept nogil
cdef void buffer_compact(Buffer* b) noexcept nogil
# Gives the memory back, whatever is in it.
cdef void buffer_drop(Buffers* pool, Buffer* b) noexcept nogil
# Half of the free blocks that nobody needed since the last call go back to the allocator.
cdef void buffers_trim(Buffers* pool) noexcept nogil
cdef void buffers_free(Buffers* pool) noexcept nogil

# n bytes from the front are done with; an empty buffer gives its memory back.
cdef inline void buffer_consume(Buffers* pool, Buffer* b, uint32_t n) noexcept nogil:
    b.start += n
    if b.start == b.end:
        buffer_drop(pool, b)
