"""Prefetched sockets: made by the keeper inside the pod's namespace, since a worker can neither enter it nor set a mark.

    stock_take   one at once, or -1; what came for those who waited is promised to them until their pod's turn
    stock_wait   queues a connection; `advance` runs when a socket came. The caller bounds the wait (STOCK_WAIT_MS)
    stock_fill   the keeper's answer
"""
from libc.stdint cimport uint8_t, uint32_t
from ext.proxy.state cimport Captured, Conn

cdef void stock_open(Captured* pod) noexcept nogil
cdef int stock_take(Conn* c, uint8_t family) noexcept nogil
# One that nobody waits for, and not the last: for what is dialled ahead. -1: none.
cdef int stock_spare(Captured* pod, uint8_t family) noexcept nogil
cdef void stock_wait(Conn* c, uint8_t family) noexcept nogil
cdef void stock_forget(Conn* c) noexcept nogil                     # out of the queue
# Takes the descriptors over; those above STOCK_MAX are closed.
cdef void stock_fill(Captured* pod, uint8_t family, const int* fds, uint32_t n) noexcept nogil
# Descriptors ran out: half of what is prefetched goes, and orders get smaller.
cdef void stock_shed(Captured* pod) noexcept nogil
# Once a second: who dialled nothing since keeps half of what is above STOCK_MIN.
cdef void stock_rest(Captured* pod) noexcept nogil
cdef void stock_close(Captured* pod) noexcept nogil
