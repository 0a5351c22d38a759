"""See timer.pxd."""
from libc.stdint cimport uint64_t


cdef inline Timer* meld(Timer* a, Timer* b) noexcept nogil:
    """Two roots into one; either may be NULL. Neither has siblings."""
    if a == NULL:
        return b
    if b == NULL:
        return a
    cdef Timer* swap
    if b.due_ns < a.due_ns:
        swap = a
        a = b
        b = swap
    b.next = a.child
    if b.next != NULL:
        b.next.prev = b
    b.prev = a
    a.child = b
    a.next = NULL
    a.prev = NULL
    return a


cdef Timer* combine(Timer* first) noexcept nogil:
    """A list of siblings into one root: pairs from the left, then all from the right (the two passes give the bound)."""
    cdef Timer* pairs = NULL
    cdef Timer* root = NULL
    cdef Timer* a
    cdef Timer* b
    while first != NULL:
        a = first
        b = a.next
        first = b.next if b != NULL else NULL
        a.next = a.prev = NULL
        if b != NULL:
            b.next = b.prev = NULL
        a = meld(a, b)
        a.next = pairs              # a stack of pairs, the last one on top
        pairs = a
    while pairs != NULL:
        a = pairs
        pairs = a.next
        a.next = NULL
        root = meld(root, a)
    return root


cdef void timer_set(Timers* timers, Timer* timer, uint64_t due_ns) noexcept nogil:
    timer_clear(timers, timer)
    timer.due_ns = due_ns if due_ns != 0 else 1
    timers.root = meld(timers.root, timer)
    timers.armed += 1


cdef void timer_clear(Timers* timers, Timer* timer) noexcept nogil:
    if timer.due_ns == 0:
        return
    cdef Timer* rest
    if timers.root == timer:
        timers.root = combine(timer.child)
    else:
        if timer.prev.child == timer:
            timer.prev.child = timer.next
        else:
            timer.prev.next = timer.next
        if timer.next != NULL:
            timer.next.prev = timer.prev
        timer.next = timer.prev = NULL
        rest = combine(timer.child)
        timers.root = meld(timers.root, rest)
    timer.child = timer.next = timer.prev = NULL
    timer.due_ns = 0
    timers.armed -= 1


cdef Timer* timer_due(Timers* timers, uint64_t now_ns) noexcept nogil:
    cdef Timer* timer = timers.root
    if timer == NULL or timer.due_ns > now_ns:
        return NULL
    timer_clear(timers, timer)
    return timer
