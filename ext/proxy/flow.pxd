"""Where a connection goes: from the original destination to a protocol and an upstream. The picture is in state.pxd."""
from ext.core.timer cimport Timer
from ext.proxy.state cimport Conn

cdef void flow_start(Conn* c) noexcept nogil
cdef void flow_advance(Conn* c) noexcept nogil
cdef void flow_expire(Conn* c, Timer* timer) noexcept nogil
