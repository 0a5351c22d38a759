"""Connections between two captured pods of this worker: no socket between the two hops, and both hops all the same.

    application ── Conn (LISTEN_OUTBOUND, its pod's) ── Upstream ═ Near ═ Conn (LISTEN_INBOUND, its pod's) ── Upstream ── application

The second Conn is what 15006 would have accepted: it asks policies, counts, logs, is bounded and drained as such, and its Upstream's socket
is of its own pod's stock, bound to the client's address. It knows who the client is (`peer`) from the listener that took it.

Like a socket to its users: -EAGAIN and edges, an end behind what was written, resets. What an end has not read yet is counted as its pod's
memory, at most BUFFER_LARGE.
"""
from libc.stdint cimport uint32_t
from ext.proxy.state cimport Captured, Conn, Upstream
from ext.route.shapes cimport Identity
from ext.sys.stream cimport Peer

cdef struct Neighbour:          # who is to be reached, and as whom
    Captured* pod
    Identity* who               # the client's; NULL: it has none
    Peer source                 # the client's address as the destination sees it
    bint secure                 # both have an identity: as good as mutual TLS

# An outbound connection to `to` ends in a pod of this worker and may be made there. False: it goes the way that it would go to
# another node (15006 or a tunnel); so does whatever is not known for certain.
cdef bint near_way(Conn* c, const Peer* to, Neighbour* out) noexcept nogil
# It ends in a captured pod of this node, whoever serves it: its 15006 takes it, and knows who comes by the address (permit). No tunnel.
cdef bint near_node(const Conn* c, const Peer* to) noexcept nogil
# The pod has room for one more. If not it goes the other way too, where it waits in the backlog or is refused.
cdef bint near_room(const Neighbour* to) noexcept nogil
cdef bint near_fits(const Upstream* up, const Neighbour* to) noexcept nogil
# The upstream's Source is connected to a new Conn of the neighbour's. False: no memory.
cdef bint near_join(const Neighbour* neighbour, Upstream* up, const Peer* to) noexcept nogil
# End 1: the application's connection stands, or its requests will be answered. Of any other Conn: nothing.
cdef void near_accept(Conn* c) noexcept nogil
