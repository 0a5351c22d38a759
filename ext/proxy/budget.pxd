"""What one pod may have of a worker. Work is bounded in core/loop (a slice a turn); here are the things that are held.

A pod gets what it asks for while it has less than is still free ("dynamic thresholds", Choudhury and Hahne 1998, as in shared-memory
switches): one pod alone gets at most half, n greedy ones n/(n+1), and who comes later always finds something. Nothing has to be set
aside for each, and nobody has to know how many pods there are.
"""
from libc.stdint cimport uint32_t
from ext.proxy.state cimport Captured, Worker

cdef enum:
    DESCRIPTORS_KEPT = 512      # for control, transactions, pipes (128), and sockets on their way from the keeper (253 in a message)

# Of a process that may open `limit` descriptors, those that pods may have.
cdef uint32_t descriptors_for_pods(uint32_t limit) noexcept nogil

# A captured connection is counted with the connection to the server that it will need: none is accepted that could not be served.
cdef inline uint32_t pod_descriptors(const Captured* pod) noexcept nogil:
    return 2 * pod.conns + pod.idle + pod.stock[0].n + pod.stock[1].n

cdef inline uint32_t worker_descriptors(const Worker* w) noexcept nogil:
    return 2 * w.n_conns + <uint32_t>w.stats.upstream_idle + <uint32_t>w.stats.sockets_ready

# True: `more` would be beyond the pod's share.
cdef inline bint descriptors_short(const Captured* pod, uint32_t more) noexcept nogil:
    return pod_descriptors(pod) + worker_descriptors(pod.w) + more > pod.w.descriptors
