"""TCP sockets as a worker uses them: addresses, accept, connect, send, receive. Non-blocking; results are counts or -errno."""
from libc.errno cimport errno
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t
from libc.string cimport memcmp, memcpy, memset

cdef extern from "<sys/socket.h>" nogil:
    ctypedef unsigned int socklen_t
    ctypedef unsigned short sa_family_t
    struct sockaddr:
        sa_family_t sa_family
    int AF_INET
    int AF_INET6
    int SOL_SOCKET
    int SO_ERROR
    int SO_LINGER
    int SO_ACCEPTCONN
    int SO_DOMAIN
    int SHUT_WR
    int MSG_NOSIGNAL
    int MSG_DONTWAIT
    int MSG_PEEK
    int MSG_MORE
    int SOCK_NONBLOCK
    int SOCK_CLOEXEC
    int accept4(int fd, sockaddr* address, socklen_t* size, int flags)
    int bind(int fd, const sockaddr* address, socklen_t size)
    int connect(int fd, const sockaddr* address, socklen_t size)
    int getsockname(int fd, sockaddr* address, socklen_t* size)
    int getsockopt(int fd, int level, int name, void* value, socklen_t* size)
    int setsockopt(int fd, int level, int name, const void* value, socklen_t size)
    int shutdown(int fd, int how)
    ssize_t recv(int fd, void* data, size_t size, int flags)
    ssize_t send(int fd, const void* data, size_t size, int flags)
    struct iovec:
        void* iov_base
        size_t iov_len
    struct msghdr:
        void* msg_name
        socklen_t msg_namelen
        iovec* msg_iov
        size_t msg_iovlen
        void* msg_control
        size_t msg_controllen
        int msg_flags
    ssize_t sendmsg(int fd, const msghdr* message, int flags)
    struct linger:
        int l_onoff
        int l_linger

cdef extern from "<netinet/in.h>" nogil:
    struct in_addr:
        uint32_t s_addr
    struct in6_addr:
        uint8_t[16] s6_addr
    struct sockaddr_in:
        sa_family_t sin_family
        uint16_t sin_port
        in_addr sin_addr
    struct sockaddr_in6:
        sa_family_t sin6_family
        uint16_t sin6_port
        uint32_t sin6_flowinfo
        in6_addr sin6_addr
        uint32_t sin6_scope_id
    int IPPROTO_TCP
    int SOL_IP
    int SOL_IPV6
    uint16_t htons(uint16_t value)
    uint16_t ntohs(uint16_t value)

cdef extern from "<netinet/tcp.h>" nogil:
    int TCP_NODELAY

cdef extern from "<fcntl.h>" nogil:
    unsigned int SPLICE_F_MOVE
    unsigned int SPLICE_F_NONBLOCK
    ssize_t splice(int source, int64_t* source_at, int sink, int64_t* sink_at, size_t size, unsigned int flags)

cdef enum:
    SO_ORIGINAL_DST = 80        # linux/netfilter_ipv4.h; IP6T_SO_ORIGINAL_DST has the same number at SOL_IPV6

cdef union SocketAddress:
    sockaddr any
    sockaddr_in v4
    sockaddr_in6 v6

cdef struct Peer:               # an address and a port; IPv4-mapped IPv6 is IPv4
    uint8_t family              # 4 or 6; 0: none
    uint8_t ip[16]              # network order; for IPv4 ip[4:] is zero
    uint16_t port               # host order
    uint32_t scope              # the link of a link-local IPv6 address (RFC 4007), which means nothing without; else 0

cdef inline void peer_from(Peer* out, const SocketAddress* address) noexcept nogil:
    memset(out, 0, sizeof(Peer))
    cdef const uint8_t* six
    cdef int i
    if address.any.sa_family == AF_INET:
        out.family = 4
        memcpy(out.ip, &address.v4.sin_addr, 4)
        out.port = ntohs(address.v4.sin_port)
    elif address.any.sa_family == AF_INET6:
        six = <const uint8_t*>&address.v6.sin6_addr
        out.port = ntohs(address.v6.sin6_port)
        for i in range(10):
            if six[i] != 0:
                break
        else:
            if six[10] == 0xff and six[11] == 0xff:
                out.family = 4
                memcpy(out.ip, six + 12, 4)
                return
        out.family = 6
        out.scope = address.v6.sin6_scope_id
        memcpy(out.ip, six, 16)

cdef inline socklen_t peer_to(const Peer* peer, uint16_t port, SocketAddress* out) noexcept nogil:
    memset(out, 0, sizeof(SocketAddress))
    if peer.family == 4:
        out.v4.sin_family = <sa_family_t>AF_INET
        out.v4.sin_port = htons(port)
        memcpy(&out.v4.sin_addr, peer.ip, 4)
        return sizeof(sockaddr_in)
    out.v6.sin6_family = <sa_family_t>AF_INET6
    out.v6.sin6_port = htons(port)
    out.v6.sin6_scope_id = peer.scope
    memcpy(&out.v6.sin6_addr, peer.ip, 16)
    return sizeof(sockaddr_in6)

cdef inline bint same_ip(const Peer* a, const Peer* b) noexcept nogil:
    return a.family == b.family and memcmp(a.ip, b.ip, 16) == 0

cdef inline bint same_peer(const Peer* a, const Peer* b) noexcept nogil:
    return a.port == b.port and a.scope == b.scope and same_ip(a, b)

cdef inline bint link_local(const Peer* peer) noexcept nogil:
    return peer.family == 6 and peer.ip[0] == 0xfe and (peer.ip[1] & 0xc0) == 0x80     # fe80::/10

# The next connection (non-blocking, close-on-exec; no delay, as its listener) and its client's address; -errno.
cdef inline int stream_accept(int listener, Peer* client) noexcept nogil:
    cdef SocketAddress address
    cdef socklen_t size = sizeof(SocketAddress)
    cdef int fd = accept4(listener, &address.any, &size, SOCK_NONBLOCK | SOCK_CLOEXEC)
    if fd < 0:
        return -errno
    peer_from(client, &address)
    return fd

# Where the client dialled, whichever hook captured it; -errno when nothing did.
cdef inline int stream_original(int fd, uint8_t family, Peer* out) noexcept nogil:
    cdef SocketAddress address
    cdef socklen_t size = sizeof(SocketAddress)
    if getsockopt(fd, SOL_IP if family == 4 else SOL_IPV6, SO_ORIGINAL_DST, &address, &size) != 0:
        return -errno
    peer_from(out, &address)
    return 0

cdef inline int stream_local(int fd, Peer* out) noexcept nogil:
    cdef SocketAddress address
    cdef socklen_t size = sizeof(SocketAddress)
    if getsockname(fd, &address.any, &size) != 0:
        return -errno
    peer_from(out, &address)
    return 0

cdef inline int stream_bind(int fd, const Peer* source) noexcept nogil:
    cdef SocketAddress address
    cdef socklen_t size = peer_to(source, 0, &address)
    return 0 if bind(fd, &address.any, size) == 0 else -errno

cdef inline int stream_connect(int fd, const Peer* to) noexcept nogil:
    cdef SocketAddress address
    cdef socklen_t size = peer_to(to, to.port, &address)
    return 0 if connect(fd, &address.any, size) == 0 else -errno

cdef inline int stream_error(int fd) noexcept nogil:
    cdef int error = 0
    cdef socklen_t size = sizeof(int)
    if getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size) != 0:
        return -errno
    return -error

cdef inline int64_t stream_read(int fd, void* data, size_t size) noexcept nogil:
    cdef ssize_t n = recv(fd, data, size, MSG_DONTWAIT)
    return n if n >= 0 else -errno

cdef inline int64_t stream_write(int fd, const void* data, size_t size) noexcept nogil:
    cdef ssize_t n = send(fd, data, size, MSG_DONTWAIT | MSG_NOSIGNAL)
    return n if n >= 0 else -errno

# At most `size` bytes between a socket and a pipe, uncopied. 0: the socket ended.
cdef inline int64_t stream_splice(int source, int sink, size_t size) noexcept nogil:
    cdef ssize_t n = splice(source, NULL, sink, NULL, size, SPLICE_F_MOVE | SPLICE_F_NONBLOCK)
    return n if n >= 0 else -errno

# Two pieces in one call; either may be empty. With `last` the socket is closed or shut next: the end goes in the segment of
# these bytes instead of one of its own (and without a close the kernel would keep them for 200 ms).
cdef inline int64_t stream_write2(int fd, const void* a, size_t na, const void* b, size_t nb, bint last) noexcept nogil:
    cdef iovec[2] pieces
    cdef msghdr message
    cdef ssize_t n
    cdef int flags = MSG_DONTWAIT | MSG_NOSIGNAL | (MSG_MORE if last else 0)
    if na == 0 or nb == 0:
        n = send(fd, a if nb == 0 else b, na + nb, flags)
        return n if n >= 0 else -errno
    memset(&message, 0, sizeof(msghdr))
    pieces[0].iov_base = <void*>a
    pieces[0].iov_len = na
    pieces[1].iov_base = <void*>b
    pieces[1].iov_len = nb
    message.msg_iov = pieces
    message.msg_iovlen = 2
    n = sendmsg(fd, &message, flags)
    return n if n >= 0 else -errno

# The next close sends a reset instead of an end: the peer must not take what it has for complete.
cdef inline void stream_abort(int fd) noexcept nogil:
    cdef linger now
    now.l_onoff = 1
    now.l_linger = 0
    setsockopt(fd, SOL_SOCKET, SO_LINGER, &now, sizeof(linger))
