"""For tests: the tunnel room driven from Python. Nothing in the mesh imports it."""
from libc.stdint cimport int64_t, uint32_t
from libc.stdlib cimport calloc, free
from cpython.bytes cimport PyBytes_AsString
from ext.core.text cimport Span
from ext.tunnel.tls cimport (TLS_ERROR_BYTES, TLS_RECORD, Credentials, Sink, Tls, credentials_new, credentials_release, tls_end, tls_free,
                             tls_handshake, tls_init, tls_open, tls_read, tls_text, tls_write)

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
