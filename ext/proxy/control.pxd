"""The worker's end of the control protocol (ext/core/protocol.pxd)."""
from ext.proxy.state cimport Worker

cdef int control_open(Worker* w, int fd) noexcept nogil
# Between two turns: applies the transaction that came, wakes who waited, answers.
cdef void control_apply(Worker* w) noexcept nogil
# No listener any more; ends when the last connection did or the time is over.
cdef void control_drain(Worker* w, unsigned int milliseconds) noexcept nogil
# A connection ended: perhaps it was the last one.
cdef void control_check_drained(Worker* w) noexcept nogil
