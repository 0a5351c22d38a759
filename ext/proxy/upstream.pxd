"""Connections to servers: dialled, used by one connection at a time, kept idle in the pod's pool, closed.

    upstream_get      from the pool or dialled       DIALLED: c.up is set (perhaps still connecting)
                                                     QUEUED: no socket in stock, or no certificate yet (Q_HELD);
                                                             `advance` runs when it came
                                                     FAILED: c.up is NULL, *error says why
    upstream_keep     back into the pool, most recently used first; bounds are the settings'
    upstream_drop     closed; `abort` sends a reset

The pool belongs to a pod; its key is (source address it is bound to, endpoint). Any event on an idle connection closes it: an end,
or bytes that nobody asked for.
"""
from libc.stdint cimport uint8_t, uint32_t
from ext.core.protocol cimport LISTEN_INBOUND
from ext.proxy.state cimport Captured, Conn, Tunnel, Upstream
from ext.sys.stream cimport Peer, link_local, same_ip
from ext.wire.http1 cimport M_DELETE, M_GET, M_HEAD, M_OPTIONS, M_PUT, M_TRACE

cdef enum Got:
    DIALLED = 0
    QUEUED = 1
    FAILED = 2

# `source` (or NULL) is the address to bind. `pooled`: an idle one will do, if it is still open and silent: as of the last poll for a
# request that may be sent again, as of now for another.
cdef int upstream_get(Conn* c, const Peer* to, const Peer* source, uint32_t connect_ms, bint pooled, int* error) noexcept nogil
cdef void upstream_keep(Upstream* up) noexcept nogil
cdef void upstream_drop(Upstream* up, bint abort) noexcept nogil
cdef void pool_close(Captured* pod) noexcept nogil
# Worker.parts
cdef void pool_part(Tunnel* t) noexcept nogil
# Descriptors ran out: the older half goes.
cdef void pool_shed(Captured* pod) noexcept nogil

# RFC 9110 9.2.2: may be sent again when a pooled connection turns out to be dead. The others are sent once, and only on a pooled
# connection that the kernel still calls open.
cdef inline bint idempotent(uint8_t method) noexcept nogil:
    return method == M_GET or method == M_HEAD or method == M_PUT or method == M_DELETE or method == M_OPTIONS or method == M_TRACE

# The address that the last hop is made from: the client's, or NULL where it cannot be kept. A pod that calls itself, and link-local
# addresses on either side: sockets of these are tied to their link, and the answer would come over lo, or leave the pod
# (rt6_need_strict: such a destination is looked up on its link alone, past our rule).
cdef inline const Peer* kept_source(const Conn* c) noexcept nogil:
    if c.kind != LISTEN_INBOUND or same_ip(&c.client, &c.target) or link_local(&c.client) or link_local(&c.target):
        return NULL
    return &c.client
