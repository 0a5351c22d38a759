"""See namespace.pxd. Options of the sockets: ARCHITECTURE.md, "Agent <-> keeper <-> worker"."""
from libc.errno cimport EAFNOSUPPORT, EADDRNOTAVAIL, errno
from libc.stdint cimport uint8_t, uint16_t, uint32_t
from libc.string cimport memset

cdef extern from "<sched.h>" nogil:
    int setns(int fd, int nstype)
    enum:
        CLONE_NEWNET

cdef extern from "<unistd.h>" nogil:
    int close(int fd)

cdef extern from "<sys/socket.h>" nogil:
    enum:
        AF_INET
        AF_INET6
        SOCK_STREAM
        SOCK_NONBLOCK
        SOCK_CLOEXEC
        SOL_SOCKET
        SO_MARK
        SO_REUSEADDR
    struct sockaddr:
        pass
    int socket(int domain, int type, int protocol)
    int setsockopt(int fd, int level, int name, const void* value, unsigned int size)
    int bind(int fd, const sockaddr* addr, unsigned int size)
    int listen(int fd, int backlog)

cdef extern from "<netinet/in.h>" nogil:
    enum:
        IPPROTO_TCP
        IPPROTO_IP
        IPPROTO_IPV6
        IPV6_V6ONLY
    uint16_t htons(uint16_t value)
    struct in_addr:
        uint32_t s_addr
    struct in6_addr:
        uint8_t s6_addr[16]
    struct sockaddr_in:
        uint16_t sin_family
        uint16_t sin_port
        in_addr sin_addr
    struct sockaddr_in6:
        uint16_t sin6_family
        uint16_t sin6_port
        in6_addr sin6_addr

cdef extern from "<netinet/tcp.h>" nogil:
    enum:
        TCP_NODELAY

cdef enum:
    # numeric: not every libc's headers have them (linux/in.h, linux/in6.h)
    IP_FREEBIND_ = 15
    IP_TRANSPARENT_ = 19
    IP_BIND_ADDRESS_NO_PORT_ = 24
    IPV6_TRANSPARENT_ = 75
    IPV6_FREEBIND_ = 78


cdef inline int set_int(int fd, int level, int name, int value) noexcept nogil:
    return setsockopt(fd, level, name, &value, sizeof(value))


cdef int come_home(int home) noexcept nogil:
    return 0 if setns(home, CLONE_NEWNET) == 0 else LOST_NAMESPACE


cdef int one_socket(int domain, uint32_t mark) noexcept nogil:
    cdef int error
    cdef int fd = socket(domain, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0)
    if fd < 0:
        return -errno
    if set_int(fd, SOL_SOCKET, SO_MARK, <int>mark) != 0:
        error = errno
        close(fd)
        return -error
    set_int(fd, IPPROTO_TCP, TCP_NODELAY, 1)
    # A v6 socket takes the IPv4 options too: it may connect to a mapped address.
    set_int(fd, IPPROTO_IP, IP_TRANSPARENT_, 1)
    set_int(fd, IPPROTO_IP, IP_FREEBIND_, 1)
    set_int(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT_, 1)
    if domain == AF_INET6:
        set_int(fd, IPPROTO_IPV6, IPV6_TRANSPARENT_, 1)
        set_int(fd, IPPROTO_IPV6, IPV6_FREEBIND_, 1)
        # only this family: a v4 address goes through a v4 socket, whose address the server sees unmapped
        set_int(fd, IPPROTO_IPV6, IPV6_V6ONLY, 1)
    return fd


cdef int sockets_in(int netns, int home, uint8_t family, uint32_t mark, int n, int* out) noexcept nogil:
    cdef int made = 0, fd = 0
    if setns(netns, CLONE_NEWNET) != 0:
        return -errno
    while made < n:
        fd = one_socket(AF_INET6 if family == 6 else AF_INET, mark)
        if fd < 0:
            break
        out[made] = fd
        made += 1
    if come_home(home) != 0:
        return LOST_NAMESPACE
    return made if made > 0 else fd


cdef int listen_on(int domain, uint16_t port, uint32_t mark, int backlog) noexcept nogil:
    cdef sockaddr_in v4
    cdef sockaddr_in6 v6
    cdef int error = 0, bound
    cdef int fd = socket(domain, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0)
    if fd < 0:
        return -errno
    set_int(fd, SOL_SOCKET, SO_REUSEADDR, 1)
    set_int(fd, IPPROTO_IP, IP_TRANSPARENT_, 1)
    set_int(fd, IPPROTO_TCP, TCP_NODELAY, 1)          # accepted sockets inherit it
    if domain == AF_INET6:
        set_int(fd, IPPROTO_IPV6, IPV6_TRANSPARENT_, 1)
        set_int(fd, IPPROTO_IPV6, IPV6_V6ONLY, 0)
        memset(&v6, 0, sizeof(v6))
        v6.sin6_family = AF_INET6
        v6.sin6_port = htons(port)
        bound = bind(fd, <sockaddr*>&v6, sizeof(v6))
    else:
        memset(&v4, 0, sizeof(v4))
        v4.sin_family = AF_INET
        v4.sin_port = htons(port)
        bound = bind(fd, <sockaddr*>&v4, sizeof(v4))
    # the mark: what this socket sends (SYN-ACK included, and with it every accepted connection) is ours, not the pod's
    if bound != 0 or set_int(fd, SOL_SOCKET, SO_MARK, <int>mark) != 0 or listen(fd, backlog) != 0:
        error = errno
        close(fd)
        return -error
    return fd


cdef int listener_in(int netns, int home, uint16_t port, uint32_t mark, int backlog) noexcept nogil:
    cdef int fd
    if setns(netns, CLONE_NEWNET) != 0:
        return -errno
    fd = listen_on(AF_INET6, port, mark, backlog)
    if fd == -EAFNOSUPPORT or fd == -EADDRNOTAVAIL:
        fd = listen_on(AF_INET, port, mark, backlog)
    if come_home(home) != 0:
        return LOST_NAMESPACE
    return fd
