"""Datagrams with descriptors over a SOCK_SEQPACKET unix socket (unix(7), SCM_RIGHTS)."""
from libc.stdint cimport int64_t, uint32_t

cdef enum:
    PACKET_DESCRIPTORS_MAX = 253    # SCM_MAX_FD of the kernel: more in one message is refused

# One datagram without waiting. Returns its size; 0 when the peer is gone (or sent nothing at all); -errno otherwise.
# Descriptors come close-on-exec; at most `room` are taken. What does not fit is an error, and then every descriptor
# that came is closed, *n is 0 and the start of the datagram is in `data`: -EMSGSIZE for too many bytes, -ETOOMANYREFS
# for too many descriptors.
cdef int64_t packet_receive(int fd, void* data, size_t size, int* fds, uint32_t room, uint32_t* n) noexcept nogil

# Whole or not at all, without waiting: `size`, or -errno (-EAGAIN: the peer does not read; -EINVAL: more than
# PACKET_DESCRIPTORS_MAX).
cdef int64_t packet_send(int fd, const void* data, size_t size, const int* fds, uint32_t n) noexcept nogil
