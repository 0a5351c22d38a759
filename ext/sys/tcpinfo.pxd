"""What the kernel measured of a TCP connection, whatever its state.

Apart from stream.pxd, since linux/tcp.h and netinet/tcp.h define the same names.
"""
from libc.stdint cimport uint32_t

cdef struct TcpFigures:
    uint32_t rtt_us             # smoothed round trip; 0: never measured
    uint32_t min_rtt_us         # least of the last five minutes (net.ipv4.tcp_min_rtt_wlen); 0: never measured
    uint32_t retransmits        # segments, since the connection began

# 0, or -errno with zeroes in `out`.
cdef int tcp_figures(int fd, TcpFigures* out) noexcept nogil
