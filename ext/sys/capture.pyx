"""See capture.pxd."""
from libc.errno cimport errno
from libc.stdint cimport uint8_t, uint16_t, uint32_t
from posix.unistd cimport close
from ext.sys.stream cimport (AF_INET, AF_INET6, IPPROTO_TCP, SOCK_CLOEXEC, SOCK_NONBLOCK, SOL_IP, SOL_IPV6, SOL_SOCKET,
                             TCP_NODELAY, Peer, SocketAddress, bind, peer_to, setsockopt, socklen_t)

cdef extern from "<sys/socket.h>" nogil:
    int SOCK_STREAM
    int SO_MARK
    int SO_REUSEADDR
    int socket(int family, int kind, int protocol)
    int listen(int fd, int backlog)

cdef extern from "<netinet/in.h>" nogil:
    int IPV6_V6ONLY
    int IP_TRANSPARENT
    int IP_FREEBIND
    int IPV6_TRANSPARENT
    int IPV6_FREEBIND

cdef enum:
    IP_BIND_ADDRESS_NO_PORT = 24    # linux/in.h; works for IPv6 sockets at the same level


cdef int option(int fd, int level, int name, int value) noexcept nogil:
    return 0 if setsockopt(fd, level, name, &value, sizeof(int)) == 0 else -errno


cdef int fail(int fd, int error) noexcept nogil:
    close(fd)
    return error


cdef int make(uint8_t family, const char** step) noexcept nogil:
    cdef int error
    cdef int fd = socket(AF_INET6 if family == 6 else AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, IPPROTO_TCP)
    step[0] = b"socket"
    if fd < 0:
        return -errno
    if family == 6:
        step[0] = b"setsockopt IPV6_TRANSPARENT"
        error = option(fd, SOL_IPV6, IPV6_TRANSPARENT, 1)
    else:
        step[0] = b"setsockopt IP_TRANSPARENT"
        error = option(fd, SOL_IP, IP_TRANSPARENT, 1)
    if error == 0:                  # a listener hands it on to what it accepts
        step[0] = b"setsockopt TCP_NODELAY"
        error = option(fd, IPPROTO_TCP, TCP_NODELAY, 1)
    return fd if error == 0 else fail(fd, error)


cdef int capture_listen(uint8_t family, uint16_t port, int backlog, const char** step) noexcept nogil:
    cdef Peer any
    cdef SocketAddress address
    cdef socklen_t size
    cdef int error
    cdef int fd = make(family, step)
    if fd < 0:
        return fd
    for error in range(16):
        any.ip[error] = 0
    any.family = family
    any.port = port
    any.scope = 0
    if family == 6:
        step[0] = b"setsockopt IPV6_V6ONLY"
        error = option(fd, SOL_IPV6, IPV6_V6ONLY, 0)
        if error != 0:
            return fail(fd, error)
    step[0] = b"setsockopt SO_REUSEADDR"
    error = option(fd, SOL_SOCKET, SO_REUSEADDR, 1)
    if error != 0:
        return fail(fd, error)
    size = peer_to(&any, port, &address)
    step[0] = b"bind"
    if bind(fd, &address.any, size) != 0:
        return fail(fd, -errno)
    step[0] = b"listen"
    if listen(fd, backlog) != 0:
        return fail(fd, -errno)
    return fd


cdef int capture_socket(uint8_t family, uint32_t mark, const char** step) noexcept nogil:
    cdef int error
    cdef int fd = make(family, step)
    if fd < 0:
        return fd
    step[0] = b"setsockopt SO_MARK"
    error = option(fd, SOL_SOCKET, SO_MARK, <int>mark)
    if error != 0:
        return fail(fd, error)
    step[0] = b"setsockopt IP_BIND_ADDRESS_NO_PORT"
    error = option(fd, SOL_IP, IP_BIND_ADDRESS_NO_PORT, 1)
    if error == 0 and family == 6:
        step[0] = b"setsockopt IPV6_FREEBIND"
        error = option(fd, SOL_IPV6, IPV6_FREEBIND, 1)
        if error == 0:      # IPv4 goes through an IPv4 socket, whose address the server sees unmapped
            step[0] = b"setsockopt IPV6_V6ONLY"
            error = option(fd, SOL_IPV6, IPV6_V6ONLY, 1)
    elif error == 0:
        step[0] = b"setsockopt IP_FREEBIND"
        error = option(fd, SOL_IP, IP_FREEBIND, 1)
    return fd if error == 0 else fail(fd, error)
