"""See held.pxd."""
from libc.stdint cimport uint8_t, uint64_t
from ext.core.buffer cimport buffer_used
from ext.core.loop cimport loop_again
from ext.core.protocol cimport KIND_DESTINATION
from ext.core.text cimport Span
from ext.core.timer cimport timer_clear, timer_set
from ext.proxy.budget cimport memory_forget
from ext.proxy.outbox cimport send_miss
from ext.proxy.state cimport Q_HELD, Q_NONE, Conn, Worker
from ext.route.shapes cimport Pod, ServicePort, Slot
from ext.route.tables cimport destination_wait, slot_hold, slot_release, slot_wait

cdef enum:
    ASK_AGAIN_NS = 1000000000   # the agent may have been away when it was asked


cdef void arm(Conn* c) noexcept nogil:
    cdef uint64_t due = c.w.loop.now_ns + ASK_AGAIN_NS
    timer_set(&c.w.loop.timers, &c.timer, due if due < c.wait_until_ns else c.wait_until_ns)


cdef bint full(Conn* c) noexcept nogil:
    cdef Worker* w = c.w
    if w.n_held + c.pod.n_held >= w.tables.settings.hold_connections or buffer_used(&c.din) > w.tables.settings.hold_bytes:
        w.stats.refused_held += 1
        return True
    return False


cdef int held_wait(Conn* c, const Pod* pod, const ServicePort* port) noexcept nogil:
    cdef Slot* slot
    if full(c):
        return -1
    slot = destination_wait(c.w.tables, pod, port)
    if slot == NULL:
        return -1
    wait_in(c, slot)
    return 0


cdef int held_wait_slot(Conn* c, Slot* slot) noexcept nogil:
    if full(c):
        return -1
    slot_hold(slot)
    wait_in(c, slot)
    return 0


cdef int held_wait_key(Conn* c, uint8_t kind, Span key) noexcept nogil:
    cdef Slot* slot
    if full(c):
        return -1
    slot = slot_wait(c.w.tables, kind, key)
    if slot == NULL:
        return -1
    wait_in(c, slot)
    return 0


cdef void ask(Conn* c) noexcept nogil:
    """Only destinations come on demand; the rest is told to everybody anyway."""
    if c.slot.kind == KIND_DESTINATION:
        send_miss(c.w, c.slot.key, c.slot.key_len)


cdef void wait_in(Conn* c, Slot* slot) noexcept nogil:
    cdef Worker* w = c.w
    memory_forget(c)
    c.slot = slot
    c.queue = Q_HELD
    c.wait_next = NULL
    c.wait_prev = w.held_last
    if w.held_last != NULL:
        w.held_last.wait_next = c
    else:
        w.held_first = c
    w.held_last = c
    w.n_held += 1
    c.pod.n_held += 1
    w.stats.held += 1
    c.wait_until_ns = w.loop.now_ns + <uint64_t>w.tables.settings.hold_timeout_ms * 1000000
    arm(c)
    # `user` counts those who wait here: the first asks
    if slot.user == NULL:
        ask(c)
    slot.user = <void*>(<size_t>slot.user + 1)


cdef void held_forget(Conn* c) noexcept nogil:
    cdef Worker* w = c.w
    if c.queue != Q_HELD:
        return
    c.queue = Q_NONE
    if c.wait_prev != NULL:
        c.wait_prev.wait_next = c.wait_next
    else:
        w.held_first = c.wait_next
    if c.wait_next != NULL:
        c.wait_next.wait_prev = c.wait_prev
    else:
        w.held_last = c.wait_prev
    c.wait_prev = c.wait_next = NULL
    w.n_held -= 1
    c.pod.n_held -= 1
    w.stats.held -= 1
    timer_clear(&w.loop.timers, &c.timer)
    c.slot.user = <void*>(<size_t>c.slot.user - 1)
    slot_release(w.tables, c.slot)
    c.slot = NULL


cdef void held_wake(Worker* w) noexcept nogil:
    cdef Conn* c = w.held_first
    cdef Conn* last = w.held_last
    cdef Conn* after
    while c != NULL:
        after = c.wait_next if c != last else NULL
        if c.slot.current != NULL:
            held_forget(c)
            loop_again(&w.loop, &c.source)      # in its pod's turn: a thousand may wait for one commit
        c = after


cdef void held_expire(Conn* c) noexcept nogil:
    if c.w.loop.now_ns < c.wait_until_ns:
        if c.wait_prev == NULL or c.wait_prev.slot != c.slot:   # of those who wait for the same, the first asks
            ask(c)
        arm(c)
        return
    held_forget(c)
    c.unconfigured = 1
    c.w.advance(c)
