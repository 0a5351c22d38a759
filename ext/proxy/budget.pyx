"""See budget.pxd."""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from ext.core.shm cimport DETAIL_POD_CONNECTIONS, DETAIL_POD_DESCRIPTORS, DETAIL_POD_MEMORY, gauge
from ext.proxy.state cimport Q_MEMORY, Q_NONE, Acceptor, Captured, Conn, Worker
from ext.route.shapes cimport Settings


cdef uint32_t for_pods(uint32_t limit) noexcept nogil:
    cdef uint32_t kept = limit // 3
    return limit - (kept if kept < DESCRIPTORS_KEPT else DESCRIPTORS_KEPT)


cdef void budget_share(Captured* pod) noexcept nogil:
    pod.buffers.whole = &pod.w.memory
    pod.buffers.soft = pod.w.tables.settings.buffered_bytes_per_pod
    pod.buffers.limit = pod.buffers.soft + pod.buffers.soft // 4


cdef void budget_apply(Worker* w) noexcept nogil:
    cdef const Settings* settings = &w.tables.settings
    cdef Captured* pod = w.first_pod
    w.descriptors = for_pods(w.descriptors_most)
    if settings.descriptors_per_worker != 0 and settings.descriptors_per_worker < w.descriptors:
        w.descriptors = settings.descriptors_per_worker
    w.memory.soft = settings.buffered_bytes_per_worker
    w.memory.limit = w.memory.soft + w.memory.soft // 8
    while pod != NULL:
        budget_share(pod)
        pod = pod.next
    gauge(&w.stats.descriptors_limit, w.descriptors)
    gauge(&w.stats.buffered_limit, w.memory.soft)
    gauge(&w.stats.held_limit, settings.hold_connections)
    gauge(&w.stats.pod_connections_limit, settings.connections_per_pod)
    gauge(&w.stats.pod_buffered_limit, settings.buffered_bytes_per_pod)


cdef uint16_t admission(const Acceptor* acceptor) noexcept nogil:
    return admits(acceptor.pod, acceptor.kind)


cdef uint16_t admits(const Captured* pod, uint8_t kind) noexcept nogil:
    cdef uint32_t most = pod.w.tables.settings.connections_per_pod
    if pod.conns >= most or pod.of_kind[kind] >= most - most // 4:
        return DETAIL_POD_CONNECTIONS
    if descriptors_short(pod, 2):
        return DETAIL_POD_DESCRIPTORS
    if memory_short(pod):
        return DETAIL_POD_MEMORY
    return 0


# ---- who waits for memory ---------------------------------------------------------------------------------------------------

cdef bint memory_queue(Conn* c) noexcept nogil:
    cdef Captured* pod = c.pod
    if not memory_short(pod):
        memory_forget(c)
        return False
    if c.queue != Q_NONE:
        return c.queue == Q_MEMORY      # one that waits for a socket meanwhile may read: it is bounded in time
    c.queue = Q_MEMORY
    c.wait_until_ns = c.w.loop.now_ns + <uint64_t>c.w.tables.settings.hold_timeout_ms * 1000000
    c.wait_next = NULL
    c.wait_prev = pod.waits_last
    if pod.waits_last != NULL:
        pod.waits_last.wait_next = c
    else:
        pod.waits_first = c
    pod.waits_last = c
    c.w.n_waiting += 1
    return True


cdef void memory_forget(Conn* c) noexcept nogil:
    cdef Captured* pod = c.pod
    if c.queue != Q_MEMORY:
        return
    c.queue = Q_NONE
    if c.wait_prev != NULL:
        c.wait_prev.wait_next = c.wait_next
    else:
        pod.waits_first = c.wait_next
    if c.wait_next != NULL:
        c.wait_next.wait_prev = c.wait_prev
    else:
        pod.waits_last = c.wait_prev
    c.wait_prev = c.wait_next = NULL
    c.w.n_waiting -= 1
