"""Network namespaces (setns(2), ioctl_ns(2)). setns moves the calling thread alone."""
from libc.stdint cimport uint64_t

# 0, or -errno: -EINVAL when the descriptor is no network namespace, -EPERM without CAP_SYS_ADMIN.
cdef int namespace_enter(int fd) noexcept nogil
# Whether the descriptor is a network namespace.
cdef bint namespace_is(int fd) noexcept nogil
# Its inode, the name under which the kernel shows it (`net:[N]`); 0 if the descriptor cannot be read.
cdef uint64_t namespace_inode(int fd) noexcept nogil
