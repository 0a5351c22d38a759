"""Opaque bytes between two sockets until both ended: half-close is passed on, a reset as a reset, a slow reader slows the writer.

Each direction holds at most one buffer (16 KiB; 64 KiB once reads are large), or one pipe, and only while there are bytes. Bulk goes
through the pipe, uncopied: after some large reads in a row, until the pieces are small again. What is small is read and written,
one call each.

A reset is passed on behind the bytes that came before it, unless the other side is too slow to take them: then at once, without them.
"""
from ext.proxy.state cimport Conn

cdef enum Pumped:
    PUMP_WAIT = 0           # all that can be done now is done
    PUMP_AGAIN = 1          # more could be done: fairness
    PUMP_READ_BROKE = -1
    PUMP_WRITE_BROKE = -2
    PUMP_NO_MEMORY = -3

# One direction (`onward`: client to server) as far as it goes now. Counts into the connection's facts.
cdef int pump(Conn* c, bint onward) noexcept nogil
# The upstream is connected: relays from now on (also a tunnel of HTTP).
cdef void relay_start(Conn* c) noexcept nogil
cdef void relay_advance(Conn* c) noexcept nogil
cdef void relay_expire(Conn* c) noexcept nogil
