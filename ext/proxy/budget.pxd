"""What one pod may have of a worker. Work is bounded in core/loop (a slice a turn); here are the things that are held.

A pod gets what it asks for while it has less than is still free ("dynamic thresholds", Choudhury and Hahne 1998, as in shared-memory
switches): one pod alone gets at most half, n greedy ones n/(n+1), and who comes later always finds something. Nothing has to be set
aside for each, and nobody has to know how many pods there are.

    descriptors   a connection is admitted when two are to be had: its own and its server's
    buffers       who would read looks first (memory_wait) and waits in its pod's queue; ext/proxy/shed makes room and wakes
    held          connections that wait for configuration (ext/proxy/held)
"""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from ext.proxy.state cimport Q_MEMORY, Acceptor, Captured, Conn, Worker

cdef enum:
    DESCRIPTORS_KEPT = 512      # for control, transactions, pipes (128), and sockets on their way from the keeper (253 in a message)

# Takes the settings over: at start and after each commit.
cdef void budget_apply(Worker* w) noexcept nogil
cdef void budget_share(Captured* pod) noexcept nogil        # of a new pod
# 0: this listener may accept one more; else the Detail that says why not.
cdef uint16_t admission(const Acceptor* acceptor) noexcept nogil
# The same for one that comes by a tunnel.
cdef uint16_t admits(const Captured* pod, uint8_t kind) noexcept nogil
cdef void memory_forget(Conn* c) noexcept nogil             # out of the queue
cdef bint memory_queue(Conn* c) noexcept nogil

# A captured connection is counted with the connection to the server that it will need: none is accepted that could not be served.
cdef inline uint32_t pod_descriptors(const Captured* pod) noexcept nogil:
    return 2 * pod.conns + pod.idle + pod.tunnels + pod.stock[0].n + pod.stock[1].n

cdef inline uint32_t worker_descriptors(const Worker* w) noexcept nogil:
    return 2 * w.n_conns + w.n_tunnels + <uint32_t>w.stats.upstream_idle + <uint32_t>w.stats.sockets_ready

# True: `more` would be beyond the pod's share.
cdef inline bint descriptors_short(const Captured* pod, uint32_t more) noexcept nogil:
    return pod_descriptors(pod) + worker_descriptors(pod.w) + more > pod.w.descriptors

cdef inline bint memory_short(const Captured* pod) noexcept nogil:
    return pod.buffers.taken >= pod.buffers.soft or pod.buffers.taken + pod.w.memory.taken >= pod.w.memory.soft

# The pod has half of what it may have: no large buffers for bulk.
cdef inline bint memory_tight(const Captured* pod) noexcept nogil:
    return 2 * pod.buffers.taken >= pod.buffers.soft or 3 * pod.buffers.taken + pod.w.memory.taken >= pod.w.memory.soft

# Before a buffer is taken to read into. True: not now; `advance` runs when there is memory.
cdef inline bint memory_wait(Conn* c) noexcept nogil:
    if c.queue != Q_MEMORY and not memory_short(c.pod):
        return False
    return memory_queue(c)
