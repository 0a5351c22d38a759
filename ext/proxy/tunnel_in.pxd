"""Tunnels from other nodes: accepted on 15008 in the pod's namespace, each CONNECT a connection like one that was captured.

    CONNECT -> 400 another method, or an authority that is neither an address and port of this pod nor name and port of a service of
                   its workload
            -> 401 the policy says no                                            (Conn.refusal)
            -> 503 no room, or the application did not take the connection
            -> 200 once it did, with our baggage
"""
from libc.stdint cimport uint8_t, uint16_t
from ext.core.text cimport Span
from ext.proxy.state cimport Acceptor, Conn, Tunnel
from ext.sys.stream cimport Peer

# Who comes now would have to be refused, and might not have to be in a moment: our certificate, or the pod itself, is not told yet.
cdef bint tunnel_waits(const Acceptor* acceptor) noexcept nogil
# Takes the descriptor over.
cdef void tunnel_accept(Acceptor* acceptor, int fd, const Peer* client) noexcept nogil
# A server's handshake failed: one record in the log, naming who came and why it was not believed.
cdef void tunnel_distrusts(Tunnel* t) noexcept nogil
# One record of a tunnel that carried nothing when it ended, from another node or dialled.
cdef void tunnel_tell(Tunnel* t, Span why, uint8_t flag, uint16_t details) noexcept nogil
# The application's connection stands: 200. Does nothing for who came by a socket, or was answered.
cdef void tunnel_accepted(Conn* c) noexcept nogil
