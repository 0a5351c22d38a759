"""HBONE connections of a pod: sockets, deadlines, PINGs, ends. What a tunnel is inside is ext/tunnel's; who asks for one or is asked
by one is tunnel_out and tunnel_in.

    CONNECTING (client) -> SHAKING -> OPEN -> DEAD        memory goes when nobody uses it any more

A tunnel's Source is in its pod's flow like every other. What its streams' users write makes it dirty, which queues it: it is served
behind them, reads what came, and writes once for all of them.

`finishing`: no more streams, and the end with the last one: the peer's GOAWAY, a pod that leaves, credentials that were renewed.
"""
from libc.stdint cimport uint8_t, uint32_t
from ext.core.text cimport Span
from ext.proxy.state cimport Captured, Conn, Tunnel, Worker
from ext.sys.stream cimport Peer
from ext.tunnel.shapes cimport Ops, Session
from ext.core.loop cimport Source
from ext.tunnel.tls cimport Credentials
from ext.route.shapes cimport Identity

# Once a worker, before seccomp: 0, or -1.
cdef int tunnels_open(Worker* w) noexcept nogil
# Takes the descriptor over. `wanted` (NULL for a server's) and `own` are held. NULL: no memory, and it is closed.
cdef Tunnel* tunnel_new(Captured* pod, int fd, const Ops* ops, Credentials* credentials, Identity* own, Identity* wanted,
                        uint32_t open_ms) noexcept nogil
# Ends it: its streams fail, and who waits for it is told why.
cdef void tunnel_fail(Tunnel* t, uint8_t trouble) noexcept nogil
# What nobody answered in time, for an operator.
cdef Span tunnel_silence(uint8_t state) noexcept nogil
cdef void tunnel_finish(Tunnel* t) noexcept nogil       # no more streams
cdef void tunnels_finish(Captured* pod) noexcept nogil
# GOAWAY in those that were dialled to it; they end with their last stream.
cdef void tunnels_retire(Captured* pod) noexcept nogil
cdef void tunnel_leave(Tunnel* t) noexcept nogil        # a user is gone
cdef bint tunnel_busy(Tunnel* t) noexcept nogil         # a bulk transfer has it
# Dialling one there failed within the last seconds: nothing is dialled ahead.
cdef bint tunnel_shunned(Worker* w, const Peer* to) noexcept nogil

# ---- for both sides' Ops
cdef void tunnel_dirty(Session* session) noexcept nogil
cdef void tunnel_going(Session* session) noexcept nogil
cdef void tunnel_wakes(Session* session, Source* source) noexcept nogil
cdef void tunnel_opened(Tunnel* t) noexcept nogil

# It came by a tunnel that takes no more streams: the answer is the last one there.
cdef inline bint conn_parts(const Conn* c) noexcept nogil:
    return c.tunnel != NULL and c.tunnel.finishing

# Who is at the other end of an inbound connection; n 0: it came by no tunnel.
cdef inline Span conn_peer(const Conn* c) noexcept nogil:
    cdef Span who
    who.p = NULL
    who.n = 0
    if c.tunnel != NULL:
        who.p = c.tunnel.session.tls.peer
        who.n = c.tunnel.session.tls.peer_n
    return who
