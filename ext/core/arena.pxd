"""Counted memory, and arenas: the memory of one decoded blob, handed out piece by piece, given back at once."""
from libc.stdint cimport int64_t, uint32_t

# Zeroed, or NULL: out of memory. Counted: tests hold `blocks_live` to what it was.
cdef void* block_take(size_t size) noexcept nogil
cdef void block_give(void* block) noexcept nogil        # NULL is fine
cdef int64_t blocks_live() noexcept nogil
# Memory that another library allocates for us (RE2) is counted by hand.
cdef void blocks_note(int by) noexcept nogil
# The n-th block from now (1: the next) cannot be had, once; 0: all can. For tests of every out-of-memory path.
cdef void blocks_fail_at(int64_t n) noexcept nogil

cdef struct Chunk:
    Chunk* next
    size_t pad

cdef struct Arena:                  # start with all zero
    Chunk* chunks
    char* at
    size_t left

# Zeroed and aligned to 8, or NULL: out of memory. Size 0 gives a valid pointer to nothing.
cdef void* arena_take(Arena* arena, size_t size) noexcept nogil
# A NUL-terminated copy, or NULL.
cdef char* arena_copy(Arena* arena, const char* data, size_t size) noexcept nogil
# The arena may itself lie in the memory that is freed.
cdef void arena_free(Arena* arena) noexcept nogil
