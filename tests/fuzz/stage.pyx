"""See stage.pxd."""
import struct

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset
from posix.unistd cimport close
from ext.core.buffer cimport buffers_free
from ext.core.loop cimport clock_by_hand, clock_ns, loop_close, source_close
from ext.core.pipes cimport pipes_shed
from ext.core.protocol cimport (LISTEN_HBONE, LISTEN_INBOUND, LISTEN_OUTBOUND, MSG_COMMIT, MSG_DRAIN, MSG_KEY, MSG_NEED_SOCKETS,
                                MSG_POD_ATTACH, MSG_POD_DETACH, MSG_SOCKETS, PORT_HBONE, PROTOCOL_VERSION, SOCKET_MARK)
from ext.core.ring cimport log_format, log_segment
from ext.core.shm cimport stats_format, stats_segment
from ext.core.slab cimport slab_free
from ext.proxy.keys cimport key_forget
from ext.proxy.state cimport Worker
from ext.proxy.tunnel cimport tunnels_open
from ext.proxy.worker cimport worker_new, worker_turn
from ext.route.tables cimport tables_free
from ext.sys.capture cimport capture_listen, capture_socket
from ext.sys.packet cimport packet_receive, packet_send
from ext.sys.stream cimport SOCK_CLOEXEC, SOCK_NONBLOCK, accept4, stream_abort
from ext.tunnel.session cimport pad_close
from ext.tunnel.tls cimport tls_open
from driver cimport claim

cdef extern from "<sys/socket.h>" nogil:
    int AF_UNIX
    int SOCK_SEQPACKET
    int socketpair(int family, int kind, int protocol, int* ends)

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
    CHANGES = 64
    SCRIPTS = 64                # for one worker, unless they change it: its start costs as much as they do
    HOPS = 64                   # deadlines that are met one by one; then the rest of a wait is one leap
    EPOCH_NS = 1000000000000

cdef struct Bytes:
    char* data
    uint32_t n

cdef Stage one
cdef int listeners[5]           # outbound, inbound; outbound, inbound and tunnels of the second pod
cdef int origins[2]
cdef Bytes changes[CHANGES]
cdef uint8_t notes[CHANGES]     # 1: quiet, 2: forgets, 4: denies, 8: calm, 16: says nothing of who may be joined
cdef Bytes keys[2]              # what the keeper says of them, behind the number, and the key itself
cdef Bytes secrets[2]
cdef uint32_t n_changes = 0
cdef void* stats = NULL
cdef void* log = NULL
cdef uint64_t now_ns = 0


cdef Stage* stage() noexcept nogil:
    return &one


cdef const int* stage_origins() noexcept nogil:
    return origins


# ---- the worker ------------------------------------------------------------------------------------------------------------------

cdef void tell(uint16_t kind, const char* payload, uint32_t size, const int* fds, uint32_t n) noexcept nogil:
    cdef char[256] data
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
    one.changed = one.disturbed = one.denies = one.settled_denies = 0
    one.joined = 1
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
    claim(tunnels_open(one.w) == 0, b"(tunnels can be had)")
    give_keys()
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
    for i in range(5):
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
    slab_free(&w.tunnels)
    for i in range(2):
        key_forget(w, i + 1)
    pad_close(&w.pad)
    free(w.sealed)
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
    one.settled_denies = one.denies


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
    cdef char[11] payload
    cdef int[3] fds
    cdef uint32_t n = 2 if pod == 1 else 3
    memcpy(payload, &pod, 4)
    memcpy(payload + 4, &n, 4)
    payload[8] = LISTEN_OUTBOUND
    payload[9] = LISTEN_INBOUND
    payload[10] = LISTEN_HBONE
    fds[0] = listeners[0 if pod == 1 else 2]
    fds[1] = listeners[1 if pod == 1 else 3]
    fds[2] = listeners[4]
    if pod == 2:
        one.two = 1
    tell(MSG_POD_ATTACH, payload, 8 + n, fds, n)


cdef void detaches(uint32_t pod) noexcept nogil:
    one.joined = 0
    tell(MSG_POD_DETACH, <const char*>&pod, 4, NULL, 0)


cdef void drains(uint32_t milliseconds) noexcept nogil:
    one.joined = 0
    tell(MSG_DRAIN, <const char*>&milliseconds, 4, NULL, 0)


cdef void commits(uint8_t which) noexcept nogil:
    cdef Bytes* change = &changes[which % n_changes]
    cdef int fd, i
    if one.keeper < 0:
        return
    one.changed = one.disturbed = 1
    one.quiet |= notes[which % n_changes] & 1
    one.forgets |= notes[which % n_changes] & 2
    one.denies = notes[which % n_changes] & 4
    one.joined &= notes[which % n_changes] & 16 != 0
    for i in range(SIDES):
        one.clients[i].denied = 0
    one.transaction += 1
    memcpy(change.data + 8, &one.transaction, 8)
    fd = memfd_create(b"transaction", 0)
    claim(fd >= 0 and write(fd, change.data, change.n) == change.n, b"(a transaction can be written)")
    tell(MSG_COMMIT, NULL, 0, &fd, 1)
    close(fd)


cdef void calms(uint8_t which) noexcept nogil:
    if notes[which % n_changes] & 8:
        one.disturbed = 0


cdef void give_keys() noexcept nogil:
    cdef int fd, i
    for i in range(2):
        fd = memfd_create(b"key", 0)
        claim(fd >= 0 and write(fd, secrets[i].data, secrets[i].n) == secrets[i].n, b"(a key can be written)")
        tell(MSG_KEY, keys[i].data, keys[i].n, &fd, 1)
        close(fd)


cdef void keeper_goes() noexcept nogil:
    one.joined = 0
    if one.keeper >= 0:
        close(one.keeper)
    one.keeper = -1


# ---- made once -------------------------------------------------------------------------------------------------------------------

cdef int py_listener(uint16_t port) except -1:
    cdef const char* step = NULL
    cdef int fd = capture_listen(4, port, 64, &step)
    if fd < 0:
        raise SystemExit(f"fuzz: port {port}: {(<bytes>step).decode()} failed ({-fd})")
    return fd


cdef int keep(Bytes* out, bytes data) except -1:
    out.n = <uint32_t>len(data)
    out.data = <char*>malloc(out.n)
    memcpy(out.data, <const char*>data, out.n)
    return 0


def prepare():
    """Namespace, listeners, segments and transactions, once in the process."""
    global n_changes, stats, log
    cdef int i
    cdef uint32_t at
    cdef bytes data
    from tests.fuzz import world        # late: see CHILD in run.py

    world.furnish_namespace()
    claim(tls_open() == 0, b"(libssl can be set up)")
    for i, leaf in enumerate(world.ISSUED.leaves):
        keep(&keys[i], struct.pack("<II", i + 1, len(leaf.identity)) + leaf.identity.encode())
        keep(&secrets[i], leaf.key)
    for i, port in enumerate((15001, 15006, 15002, 15007, PORT_HBONE)):
        listeners[i] = py_listener(port)
    for i, port in enumerate((world.REQUESTS, world.OPAQUE)):
        origins[i] = py_listener(port)
    for at, data in enumerate(world.transactions()):
        keep(&changes[at], data)
        notes[at] = (at in world.QUIET) | (at in world.FORGETS) << 1 | (at in world.DENIES) << 2 | (at in world.CALM) << 3 | \
            (at in world.JUDGES) << 4
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
