"""Opaque bytes between two sockets until both ended: half-close is passed on, a reset as a reset, a slow reader slows the writer.

Each direction holds at most one buffer (16 KiB; 64 KiB once reads fill it), and only while there are bytes.
"""
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from ext.core.buffer cimport Buffer
from ext.core.loop cimport Source
from ext.proxy.state cimport Conn, Worker

cdef enum Pumped:
    PUMP_WAIT = 0           # all that can be done now is done
    PUMP_AGAIN = 1          # more could be done: fairness
    PUMP_READ_BROKE = -1
    PUMP_WRITE_BROKE = -2
    PUMP_NO_MEMORY = -3

cdef int pump(Worker* w, Source* source, Source* sink, Buffer* b, uint8_t* ended, uint8_t* shut,
              uint64_t* count) noexcept nogil
# The upstream is connected: relays from now on (also a tunnel of HTTP).
cdef void relay_start(Conn* c) noexcept nogil
cdef void relay_advance(Conn* c) noexcept nogil
cdef void relay_expire(Conn* c) noexcept nogil
