"""What clients and servers of a script do, with real sockets."""
from libc.stdint cimport uint8_t, uint32_t
from stage cimport Side

cdef void client_opens(uint8_t where, bint itself, bint second, bint small) noexcept nogil
cdef void servers_accept() noexcept nogil
cdef void says(Side* side, const char* data, uint32_t n) noexcept nogil
cdef void says_bulk(Side* side, uint32_t n) noexcept nogil
cdef void hears(Side* side, uint32_t n) noexcept nogil
cdef void shuts(Side* side) noexcept nogil
cdef void leaves(Side* side, bint reset) noexcept nogil
