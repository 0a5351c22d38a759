"""See users.pxd."""
from libc.errno cimport EAGAIN
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memset
from ext.core.buffer cimport Buffer, buffer_drop, buffer_reserve, buffer_used
from ext.core.loop cimport Source
from ext.tunnel.stream cimport hbone_abort, hbone_answer, hbone_drop, hbone_give, hbone_read, hbone_shut, hbone_take, hbone_write
from driver cimport Feed, claim, feed_byte
from scene cimport ABORTS, ANSWERS, DROPS, GIVES, READS, SHUTS, TAKES, WRITES, Lane, Scene, scene, tone

cdef Scene* the = scene()


cdef void read_some(Lane* lane, uint32_t most) noexcept nogil:
    cdef int64_t n = hbone_read(lane.stream, the.scratch, most)
    cdef int64_t i
    if n == -EAGAIN or 0 <= n < most and not lane.source.hung:
        lane.source.readable = 0
    for i in range(n):
        claim(the.wild or <uint8_t>the.scratch[i] == tone(<uint32_t>lane.stream.id, lane.read + <uint64_t>i, 0),
              b"what is read of a stream is what was sent in it")
    if n > 0:
        lane.read += <uint64_t>n
        claim(the.wild or lane.read <= lane.said, b"no more is read than was sent")


cdef void take(Lane* lane) noexcept nogil:
    cdef Buffer b
    cdef uint32_t i
    memset(&b, 0, sizeof(Buffer))
    if hbone_take(lane.stream, &b) <= 0:
        return
    for i in range(b.start, b.end):
        claim(the.wild or <uint8_t>b.data[i] == tone(<uint32_t>lane.stream.id, lane.read + i - b.start, 0),
              b"what is taken of a stream is what was sent in it")
    lane.read += buffer_used(&b)
    buffer_drop(&the.pool, &b)


cdef void give(Lane* lane, uint8_t how) noexcept nogil:
    cdef Buffer b
    cdef uint32_t i, size = 1 + (<uint32_t>how << (how & 7))
    cdef int64_t n
    memset(&b, 0, sizeof(Buffer))
    if buffer_reserve(&the.pool, &b, size + 64) != 0:
        return
    b.start = 64 if how & 8 else 0
    b.end = b.start + size
    for i in range(size):
        b.data[b.start + i] = <char>tone(<uint32_t>lane.stream.id, lane.wrote + i, 101)
    n = hbone_give(lane.stream, &b)
    claim(n <= <int64_t>size, b"no more is taken than there is")
    if n > 0:
        lane.wrote += <uint64_t>n
    buffer_drop(&the.pool, &b)


cdef void acts(uint8_t op, Feed* f) noexcept nogil:
    cdef uint8_t which = feed_byte(f), how
    cdef Lane* lane = &the.lanes[which % 128]
    cdef uint32_t i, n
    cdef int64_t done
    if lane.stream == NULL:
        return
    if op == ANSWERS:
        if which & 128:
            hbone_answer(lane.stream, 503, NULL)
        else:
            if lane.stream.session != NULL and lane.stream.status == 0:
                lane.agreed = 1
            hbone_answer(lane.stream, 200, NULL)
    elif op == READS:
        how = feed_byte(f)
        read_some(lane, 1 + (<uint32_t>how << (how & 7)))
    elif op == WRITES:
        how = feed_byte(f)
        n = 1 + (<uint32_t>how << (how & 7))
        for i in range(n):
            the.scratch[i] = <char>tone(<uint32_t>lane.stream.id, lane.wrote + i, 101)
        done = hbone_write(lane.stream, the.scratch, n)
        if done == -EAGAIN:
            lane.source.writable = 0
        elif done > 0:
            lane.wrote += <uint64_t>done
    elif op == TAKES:
        take(lane)
    elif op == GIVES:
        give(lane, feed_byte(f))
    elif op == SHUTS:
        hbone_shut(lane.stream)
    elif op == ABORTS:
        hbone_abort(lane.stream)
    elif op == DROPS:
        hbone_drop(lane.stream, &the.pad)
        lane.stream = NULL
        memset(&lane.source, 0, sizeof(Source))
