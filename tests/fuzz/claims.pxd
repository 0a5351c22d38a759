"""What connections.pyx claims once a script is over: nothing is left of it, and what everybody said, heard and counted fits together."""
from libc.stdint cimport uint32_t
from ext.proxy.state cimport Worker

# A number for the next request of a client, by which it is known again. `tags_forget` before a script.
cdef uint32_t tag_next(uint32_t client) noexcept nogil
cdef void tags_forget() noexcept nogil

cdef void check_left(Worker* w) noexcept nogil
cdef void check_said(Worker* w) noexcept nogil
