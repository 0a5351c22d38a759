"""What the load generator and the origin need of Linux."""
from libc.stdint cimport int64_t, uint32_t, uint64_t

cdef extern from "<sys/epoll.h>" nogil:
    ctypedef union epoll_data_t:
        uint32_t u32
        uint64_t u64
    struct epoll_event:
        uint32_t events
        epoll_data_t data
    int EPOLL_CTL_ADD
    int EPOLL_CTL_MOD
    int EPOLL_CTL_DEL
    uint32_t EPOLLIN
    uint32_t EPOLLOUT
    int epoll_create1(int flags)
    int epoll_ctl(int ep, int op, int fd, epoll_event* event)
    int epoll_wait(int ep, epoll_event* events, int most, int timeout)
    int epoll_pwait2(int ep, epoll_event* events, int most, const timespec* timeout, const void* mask)

cdef extern from "<sys/socket.h>" nogil:
    ctypedef unsigned int socklen_t
    struct sockaddr:
        pass
    int AF_INET
    int SOCK_STREAM
    int SOCK_NONBLOCK
    int SOL_SOCKET
    int SO_REUSEADDR
    int SO_ERROR
    int MSG_NOSIGNAL
    int MSG_TRUNC
    int socket(int family, int kind, int protocol)
    int bind(int fd, const sockaddr* address, socklen_t size)
    int listen(int fd, int backlog)
    int connect(int fd, const sockaddr* address, socklen_t size)
    int accept4(int fd, sockaddr* address, socklen_t* size, int flags)
    int setsockopt(int fd, int level, int name, const void* value, socklen_t size)
    int getsockopt(int fd, int level, int name, void* value, socklen_t* size)
    ssize_t recv(int fd, void* data, size_t size, int flags)
    ssize_t send(int fd, const void* data, size_t size, int flags)

cdef extern from "<netinet/in.h>" nogil:
    struct in_addr:
        uint32_t s_addr
    struct sockaddr_in:
        unsigned short sin_family
        unsigned short sin_port
        in_addr sin_addr
    int IPPROTO_TCP
    unsigned short htons(unsigned short value)

cdef extern from "<netinet/tcp.h>" nogil:
    int TCP_NODELAY

cdef extern from "<arpa/inet.h>" nogil:
    uint32_t inet_addr(const char* text)

cdef extern from "<time.h>" nogil:
    struct timespec:
        int64_t tv_sec
        int64_t tv_nsec
    int CLOCK_MONOTONIC
    int clock_gettime(int clock, timespec* out)

cdef extern from "<sys/prctl.h>" nogil:
    int PR_SET_TIMERSLACK
    int prctl(int what, unsigned long value)

cdef extern from "<unistd.h>" nogil:
    int close(int fd)

cdef extern from "<string.h>" nogil:
    void* memmem(const void* hay, size_t hay_size, const void* needle, size_t size)

cdef extern from "<strings.h>" nogil:
    int strncasecmp(const char* a, const char* b, size_t size)


cdef inline int64_t now_ns() noexcept nogil:
    cdef timespec t
    clock_gettime(CLOCK_MONOTONIC, &t)
    return t.tv_sec * 1_000_000_000 + t.tv_nsec


cdef inline void watch(int ep, int op, int fd, uint32_t events, uint32_t index) noexcept nogil:
    cdef epoll_event event
    event.events = events
    event.data.u64 = 0
    event.data.u32 = index
    epoll_ctl(ep, op, fd, &event)


cdef inline void no_delay(int fd) noexcept nogil:
    cdef int one = 1
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one))
