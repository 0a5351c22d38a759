"""Anonymous memory with a descriptor (memfd_create(2)) and its seals."""

# A new memfd of `size` zero bytes that can neither shrink nor grow, writable by whoever maps it; or -errno.
cdef int memory_shared(const char* name, size_t size) noexcept nogil
# A new memfd that holds exactly these bytes, sealed for good against writing, shrinking, growing and further seals; or
# -errno.
cdef int memory_sealed(const char* name, const void* data, size_t size) noexcept nogil
# Whether nobody can change its bytes or its length any more: F_SEAL_WRITE, F_SEAL_SHRINK and F_SEAL_GROW are set. What
# is no memfd is not.
cdef bint memory_is_sealed(int fd) noexcept nogil
# Mapped shared; NULL with errno set.
cdef void* memory_map(int fd, size_t size, bint writable) noexcept nogil
cdef void memory_unmap(void* at, size_t size) noexcept nogil
# Mapped shared and read-only for as long as the process lives: locked (never in swap, *locked says whether that worked) and left out
# of core dumps. NULL with errno set.
cdef void* memory_pin(int fd, size_t size, bint* locked) noexcept nogil
