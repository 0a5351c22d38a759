"""Tunnels to other pods: which one carries a connection, and dialling one where there is none.

A pool is a pod's; its key is (our identity, the identity that the destination must prove, its address): the source address is kept, and
no two identities meet in one tunnel. One is dialled at a time for a key, and everybody waits for it. Small requests stay away from a
tunnel that a bulk transfer has: they get one of their own, up to TUNNELS_EACH.
"""
from libc.stdint cimport uint32_t
from ext.core.loop cimport Source
from ext.proxy.state cimport Captured, Conn, Tunnel, Upstream
from ext.route.shapes cimport Identity
from ext.sys.stream cimport Peer
from ext.tunnel.tls cimport Credentials

cdef enum Way:
    WAY_PLAIN = 0               # the destination is reached by a socket
    WAY_TUNNEL = 1
    WAY_LATER = 3               # likewise, but its certificate may still come: held (Q_HELD), `advance` runs when it came or never will
    WAY_NONE = 2                # it must be reached by a tunnel and cannot be: see Conn.texts, *error

cdef enum GotTunnel:
    TUNNEL_GOT = 0
    TUNNEL_QUEUED = 1           # no socket in stock; `advance` runs when one came
    TUNNEL_FAILED = 2

cdef enum Ahead:
    AHEAD_NONE = 0
    AHEAD_COMING = 1            # one is shaking hands
    AHEAD_THERE = 2             # one is open, and has room

cdef struct Asking:             # what a tunnel must be
    Identity* own
    Identity* wanted
    Credentials* credentials
    Peer to                     # its port is PORT_HBONE

# An outbound connection to `to` must go by a tunnel.
cdef bint secure_way(Conn* c, const Peer* to) noexcept nogil
# Whether an outbound connection to `to` needs a tunnel, and which. Sets c.secure.
cdef Way way_of(Conn* c, const Peer* to, Asking* out, int* error) noexcept nogil
cdef bint tunnel_fits(const Tunnel* t, const Asking* asking) noexcept nogil
# Dialled before anything needs it, if the pod may have one more of these and that destination did not fail just now.
cdef Ahead tunnel_ahead(Captured* pod, const Asking* asking) noexcept nogil
cdef GotTunnel tunnel_get(Conn* c, const Asking* asking, uint32_t open_ms, Tunnel** out, int* error) noexcept nogil
# The upstream's Source is a stream of it from now on; it is opened as soon as the tunnel is. False: no memory.
cdef bint tunnel_join(Tunnel* t, Upstream* up) noexcept nogil
