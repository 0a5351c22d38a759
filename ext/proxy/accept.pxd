"""A pod's listeners: bounded batches, level-triggered, paused when the pod or the process has enough.

Refused are connections that nothing captured, and those that dialled 15001 or 15006 themselves: the proxy is no destination.
"""
from libc.stdint cimport uint8_t, uint32_t
from ext.proxy.state cimport Captured, Worker

# Takes the listeners over. Attaching anew replaces those there were. 0, or -1: no memory, and they are closed.
cdef int pod_attach(Worker* w, uint32_t handle, const uint8_t* kinds, const int* fds, uint32_t n) noexcept nogil
# Closes the listeners; connections live on.
cdef void pod_detach(Captured* pod) noexcept nogil
# Descriptors ran out: what is kept in advance is closed.
cdef void accept_shed(Worker* w) noexcept nogil
