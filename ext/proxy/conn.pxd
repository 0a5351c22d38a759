"""The life of a captured connection's memory: taken at accept, given back in exactly one place."""
from libc.stdint cimport uint8_t, uint16_t, uint32_t
from ext.core.pipes cimport Pipe
from ext.proxy.state cimport Acceptor, Bulk, Captured, Conn, Tunnel, Worker
from ext.route.shapes cimport Identity
from ext.sys.stream cimport Peer

# Takes the descriptor over; NULL: no memory, and it is closed.
cdef Conn* conn_new(Acceptor* acceptor, int fd, const Peer* client, const Peer* target) noexcept nogil
# One that came by a tunnel; its Source is to be set. NULL: no memory.
cdef Conn* conn_carried(Tunnel* t, const Peer* client, const Peer* target) noexcept nogil
# One that comes from a pod of this worker, whose identity `who` is (NULL: it has none); its Source is to be set. NULL: no memory.
cdef Conn* conn_near(Captured* pod, const Peer* client, const Peer* target, Identity* who, bint secure) noexcept nogil
# One that was refused before it was one, to be told of. NULL: no memory.
cdef Conn* conn_refused(Captured* pod, uint8_t kind, const Peer* client, const Peer* target) noexcept nogil
# The one end: what is open is accounted with this flag and reason, and everything is let go. `abort` resets the client.
cdef void conn_end(Conn* c, uint8_t flag, uint16_t details, bint abort) noexcept nogil
# The answer is out: end our side, read what still comes for a bounded while, then close.
cdef void conn_linger(Conn* c) noexcept nogil
cdef void linger_advance(Conn* c) noexcept nogil
# Lets go of the endpoint, cluster and destination in use.
cdef void conn_release(Conn* c) noexcept nogil
# A timer of the state, `ms` from now.
cdef void conn_timer(Conn* c, uint32_t ms) noexcept nogil
# A pipe for bulk bytes, or NULL: there is none, or the pod has its share.
cdef Pipe* bulk_pipe(Conn* c) noexcept nogil
cdef void bulk_drop(Conn* c, Bulk* bulk) noexcept nogil

# ---- pods (in conn, since the last connection of a detached pod frees it) ----
cdef void pod_retire(Captured* pod) noexcept nogil
cdef void pod_resume(Captured* pod) noexcept nogil      # accepts again when it is below its bound
