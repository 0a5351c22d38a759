"""Memory of one decoded blob: handed out piece by piece, given back at once. Start with all zero."""
from libc.stdint cimport int64_t, uint32_t

cdef struct Chunk:
    Chunk* next

cdef struct Arena:
    Chunk* chunks
    char* at
    uint32_t left

# Zeroed and aligned to 8, or NULL: out of memory. Size 0 gives a valid pointer to nothing.
cdef void* arena_take(Arena* arena, size_t size) noexcept nogil

# A NUL-terminated copy.
cdef char* arena_copy(Arena* arena, const char* data, size_t size) noexcept nogil

# The arena may itself lie in the memory that is freed.
cdef void arena_free(Arena* arena) noexcept nogil

# Live allocations of this process: what was counted by `note_alloc` and not yet by `note_free`. Tests hold it to zero.
cdef void note_alloc() noexcept nogil
cdef void note_free() noexcept nogil
cdef int64_t allocations() noexcept nogil
