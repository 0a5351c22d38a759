"""Making room: what goes when a pod has all that it may have, in this order.

    descriptors   prefetched sockets and pooled connections of the pod; its kept-alive client that has been silent longest; then new
                  connections wait hold_timeout_ms in the backlog, and after that are reset with a reason
    buffers       nothing more is read; copies of requests that were kept to send them again; the connection whose peer has not read
                  for longest; who waits to begin a request is answered 503 after hold_timeout_ms

Whoever is below its share loses nothing. A look goes over SCAN connections of the pod, on from where the last one ended, so that it
costs the same however many there are: the longest silent of a sample stands for that of all (as in Redis' eviction).
"""
from ext.proxy.state cimport Captured, Worker

cdef enum:
    SCAN = 64
    SCAN_PAUSE_NS = 1000000     # between two looks at one pod
    SILENT_NS = 1000000000      # who was active within a second is neither idle nor stalled
    SURVEY_NS = 1000000000      # gauges of the largest pod, what is kept and not used
    HURRY_NS = 20000000         # while somebody waits for memory

cdef void shed_open(Worker* w) noexcept nogil
# Ends one kept-alive connection of the pod; False: none is idle.
cdef bint shed_idle(Captured* pod) noexcept nogil
# Once a turn: wakes who waited for memory, makes room, ends what waited too long.
cdef void shed_turn(Worker* w) noexcept nogil
