"""HTTP/1.1 of one client's connection: requests in order, one at a time. The picture is in state.pxd.

    IDLE, HEAD   read and parse a head                     http.pyx
    HELD         the destination's configuration
    UPSTREAM     route, cluster, endpoint; pool or dial
    FLOW         head and bodies both ways                 exchange.pyx
    REPLY        an answer of our own                      answer.pyx
    TUNNEL       opaque bytes after 101, or 2xx to CONNECT
"""
from ext.core.timer cimport Timer
from ext.proxy.state cimport Conn

cdef void http_start(Conn* c) noexcept nogil
cdef void http_advance(Conn* c) noexcept nogil
cdef void http_expire(Conn* c, Timer* timer) noexcept nogil
