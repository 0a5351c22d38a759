"""See memory.pxd."""
from libc.errno cimport EINTR, EIO, errno
from posix.unistd cimport close, ftruncate, write

cdef extern from "<sys/mman.h>" nogil:
    unsigned int MFD_CLOEXEC
    unsigned int MFD_ALLOW_SEALING
    int PROT_READ
    int PROT_WRITE
    int MAP_SHARED
    void* MAP_FAILED
    int memfd_create(const char* name, unsigned int flags)
    void* mmap(void* at, size_t size, int protection, int flags, int fd, long offset)
    int munmap(void* at, size_t size)
    int mlock(const void* at, size_t size)
    int MADV_DONTDUMP
    int madvise(void* at, size_t size, int advice)

cdef extern from "<fcntl.h>" nogil:
    int F_ADD_SEALS
    int F_GET_SEALS
    int F_SEAL_SEAL
    int F_SEAL_SHRINK
    int F_SEAL_GROW
    int F_SEAL_WRITE
    int fcntl(int fd, int command, ...)


cdef int fail(int fd, int error) noexcept nogil:
    close(fd)
    return error


cdef int memory_shared(const char* name, size_t size) noexcept nogil:
    cdef int fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING)
    if fd < 0:
        return -errno
    if ftruncate(fd, <long>size) != 0 or fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0:
        return fail(fd, -errno)
    return fd


cdef int memory_sealed(const char* name, const void* data, size_t size) noexcept nogil:
    cdef size_t at = 0
    cdef ssize_t n
    cdef int fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING)
    if fd < 0:
        return -errno
    while at < size:
        n = write(fd, <const char*>data + at, size - at)
        if n > 0:
            at += <size_t>n
        elif n == 0:
            return fail(fd, -EIO)
        elif errno != EINTR:
            return fail(fd, -errno)
    if fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0:
        return fail(fd, -errno)
    return fd


cdef bint memory_is_sealed(int fd) noexcept nogil:
    cdef int needed = F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW
    cdef int seals = fcntl(fd, F_GET_SEALS)
    return seals >= 0 and (seals & needed) == needed


cdef void* memory_map(int fd, size_t size, bint writable) noexcept nogil:
    cdef void* at = mmap(NULL, size, PROT_READ | PROT_WRITE if writable else PROT_READ, MAP_SHARED, fd, 0)
    return NULL if at == MAP_FAILED else at


cdef void memory_unmap(void* at, size_t size) noexcept nogil:
    munmap(at, size)


cdef void* memory_pin(int fd, size_t size, bint* locked) noexcept nogil:
    cdef void* at = memory_map(fd, size, False)
    locked[0] = at != NULL and mlock(at, size) == 0
    if at != NULL:
        madvise(at, size, MADV_DONTDUMP)
    return at
