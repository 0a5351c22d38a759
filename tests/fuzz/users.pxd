"""What users of a session's streams do in hbone.pyx: answer, read, write, end, go."""
from libc.stdint cimport uint8_t
from driver cimport Feed

cdef void acts(uint8_t op, Feed* f) noexcept nogil
