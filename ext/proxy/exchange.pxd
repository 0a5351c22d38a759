"""Head and bodies of one exchange between a client's connection and its upstream, with back-pressure both ways.

A request that lies in din as a whole stays there until the response begins, so that it can be sent again when a pooled connection turns out
to be dead (`replay`). Otherwise bytes leave din as they are sent.
"""
from ext.proxy.state cimport Conn

# Writes the forwarded head: w.head holds the request's. FLOW from now on, or an answer.
cdef void exchange_begin(Conn* c) noexcept nogil
# Follows the request's framing over what din holds: 0, or -1 for a framing error.
cdef int exchange_feed(Conn* c) noexcept nogil
cdef bint exchange_flow(Conn* c) noexcept nogil
cdef bint tunnel_advance(Conn* c) noexcept nogil
