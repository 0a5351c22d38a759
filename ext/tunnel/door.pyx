"""For tests: the tunnel room driven from Python. Nothing in the mesh imports it."""
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memset
from cpython.bytes cimport PyBytes_AsString
from ext.core.buffer cimport Buffers, buffers_free
from ext.core.loop cimport Source
from ext.core.text cimport Span
from ext.tunnel.session cimport (pad_close, pad_open, session_close, session_end, session_feed, session_init, session_leave, session_over,
                                 session_ping, session_pull, session_room, session_sweep, session_text)
from ext.tunnel.shapes cimport Asked, Ops, Pad, Session, Stream
from ext.tunnel.stream cimport (hbone_abort, hbone_accept, hbone_answer, hbone_drop, hbone_open, hbone_read, hbone_refuse, hbone_shut,
                                hbone_write)
from ext.tunnel.tls cimport (TLS_ERROR_BYTES, TLS_RECORD, Credentials, Sink, Tls, credentials_new, credentials_release, tls_end, tls_free,
                             tls_handshake, tls_init, tls_open, tls_read, tls_revoked, tls_text, tls_write)

FAULTS = ("fine", "no_memory", "no_certificate", "untrusted", "expired", "not_yet", "revoked", "purpose", "no_identity", "trust_domain",
          "other_identity", "version", "alpn", "alert", "closed", "broken")

if tls_open() != 0:
    raise ImportError("libssl cannot be set up")


cdef Span span(bytes text):
    cdef Span made
    made.p = PyBytes_AsString(text)
    made.n = <uint32_t>len(text)
    return made


cdef class Spans:
    """An array of spans into a list of bytes, which it keeps."""
    cdef list kept
    cdef Span* at
    cdef uint32_t n

    def __cinit__(self, texts):
        cdef uint32_t i
        self.kept = list(texts)
        self.n = <uint32_t>len(self.kept)
        self.at = <Span*>calloc(self.n + 1, sizeof(Span))
        for i in range(self.n):
            self.at[i] = span(self.kept[i])

    def __dealloc__(self):
        free(self.at)


cdef class Identity:
    """Credentials from DER. ValueError with the text."""
    cdef Credentials* credentials

    def __cinit__(self, bytes key, chain, roots, crls=(), bytes trust_domain=b"cluster.local"):
        cdef char[TLS_ERROR_BYTES] error
        cdef Span secret = span(key), domain = span(trust_domain)
        cdef Spans certificates = Spans(chain), believed = Spans(roots), revoked = Spans(crls)
        self.credentials = credentials_new(&secret, certificates.at, certificates.n, believed.at, believed.n, revoked.at, revoked.n,
                                           &domain, error)
        if self.credentials == NULL:
            raise ValueError((<bytes>error).decode())

    def __dealloc__(self):
        credentials_release(self.credentials)

    @property
    def facts(self):
        """(identity, not before, not after, references)"""
        cdef Credentials* c = self.credentials
        return c.identity[:c.identity_n].decode(), c.not_before, c.not_after, c.refs


cdef class Connection:
    """One side's TLS: `feed` gives (bytes to send, plain bytes)."""
    cdef Tls tls
    cdef Sink sink
    cdef Spans expected

    def __cinit__(self, Identity identity, bint server, expected=()):
        self.expected = Spans(expected)
        self.sink.size = 1 << 20
        self.sink.data = <char*>calloc(1, self.sink.size)
        if tls_init(&self.tls, identity.credentials, server, self.expected.at, self.expected.n) != 0:
            raise MemoryError
        self.tls.sink = &self.sink

    def __dealloc__(self):
        tls_free(&self.tls)
        free(self.sink.data)

    def feed(self, bytes data=b""):
        cdef char[TLS_RECORD] plain
        cdef int64_t n
        cdef list parts = []
        self.tls.given = span(data)
        if not self.tls.done and tls_handshake(&self.tls) != 1:
            return self.taken(), b""
        while True:
            n = tls_read(&self.tls, plain, TLS_RECORD)
            if n <= 0:
                return self.taken(), b"".join(parts)
            parts.append(plain[:n])

    def revoked(self, Identity identity):
        """Whether the peer is, by the lists of newer credentials."""
        return bool(tls_revoked(&self.tls, identity.credentials))

    def write(self, bytes data):
        """Bytes to send, or None."""
        cdef uint32_t at
        for at in range(0, len(data), TLS_RECORD):
            part = data[at:at + TLS_RECORD]
            if tls_write(&self.tls, PyBytes_AsString(part), <uint32_t>len(part)) != 0:
                return None
        return self.taken()

    def end(self):
        tls_end(&self.tls)
        return self.taken()

    cdef bytes taken(self):
        out = self.sink.data[:self.sink.n]
        self.sink.n = 0
        return out

    @property
    def state(self):
        """(done, ended, fault, text, peer)"""
        cdef char[TLS_ERROR_BYTES] text
        cdef uint32_t n = tls_text(&self.tls, text, sizeof(text))
        return (bool(self.tls.done), bool(self.tls.ended), FAULTS[self.tls.fault], text[:n].decode(),
                self.tls.peer[:self.tls.peer_n].decode())


# ---- sessions ---------------------------------------------------------------------------------------------------------------------

cdef enum:
    LANES = 512

TROUBLES = ("none", "tls", "http2", "flood", "closed", "silent", "memory")
STATES = ("opening", "open", "refused", "broken")

cdef struct Lane:
    Source source           # first
    Stream* stream
    int32_t id


cdef void on_ready(Session* session) noexcept nogil:
    with gil:
        (<Tunnel>session.owner).events.append(("ready",))


cdef void on_dirty(Session* session) noexcept nogil:
    pass


cdef void on_going(Session* session) noexcept nogil:
    with gil:
        (<Tunnel>session.owner).events.append(("going",))


cdef void on_asks(Session* session, int32_t id, Asked* asked, bint ended) noexcept nogil:
    with gil:
        (<Tunnel>session.owner).asked(id, asked, ended)


cdef void on_wakes(Session* session, Source* source) noexcept nogil:
    with gil:
        (<Tunnel>session.owner).events.append(("wake", (<Lane*>source - (<Tunnel>session.owner).lanes)))


cdef class Tunnel:
    """One side. Streams are numbers; `events` tells what happened. `feed` and every other call give the bytes to send in `out`."""
    cdef Session session
    cdef Pad pad
    cdef Ops ops
    cdef Buffers pool
    cdef Spans expected
    cdef Lane* lanes
    cdef uint32_t n
    cdef Identity identity
    cdef public list events
    cdef public int refuse_with
    cdef public bytes out
    cdef public uint64_t now_ns

    def __cinit__(self, Identity identity, bint server, expected=(), uint64_t limit=1 << 30):
        self.identity = identity
        self.events = []
        self.out = b""
        self.now_ns = 1
        self.lanes = <Lane*>calloc(LANES, sizeof(Lane))
        self.pool.limit = self.pool.soft = limit
        self.expected = Spans(expected)
        self.ops.ready = on_ready
        self.ops.dirty = on_dirty
        self.ops.going = on_going
        self.ops.asks = on_asks
        self.ops.wakes = on_wakes
        if pad_open(&self.pad) != 0 or session_init(&self.session, &self.pad, &self.ops, <void*>self, identity.credentials, server,
                                                    self.expected.at, self.expected.n) != 0:
            raise MemoryError

    def __dealloc__(self):
        cdef uint32_t i
        session_close(&self.session)
        for i in range(self.n):
            if self.lanes[i].stream != NULL:
                hbone_drop(self.lanes[i].stream, &self.pad)
        pad_close(&self.pad)
        buffers_free(&self.pool)
        free(self.lanes)

    cdef uint32_t unused(self) except *:
        cdef uint32_t i = 0
        while i < self.n and self.lanes[i].stream != NULL:
            i += 1
        if i == LANES:
            raise RuntimeError("too many streams for this door")
        self.n = max(self.n, i + 1)
        memset(&self.lanes[i], 0, sizeof(Lane))
        return i

    cdef asked(self, int32_t id, Asked* asked, bint ended):
        facts = {"id": id, "connect": bool(asked.method), "authority": asked.authority[:asked.authority_n].decode(),
                 "forwarded": asked.forwarded[:asked.forwarded_n].decode(), "baggage": asked.baggage[:asked.baggage_n].decode(),
                 "traceparent": asked.trace[:asked.trace_n].decode(), "ended": bool(ended), "lane": None}
        if self.refuse_with:
            hbone_refuse(&self.session, id, self.refuse_with)
        else:
            lane = self.unused()
            self.lanes[lane].id = id
            self.lanes[lane].stream = hbone_accept(&self.session, id, ended, &self.lanes[lane].source, &self.pool)
            facts["lane"] = lane
        self.events.append(("asks", facts))

    def flush(self):
        cdef bint more = True
        self.taken()
        while more:
            more = session_pull(&self.session)
            self.taken()

    cdef taken(self):
        self.out += self.pad.sink.data[:self.pad.sink.n]
        self.pad.sink.n = 0

    def feed(self, bytes data):
        """False: it is over."""
        cdef int result = session_feed(&self.session, PyBytes_AsString(data), <uint32_t>len(data), self.now_ns)
        self.taken()
        return result == 0

    def open(self, bytes authority, bytes forwarded=b"", bytes baggage=b"", bytes trace=b""):
        cdef Span a = span(authority), f = span(forwarded), b = span(baggage), t = span(trace)
        cdef uint32_t at = self.unused()
        cdef Lane* lane = &self.lanes[at]
        lane.stream = hbone_open(&self.session, &lane.source, &self.pool, &a, &f, &b, &t)
        return None if lane.stream == NULL else at

    def answer(self, uint32_t lane, int status, bytes baggage=b""):
        cdef Span b = span(baggage)
        hbone_answer(self.lanes[lane].stream, status, &b)

    def read(self, uint32_t lane, uint32_t size=1 << 20):
        """Bytes, or -errno."""
        cdef char* data = <char*>malloc(size)
        cdef int64_t n = hbone_read(self.lanes[lane].stream, data, size)
        got = data[:n] if n >= 0 else n
        if n == -11 or 0 <= n < size and not self.lanes[lane].source.hung:
            self.lanes[lane].source.readable = 0
        free(data)
        return got

    def write(self, uint32_t lane, bytes data):
        cdef int64_t n = hbone_write(self.lanes[lane].stream, PyBytes_AsString(data), len(data))
        if n == -11:
            self.lanes[lane].source.writable = 0
        return n

    def shut(self, uint32_t lane):
        hbone_shut(self.lanes[lane].stream)

    def abort(self, uint32_t lane):
        hbone_abort(self.lanes[lane].stream)

    def drop(self, uint32_t lane):
        hbone_drop(self.lanes[lane].stream, &self.pad)
        self.lanes[lane].stream = NULL

    def lane(self, uint32_t lane):
        """What a stream's user sees."""
        cdef Source* source = &self.lanes[lane].source
        cdef Stream* stream = self.lanes[lane].stream
        return {"readable": source.readable, "writable": source.writable, "hung": source.hung, "failed": source.failed,
                "state": STATES[stream.state], "status": stream.status, "waiting": stream.waiting, "code": stream.code,
                "error": stream.error}

    def ping(self):
        session_ping(&self.session)

    def leave(self):
        session_leave(&self.session)

    def end(self):
        session_end(&self.session)

    def sweep(self):
        session_sweep(&self.session)

    def close(self):
        session_close(&self.session)

    @property
    def state(self):
        cdef char[TLS_ERROR_BYTES] text
        cdef uint32_t n = session_text(&self.session, text, sizeof(text))
        return {"streams": self.session.streams, "trouble": TROUBLES[self.session.trouble], "text": text[:n].decode(),
                "going": bool(self.session.going), "over": bool(session_over(&self.session)), "room": session_room(&self.session),
                "pinged": bool(self.session.pinged), "buffered": self.pool.taken,
                "peer": self.session.tls.peer[:self.session.tls.peer_n].decode(), "allocated": self.pad.streams.live}
