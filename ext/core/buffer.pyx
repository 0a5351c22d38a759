"""See buffer.pxd."""
from libc.stdint cimport uint32_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memmove


cdef char* take(Buffers* share, uint32_t size) noexcept nogil:
    cdef Buffers* pool = share.whole if share.whole != NULL else share
    cdef FreeBlock* block
    if not buffers_count(share, size):
        return NULL
    if size == BUFFER_TINY and pool.tiny != NULL:
        block = pool.tiny
        pool.tiny = block.next
        pool.n_tiny -= 1
        if pool.n_tiny < pool.idle_tiny:
            pool.idle_tiny = pool.n_tiny
    elif size == BUFFER_SMALL and pool.small != NULL:
        block = pool.small
        pool.small = block.next
        pool.n_small -= 1
        if pool.n_small < pool.idle_small:
            pool.idle_small = pool.n_small
    elif size == BUFFER_LARGE and pool.large != NULL:
        block = pool.large
        pool.large = block.next
        pool.n_large -= 1
        if pool.n_large < pool.idle_large:
            pool.idle_large = pool.n_large
    else:
        block = <FreeBlock*>malloc(size)
        if block == NULL:
            buffers_uncount(share, size)
            return NULL
    return <char*>block


cdef void give(Buffers* share, char* data, uint32_t size) noexcept nogil:
    cdef Buffers* pool = share.whole if share.whole != NULL else share
    cdef FreeBlock* block = <FreeBlock*>data
    buffers_uncount(share, size)
    if size == BUFFER_TINY and pool.n_tiny < KEEP_FREE:
        block.next = pool.tiny
        pool.tiny = block
        pool.n_tiny += 1
    elif size == BUFFER_SMALL and pool.n_small < KEEP_FREE:
        block.next = pool.small
        pool.small = block
        pool.n_small += 1
    elif size == BUFFER_LARGE and pool.n_large < KEEP_FREE:
        block.next = pool.large
        pool.large = block
        pool.n_large += 1
    else:
        free(block)


cdef void buffers_trim(Buffers* pool) noexcept nogil:
    cdef FreeBlock* block
    cdef int _
    for _ in range((pool.idle_tiny + 1) // 2):
        block = pool.tiny
        pool.tiny = block.next
        pool.n_tiny -= 1
        free(block)
    for _ in range((pool.idle_small + 1) // 2):
        block = pool.small
        pool.small = block.next
        pool.n_small -= 1
        free(block)
    for _ in range((pool.idle_large + 1) // 2):
        block = pool.large
        pool.large = block.next
        pool.n_large -= 1
        free(block)
    pool.idle_tiny = pool.n_tiny
    pool.idle_small = pool.n_small
    pool.idle_large = pool.n_large


cdef void buffer_compact(Buffer* b) noexcept nogil:
    if b.start == 0:
        return
    memmove(b.data, b.data + b.start, b.end - b.start)
    b.end -= b.start
    b.start = 0


cdef int buffer_reserve(Buffers* pool, Buffer* b, uint32_t size) noexcept nogil:
    cdef uint32_t want = BUFFER_LARGE if size > BUFFER_SMALL else BUFFER_SMALL
    cdef char* data
    if size > BUFFER_LARGE:
        return -1
    if b.data != NULL and b.size >= size:
        buffer_compact(b)
        return 0
    data = take(pool, want)
    if data == NULL:
        return -1
    if b.data != NULL:
        memcpy(data, b.data + b.start, b.end - b.start)
        give(pool, b.data, b.size)
        b.end -= b.start
    else:
        b.end = 0
    b.data = data
    b.start = 0
    b.size = want
    return 0


cdef int buffer_tiny(Buffers* pool, Buffer* b) noexcept nogil:
    b.data = take(pool, BUFFER_TINY)
    if b.data == NULL:
        return -1
    b.start = b.end = 0
    b.size = BUFFER_TINY
    return 0


cdef void buffer_drop(Buffers* pool, Buffer* b) noexcept nogil:
    if b.data != NULL:
        give(pool, b.data, b.size)
    b.data = NULL
    b.start = b.end = b.size = 0


cdef void buffers_free(Buffers* pool) noexcept nogil:
    cdef FreeBlock* block
    while pool.tiny != NULL:
        block = pool.tiny
        pool.tiny = block.next
        free(block)
    while pool.small != NULL:
        block = pool.small
        pool.small = block.next
        free(block)
    while pool.large != NULL:
        block = pool.large
        pool.large = block.next
        free(block)
    pool.n_tiny = pool.n_small = pool.n_large = pool.idle_tiny = pool.idle_small = pool.idle_large = 0
