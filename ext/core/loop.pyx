"""See loop.pxd."""
from libc.errno cimport errno
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memset
from posix.unistd cimport close
from ext.core.slab cimport slab_give
from ext.core.timer cimport Timer, timer_due

cdef extern from *:
    """
    #ifndef NARROWS_FUZZ            /* meson.build says it for a fuzzing build */
    #define NARROWS_FUZZ 0
    #endif
    """
    const bint NARROWS_FUZZ

cdef extern from "<time.h>" nogil:
    struct timespec:
        long tv_sec
        long tv_nsec
    int CLOCK_MONOTONIC
    int CLOCK_REALTIME
    int clock_gettime(int clock, timespec* out)

cdef extern from "<sys/epoll.h>" nogil:
    ctypedef union epoll_data_t:
        void* ptr
    struct epoll_event:
        uint32_t events
        epoll_data_t data
    int EPOLL_CLOEXEC
    int EPOLL_CTL_ADD
    int EPOLL_CTL_MOD
    int EPOLL_CTL_DEL
    uint32_t EPOLLIN
    uint32_t EPOLLOUT
    uint32_t EPOLLERR
    uint32_t EPOLLHUP
    uint32_t EPOLLRDHUP
    uint32_t EPOLLET
    int epoll_create1(int flags)
    int epoll_ctl(int epoll, int op, int fd, epoll_event* event)
    int epoll_wait(int epoll, epoll_event* events, int n, int timeout_ms)


cdef uint64_t hand_ns = 0
cdef uint64_t hand_tick_ns = 0


cdef void clock_by_hand(uint64_t now_ns, uint64_t tick_ns) noexcept nogil:
    global hand_ns, hand_tick_ns
    hand_ns = now_ns
    hand_tick_ns = tick_ns


cdef uint64_t clock_ns() noexcept nogil:
    global hand_ns
    cdef timespec now
    if NARROWS_FUZZ and hand_ns != 0:
        hand_ns += hand_tick_ns
        return hand_ns
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <uint64_t>now.tv_sec * 1000000000 + <uint64_t>now.tv_nsec


cdef uint64_t wall_us() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_REALTIME, &now)
    return <uint64_t>now.tv_sec * 1000000 + <uint64_t>now.tv_nsec // 1000


cdef int loop_open(Loop* loop) noexcept nogil:
    memset(loop, 0, sizeof(Loop))
    loop.epoll = epoll_create1(EPOLL_CLOEXEC)
    loop.now_ns = clock_ns()
    return 0 if loop.epoll >= 0 else -errno


cdef void loop_close(Loop* loop) noexcept nogil:
    close(loop.epoll)
    loop.epoll = -1


cdef int loop_add(Loop* loop, Source* source) noexcept nogil:
    cdef epoll_event event
    event.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET
    event.data.ptr = source
    return 0 if epoll_ctl(loop.epoll, EPOLL_CTL_ADD, source.fd, &event) == 0 else -errno


cdef int loop_listen(Loop* loop, Source* source, int on) noexcept nogil:
    cdef epoll_event event
    event.events = EPOLLIN if on else 0
    event.data.ptr = source
    if epoll_ctl(loop.epoll, EPOLL_CTL_MOD, source.fd, &event) == 0:
        return 0
    return 0 if epoll_ctl(loop.epoll, EPOLL_CTL_ADD, source.fd, &event) == 0 else -errno


# ---- flows -----------------------------------------------------------------------------------------------------------------

cdef inline void flows_push(Flows* flows, Flow* flow, uint8_t place) noexcept nogil:
    flow.place = place
    flow.next = NULL
    if flows.last != NULL:
        flows.last.next = flow
    else:
        flows.first = flow
    flows.last = flow


cdef inline Flow* flows_pop(Flows* flows) noexcept nogil:
    cdef Flow* flow = flows.first
    flows.first = flow.next
    if flows.first == NULL:
        flows.last = NULL
    flow.place = FLOW_IDLE
    return flow


cdef void flows_forget(Flows* flows, Flow* flow) noexcept nogil:
    cdef Flow* at = flows.first
    cdef Flow* before = NULL
    while at != NULL and at != flow:
        before = at
        at = at.next
    if at == NULL:
        return
    if before != NULL:
        before.next = flow.next
    else:
        flows.first = flow.next
    if flows.last == flow:
        flows.last = before


cdef void flow_forget(Loop* loop, Flow* flow) noexcept nogil:
    flows_forget(&loop.fresh if flow.place == FLOW_FRESH else &loop.busy, flow)
    flow.place = FLOW_IDLE


cdef inline void queue(Loop* loop, Source* source, uint32_t events) noexcept nogil:
    cdef Flow* flow = source.flow if source.flow != NULL else &loop.own
    source.events |= events
    if source.queued:
        return
    source.queued = 1
    source.after = NULL
    source.before = flow.last
    if flow.last != NULL:
        flow.last.after = source
    else:
        flow.first = source
    flow.last = source
    if flow.place == FLOW_IDLE and flow != loop.running:
        flows_push(&loop.fresh, flow, FLOW_FRESH)


cdef inline void unqueue(Loop* loop, Source* source) noexcept nogil:
    cdef Flow* flow = source.flow if source.flow != NULL else &loop.own
    if source.before != NULL:
        source.before.after = source.after
    else:
        flow.first = source.after
    if source.after != NULL:
        source.after.before = source.before
    else:
        flow.last = source.before
    source.queued = 0


cdef void loop_again(Loop* loop, Source* source) noexcept nogil:
    if source.fd >= 0:
        queue(loop, source, 0)


cdef inline void read_clock(Loop* loop) noexcept nogil:
    loop.clock_ns = clock_ns()
    loop.unclocked = 0


cdef bint loop_over(Loop* loop) noexcept nogil:
    read_clock(loop)
    return loop.clock_ns >= loop.slice_end_ns


cdef inline Flow* pick(Loop* loop) noexcept nogil:
    loop.picks += 1
    if loop.busy.first != NULL and (loop.fresh.first == NULL or loop.picks % FRESH_RUN == 0):
        return flows_pop(&loop.busy)
    return flows_pop(&loop.fresh) if loop.fresh.first != NULL else NULL


cdef void serve(Loop* loop) noexcept nogil:
    """Flows in turn until a slice of time is over in all, or nothing is left; at least one of them."""
    cdef uint64_t end = loop.clock_ns + SLICE_NS
    cdef Flow* flow = pick(loop)
    cdef Source* source
    cdef uint32_t events
    while flow != NULL:
        loop.running = flow
        loop.slice_end_ns = loop.clock_ns + SLICE_NS
        while flow.first != NULL and loop.clock_ns < loop.slice_end_ns:
            source = flow.first
            unqueue(loop, source)
            events = source.events
            source.events = 0
            source.ready(source, events)
            loop.unclocked += 1
            if loop.unclocked >= CLOCK_EACH:
                read_clock(loop)
        loop.running = NULL
        if flow.first != NULL:
            flow.cut += 1
            flows_push(&loop.busy, flow, FLOW_BUSY)
        if loop.clock_ns >= end:
            return
        flow = pick(loop)


cdef void source_close(Loop* loop, Source* source) noexcept nogil:
    if source.queued:
        unqueue(loop, source)
    if source.fd == CARRIED:
        source.carrier.close(source)
        source.fd = -1
    elif source.fd >= 0:
        if source.shared:
            epoll_ctl(loop.epoll, EPOLL_CTL_DEL, source.fd, NULL)
        close(source.fd)
        source.fd = -1
    source.readable = source.writable = 0


cdef void loop_bury(Loop* loop, Grave* grave, Slab* slab, void* item) noexcept nogil:
    grave.slab = slab
    grave.item = item
    grave.next = loop.graves
    loop.graves = grave


cdef void empty_graves(Loop* loop) noexcept nogil:
    cdef Grave* grave = loop.graves
    cdef Grave* after
    loop.graves = NULL
    while grave != NULL:
        after = grave.next
        slab_give(grave.slab, grave.item)
        grave = after


cdef int patience_ms(Loop* loop) noexcept nogil:
    cdef uint64_t due, wait_ms
    if loop.fresh.first != NULL or loop.busy.first != NULL:
        return 0
    if loop.timers.root == NULL:
        return TURN_MAX_MS
    due = loop.timers.root.due_ns
    if due <= loop.now_ns:
        return 0
    wait_ms = (due - loop.now_ns + 999999) // 1000000
    return <int>wait_ms if wait_ms < TURN_MAX_MS else TURN_MAX_MS


cdef int poll(Loop* loop, int patience) noexcept nogil:
    """Asks the kernel once and queues who is ready; how many events there were."""
    cdef epoll_event[EVENTS] events
    cdef Source* source
    cdef uint32_t what
    cdef int i, n = epoll_wait(loop.epoll, events, EVENTS, patience)
    if patience != 0:
        loop.clock_ns = clock_ns()
        loop.now_ns = loop.clock_ns
    for i in range(n if n > 0 else 0):
        source = <Source*>events[i].data.ptr
        if source.fd < 0:
            continue
        what = events[i].events
        if what & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR):
            source.readable = 1
        if what & (EPOLLOUT | EPOLLHUP | EPOLLERR):
            source.writable = 1
        if what & (EPOLLRDHUP | EPOLLHUP):
            source.hung = 1
        if what & EPOLLERR:
            source.failed = 1
        if source.flow != NULL:
            queue(loop, source, what)
        else:
            source.ready(source, what)
    return n


cdef void fire(Loop* loop) noexcept nogil:
    cdef uint64_t end = loop.clock_ns + SLICE_NS
    cdef Timer* timer = timer_due(&loop.timers, loop.now_ns)
    while timer != NULL:
        timer.fire(timer)
        loop.unclocked += 1
        if loop.unclocked >= CLOCK_EACH:
            read_clock(loop)
            if loop.clock_ns >= end:
                return
        timer = timer_due(&loop.timers, loop.now_ns)


cdef void loop_turn(Loop* loop) noexcept nogil:
    cdef int polls = 1, patience = patience_ms(loop)
    loop.turns += 1
    if patience == 0:
        loop.clock_ns = loop.now_ns = clock_ns()
    while poll(loop, patience) == EVENTS and polls < POLLS:
        patience = 0
        polls += 1
    serve(loop)
    fire(loop)
    empty_graves(loop)
