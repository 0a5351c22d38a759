"""See shed.pxd."""
from libc.stdint cimport uint32_t, uint64_t
from ext.core.buffer cimport buffer_used, buffers_trim
from ext.core.loop cimport clock_ns, loop_again
from ext.core.shm cimport DETAIL_POD_MEMORY, DETAIL_STALLED, FLAG_OM, gauge
from ext.core.timer cimport Timer, timer_init, timer_set
from ext.proxy.account cimport account_begin_http, account_begin_tcp
from ext.proxy.answer cimport answer
from ext.proxy.budget cimport memory_forget, memory_short, worker_descriptors
from ext.proxy.conn cimport conn_end
from ext.proxy.request cimport give_up_replay
from ext.proxy.roster cimport roster_write
from ext.proxy.state cimport (C_DETECT, C_HTTP, C_RELAY, U_READY, X_FLOW, X_HEAD, X_IDLE, Bulk, Captured, Conn, Worker)
from ext.proxy.stock cimport stock_rest

cdef extern from "<malloc.h>" nogil:
    int malloc_trim(size_t kept)

cdef enum:
    WAKE = 32           # at a time: each may take a buffer before it is seen who has how much
    TRIM_TUNNELS = 256  # that ended: libssl and libnghttp2 had some 16 MiB for them, which malloc keeps
    TRIM_NS = 10000000000   # between two trims, each of which walks over all that is free


# ---- a look at some connections ------------------------------------------------------------------------------------------------

cdef inline Conn* step(Captured* pod, Conn* c) noexcept nogil:
    return c.next if c.next != NULL else pod.first_conn


cdef bint shed_idle(Captured* pod) noexcept nogil:
    cdef uint64_t now = pod.w.loop.now_ns
    cdef Conn* c = pod.hand if pod.hand != NULL else pod.first_conn
    cdef Conn* oldest = NULL
    cdef int _
    if now - pod.looked_ns < SCAN_PAUSE_NS:
        return False
    pod.looked_ns = now
    for _ in range(SCAN if pod.conns > SCAN else pod.conns):
        if c.state == C_HTTP and c.x.state == X_IDLE and not c.source.readable and c.active_ns + SILENT_NS < now and \
                (oldest == NULL or c.active_ns < oldest.active_ns):
            oldest = c
        c = step(pod, c)
    pod.hand = c
    if oldest == NULL:
        return False
    pod.w.stats.shed_idle += 1
    pod.looked_ns = 0                   # there may be more of them
    conn_end(oldest, 0, 0, False)
    return True


cdef inline uint32_t in_pipe(const Bulk* bulk) noexcept nogil:
    return bulk.pipe.held if bulk.pipe != NULL else 0


cdef bint stalled(const Conn* c) noexcept nogil:
    if buffer_used(&c.dhead) + buffer_used(&c.uin) + in_pipe(&c.back) > 0 and not c.source.writable:
        return True
    return buffer_used(&c.uhead) + buffer_used(&c.din) + in_pipe(&c.onward) > 0 and c.up != NULL and c.up.state == U_READY and \
        not c.up.source.writable


cdef void make_room(Captured* pod) noexcept nogil:
    cdef uint64_t now = pod.w.loop.now_ns
    cdef Conn* c = pod.hand if pod.hand != NULL else pod.first_conn
    cdef Conn* oldest = NULL
    cdef int _
    if now - pod.looked_ns < SCAN_PAUSE_NS:
        return
    pod.looked_ns = now
    for _ in range(SCAN if pod.conns > SCAN else pod.conns):
        if c.state == C_HTTP and c.x.state == X_FLOW and c.x.replay and c.x.at == c.x.fed and buffer_used(&c.uhead) == 0:
            give_up_replay(c)
            pod.w.stats.shed_replay += 1
        elif (c.state == C_HTTP or c.state == C_RELAY) and c.active_ns + SILENT_NS < now and stalled(c) and \
                (oldest == NULL or c.active_ns < oldest.active_ns):
            oldest = c
        c = step(pod, c)
    pod.hand = c
    if oldest != NULL and memory_short(pod):
        pod.w.stats.shed_stalled += 1
        conn_end(oldest, FLAG_OM, DETAIL_STALLED, True)


# ---- who waits ---------------------------------------------------------------------------------------------------------------

cdef void give_up(Conn* c) noexcept nogil:
    """A request that could not be read in time. What is under way goes on waiting: it has deadlines of its own."""
    memory_forget(c)
    c.w.stats.refused_memory += 1
    if c.state == C_DETECT:
        account_begin_tcp(c)
        conn_end(c, FLAG_OM, DETAIL_POD_MEMORY, True)
        return
    if c.x.state == X_IDLE:
        c.facts.start_ns = clock_ns()
    account_begin_http(c)
    answer(c, 503, FLAG_OM, DETAIL_POD_MEMORY)
    loop_again(&c.w.loop, &c.source)


cdef void serve(Captured* pod) noexcept nogil:
    cdef uint64_t now = pod.w.loop.now_ns
    cdef Conn* c = pod.waits_first
    cdef Conn* after
    cdef int _
    if not memory_short(pod):
        for _ in range(WAKE):
            c = pod.waits_first
            if c == NULL:
                return
            memory_forget(c)
            loop_again(&pod.w.loop, &c.source)
        return
    make_room(pod)
    c = pod.waits_first
    for _ in range(SCAN):
        if c == NULL or c.wait_until_ns > now:
            return                      # in the order of their coming
        after = c.wait_next
        if c.state == C_DETECT or (c.state == C_HTTP and (c.x.state == X_IDLE or c.x.state == X_HEAD)):
            give_up(c)
        c = after


cdef void shed_turn(Worker* w) noexcept nogil:
    cdef Captured* pod = w.first_pod
    cdef Captured* after
    if w.n_waiting == 0:
        return
    if w.survey.due_ns > w.loop.now_ns + HURRY_NS:
        timer_set(&w.loop.timers, &w.survey, w.loop.now_ns + HURRY_NS)
    while pod != NULL:
        after = pod.next                # a detached pod goes with its last connection
        if pod.waits_first != NULL:
            serve(pod)
        pod = after


# ---- once a second ------------------------------------------------------------------------------------------------------------

cdef void on_survey(Timer* timer) noexcept nogil:
    cdef Worker* w = <Worker*>timer.owner
    cdef Captured* pod = w.first_pod
    cdef uint64_t conns = 0, buffered = 0
    cdef bint rest = w.loop.now_ns - w.rested_ns >= SURVEY_NS
    while pod != NULL:
        if pod.conns > conns:
            conns = pod.conns
        if pod.buffers.taken > buffered:
            buffered = pod.buffers.taken
        w.stats.turns_cut += pod.flow.cut
        pod.flow.cut = 0
        if rest:
            stock_rest(pod)
        pod = pod.next
    if rest:
        w.rested_ns = w.loop.now_ns
        buffers_trim(&w.memory)
    if w.ended >= TRIM_TUNNELS and w.loop.now_ns - w.trimmed_ns >= TRIM_NS:
        w.ended = 0
        w.trimmed_ns = w.loop.now_ns
        malloc_trim(0)
    gauge(&w.stats.descriptors, worker_descriptors(w))
    gauge(&w.stats.pod_connections, conns)
    gauge(&w.stats.pod_buffered, buffered)
    gauge(&w.stats.waiting_memory, w.n_waiting)
    roster_write(w)
    timer_set(&w.loop.timers, &w.survey, w.loop.now_ns + SURVEY_NS)


cdef void shed_open(Worker* w) noexcept nogil:
    timer_init(&w.survey, on_survey, w)
    timer_set(&w.loop.timers, &w.survey, w.loop.now_ns + SURVEY_NS)
