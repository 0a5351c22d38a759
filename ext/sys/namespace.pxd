"""Sockets made inside another network namespace by a privileged process (the keeper). setns affects the calling thread only."""
from libc.stdint cimport uint8_t, uint16_t, uint32_t

# How many sockets could be made (<= n), descriptors in out; or -errno when the namespace could not be entered, or left again
# (in that case the process must end: it is in somebody else's network).
cdef enum:
    LOST_NAMESPACE = -100000

cdef int sockets_in(int netns, int home, uint8_t family, uint32_t mark, int n, int* out) noexcept nogil

# A listening socket on [::]:port (both families), or 0.0.0.0:port where the namespace has no IPv6; descriptor or -errno.
cdef int listener_in(int netns, int home, uint16_t port, uint32_t mark, int backlog) noexcept nogil
