"""The other end of every case, cheap on purpose: one epoll loop that answers HTTP from two fixed texts, echoes, or sends without end.

    python -c "from origin import main; main()" HTTP_PORT ECHO_PORT SOURCE_PORT      listens on all addresses; ends by a signal
"""
import sys

from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport EAGAIN, errno
from libc.stdint cimport uint8_t, uint32_t
from libc.stdlib cimport calloc, malloc
from libc.string cimport memcpy, memset

from tests.bench.kernel cimport *

cdef enum:
    CONNECTIONS = 20_000    # by descriptor; above the machine's usual limit
    HEAD = 2_048            # of a request, at most
    CHUNK = 262_144         # one send of the source, one read of the echo
    HTTP = 1
    ECHO = 2
    SOURCE = 3

cdef struct Peer:
    uint8_t kind
    bint closing            # the answer is the last one
    bint blocked            # the socket was full
    uint32_t n              # bytes of an unfinished request head
    uint32_t left           # bytes of the answer still to send
    const char* rest        # where they are
    char[HEAD] head

cdef Peer* peers            # by descriptor; pages that are not used are not there
cdef int ep
cdef char* chunk
cdef const char* answers[2]
cdef uint32_t[2] sizes


cdef int finish(int fd, Peer* peer) noexcept nogil:
    """Sends what is left of an answer. 0: all sent or the socket is full; -1: the connection ended."""
    cdef ssize_t n
    while peer.left:
        n = send(fd, peer.rest, peer.left, MSG_NOSIGNAL)
        if n < 0:
            if errno != EAGAIN:
                return -1
            if not peer.blocked:
                watch(ep, EPOLL_CTL_MOD, fd, EPOLLOUT, fd)
            peer.blocked = True
            return 0
        peer.rest += n
        peer.left -= <uint32_t>n
    if peer.blocked:
        watch(ep, EPOLL_CTL_MOD, fd, EPOLLIN, fd)
        peer.blocked = False
    return -1 if peer.closing else 0


cdef int on_http(int fd, Peer* peer) noexcept nogil:
    cdef ssize_t n
    cdef int which
    if peer.left:
        return finish(fd, peer)
    n = recv(fd, &peer.head[peer.n], HEAD - peer.n, 0)
    if n <= 0:
        return 0 if n < 0 and errno == EAGAIN else -1
    peer.n += <uint32_t>n
    if peer.n < 8 or memmem(&peer.head[peer.n - 4], 4, b"\r\n\r\n", 4) == NULL:
        return -1 if peer.n == HEAD else 0
    which = 1 if peer.head[5] == c'6' else 0        # GET /64k
    peer.closing = memmem(peer.head, peer.n, b"onnection: close", 16) != NULL
    peer.n = 0
    peer.rest = answers[which]
    peer.left = sizes[which]
    return finish(fd, peer)


cdef int on_echo(int fd) noexcept nogil:
    cdef ssize_t n = recv(fd, chunk, CHUNK, 0)
    if n <= 0:
        return 0 if n < 0 and errno == EAGAIN else -1
    return 0 if send(fd, chunk, n, MSG_NOSIGNAL) == n else -1


cdef int on_source(int fd) noexcept nogil:
    return -1 if send(fd, chunk, CHUNK, MSG_NOSIGNAL) < 0 and errno != EAGAIN else 0


cdef void take(int listener, uint8_t kind) noexcept nogil:
    cdef int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)
    if fd < 0:
        return
    if fd >= CONNECTIONS:
        close(fd)
        return
    no_delay(fd)
    memset(&peers[fd], 0, sizeof(Peer) - HEAD)
    peers[fd].kind = kind
    watch(ep, EPOLL_CTL_ADD, fd, EPOLLOUT if kind == SOURCE else EPOLLIN, fd)


cdef void turn(int* listeners, epoll_event* events) noexcept nogil:
    cdef int i, k, fd, end
    cdef int count = epoll_wait(ep, events, 256, -1)
    for i in range(count):
        fd = <int>events[i].data.u32
        end = 0
        for k in range(3):
            if fd == listeners[k]:
                take(fd, <uint8_t>(k + 1))
                break
        else:
            if peers[fd].kind == HTTP:
                end = on_http(fd, &peers[fd])
            elif peers[fd].kind == ECHO:
                end = on_echo(fd)
            else:
                end = on_source(fd)
            if end < 0:
                close(fd)


cdef int listen_on(int port) except -1:
    cdef sockaddr_in address
    cdef int one = 1
    cdef int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0)
    memset(&address, 0, sizeof(address))
    address.sin_family = AF_INET
    address.sin_port = htons(port)
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one))
    if fd < 0 or bind(fd, <sockaddr*>&address, sizeof(address)) or listen(fd, 16_384):
        raise OSError(errno, f"origin: cannot listen on {port}")
    watch(ep, EPOLL_CTL_ADD, fd, EPOLLIN, fd)
    return fd


cdef void answer(int which, bytes text):
    cdef char* copy = <char*>malloc(len(text))
    memcpy(copy, <const char*>text, len(text))
    answers[which], sizes[which] = copy, len(text)


def main():
    global ep, chunk, peers
    cdef int[3] listeners
    cdef epoll_event[256] events
    ep = epoll_create1(0)
    chunk = <char*>calloc(1, CHUNK)
    peers = <Peer*>calloc(CONNECTIONS, sizeof(Peer))
    for which, size in enumerate((1024, 65536)):
        answer(which, b"HTTP/1.1 200 OK\r\nServer: origin\r\nContent-Type: application/octet-stream\r\n"
                      b"ETag: \"67a1b2c3-400\"\r\nContent-Length: %d\r\n\r\n" % size + b"x" * size)
    for k, port in enumerate(sys.argv[1:4]):
        listeners[k] = listen_on(int(port))
    while True:
        turn(listeners, events)
        PyErr_CheckSignals()
