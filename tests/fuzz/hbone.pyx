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
  7. Who a revocation list names is recognised on the open connection, by name, and so only who it names.
  8. When users are gone no stream, no buffer and no byte of the heap is left.
"""
from libc.errno cimport EAGAIN
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport malloc
from libc.string cimport memcmp, memcpy, memmove, memset, strstr
from ext.core.buffer cimport Buffers, buffer_used, buffers_free
from ext.core.loop cimport Source
from ext.core.text cimport Span
from ext.tunnel.session cimport (pad_close, pad_open, session_close, session_end, session_feed, session_init, session_leave, session_over,
                                 session_ping, session_pull, session_sweep)
from ext.tunnel.shapes cimport QUEUE_MOST, SEND_BYTES, STREAMS_MOST, WINDOW_WIDE, Asked, Ops, Pad, Session
from ext.tunnel.stream cimport hbone_accept, hbone_drop, hbone_read, hbone_refuse
from ext.tunnel.tls cimport (TLS_ERROR_BYTES, TLS_RECORD, TLS_REVOKED, Credentials, Sink, Tls, credentials_new, tls_free, tls_handshake,
                             tls_init, tls_open, tls_read, tls_revoked, tls_text, tls_write)
from driver cimport Feed, claim, feed_byte, run as drive
from frames cimport connects, data, put, put_frame, says
from scene cimport (ANSWERS, CONNECTS, DATA, DROPS, GIVES, LANES, OP_COUNT, PULLS, REVOKES, TAKES, TIME, Lane, Scene, lane_of, scene,
                    tone)
from users cimport acts

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
    OPERATIONS = 400
    OVERHEAD = 4194304              # of one tunnel, 200 streams and QUEUE_MOST frames that wait: some 1.5 MiB

cdef Scene* the = scene()
cdef Credentials* here
cdef Credentials* wary          # who we are, with a list that names the peer
cdef Credentials* there
cdef char heard[1048576]
cdef uint32_t heard_n
cdef Session session
cdef Ops ops
cdef Tls client
cdef Tls served                     # the session's, between inputs
cdef bint spoiled = True            # a handshake is needed
cdef Sink sealed
cdef bint over
cdef uint32_t cut
cdef uint32_t newest                # that we were asked for
cdef uint32_t pongs
cdef uint32_t frames
cdef uint64_t now_ns
cdef size_t before
cdef size_t pair                    # what TLS of both sides has of the heap


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
    claim(the.wild or lane.intended, b"only what a CONNECT to a place of ours asks for is taken")
    lane.source.fd = 7
    lane.stream = hbone_accept(s, id, ended, &lane.source, &the.pool)
    lane.taken = lane.stream != NULL


# ---- what it says ------------------------------------------------------------------------------------------------------------------------

cdef void hear(const uint8_t* frame, uint32_t size, uint8_t type, uint8_t flags, uint32_t id) noexcept nogil:
    global frames, pongs
    cdef Lane* lane = lane_of(id)
    cdef uint32_t i = 0
    claim(frames > 0 or type == 4, b"SETTINGS come first")
    frames += 1
    claim(size <= 16384 or the.wild, b"no frame beyond what everybody takes")
    if type == 6 and flags & 1:
        pongs += 1
        claim(the.wild or pongs <= the.pings, b"a PING is answered once")
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


cdef void keep(const void* said, size_t n) noexcept nogil:
    global heard_n
    claim(heard_n + n <= sizeof(heard), b"one turn says a bounded number of bytes")
    memcpy(heard + heard_n, said, n)
    heard_n += <uint32_t>n
    parse()


cdef void client_takes() noexcept nogil:
    """What is in the server's sink."""
    cdef int64_t n = 1
    client.given.p = the.pad.sink.data
    client.given.n = the.pad.sink.n
    client.sink = &sealed
    sealed.n = 0
    if client.done or tls_handshake(&client) == 1:
        while n > 0:
            n = tls_read(&client, the.scratch, TLS_RECORD)
            claim(n >= 0, b"records of ours can be read")
            keep(the.scratch, <size_t>n)
    the.pad.sink.n = 0


cdef void pull() noexcept nogil:
    cdef bint more = True
    while more and session.h2 != NULL:
        more = session_pull(&session)
        client_takes()


# ---- what the peer says ------------------------------------------------------------------------------------------------------------------

cdef void feed_plain(const char* plain, uint32_t n) noexcept nogil:
    cdef uint32_t at = 0, part
    while at < n and not over:
        part = n - at if n - at < TLS_RECORD else TLS_RECORD
        sealed.n = 0
        claim(tls_write(&client, plain + at, part) == 0, b"the client's records can be made")
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
    if the.wire_n > 0 and not over:
        feed_plain(the.wire, the.wire_n)
        if over:
            claim(session.trouble != 0 and session_over(&session), b"who is over says why")
            claim(session_feed(&session, the.wire, 1, now_ns) != 0, b"who is over takes nothing more")
    the.wire_n = 0
    check()


cdef void check() noexcept nogil:
    cdef uint32_t i
    cdef Lane* lane
    claim(the.pool.taken <= the.pool.limit, b"buffers are within their bound")
    claim(session.streams <= STREAMS_MOST, b"a session has its number of streams at most")
    if session.h2 != NULL and not over:
        claim(nghttp2_session_get_outbound_queue_size(<nghttp2_session*>session.h2) <= QUEUE_MOST + 4 * STREAMS_MOST,
              b"a bounded number of frames waits")
    claim(__sanitizer_get_current_allocated_bytes() <= before + the.pool.limit + OVERHEAD,
          b"a peer costs a bounded part of the heap")
    for i in range(LANES):
        lane = &the.lanes[i]
        if lane.stream != NULL:
            claim(lane.stream.waiting <= WINDOW_WIDE, b"a stream holds its window at most")
            claim(buffer_used(&lane.stream.out) <= SEND_BYTES, b"and a bounded part of what its user writes")
            claim(lane.stream.waiting == 0 or lane.stream.error != 0 or lane.source.readable, b"a user with bytes to read knows")
            claim(lane.stream.source == &lane.source, b"a stream has its user")


# ---- what the users do -------------------------------------------------------------------------------------------------------------------

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


cdef void revokes() noexcept nogil:
    """What ext/proxy/recall does with a tunnel whose peer is named."""
    global over
    cdef char[TLS_ERROR_BYTES] text
    claim(not tls_revoked(&session.tls, here), b"who no list names is believed")
    claim(tls_revoked(&session.tls, wary) and session.tls.fault == TLS_REVOKED, b"who a list names is not believed any more")
    claim(tls_text(&session.tls, text, sizeof(text)) > 0 and strstr(text, expected_peer) != NULL, b"and an operator is told who")
    over = True


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
    global heard_n, over, cut, newest, pongs, frames
    memset(the.lanes, 0, sizeof(the.lanes))
    memset(&the.pool, 0, sizeof(Buffers))
    memset(&the.pad, 0, sizeof(Pad))
    the.wire_n = heard_n = the.last_id = newest = the.pings = pongs = frames = 0
    the.wild = over = False
    cut = 1 << 20
    claim(pad_open(&the.pad) == 0 and session_init(&session, &the.pad, &ops, NULL, here, True, NULL, 0) == 0, b"there is memory")


cdef void session_ends() noexcept nogil:
    """Its TLS lives on, at the place that libssl knows it by."""
    memcpy(&served, &session.tls, sizeof(Tls))
    session.tls.ssl = NULL
    session_close(&session)
    claim(the.pad.streams.live == 0 or lanes_live(), b"a stream lives for its user alone")


cdef bint lanes_live() noexcept nogil:
    cdef uint32_t i
    for i in range(LANES):
        if the.lanes[i].stream != NULL:
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
        lane = &the.lanes[i]
        if lane.stream == NULL:
            continue
        reads = 0
        n = 1
        while n > 0 and reads < 1000:
            n = hbone_read(lane.stream, the.scratch, sizeof(the.scratch))
            reads += 1
        claim(n <= 0 and n != -EAGAIN, b"every stream ends")
        claim(n < 0 or lane.stream.fin_in, b"an end without an error is the peer's own")
        hbone_drop(lane.stream, &the.pad)
        lane.stream = NULL
    claim(the.pad.streams.live == 0, b"no stream is left")
    claim(the.pool.taken == 0, b"no buffer is left")
    pad_close(&the.pad)
    buffers_free(&the.pool)


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
        pad_close(&the.pad)
        pair = __sanitizer_get_current_allocated_bytes() - pair
    before = __sanitizer_get_current_allocated_bytes()
    session_begins()
    the.pool.limit = the.pool.soft = <uint64_t>16384 << (2 * (first & 3))
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
        elif (op & 127) % OP_COUNT == REVOKES:
            flush()
            if not over:
                revokes()
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


# ---- credentials -----------------------------------------------------------------------------------------------------------------------

cdef Span expected
cdef const char* expected_peer
cdef list kept = []


cdef Span span(bytes text):
    cdef Span made
    kept.append(text)
    made.p = text
    made.n = <uint32_t>len(text)
    return made


cdef Credentials* credentials(issued, leaf, bint lists) except NULL:
    cdef char[TLS_ERROR_BYTES] error
    cdef Span key = span(leaf.key), certificate = span(leaf.certificate), root = span(issued.root), revoked = span(issued.revoked)
    cdef Span domain = span(b"cluster.local")
    cdef Credentials* made = credentials_new(&key, &certificate, 1, &root, 1, &revoked if lists else NULL, 1 if lists else 0, &domain,
                                             error)
    if made == NULL:
        raise SystemExit(f"fuzz: {(<bytes>error).decode()}")
    return made


def run(list words):
    global here, wary, there, expected, expected_peer
    from tests.fuzz.identities import issue         # late: see CHILD in run.py

    if tls_open() != 0:
        raise SystemExit("fuzz: libssl cannot be set up")
    issued = issue("there", "here")
    peer, us = issued.leaves
    here, wary, there = credentials(issued, us, False), credentials(issued, us, True), credentials(issued, peer, False)
    expected = span(us.identity.encode())
    expected_peer = span(peer.identity.encode()).p
    ops.ready = ops.dirty = ops.going = on_told
    ops.asks = on_asks
    ops.wakes = on_wakes
    sealed.size = 1 << 17
    sealed.data = <char*>malloc(sealed.size)
    return drive(words, one_input)
