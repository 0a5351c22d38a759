"""See loop.pxd."""
from libc.errno cimport errno
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memset
from posix.unistd cimport close
from ext.core.slab cimport slab_give
from ext.core.timer cimport Timer, timer_due

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


cdef uint64_t clock_ns() noexcept nogil:
    cdef timespec now
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


cdef void loop_again(Loop* loop, Source* source) noexcept nogil:
    if source.queued or source.fd < 0:
        return
    source.queued = 1
    source.again = NULL
    if loop.again_last != NULL:
        loop.again_last.again = source
    else:
        loop.again_first = source
    loop.again_last = source


cdef void forget(Loop* loop, Source* source) noexcept nogil:
    """Takes a source off the `again` list: its memory may go at the turn's end, before the list is read."""
    cdef Source* at = loop.again_first
    cdef Source* before = NULL
    while at != NULL:
        if at == source:
            if before != NULL:
                before.again = at.again
            else:
                loop.again_first = at.again
            if loop.again_last == at:
                loop.again_last = before
            return
        before = at
        at = at.again


cdef void source_close(Loop* loop, Source* source) noexcept nogil:
    if source.queued:
        forget(loop, source)
    if source.fd >= 0:
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


cdef void again(Loop* loop) noexcept nogil:
    """Those that were on the list when the turn began; who queues itself anew waits for the next turn."""
    cdef Source* source = loop.again_first
    cdef Source* after
    loop.again_first = loop.again_last = NULL
    while source != NULL:
        after = source.again
        source.again = NULL
        source.queued = 0
        if source.fd >= 0:
            source.ready(source, 0)
        source = after


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
    if loop.again_first != NULL:
        return 0
    if loop.timers.root == NULL:
        return TURN_MAX_MS
    due = loop.timers.root.due_ns
    if due <= loop.now_ns:
        return 0
    wait_ms = (due - loop.now_ns + 999999) // 1000000
    return <int>wait_ms if wait_ms < TURN_MAX_MS else TURN_MAX_MS


cdef void loop_turn(Loop* loop) noexcept nogil:
    cdef epoll_event[EVENTS] events
    cdef Source* source
    cdef Timer* timer
    cdef uint32_t what
    cdef int n, i
    n = epoll_wait(loop.epoll, events, EVENTS, patience_ms(loop))
    loop.now_ns = clock_ns()
    loop.turns += 1
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
        source.ready(source, what)
    again(loop)
    timer = timer_due(&loop.timers, loop.now_ns)
    while timer != NULL:
        timer.fire(timer)
        timer = timer_due(&loop.timers, loop.now_ns)
    empty_graves(loop)
