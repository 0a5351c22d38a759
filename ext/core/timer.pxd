"""Deadlines of one loop: an intrusive pairing heap (Fredman et al. 1986), so arming a timer allocates nothing and cannot fail.

    timer_set    O(1)            the owner embeds the Timer; setting an armed one moves it
    timer_clear  O(log n) amortised; clearing an idle one does nothing
    timer_due    the earliest whose time has come, taken out of the heap; NULL: none
"""
from libc.stdint cimport uint64_t

ctypedef void (*Fire)(Timer* timer) noexcept nogil

cdef struct Timer:
    Timer* child
    Timer* next             # sibling
    Timer* prev             # sibling before, or the parent for a first child; NULL: the root, or not armed
    uint64_t due_ns         # CLOCK_MONOTONIC; 0: not armed
    Fire fire
    void* owner

cdef struct Timers:
    Timer* root
    uint64_t armed

cdef inline void timer_init(Timer* timer, Fire fire, void* owner) noexcept nogil:
    timer.child = timer.next = timer.prev = NULL
    timer.due_ns = 0
    timer.fire = fire
    timer.owner = owner

cdef void timer_set(Timers* timers, Timer* timer, uint64_t due_ns) noexcept nogil
cdef void timer_clear(Timers* timers, Timer* timer) noexcept nogil
cdef Timer* timer_due(Timers* timers, uint64_t now_ns) noexcept nogil
