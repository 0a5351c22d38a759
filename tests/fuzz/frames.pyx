"""See frames.pxd."""
from libc.stdint cimport uint8_t, uint32_t
from libc.string cimport memcpy, memset
from driver cimport Feed, feed_byte
from scene cimport (BOMB, FRAME, GOES, LANES, MANY, PINGS, PRIORITISES, RAW, RESETS, SETS, TRAILERS, UPDATES, WIRE, Lane, Scene, lane_of,
                    scene, tone)

cdef Scene* the = scene()


cdef void put(const void* data, size_t n) noexcept nogil:
    if n <= WIRE - the.wire_n:
        memcpy(the.wire + the.wire_n, data, n)
        the.wire_n += <uint32_t>n


cdef void put_byte(uint32_t byte) noexcept nogil:
    cdef uint8_t b = <uint8_t>byte
    put(&b, 1)


cdef void put_u32(uint32_t n) noexcept nogil:
    put_byte(n >> 24)
    put_byte(n >> 16)
    put_byte(n >> 8)
    put_byte(n)


cdef void put_frame(uint32_t size, uint8_t type, uint8_t flags, uint32_t id) noexcept nogil:
    put_byte(size >> 16)
    put_byte(size >> 8)
    put_byte(size)
    put_byte(type)
    put_byte(flags)
    put_u32(id)


cdef void authority(uint8_t which) noexcept nogil:
    put_byte(0x01)                  # :authority, literal, not indexed
    if which % 4 == 0 or which % 4 == 3:
        put_byte(11)
        put(b"10.0.0.7:80", 11)
    elif which % 4 == 1:
        put_byte(11)
        put(b"10.0.0.8:80", 11)
    else:
        put_byte(7)
        put(b"nobody:", 7)


cdef void fields(uint8_t how, uint8_t many, uint8_t size) noexcept nogil:
    """A header list: by `how` (bits 0-1) an authority, another method (bit 2), and fields of the peer's own."""
    cdef int i
    put_byte(0x02)                  # :method
    if how & 4:
        put_byte(3)
        put(b"GET", 3)
    else:
        put_byte(7)
        put(b"CONNECT", 7)
    authority(how)
    for i in range(many % 32):
        put_byte(0x40 if how & 8 else 0x00)
        put_byte(9)
        put(b"forwarded" if i & 1 else b"x-anythin", 9)
        put_byte(size & 127)
        memset(the.scratch, 120, 128)
        put(the.scratch, size & 127)


cdef void connects(Feed* f) noexcept nogil:
    cdef uint8_t how = feed_byte(f), many = feed_byte(f), flags = feed_byte(f)
    cdef uint32_t at = the.wire_n, n, half, id = the.last_id + 2 if the.last_id else 1
    cdef Lane* lane = lane_of(id)
    cdef char* block
    the.last_id = id
    if lane != NULL:
        lane.intended = not how & 4 and (how % 4 == 0 or how % 4 == 3)
    fields(how, many, flags & 0x7c)
    n = the.wire_n - at
    block = the.scratch + 1024
    if n > sizeof(the.scratch) - 1024:
        return
    memcpy(block, the.wire + at, n)
    the.wire_n = at
    half = n // 2 if flags & 2 else n           # the rest in CONTINUATION
    put_frame(half, 1, (flags & 1) | (4 if half == n else 0), id)
    put(block, half)
    if half < n:
        put_frame(n - half, 9, 4, id)
        put(block + half, n - half)


cdef void data(Feed* f) noexcept nogil:
    cdef uint8_t which = feed_byte(f), how = feed_byte(f), size = feed_byte(f)
    cdef uint32_t id = 2 * (which % 128) + 1, n = size << (how & 7), padding = 0 if not how & 16 else size
    cdef Lane* lane = lane_of(id)
    cdef uint32_t i
    if n > 16384 - 256:
        n = 16384 - 256
    put_frame(n + (padding + 1 if how & 16 else 0), 0, (1 if how & 8 else 0) | (8 if how & 16 else 0), id)
    if how & 16:
        put_byte(padding)
    for i in range(n):
        the.scratch[i] = <char>tone(id, lane.said + i, 0)
    put(the.scratch, n)
    lane.said += n
    memset(the.scratch, 0, 256)
    put(the.scratch, padding)


cdef uint32_t number(uint8_t which) noexcept nogil:
    if which < 128:
        return which
    if which < 192:
        return <uint32_t>1 << (which & 31)
    return <uint32_t>0x7fffffff - (which & 63) if which & 32 else <uint32_t>0xffffffff - (which & 63)


cdef void says(uint8_t op, Feed* f) noexcept nogil:
    cdef uint8_t a = feed_byte(f), b = feed_byte(f)
    cdef uint32_t id = 2 * (a % 128) + 1, i, _
    if op == RESETS:
        put_frame(4, 3, 0, id)
        put_u32(b)
    elif op == UPDATES:
        put_frame(4, 8, 0, 0 if a == 255 else id)
        put_u32(number(b))
    elif op == SETS:
        put_frame(6 * (b % 4), 4, 1 if a & 128 else 0, 0)
        for i in range(b % 4):
            put_byte(0)
            put_byte(1 + (a + i) % 8)
            put_u32(number(feed_byte(f)))
    elif op == PINGS:
        for i in range(a << (b & 7)):
            put_frame(8, 6, b >> 7, 0)
            put_u32(i)
            put_u32(a)
            the.pings += 1
    elif op == PRIORITISES:
        put_frame(5, 2, 0, id)
        put_u32(2 * (b % 128) + 1)
        put_byte(b)
    elif op == GOES:
        put_frame(8, 7, 0, 0)
        put_u32(a)
        put_u32(b)
    elif op == FRAME:
        if b == 1 or b == 9 or b == 0:
            the.wild = True
        put_frame(a % 64, b, feed_byte(f), number(feed_byte(f)))
        for _ in range(a % 64):
            put_byte(feed_byte(f))
        the.pings += b == 6
    elif op == RAW:
        the.wild = True
        for _ in range(a):
            put_byte(feed_byte(f))
    elif op == TRAILERS:
        put_frame(11, 1, 4 | (a >> 7), id)
        put(b"\x00\x04name\x04word", 11)
    elif op == BOMB:                # a field of 4 KiB in the table, then again and again by its number
        i = the.last_id + 2 if the.last_id else 1
        the.last_id = i
        put_frame(3806 + (b << 5), 1, 4, i)
        put(b"\x40\x01x\x7f\xd9\x1c", 6)     # 127 + 0x59 + 128 * 0x1c = 3,800 bytes
        memset(the.scratch, 121, 3800)
        put(the.scratch, 3800)
        memset(the.scratch, 0xbe, 8192)
        put(the.scratch, b << 5)
        the.wild = True
    elif op == MANY:
        for _ in range(a << (b & 1)):
            the.last_id = the.last_id + 2 if the.last_id else 1
            if the.last_id // 2 < LANES:
                the.lanes[the.last_id // 2].intended = 1
            put_frame(22, 1, 4, the.last_id)
            put(b"\x02\x07CONNECT\x01\x0b10.0.0.7:80", 22)
            put_frame(4, 3, 0, the.last_id)
            put_u32(8)
