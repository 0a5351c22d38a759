"""The response of an exchange on its way to the client: interim heads, the final one, the body. A slow client stops the reading."""
from ext.proxy.state cimport Conn

# Both return a Step (request.pxd).
# Reads, understands, and sends what it understood.
cdef int response_read(Conn* c) noexcept nogil
# STEP_WAIT, or STEP_OVER: the client is gone.
cdef int response_send(Conn* c) noexcept nogil
