"""Connections that wait for configuration: bounded in number and time, woken by the commit that brings it.

A connection reads nothing more while it is held, so that its bytes are bounded by what was read before: at most one head, and hold_bytes.
A pod may have as many of them as places are still free.
"""
from libc.stdint cimport uint8_t
from ext.core.text cimport Span
from ext.proxy.state cimport Conn, Worker
from ext.route.shapes cimport Pod, ServicePort, Slot

# Asks for the destination and queues; 0, or -1: too many wait, or no memory (flag UO).
cdef int held_wait(Conn* c, const Pod* pod, const ServicePort* port) noexcept nogil
# The same for any other slot, which somebody will fill unasked.
cdef int held_wait_slot(Conn* c, Slot* slot) noexcept nogil
# And for one that may not have a name yet: of that kind and key.
cdef int held_wait_key(Conn* c, uint8_t kind, Span key) noexcept nogil
cdef void held_forget(Conn* c) noexcept nogil
# After an apply: those whose slot has content go on.
cdef void held_wake(Worker* w) noexcept nogil
# The timer is due: asks again, or marks the connection `unconfigured` and lets it go on.
cdef void held_expire(Conn* c) noexcept nogil
