"""See tcpinfo.pxd."""
from libc.errno cimport errno
from libc.stdint cimport uint32_t
from libc.string cimport memset

cdef extern from "<linux/tcp.h>" nogil:
    int TCP_INFO
    struct tcp_info:
        uint32_t tcpi_rtt
        uint32_t tcpi_min_rtt
        uint32_t tcpi_total_retrans

cdef extern from "<sys/socket.h>" nogil:
    ctypedef unsigned int socklen_t
    int getsockopt(int fd, int level, int name, void* value, socklen_t* size)

cdef extern from "<netinet/in.h>" nogil:
    int IPPROTO_TCP

cdef enum:
    NEVER = 0xffffffffu         # tcpi_min_rtt without a sample


cdef int tcp_figures(int fd, TcpFigures* out) noexcept nogil:
    cdef tcp_info info
    cdef socklen_t size = sizeof(tcp_info)
    memset(out, 0, sizeof(TcpFigures))
    memset(&info, 0, sizeof(tcp_info))          # an older kernel fills less
    if getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &size) != 0:
        return -errno
    out.rtt_us = info.tcpi_rtt
    out.min_rtt_us = 0 if info.tcpi_min_rtt == NEVER else info.tcpi_min_rtt
    out.retransmits = info.tcpi_total_retrans
    return 0
