"""The request of an exchange on its way to the server: the head as forwarded, then the body.

A request that lies in din as a whole stays there until the response begins, so that it can be sent again when a pooled connection turns
out to be dead (`replay`). Otherwise bytes leave din as they are sent.
"""
from libc.stdint cimport uint32_t
from ext.proxy.state cimport Conn
from ext.wire.edit cimport HeaderOp

cdef enum Step:             # of a request's or a response's flow
    STEP_WAIT = 0           # nothing to do now
    STEP_MORE = 1           # fairness: go on next turn
    STEP_OVER = 2           # the exchange or the connection left FLOW
    STEP_ROOM = 3           # a head waits until what was written before it is sent

# Writes the forwarded head: w.head holds the request's. FLOW from now on, or an answer.
cdef void request_begin(Conn* c) noexcept nogil
# Follows the framing over what din holds: 0, or -1 for a framing error.
cdef int request_feed(Conn* c) noexcept nogil
cdef void request_send(Conn* c) noexcept nogil
# A Step. Reads only what the present request still needs, one buffer ahead of the server.
cdef int request_read(Conn* c) noexcept nogil
# What was sent leaves din.
cdef void give_up_replay(Conn* c) noexcept nogil

cdef inline uint32_t edits_size(const HeaderOp* ops, uint32_t n) noexcept nogil:
    cdef uint32_t i, size = 0
    for i in range(n):
        size += ops[i].name.n + ops[i].value.n + 4
    return size
