"""See budget.pxd."""
from libc.stdint cimport uint32_t


cdef uint32_t descriptors_for_pods(uint32_t limit) noexcept nogil:
    cdef uint32_t kept = limit // 3
    return limit - (kept if kept < DESCRIPTORS_KEPT else DESCRIPTORS_KEPT)
