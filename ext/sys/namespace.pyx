"""See namespace.pxd."""
from libc.errno cimport errno
from libc.stdint cimport uint64_t

cdef extern from "<sched.h>" nogil:
    int CLONE_NEWNET
    int setns(int fd, int kind)

cdef extern from "<sys/ioctl.h>" nogil:
    int ioctl(int fd, unsigned long request, ...)

cdef extern from "<sys/stat.h>" nogil:
    struct stat_t "stat":
        unsigned long st_ino
    int fstat(int fd, stat_t* out)

cdef enum:
    NS_GET_NSTYPE = 0xb703          # linux/nsfs.h: _IO(0xb7, 3)


cdef int namespace_enter(int fd) noexcept nogil:
    return 0 if setns(fd, CLONE_NEWNET) == 0 else -errno


cdef bint namespace_is(int fd) noexcept nogil:
    return ioctl(fd, NS_GET_NSTYPE) == CLONE_NEWNET


cdef uint64_t namespace_inode(int fd) noexcept nogil:
    cdef stat_t facts
    return facts.st_ino if fstat(fd, &facts) == 0 else 0
