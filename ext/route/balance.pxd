"""Which endpoint of a cluster. Only healthy ones; the same randomness gives the same answer."""
from libc.stdint cimport uint64_t
from ext.route.shapes cimport Cluster, Endpoint

# NULL: none is healthy (UH). `exclude` (or NULL) is not given again if there is another: for a retry.
cdef Endpoint* balance_pick(Cluster* cluster, uint64_t random, const Endpoint* exclude) noexcept nogil

# Fills the balancer's part of a freshly decoded cluster from its arena. -1: out of memory.
cdef int balance_build(Cluster* cluster) noexcept nogil

# Around every connection (TCP) or request (HTTP) given to an endpoint; least request reads it. The cluster is held meanwhile.
cdef inline void endpoint_begin(Endpoint* endpoint) noexcept nogil:
    endpoint.load.active += 1

cdef inline void endpoint_end(Endpoint* endpoint) noexcept nogil:
    endpoint.load.active -= 1
