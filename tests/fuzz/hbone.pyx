"""A server of HBONE and a peer that says anything: frames of HTTP/2, well made or not, whatever the users of its streams do meanwhile.

Input: a byte (bits 0-1: what the pod may buffer; bits 4-6: how the bytes are cut), then operations: a byte (bit 7: what it says waits for
the next one, so that frames come together) and its operands. Each frame is made from its parts, so that a mutation is another frame and
not noise; RAW is noise. All of it passes a client's TLS, which is no part of the input: one handshake serves until an input spoils it.

What must hold:
  1. A stream is taken only when a CONNECT to a place of ours asked for it, once, with an id that grows; no other is answered 200.
  2. What a user reads of a stream is what the peer sent in it, and the other way round, from the first byte on: nothing of another.
  3. Of the pod's buffers no more than its bound is taken; a stream holds its window and SEND_BYTES at most; a session 200 streams.
  4. Beyond those buffers a peer costs at most OVERHEAD bytes of the heap, whatever it sends and however little it reads.
  5. After a RST_STREAM nothing is said in a stream; DATA comes after its HEADERS; PINGs are answered at most once.
  6. A session that is over takes nothing more. Every stream that was taken ends: its user reads an end or an error, never "later".
  7. When users are gone no stream, no buffer and no byte of the heap is left.
"""
from libc.errno cimport EAGAIN
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport malloc
from libc.string cimport memcmp, memcpy, memmove, memset
from ext.core.buffer cimport Buffer, Buffers, buffer_drop, buffer_reserve, buffer_used, buffers_free
from ext.core.loop cimport Source
from ext.core.text cimport Span
from ext.tunnel.session cimport (pad_close, pad_open, session_close, session_end, session_feed, session_init, session_leave, session_over,
                                 session_ping, session_pull, session_sweep)
from ext.tunnel.shapes cimport (QUEUE_MOST, SEND_BYTES, STREAMS_MOST, WINDOW_WIDE, Asked, Ops, Pad, Session, Stream)
from ext.tunnel.stream cimport (hbone_abort, hbone_accept, hbone_answer, hbone_drop, hbone_give, hbone_read, hbone_refuse, hbone_shut,
                                hbone_take, hbone_write)
from ext.tunnel.tls cimport (TLS_ERROR_BYTES, TLS_RECORD, Credentials, Sink, Tls, credentials_new, tls_free, tls_handshake, tls_init,
                             tls_open, tls_read, tls_write)
from driver cimport Feed, claim, feed_byte, run as drive

cdef extern from *:
    """
    #include <nghttp2/nghttp2.h>
    size_t __sanitizer_get_current_allocated_bytes(void);
    """
    size_t __sanitizer_get_current_allocated_bytes() nogil
    ctypedef struct nghttp2_session:
        pass
    size_t nghttp2_session_get_outbound_queue_size(nghttp2_session* session) nogil

cdef enum:
    LANES = 128                     # streams of one input
    WIRE = 262144                   # bytes of one operation
    OPERATIONS = 400
    OVERHEAD = 4194304              # of one tunnel, 200 streams and QUEUE_MOST frames that wait: some 1.5 MiB

cdef enum Op:
    CONNECTS = 0
    DATA
    RESETS
    UPDATES
    SETS
    PINGS
    PRIORITISES
    GOES
    FRAME
    RAW
    TRAILERS
    BOMB
    ANSWERS
    READS
    WRITES
    SHUTS
    ABORTS
    DROPS
    PULLS
    TIME
    TAKES
    GIVES
    MANY                            # CONNECT and RST_STREAM, again and again
    OP_COUNT

cdef struct Lane:
    Source source                   # first
    Stream* stream
    uint8_t intended                # 1: what was said asks for it rightly
    uint8_t asked
    uint8_t taken                   # by us
    uint8_t agreed                  # answered 200
    uint8_t headed                  # HEADERS of ours came
    uint8_t gone                    # RST_STREAM of ours
    uint64_t said                   # bytes of the peer in it
    uint64_t read                   # of these by the user
    uint64_t wrote
    uint64_t heard

cdef Credentials* here
cdef Credentials* there
cdef Lane lanes[128]
cdef char wire[262144]
cdef uint32_t wire_n
cdef char heard[1048576]
cdef uint32_t heard_n
cdef char scratch[131072]
cdef Session session
cdef Pad pad
cdef Buffers pool
cdef Ops ops
cdef Tls client
cdef Tls served                     # the session's, between inputs
cdef bint spoiled = True            # a handshake is needed
cdef Sink sealed
cdef bint wild                      # noise was said: what it means nobody knows
cdef bint over
cdef uint32_t cut
cdef uint32_t last_id               # of the streams that the peer asked for
cdef uint32_t newest                # that we were asked for
cdef uint32_t pings
cdef uint32_t pongs
cdef uint32_t frames
cdef uint64_t now_ns
cdef size_t before
cdef size_t pair                    # what TLS of both sides has of the heap


cdef inline uint8_t tone(uint32_t id, uint64_t at, uint8_t way) noexcept nogil:
    """The byte at this place of this stream; 251: no multiple of any buffer."""
    return <uint8_t>(id * 37 + at % 251 + way)


cdef Lane* lane_of(uint32_t id) noexcept nogil:
    return &lanes[id // 2] if id & 1 and id // 2 < LANES else NULL


# ---- what the server is asked ----------------------------------------------------------------------------------------------------------

cdef void on_told(Session* s) noexcept nogil:
    pass


cdef void on_wakes(Session* s, Source* source) noexcept nogil:
    claim(source != NULL and source.fd == 7, b"a user is woken that is there")


cdef bint starts(const Asked* asked, const char* text, uint32_t n) noexcept nogil:
    return asked.authority_n == n and memcmp(asked.authority, text, n) == 0


cdef void on_asks(Session* s, int32_t id, Asked* asked, bint ended) noexcept nogil:
    global newest
    cdef Lane* lane = lane_of(<uint32_t>id)
    claim(s == &session and id & 1 and <uint32_t>id > newest, b"ids of asked streams grow")
    newest = <uint32_t>id
    if lane == NULL:
        hbone_refuse(s, id, 503)
        return
    claim(not lane.asked, b"a stream is asked for once")
    lane.asked = 1
    if not asked.method or not starts(asked, b"10.0.0.7:80", 11):
        hbone_refuse(s, id, 400 if not starts(asked, b"10.0.0.8:80", 11) else 401)
        return
    claim(wild or lane.intended, b"only what a CONNECT to a place of ours asks for is taken")
    lane.source.fd = 7
    lane.stream = hbone_accept(s, id, ended, &lane.source, &pool)
    lane.taken = lane.stream != NULL


# ---- what it says ------------------------------------------------------------------------------------------------------------------------

cdef void hear(const uint8_t* frame, uint32_t size, uint8_t type, uint8_t flags, uint32_t id) noexcept nogil:
    global frames, pongs
    cdef Lane* lane = lane_of(id)
    cdef uint32_t i = 0
    claim(frames > 0 or type == 4, b"SETTINGS come first")
    frames += 1
    claim(size <= 16384 or wild, b"no frame beyond what everybody takes")
    if type == 6 and flags & 1:
        pongs += 1
        claim(wild or pongs <= pings, b"a PING is answered once")
    if lane == NULL:
        return
    if type == 3:
        lane.gone = 1
    elif type == 0:
        claim(not lane.gone and lane.headed and lane.agreed, b"DATA in a stream that was agreed on, and lives")
        claim(lane.heard + size <= lane.wrote, b"no more than its user wrote")
        for i in range(size):
            claim(frame[i] == tone(id, lane.heard + i, 101), b"what is sent in a stream is what its user wrote")
        lane.heard += size
    elif type == 1:
        claim(not lane.gone and not lane.headed, b"one response")
        lane.headed = 1
        while i < size and frame[i] & 0xe0 == 0x20:         # the table's size
            i += 1
            if frame[i - 1] & 31 == 31:
                while i < size and frame[i] & 128:
                    i += 1
                i += 1
        claim(i < size and (frame[i] != 0x88 or lane.agreed), b"no 200 before the user agreed")


cdef void parse() noexcept nogil:
    global heard_n
    cdef uint32_t at = 0, size
    cdef const uint8_t* p = <const uint8_t*>heard
    while heard_n - at >= 9:
        size = (p[at] << 16) | (p[at + 1] << 8) | p[at + 2]
        if heard_n - at - 9 < size:
            break
        hear(p + at + 9, size, p[at + 3], p[at + 4],
             ((p[at + 5] & 127) << 24) | (p[at + 6] << 16) | (p[at + 7] << 8) | p[at + 8])
        at += 9 + size
    heard_n -= at
    memmove(heard, heard + at, heard_n)


cdef void keep(const void* data, size_t n) noexcept nogil:
    global heard_n
    claim(heard_n + n <= sizeof(heard), b"one turn says a bounded number of bytes")
    memcpy(heard + heard_n, data, n)
    heard_n += <uint32_t>n
    parse()


cdef void client_takes() noexcept nogil:
    """What is in the server's sink."""
    cdef int64_t n = 1
    client.given.p = pad.sink.data
    client.given.n = pad.sink.n
    client.sink = &sealed
    sealed.n = 0
    if client.done or tls_handshake(&client) == 1:
        while n > 0:
            n = tls_read(&client, scratch, TLS_RECORD)
            claim(n >= 0, b"records of ours can be read")
            keep(scratch, <size_t>n)
    pad.sink.n = 0


cdef void pull() noexcept nogil:
    cdef bint more = True
    while more and session.h2 != NULL:
        more = session_pull(&session)
        client_takes()


# ---- what the peer says ------------------------------------------------------------------------------------------------------------------

cdef void put(const void* data, size_t n) noexcept nogil:
    global wire_n
    if n <= WIRE - wire_n:
        memcpy(wire + wire_n, data, n)
        wire_n += <uint32_t>n


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


cdef void feed_plain(const char* data, uint32_t n) noexcept nogil:
    cdef uint32_t at = 0, part
    while at < n and not over:
        part = n - at if n - at < TLS_RECORD else TLS_RECORD
        sealed.n = 0
        claim(tls_write(&client, data + at, part) == 0, b"the client's records can be made")
        at += part
        feed_sealed()


cdef void feed_sealed() noexcept nogil:
    global over
    cdef uint32_t at = 0, part, n = sealed.n
    while at < n and not over:
        part = n - at if n - at < cut else cut
        over = session_feed(&session, sealed.data + at, part, now_ns) != 0
        at += part


cdef void flush() noexcept nogil:
    global wire_n
    if wire_n > 0 and not over:
        feed_plain(wire, wire_n)
        if over:
            claim(session.trouble != 0 and session_over(&session), b"who is over says why")
            claim(session_feed(&session, wire, 1, now_ns) != 0, b"who is over takes nothing more")
    wire_n = 0
    check()


cdef void check() noexcept nogil:
    cdef uint32_t i
    cdef Lane* lane
    claim(pool.taken <= pool.limit, b"buffers are within their bound")
    claim(session.streams <= STREAMS_MOST, b"a session has its number of streams at most")
    if session.h2 != NULL and not over:
        claim(nghttp2_session_get_outbound_queue_size(<nghttp2_session*>session.h2) <= QUEUE_MOST + 4 * STREAMS_MOST,
              b"a bounded number of frames waits")
    claim(__sanitizer_get_current_allocated_bytes() <= before + pool.limit + OVERHEAD,
          b"a peer costs a bounded part of the heap")
    for i in range(LANES):
        lane = &lanes[i]
        if lane.stream != NULL:
            claim(lane.stream.waiting <= WINDOW_WIDE, b"a stream holds its window at most")
            claim(buffer_used(&lane.stream.out) <= SEND_BYTES, b"and a bounded part of what its user writes")
            claim(lane.stream.waiting == 0 or lane.stream.error != 0 or lane.source.readable, b"a user with bytes to read knows")
            claim(lane.stream.source == &lane.source, b"a stream has its user")


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
        memset(scratch, 120, 128)
        put(scratch, size & 127)


cdef void connects(Feed* f) noexcept nogil:
    global last_id, wire_n
    cdef uint8_t how = feed_byte(f), many = feed_byte(f), flags = feed_byte(f)
    cdef uint32_t at = wire_n, n, half, id = last_id + 2 if last_id else 1
    cdef Lane* lane = lane_of(id)
    cdef char* block
    last_id = id
    if lane != NULL:
        lane.intended = not how & 4 and (how % 4 == 0 or how % 4 == 3)
    fields(how, many, flags & 0x7c)
    n = wire_n - at
    block = scratch + 1024
    if n > sizeof(scratch) - 1024:
        return
    memcpy(block, wire + at, n)
    wire_n = at
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
        scratch[i] = <char>tone(id, lane.said + i, 0)
    put(scratch, n)
    lane.said += n
    memset(scratch, 0, 256)
    put(scratch, padding)


cdef uint32_t number(uint8_t which) noexcept nogil:
    if which < 128:
        return which
    if which < 192:
        return <uint32_t>1 << (which & 31)
    return <uint32_t>0x7fffffff - (which & 63) if which & 32 else <uint32_t>0xffffffff - (which & 63)


cdef void says(uint8_t op, Feed* f) noexcept nogil:
    global last_id, pings, wild
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
            pings += 1
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
            wild = True
        put_frame(a % 64, b, feed_byte(f), number(feed_byte(f)))
        for _ in range(a % 64):
            put_byte(feed_byte(f))
        pings += b == 6
    elif op == RAW:
        wild = True
        for _ in range(a):
            put_byte(feed_byte(f))
    elif op == TRAILERS:
        put_frame(11, 1, 4 | (a >> 7), id)
        put(b"\x00\x04name\x04word", 11)
    elif op == BOMB:                # a field of 4 KiB in the table, then again and again by its number
        i = last_id + 2 if last_id else 1
        last_id = i
        put_frame(3806 + (b << 5), 1, 4, i)
        put(b"\x40\x01x\x7f\xd9\x1c", 6)     # 127 + 0x59 + 128 * 0x1c = 3,800 bytes
        memset(scratch, 121, 3800)
        put(scratch, 3800)
        memset(scratch, 0xbe, 8192)
        put(scratch, b << 5)
        wild = True
    elif op == MANY:
        for _ in range(a << (b & 1)):
            last_id = last_id + 2 if last_id else 1
            if last_id // 2 < LANES:
                lanes[last_id // 2].intended = 1
            put_frame(22, 1, 4, last_id)
            put(b"\x02\x07CONNECT\x01\x0b10.0.0.7:80", 22)
            put_frame(4, 3, 0, last_id)
            put_u32(8)


# ---- what the users do -------------------------------------------------------------------------------------------------------------------

cdef void read_some(Lane* lane, uint32_t most) noexcept nogil:
    cdef int64_t n = hbone_read(lane.stream, scratch, most)
    cdef int64_t i
    if n == -EAGAIN or 0 <= n < most and not lane.source.hung:
        lane.source.readable = 0
    for i in range(n):
        claim(wild or <uint8_t>scratch[i] == tone(<uint32_t>lane.stream.id, lane.read + <uint64_t>i, 0),
              b"what is read of a stream is what was sent in it")
    if n > 0:
        lane.read += <uint64_t>n
        claim(wild or lane.read <= lane.said, b"no more is read than was sent")


cdef void take(Lane* lane) noexcept nogil:
    cdef Buffer b
    cdef uint32_t i
    memset(&b, 0, sizeof(Buffer))
    if hbone_take(lane.stream, &b) <= 0:
        return
    for i in range(b.start, b.end):
        claim(wild or <uint8_t>b.data[i] == tone(<uint32_t>lane.stream.id, lane.read + i - b.start, 0),
              b"what is taken of a stream is what was sent in it")
    lane.read += buffer_used(&b)
    buffer_drop(&pool, &b)


cdef void give(Lane* lane, uint8_t how) noexcept nogil:
    cdef Buffer b
    cdef uint32_t i, size = 1 + (<uint32_t>how << (how & 7))
    cdef int64_t n
    memset(&b, 0, sizeof(Buffer))
    if buffer_reserve(&pool, &b, size + 64) != 0:
        return
    b.start = 64 if how & 8 else 0
    b.end = b.start + size
    for i in range(size):
        b.data[b.start + i] = <char>tone(<uint32_t>lane.stream.id, lane.wrote + i, 101)
    n = hbone_give(lane.stream, &b)
    claim(n <= <int64_t>size, b"no more is taken than there is")
    if n > 0:
        lane.wrote += <uint64_t>n
    buffer_drop(&pool, &b)


cdef void acts(uint8_t op, Feed* f) noexcept nogil:
    cdef uint8_t which = feed_byte(f), how
    cdef Lane* lane = &lanes[which % 128]
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
            scratch[i] = <char>tone(<uint32_t>lane.stream.id, lane.wrote + i, 101)
        done = hbone_write(lane.stream, scratch, n)
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
        hbone_drop(lane.stream, &pad)
        lane.stream = NULL
        memset(&lane.source, 0, sizeof(Source))


cdef void time_passes(uint8_t how) noexcept nogil:
    global now_ns
    if how % 4 == 0:
        now_ns += 1000000000
    elif how % 4 == 1:
        session_sweep(&session)
    elif how % 4 == 2:
        if not session.pinged:
            session_ping(&session)
    elif how & 4:
        session_end(&session)
    else:
        session_leave(&session)


# ---- one input ---------------------------------------------------------------------------------------------------------------------------

cdef void shake() noexcept nogil:
    """Both sides of a handshake. What comes of it is used until it is spoiled."""
    global spoiled
    cdef int rounds = 0
    session_begins()
    tls_init(&client, there, False, <const Span*>&expected, 1)
    client.sink = &sealed
    sealed.n = 0
    tls_handshake(&client)
    while not (client.done and session.tls.done) and rounds < 4:
        feed_sealed()
        client_takes()
        rounds += 1
    feed_sealed()
    claim(client.done and session.tls.done and not over, b"two of ours agree")
    session_ends()
    spoiled = False


cdef void session_begins() noexcept nogil:
    global wire_n, heard_n, wild, over, cut, last_id, newest, pings, pongs, frames
    memset(lanes, 0, sizeof(lanes))
    memset(&pool, 0, sizeof(Buffers))
    memset(&pad, 0, sizeof(Pad))
    wire_n = heard_n = last_id = newest = pings = pongs = frames = 0
    wild = over = False
    cut = 1 << 20
    claim(pad_open(&pad) == 0 and session_init(&session, &pad, &ops, NULL, here, True, NULL, 0) == 0, b"there is memory")


cdef void session_ends() noexcept nogil:
    """Its TLS lives on, at the place that libssl knows it by."""
    memcpy(&served, &session.tls, sizeof(Tls))
    session.tls.ssl = NULL
    session_close(&session)
    claim(pad.streams.live == 0 or lanes_live(), b"a stream lives for its user alone")


cdef bint lanes_live() noexcept nogil:
    cdef uint32_t i
    for i in range(LANES):
        if lanes[i].stream != NULL:
            return True
    return False


cdef void meet() noexcept nogil:
    tls_free(&session.tls)
    memcpy(&session.tls, &served, sizeof(Tls))
    memset(&served, 0, sizeof(Tls))
    put(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 24)
    put_frame(0, 4, 0, 0)
    flush()


cdef void finish() noexcept nogil:
    """The connection ends; its users read what there is, and go."""
    cdef uint32_t i, reads
    cdef int64_t n
    cdef Lane* lane
    session_ends()
    for i in range(LANES):
        lane = &lanes[i]
        if lane.stream == NULL:
            continue
        reads = 0
        n = 1
        while n > 0 and reads < 1000:
            n = hbone_read(lane.stream, scratch, sizeof(scratch))
            reads += 1
        claim(n <= 0 and n != -EAGAIN, b"every stream ends")
        claim(n < 0 or lane.stream.fin_in, b"an end without an error is the peer's own")
        hbone_drop(lane.stream, &pad)
        lane.stream = NULL
    claim(pad.streams.live == 0, b"no stream is left")
    claim(pool.taken == 0, b"no buffer is left")
    pad_close(&pad)
    buffers_free(&pool)


cdef size_t play(const uint8_t* raw, size_t size) noexcept nogil:
    """What it left on the heap, in bytes."""
    global cut, before, pair, spoiled
    cdef Feed f
    cdef uint8_t first, op
    cdef uint32_t n = 0
    f.at = raw
    f.left = size
    first = feed_byte(&f)
    if spoiled:
        pair = __sanitizer_get_current_allocated_bytes()
        shake()
        pad_close(&pad)
        pair = __sanitizer_get_current_allocated_bytes() - pair
    before = __sanitizer_get_current_allocated_bytes()
    session_begins()
    pool.limit = pool.soft = <uint64_t>16384 << (2 * (first & 3))
    cut = <uint32_t>1 << (2 * ((first >> 4) & 7) + 3)
    meet()
    while f.left and n < OPERATIONS and not over:
        n += 1
        op = feed_byte(&f)
        if op & 127 == TIME:
            time_passes(feed_byte(&f))
        elif op & 127 == PULLS:
            flush()
            pull()
        elif ANSWERS <= (op & 127) % OP_COUNT <= DROPS or TAKES <= (op & 127) % OP_COUNT <= GIVES:
            flush()
            acts((op & 127) % OP_COUNT, &f)
        elif (op & 127) % OP_COUNT == CONNECTS:
            connects(&f)
        elif (op & 127) % OP_COUNT == DATA:
            data(&f)
        else:
            says((op & 127) % OP_COUNT, &f)
        if not op & 128:
            flush()
    flush()
    pull()
    spoiled = over or session.tls.ended or client.ended or session_over(&session)
    finish()
    if spoiled:
        tls_free(&client)
        tls_free(&served)
        before -= pair
    return __sanitizer_get_current_allocated_bytes() - before


cdef int one_input(const uint8_t* raw, size_t size) noexcept nogil:
    if <int64_t>play(raw, size) > 0:        # libssl makes some things once and keeps them; a leak comes each time
        claim(<int64_t>play(raw, size) <= 0, b"no byte of the heap is left")
    return 0


# ---- credentials, by openssl -------------------------------------------------------------------------------------------------------------

cdef Span expected
cdef list kept = []


cdef Span span(bytes text):
    cdef Span made
    kept.append(text)
    made.p = text
    made.n = <uint32_t>len(text)
    return made


def issue():
    """A root and two leaves of it: (root, [(key, certificate), ...]), DER."""
    import subprocess
    import tempfile
    from pathlib import Path

    def openssl(*words):
        subprocess.run(["openssl", *words], check=True, capture_output=True, env={"PATH": "/usr/bin:/bin"}, cwd=folder)

    new = ("req", "-config", "req.cnf", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "365")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "req.cnf").write_text("[req]\ndistinguished_name = dn\n[dn]\n")
        openssl(*new, "-subj", "/O=root", "-addext", "basicConstraints=critical,CA:TRUE", "-keyout", "root.key", "-out", "root.pem")
        openssl("x509", "-in", "root.pem", "-outform", "DER", "-out", "root.der")
        for name in ("here", "there"):
            openssl(*new, "-subj", "/O=leaf", "-CA", "root.pem", "-CAkey", "root.key", "-keyout", f"{name}.key",
                    "-out", f"{name}.pem", "-addext", f"subjectAltName=URI:spiffe://cluster.local/ns/default/sa/{name}",
                    "-addext", "basicConstraints=CA:FALSE")
            openssl("x509", "-in", f"{name}.pem", "-outform", "DER", "-out", f"{name}.der")
            openssl("pkcs8", "-topk8", "-nocrypt", "-in", f"{name}.key", "-outform", "DER", "-out", f"{name}.p8")
        read = Path(folder)
        return ((read / "root.der").read_bytes(),
                [((read / f"{name}.p8").read_bytes(), (read / f"{name}.der").read_bytes()) for name in ("here", "there")])


def run(list words):
    global here, there, expected
    cdef char[TLS_ERROR_BYTES] error
    cdef Span root, key, leaf, domain = span(b"cluster.local")
    cdef Credentials* made[2]
    if tls_open() != 0:
        raise SystemExit("fuzz: libssl cannot be set up")
    der, leaves = issue()
    root = span(der)
    for i in range(2):
        key, leaf = span(leaves[i][0]), span(leaves[i][1])
        made[<int>i] = credentials_new(&key, &leaf, 1, &root, 1, NULL, 0, &domain, error)
        if made[<int>i] == NULL:
            raise SystemExit(f"fuzz: {(<bytes>error).decode()}")
    here, there = made[0], made[1]
    expected = span(b"spiffe://cluster.local/ns/default/sa/here")
    ops.ready = ops.dirty = ops.going = on_told
    ops.asks = on_asks
    ops.wakes = on_wakes
    sealed.size = 1 << 17
    sealed.data = <char*>malloc(sealed.size)
    return drive(words, one_input)
