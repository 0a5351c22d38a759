"""See stock.pxd."""
from libc.stdint cimport uint8_t, uint32_t
from posix.unistd cimport close
from ext.core.loop cimport loop_again
from ext.core.timer cimport Timer, timer_clear, timer_init, timer_set
from ext.proxy.budget cimport descriptors_short, memory_forget
from ext.proxy.outbox cimport send_need_sockets
from ext.proxy.state cimport Q_NONE, Q_STOCK, STOCK_MAX, STOCK_MIN, Captured, Conn, Stock

cdef enum:
    RETRY_NS = 250000000    # the keeper answers in a millisecond; a lost answer (its or our descriptors ran out) is asked for again


cdef void on_retry(Timer* timer) noexcept nogil:
    cdef Captured* pod = <Captured*>timer.owner
    cdef int which
    for which in range(2):
        if &pod.stock[which].retry == timer:
            pod.stock[which].asked = 0
            order(pod, <uint8_t>which)


cdef void order(Captured* pod, uint8_t which) noexcept nogil:
    """Asks for more below the low-water mark of half a batch. One order at a time."""
    cdef Stock* stock = &pod.stock[which]
    cdef uint32_t want
    if stock.asked != 0 or (not pod.attached and stock.first == NULL):
        return
    if stock.n > stock.batch // 2:
        return
    want = stock.batch
    if stock.n + want > STOCK_MAX:
        want = STOCK_MAX - stock.n
    if descriptors_short(pod, want):
        want = 0 if stock.first == NULL else STOCK_MIN      # nothing in advance; who waits was counted with its socket
    if want == 0:
        return
    stock.asked = want
    timer_set(&pod.w.loop.timers, &stock.retry, pod.w.loop.now_ns + RETRY_NS)
    send_need_sockets(pod.w, pod.handle, 4 if which == 0 else 6, <uint32_t>want)


cdef void stock_open(Captured* pod) noexcept nogil:
    """The first few are for IPv4; a family that is not used costs nothing."""
    cdef int which
    for which in range(2):
        pod.stock[which].batch = STOCK_MIN
        timer_init(&pod.stock[which].retry, on_retry, pod)
    order(pod, 0)


cdef int stock_take(Conn* c, uint8_t family) noexcept nogil:
    cdef Captured* pod = c.pod
    cdef uint8_t which = 0 if family == 4 else 1
    cdef Stock* stock = &pod.stock[which]
    cdef int fd = -1
    stock_forget(c)
    stock.used = 1
    if stock.n > stock.promised:
        stock.n -= 1
        fd = stock.fds[stock.n]
        pod.w.stats.sockets_ready -= 1
    elif stock.batch < STOCK_MAX:
        stock.batch *= 2            # demand outran it
    order(pod, which)
    return fd


cdef int stock_spare(Captured* pod, uint8_t family) noexcept nogil:
    cdef uint8_t which = 0 if family == 4 else 1
    cdef Stock* stock = &pod.stock[which]
    cdef int fd = -1
    stock.used = 1
    if stock.n > stock.promised + 1:
        stock.n -= 1
        fd = stock.fds[stock.n]
        pod.w.stats.sockets_ready -= 1
    order(pod, which)
    return fd


cdef void stock_wait(Conn* c, uint8_t family) noexcept nogil:
    cdef Stock* stock = &c.pod.stock[0 if family == 4 else 1]
    stock_forget(c)
    memory_forget(c)
    c.queue = Q_STOCK
    c.stock_family = family
    c.wait_next = NULL
    c.wait_prev = stock.last
    if stock.last != NULL:
        stock.last.wait_next = c
    else:
        stock.first = c
    stock.last = c
    order(c.pod, 0 if family == 4 else 1)


cdef void stock_forget(Conn* c) noexcept nogil:
    cdef Stock* stock = &c.pod.stock[0 if c.stock_family == 4 else 1]
    if c.promised:
        c.promised = 0
        stock.promised -= 1
    if c.queue != Q_STOCK:
        return
    c.queue = Q_NONE
    if c.wait_prev != NULL:
        c.wait_prev.wait_next = c.wait_next
    else:
        stock.first = c.wait_next
    if c.wait_next != NULL:
        c.wait_next.wait_prev = c.wait_prev
    else:
        stock.last = c.wait_prev
    c.wait_prev = c.wait_next = NULL


cdef void stock_fill(Captured* pod, uint8_t family, const int* fds, uint32_t n) noexcept nogil:
    cdef uint8_t which = 0 if family == 4 else 1
    cdef Stock* stock = &pod.stock[which]
    cdef Conn* c
    cdef uint32_t i
    if n > 0:
        stock.asked = 0
        timer_clear(&pod.w.loop.timers, &stock.retry)
    for i in range(n):
        if stock.n < STOCK_MAX and (pod.attached or stock.first != NULL):
            stock.fds[stock.n] = fds[i]
            stock.n += 1
            pod.w.stats.sockets_ready += 1
        else:
            close(fds[i])
    while stock.first != NULL and stock.n > stock.promised:
        c = stock.first
        stock_forget(c)
        c.promised = 1
        stock.promised += 1
        loop_again(&pod.w.loop, &c.source)
    order(pod, which)


cdef void stock_shed(Captured* pod) noexcept nogil:
    cdef Stock* stock
    cdef uint32_t keep
    cdef int which
    for which in range(2):
        stock = &pod.stock[which]
        keep = stock.promised + (stock.n - stock.promised) // 2
        if stock.batch > STOCK_MIN:
            stock.batch //= 2
        while stock.n > keep:
            stock.n -= 1
            close(stock.fds[stock.n])
            pod.w.stats.sockets_ready -= 1
            pod.w.stats.shed_sockets += 1


cdef void stock_rest(Captured* pod) noexcept nogil:
    cdef Stock* stock
    cdef int which, _
    for which in range(2):
        stock = &pod.stock[which]
        if not stock.used and stock.n > STOCK_MIN and stock.promised == 0:
            stock.batch = STOCK_MIN
            for _ in range((stock.n - STOCK_MIN + 1) // 2):
                stock.n -= 1
                close(stock.fds[stock.n])
                pod.w.stats.sockets_ready -= 1
        stock.used = 0


cdef void stock_close(Captured* pod) noexcept nogil:
    cdef uint32_t i
    cdef int which
    for which in range(2):
        timer_clear(&pod.w.loop.timers, &pod.stock[which].retry)
        pod.stock[which].asked = 0
        for i in range(pod.stock[which].n):
            close(pod.stock[which].fds[i])
        pod.w.stats.sockets_ready -= pod.stock[which].n
        pod.stock[which].n = 0
