"""See stage.pxd."""
from libc.errno cimport EAGAIN, ECONNRESET, EINPROGRESS, errno
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset
from posix.unistd cimport close
from ext.core.buffer cimport buffers_free
from ext.core.loop cimport clock_by_hand, clock_ns, loop_close, source_close
from ext.core.pipes cimport pipes_shed
from ext.core.protocol cimport (LISTEN_INBOUND, LISTEN_OUTBOUND, MSG_COMMIT, MSG_DRAIN, MSG_NEED_SOCKETS, MSG_POD_ATTACH, MSG_POD_DETACH,
                                MSG_SOCKETS, PROTOCOL_VERSION, SOCKET_MARK)
from ext.core.shm cimport log_format, log_segment, stats_format, stats_segment
from ext.core.slab cimport slab_free
from ext.proxy.state cimport Worker
from ext.proxy.worker cimport worker_new, worker_turn
from ext.route.tables cimport tables_free
from ext.sys.capture cimport capture_listen, capture_socket
from ext.sys.packet cimport packet_receive, packet_send
from ext.sys.stream cimport (AF_INET, MSG_DONTWAIT, MSG_NOSIGNAL, SHUT_WR, SOCK_CLOEXEC, SOCK_NONBLOCK, SOL_SOCKET, Peer, SocketAddress,
                             accept4, bind, connect, peer_from, peer_to, recv, send, setsockopt, shutdown, socklen_t,
                             stream_abort, stream_local)
from driver cimport claim

cdef extern from "<sys/socket.h>" nogil:
    int AF_UNIX
    int SOCK_STREAM
    int SOCK_SEQPACKET
    int SO_REUSEADDR
    int SO_RCVBUF
    int socket(int family, int kind, int protocol)
    int socketpair(int family, int kind, int protocol, int* ends)
    int listen(int fd, int backlog)

cdef extern from "<sys/mman.h>" nogil:
    int memfd_create(const char* name, unsigned int flags)

cdef extern from "<unistd.h>" nogil:
    ssize_t write(int fd, const void* data, size_t size)

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    short POLLIN
    int poll(pollfd* fds, unsigned long n, int timeout_ms)

cdef enum:
    FIRST_PORT = 20000          # of clients: each has its own for long, so that a log record names one of them
    PORTS = 40000
    CHANGES = 64
    SCRIPTS = 64                # for one worker, unless they change it: its start costs as much as they do
    HOPS = 64                   # deadlines that are met one by one; then the rest of a wait is one leap
    EPOCH_NS = 1000000000000

cdef struct Bytes:
    char* data
    uint32_t n

cdef Stage one
cdef char[131072] bulk
cdef int listeners[3]           # outbound, inbound; outbound of the second pod
cdef int origins[2]
cdef Bytes changes[CHANGES]
cdef uint8_t notes[CHANGES]     # 1: quiet, 2: forgets
cdef uint32_t n_changes = 0
cdef void* stats = NULL
cdef void* log = NULL
cdef uint32_t next_port = 0
cdef uint64_t now_ns = 0

# Where a client may dial: 10.9.A.B, port.
cdef enum:
    TARGETS = 15
cdef uint16_t[15][3] targets = [
    [0, 1, 7001], [0, 1, 7002], [0, 2, 7003], [0, 3, 7001], [0, 3, 7002], [0, 3, 7003], [0, 4, 7002], [0, 4, 7003], [0, 20, 7001],
    [0, 20, 7002], [1, 1, 7001], [1, 1, 7002], [0, 99, 7002], [0, 99, 7009], [0, 1, 15001]]


cdef Stage* stage() noexcept nogil:
    return &one


# ---- the worker ------------------------------------------------------------------------------------------------------------------

cdef void tell(uint16_t kind, const char* payload, uint32_t size, const int* fds, uint32_t n) noexcept nogil:
    cdef char[64] data
    cdef uint16_t version = PROTOCOL_VERSION
    cdef uint32_t sequence = 7
    memcpy(data, &kind, 2)
    memcpy(data + 2, &version, 2)
    memcpy(data + 4, &sequence, 4)
    if size > 0:
        memcpy(data + 8, payload, size)
    if one.keeper >= 0:
        packet_send(one.keeper, data, 8 + size, fds, n)


cdef void stage_open() noexcept nogil:
    cdef uint32_t i
    one.n_clients = one.n_servers = 0
    one.withholds = one.two = one.quiet = one.forgets = 0
    memset(one.wanted, 0, sizeof(one.wanted))
    for i in range(SIDES):
        one.clients[i].fd = one.servers[i].fd = -1
        one.clients[i].was = one.servers[i].was = 0
    if one.w == NULL:
        worker_begins()
    one.changed = one.disturbed = 0
    one.w.tables.random_state = 88172645463325252   # the same choices each time
    attaches(1)
    settle()


cdef void worker_begins() noexcept nogil:
    cdef int[2] ends
    now_set(EPOCH_NS, 0)
    one.scripts = 0
    one.transaction = 0
    claim(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, ends) == 0, b"(a socket pair can be had)")
    one.keeper = ends[0]
    one.w = worker_new(ends[1], stats, stats_segment(), log, log_segment())
    claim(one.w != NULL, b"(a worker starts)")
    one.w.descriptors_most = 4096
    commits(0)
    settle()


cdef void empty(int listener) noexcept nogil:
    """Who was never served must not be the next script's."""
    cdef int fd
    while True:
        fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC)
        if fd < 0:
            return
        stream_abort(fd)
        close(fd)


cdef bint stage_close() noexcept nogil:
    cdef Worker* w = one.w
    cdef int i
    for i in range(3):
        empty(listeners[i])
    for i in range(2):
        empty(origins[i])
    one.scripts += 1
    if not one.changed and not w.stop and not w.draining and one.scripts < SCRIPTS:
        claim(w.outbox.start == w.outbox.end, b"nothing is left to say to the keeper")
        return True
    source_close(&w.loop, &w.control)
    if one.keeper >= 0:
        close(one.keeper)
    pipes_shed(&w.pipes)
    slab_free(&w.conns)
    slab_free(&w.exchanges)
    slab_free(&w.upstreams)
    slab_free(&w.pods)
    slab_free(&w.texts)
    slab_free(&w.nears)
    buffers_free(&w.memory)
    tables_free(w.tables)
    loop_close(&w.loop)
    free(w.outbox.data)
    free(w)
    one.w = NULL
    return False


cdef bint busy() noexcept nogil:
    cdef Worker* w = one.w
    cdef pollfd[2] ask
    w.loop.now_ns = clock_ns()
    ask[0].fd = w.loop.epoll
    ask[1].fd = one.keeper              # -1 is passed over
    ask[0].events = ask[1].events = POLLIN
    ask[0].revents = ask[1].revents = 0
    poll(ask, 2, 0)
    if ask[1].revents != 0 and keeper_hears():
        poll(ask, 1, 0)
    return ask[0].revents != 0 or w.loop.fresh.first != NULL or w.loop.busy.first != NULL or \
        (w.loop.timers.root != NULL and w.loop.timers.root.due_ns <= w.loop.now_ns)


cdef bint turn() noexcept nogil:
    if one.w.stop or not busy():
        return False
    worker_turn(one.w)
    one.turns += 1
    return True


cdef void settle() noexcept nogil:
    cdef uint32_t turns = 0
    while turn():
        turns += 1
        claim(turns < TURNS, b"the worker rests when nothing happens")


# ---- time ------------------------------------------------------------------------------------------------------------------------

cdef void now_set(uint64_t ns, uint32_t tick) noexcept nogil:
    global now_ns
    now_ns = ns
    one.tick = tick
    clock_by_hand(ns, tick)


cdef void ticks(uint32_t ns) noexcept nogil:
    now_set(clock_ns(), ns)


cdef void wait(uint64_t milliseconds) noexcept nogil:
    cdef uint64_t until = clock_ns() + milliseconds * 1000000, due
    cdef int _
    for _ in range(HOPS):
        if one.w.stop or one.w.loop.timers.root == NULL or one.w.loop.timers.root.due_ns > until:
            break
        due = one.w.loop.timers.root.due_ns
        if due > clock_ns():
            now_set(due, one.tick)
        settle()
    if until > clock_ns():
        now_set(until, one.tick)
    settle()


# ---- the keeper ------------------------------------------------------------------------------------------------------------------

cdef bint keeper_hears() noexcept nogil:
    """True: it answered."""
    cdef char[2048] data
    cdef uint32_t n, pod
    cdef uint16_t kind, many
    cdef int64_t size
    cdef bint answered = False
    while one.keeper >= 0:
        size = packet_receive(one.keeper, data, sizeof(data), NULL, 0, &n)
        if size < 8:
            break
        memcpy(&kind, data, 2)
        if kind == MSG_NEED_SOCKETS and size == 15 and data[12] == 4:
            memcpy(&pod, data + 8, 4)
            memcpy(&many, data + 13, 2)
            claim(pod == 1 or pod == 2, b"sockets are asked for a pod that there is")
            one.wanted[pod] += many
            if not one.withholds:
                gives(pod, one.wanted[pod])
                answered = True
    return answered


cdef void gives(uint32_t pod, uint32_t n) noexcept nogil:
    cdef int[64] fds
    cdef char[5] payload
    cdef const char* step = NULL
    cdef uint32_t i
    if n > 64:
        n = 64
    for i in range(n):
        fds[i] = capture_socket(4, SOCKET_MARK, &step)
        claim(fds[i] >= 0, b"(a marked socket can be had)")
    memcpy(payload, &pod, 4)
    payload[4] = 4
    tell(MSG_SOCKETS, payload, 5, fds, n)
    for i in range(n):
        close(fds[i])
    one.wanted[pod] = 0


cdef void attaches(uint32_t pod) noexcept nogil:
    cdef char[10] payload
    cdef int[2] fds
    cdef uint32_t n = 2 if pod == 1 else 1
    memcpy(payload, &pod, 4)
    memcpy(payload + 4, &n, 4)
    payload[8] = LISTEN_OUTBOUND
    payload[9] = LISTEN_INBOUND
    fds[0] = listeners[0 if pod == 1 else 2]
    fds[1] = listeners[1]
    if pod == 2:
        one.two = 1
    tell(MSG_POD_ATTACH, payload, 8 + n, fds, n)


cdef void detaches(uint32_t pod) noexcept nogil:
    tell(MSG_POD_DETACH, <const char*>&pod, 4, NULL, 0)


cdef void drains(uint32_t milliseconds) noexcept nogil:
    tell(MSG_DRAIN, <const char*>&milliseconds, 4, NULL, 0)


cdef void commits(uint8_t which) noexcept nogil:
    cdef Bytes* change = &changes[which % n_changes]
    cdef int fd
    if one.keeper < 0:
        return
    one.changed = one.disturbed = 1
    one.quiet |= notes[which % n_changes] & 1
    one.forgets |= notes[which % n_changes] & 2
    one.transaction += 1
    memcpy(change.data + 8, &one.transaction, 8)
    fd = memfd_create(b"transaction", 0)
    claim(fd >= 0 and write(fd, change.data, change.n) == change.n, b"(a transaction can be written)")
    tell(MSG_COMMIT, NULL, 0, &fd, 1)
    close(fd)


cdef void keeper_goes() noexcept nogil:
    if one.keeper >= 0:
        close(one.keeper)
    one.keeper = -1


# ---- clients and servers -----------------------------------------------------------------------------------------------------------

cdef void begin(Side* side, int fd) noexcept nogil:
    side.fd = fd
    side.was = 1
    side.refused = side.shut = side.reset = side.ended = side.broken = side.closed = side.opaque = 0
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
    if one.n_clients == SIDES:
        return
    if second and not one.two:
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
    side = &one.clients[one.n_clients]
    one.n_clients += 1
    begin(side, fd)
    side.port = <uint16_t>(FIRST_PORT + next_port)
    side.dialled = to[2]
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
            fd = accept4(origins[i], &address.any, &size, SOCK_NONBLOCK | SOCK_CLOEXEC)
            if fd < 0:
                break
            if one.n_servers == SIDES:
                stream_abort(fd)
                close(fd)
                continue
            peer_from(&peer, &address)
            side = &one.servers[one.n_servers]
            one.n_servers += 1
            begin(side, fd)
            side.port = peer.port
            side.there = peer
            stream_local(fd, &side.here)
            side.opaque = i == 1


cdef void says(Side* side, const char* data, uint32_t n) noexcept nogil:
    """What the kernel takes of it now."""
    cdef ssize_t done
    if side.fd < 0 or side.shut or n == 0:
        return
    if n > MOST - side.n_said:
        n = MOST - side.n_said
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


# ---- made once -------------------------------------------------------------------------------------------------------------------

cdef int py_listener(uint16_t port) except -1:
    cdef const char* step = NULL
    cdef int fd = capture_listen(4, port, 64, &step)
    if fd < 0:
        raise SystemExit(f"fuzz: port {port}: {(<bytes>step).decode()} failed ({-fd})")
    return fd


def prepare():
    """Namespace, listeners, segments and transactions, once in the process."""
    global n_changes, stats, log
    cdef int i
    cdef uint32_t at
    cdef bytes data
    from tests.fuzz import world        # late: see CHILD in run.py

    world.furnish_namespace()
    for i, port in enumerate((15001, 15006, 15002)):
        listeners[i] = py_listener(port)
    for i, port in enumerate((world.REQUESTS, world.OPAQUE)):
        origins[i] = py_listener(port)
    for at, data in enumerate(world.transactions()):
        changes[at].n = len(data)
        changes[at].data = <char*>malloc(len(data))
        memcpy(changes[at].data, <const char*>data, len(data))
        notes[at] = (at in world.QUIET) | (at in world.FORGETS) << 1
        n_changes = at + 1
    stats = malloc(stats_segment())
    log = malloc(log_segment())
    memset(stats, 0, stats_segment())
    memset(log, 0, log_segment())
    stats_format(stats, stats_segment())
    log_format(log, log_segment())
    for i in range(SIDES):
        for side in range(2):
            (&one.clients[i] if side == 0 else &one.servers[i]).said = <char*>malloc(MOST)
            (&one.clients[i] if side == 0 else &one.servers[i]).heard = <char*>malloc(2 * MOST)
