"""One exchange: its request and response side by side (request.pxd, response.pxd), its proper end, and the tunnel it may become."""
from ext.proxy.state cimport Conn

# True: the connection is in another state now. False: an event has to come first.
cdef bint exchange_flow(Conn* c) noexcept nogil
cdef bint tunnel_advance(Conn* c) noexcept nogil
