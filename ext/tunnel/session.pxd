"""One tunnel: HTTP/2 over TLS on one connection, without the connection. Both sides; see shapes.pxd for the picture.

Each turn its owner gives it what came (session_feed), lets users read and write their streams, and once at the turn's end, if it is
dirty, pulls what is to be sent (session_pull) and sends it. Times come with the calls.
"""
from libc.stdint cimport uint32_t, uint64_t
from ext.core.text cimport Span
from ext.tunnel.shapes cimport Ops, Pad, Session
from ext.tunnel.tls cimport Credentials

cdef int pad_open(Pad* pad) noexcept nogil                  # once a worker, before seccomp; tls_open too. 0, or -1: no memory
cdef void pad_close(Pad* pad) noexcept nogil

# 0, or -1: no memory. `expected` (a client's) must live until the handshake is over. A client's first bytes are to be pulled.
cdef int session_init(Session* session, Pad* pad, const Ops* ops, void* owner, Credentials* credentials, bint server, const Span* expected,
                      uint32_t n_expected) noexcept nogil
# All of it is taken; what is in pad.sink afterwards (of a handshake) is to be sent. 0, or -1: it is over (`trouble`); what can be pulled
# is still to be sent (GOAWAY), then session_close.
cdef int session_feed(Session* session, const char* data, uint32_t size, uint64_t now_ns) noexcept nogil
# Encrypts into pad.sink, which must be empty, what there is to send and has room. True: there is more.
cdef bint session_pull(Session* session) noexcept nogil
cdef bint session_over(Session* session) noexcept nogil     # nothing more will come or go: to be closed
# Every stream fails. Twice does nothing.
cdef void session_close(Session* session) noexcept nogil

cdef void session_ping(Session* session) noexcept nogil     # `pinged` until it is answered
cdef void session_leave(Session* session) noexcept nogil    # GOAWAY: first that it will be, the second time that it is; streams live on
cdef void session_end(Session* session) noexcept nogil      # an idle one: GOAWAY, close_notify
cdef void session_sweep(Session* session) noexcept nogil    # each 10 s: streams that were let go and do not end
# How many more streams it would take.
cdef uint32_t session_room(const Session* session) noexcept nogil
# Why it ended; see tls_text.
cdef uint32_t session_text(const Session* session, char* out, uint32_t size) noexcept nogil
