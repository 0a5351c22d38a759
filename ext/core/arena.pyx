from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

cdef enum:
    # most blobs (a workload, a service) fit one chunk; a large route table takes a few of the larger ones
    FIRST_CHUNK = 512
    LATER_CHUNK = 8192

cdef int64_t live = 0
cdef int64_t fail_in = 0


cdef void* block_take(size_t size) noexcept nogil:
    global live, fail_in
    if fail_in > 0:
        fail_in -= 1
        if fail_in == 0:
            return NULL
    cdef void* block = calloc(1, size if size else 1)
    if block != NULL:
        live += 1
    return block


cdef void block_give(void* block) noexcept nogil:
    global live
    if block != NULL:
        live -= 1
        free(block)


cdef int64_t blocks_live() noexcept nogil:
    return live


cdef void blocks_note(int by) noexcept nogil:
    global live
    live += by


cdef void blocks_fail_at(int64_t n) noexcept nogil:
    global fail_in
    fail_in = n


cdef void* arena_take(Arena* arena, size_t size) noexcept nogil:
    cdef Chunk* chunk
    cdef size_t room
    cdef void* piece
    size = (size + 7) & ~<size_t>7
    if size > arena.left or arena.at == NULL:
        room = FIRST_CHUNK if arena.chunks == NULL else LATER_CHUNK
        if size > room:
            room = size
        chunk = <Chunk*>block_take(sizeof(Chunk) + room)
        if chunk == NULL:
            return NULL
        chunk.next = arena.chunks
        arena.chunks = chunk
        arena.at = <char*>(chunk + 1)
        arena.left = room
    piece = arena.at
    arena.at += size
    arena.left -= size
    return piece


cdef char* arena_copy(Arena* arena, const char* data, size_t size) noexcept nogil:
    cdef char* copy = <char*>arena_take(arena, size + 1)
    if copy != NULL and size > 0:
        memcpy(copy, data, size)
    return copy


cdef void arena_free(Arena* arena) noexcept nogil:
    cdef Chunk* chunk = arena.chunks
    cdef Chunk* next
    while chunk != NULL:
        next = chunk.next
        block_give(chunk)
        chunk = next
