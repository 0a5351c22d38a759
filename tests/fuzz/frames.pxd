"""What the peer of hbone.pyx says: frames of HTTP/2 (RFC 9113 section 6) into `wire` of the scene, each made of its parts."""
from libc.stdint cimport uint8_t, uint32_t
from driver cimport Feed

cdef void put(const void* data, size_t n) noexcept nogil
cdef void put_frame(uint32_t size, uint8_t type, uint8_t flags, uint32_t id) noexcept nogil
cdef void connects(Feed* f) noexcept nogil
cdef void data(Feed* f) noexcept nogil
cdef void says(uint8_t op, Feed* f) noexcept nogil      # every other operation of the peer's
