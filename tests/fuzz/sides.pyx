"""See sides.pxd."""
from libc.errno cimport EAGAIN, ECONNRESET, EINPROGRESS, errno
from libc.stdint cimport uint8_t, uint16_t, uint32_t
from libc.string cimport memcpy, memset
from posix.unistd cimport close
from ext.sys.stream cimport (AF_INET, MSG_DONTWAIT, MSG_NOSIGNAL, SHUT_WR, SOCK_CLOEXEC, SOCK_NONBLOCK, SOL_SOCKET, Peer, SocketAddress,
                             accept4, bind, connect, peer_from, peer_to, recv, send, setsockopt, shutdown, socklen_t,
                             stream_abort, stream_local)
from driver cimport claim
from stage cimport MOST, SIDES, Side, Stage, attaches, stage, stage_origins

cdef extern from "<sys/socket.h>" nogil:
    int SOCK_STREAM
    int SO_REUSEADDR
    int SO_RCVBUF
    int socket(int family, int kind, int protocol)

cdef enum:
    FIRST_PORT = 30000          # of clients: each has its own for long, so that a log record names one of them
    PORTS = 30000               # none that the kernel gives to others (world.py)

cdef Stage* the = stage()
cdef char[131072] bulk
cdef uint32_t next_port = 0

# Where a client may dial: 10.9.A.B, port.
cdef enum:
    TARGETS = 17
cdef uint16_t[17][3] targets = [
    [0, 1, 7001], [0, 1, 7002], [0, 2, 7003], [0, 3, 7001], [0, 3, 7002], [0, 3, 7003], [0, 4, 7002], [0, 4, 7003], [0, 20, 7001],
    [0, 20, 7002], [1, 1, 7001], [1, 1, 7002], [0, 99, 7002], [0, 99, 7009], [0, 1, 15001], [2, 2, 7001], [2, 2, 7002]]


cdef void begin(Side* side, int fd) noexcept nogil:
    side.fd = fd
    side.was = 1
    side.refused = side.shut = side.reset = side.ended = side.broken = side.closed = side.opaque = side.denied = side.inner = 0
    side.n_said = side.n_heard = 0
    side.port = side.dialled = 0


cdef void client_opens(uint8_t where, bint itself, bint second, bint small) noexcept nogil:
    """`itself`: from the address that is dialled, as a pod that calls itself."""
    global next_port
    cdef SocketAddress address
    cdef Peer peer
    cdef socklen_t size
    cdef Side* side
    cdef uint16_t* to = targets[where % TARGETS]
    cdef int on = 1, least = 2048, fd, _
    if the.n_clients == SIDES:
        return
    if (second or to[0] == 2) and not the.two:
        attaches(2)
    fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0)
    claim(fd >= 0, b"(a client has a socket)")
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(int))
    if small:
        setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &least, sizeof(int))
    memset(&peer, 0, sizeof(Peer))
    peer.family = 4
    peer.ip[0] = 10
    peer.ip[1] = 9
    if itself:
        peer.ip[2] = <uint8_t>to[0]
        peer.ip[3] = <uint8_t>to[1]
    else:
        peer.ip[2] = 2
        peer.ip[3] = 2 if second else 1
    for _ in range(64):
        next_port = (next_port + 1) % PORTS
        size = peer_to(&peer, <uint16_t>(FIRST_PORT + next_port), &address)
        if bind(fd, &address.any, size) == 0:
            break
    side = &the.clients[the.n_clients]
    the.n_clients += 1
    begin(side, fd)
    side.port = <uint16_t>(FIRST_PORT + next_port)
    side.dialled = to[2]
    side.inner = to[0] == 2 and not itself and not second
    side.denied = the.settled_denies and (to[0] == 1 or (side.inner and the.joined))
    peer.ip[2] = <uint8_t>to[0]
    peer.ip[3] = <uint8_t>to[1]
    size = peer_to(&peer, to[2], &address)
    if connect(fd, &address.any, size) != 0 and errno != EINPROGRESS:
        side.broken = 1


cdef void servers_accept() noexcept nogil:
    cdef SocketAddress address
    cdef socklen_t size
    cdef Peer peer
    cdef Side* side
    cdef int i, fd
    for i in range(2):
        while True:
            size = sizeof(SocketAddress)
            fd = accept4(stage_origins()[i], &address.any, &size, SOCK_NONBLOCK | SOCK_CLOEXEC)
            if fd < 0:
                break
            if the.n_servers == SIDES:
                stream_abort(fd)
                close(fd)
                continue
            peer_from(&peer, &address)
            side = &the.servers[the.n_servers]
            the.n_servers += 1
            begin(side, fd)
            side.port = peer.port
            side.there = peer
            stream_local(fd, &side.here)
            side.opaque = i == 1


cdef void says(Side* side, const char* data, uint32_t n) noexcept nogil:
    """What the kernel takes of it now."""
    cdef ssize_t done
    if side.fd < 0 or side.shut:
        return
    if n > MOST - side.n_said:
        n = MOST - side.n_said
    if n == 0:
        return
    done = send(side.fd, data, n, MSG_DONTWAIT | MSG_NOSIGNAL)
    if done > 0:
        memcpy(side.said + side.n_said, data, done)
        side.n_said += <uint32_t>done
    elif errno == ECONNRESET:
        side.refused = 1        # the kernel says it once: whoever reads next is told of an end


cdef void says_bulk(Side* side, uint32_t n) noexcept nogil:
    """No two places of it are alike, nor two sides."""
    cdef uint32_t i, at = side.n_said
    if side.fd < 0 or side.shut:
        return
    if n > MOST - at:
        n = MOST - at
    for i in range(n):
        bulk[i] = <char>(97 + (at + i + side.port + ((at + i) >> 8) * 5) % 26)
    says(side, bulk, n)


cdef void hears(Side* side, uint32_t n) noexcept nogil:
    cdef ssize_t got
    cdef uint32_t room
    while side.fd >= 0 and n > 0 and not side.ended and not side.broken:
        room = MOST * 2 - side.n_heard
        got = recv(side.fd, side.heard + side.n_heard, n if n < room else room, MSG_DONTWAIT)
        if got > 0:
            side.n_heard += <uint32_t>got
            n -= <uint32_t>got
        elif got == 0:
            claim(room > 0, b"nobody hears more than was said")
            side.ended = not side.refused
            side.broken = side.refused
        elif errno == EAGAIN:
            return
        else:
            side.broken = 1


cdef void shuts(Side* side) noexcept nogil:
    if side.fd >= 0 and not side.shut:
        shutdown(side.fd, SHUT_WR)
        side.shut = 1


cdef void leaves(Side* side, bint reset) noexcept nogil:
    if side.fd < 0:
        return
    if reset:
        stream_abort(side.fd)
        side.reset = 1
    close(side.fd)
    side.fd = -1
    side.closed = 1
