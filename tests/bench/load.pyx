"""The load generator: one epoll loop, as cheap as it can be, that counts work and keeps every latency.

    exchange     requests and answers on some connections: closed loop (each asks again once it is answered), or open loop at a
                 fixed rate with arrivals as a Poisson process, each latency counted from when the request was due
    bulk         reads and drops
    hold         opens connections, has one request answered on each, then waits for the end of standard input
"""
import json
import sys

from libc.errno cimport EAGAIN, EINPROGRESS, EINTR, errno
from libc.math cimport log
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, malloc, qsort
from libc.string cimport memcpy

from tests.bench.kernel cimport *

cdef enum:
    HEAD = 4_096                # of an answer, at most
    CHUNK = 1_048_576           # one read
    LATENCIES = 8_000_000       # kept of one run
    DIALLING = 0
    IDLE = 1
    WAITING = 2
    ENDING = 3                  # answered, the server is about to close
    KEEP = 0                    # what becomes of a connection after its answer
    SERVER_CLOSES = 1
    CLIENT_CLOSES = 2

cdef struct Conn:
    int fd
    uint8_t state
    int64_t left                # bytes of the answer to come; -1: its head is not complete
    int64_t began               # ns
    uint32_t n
    char[HEAD] head

cdef struct Run:
    int ep
    sockaddr_in address
    Conn* conns
    int count
    const char* request
    uint32_t request_n
    int64_t fixed               # bytes of an answer; 0: HTTP
    int after                   # KEEP, SERVER_CLOSES, CLIENT_CLOSES
    bint closed_loop
    bint stopping
    int* idle                   # ring of connections that are free
    uint32_t idle_at, idle_n
    char* chunk
    uint32_t* latencies         # ns / 10
    uint64_t done, failed, bytes
    uint64_t dice


cdef void fail(Run* run, Conn* conn) noexcept nogil:
    """A connection that ends when it should not: counted, and dialled anew so that the load stays what it is."""
    run.failed += 1
    close(conn.fd)
    dial(run, conn)


cdef void dial(Run* run, Conn* conn) noexcept nogil:
    conn.fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0)
    conn.state = DIALLING
    no_delay(conn.fd)
    if connect(conn.fd, <sockaddr*>&run.address, sizeof(sockaddr_in)) < 0 and errno != EINPROGRESS:
        run.failed += 1
    watch(run.ep, EPOLL_CTL_ADD, conn.fd, EPOLLOUT, <uint32_t>(conn - run.conns))


cdef void ask(Run* run, Conn* conn, int64_t due) noexcept nogil:
    conn.state = WAITING
    conn.left = run.fixed if run.fixed else -1
    conn.n = 0
    conn.began = due
    if send(conn.fd, run.request, run.request_n, MSG_NOSIGNAL) != run.request_n:
        fail(run, conn)


cdef void free_again(Run* run, Conn* conn) noexcept nogil:
    """The connection can carry the next request."""
    conn.state = IDLE
    if run.closed_loop:
        if not run.stopping:
            ask(run, conn, now_ns())
        return
    run.idle[(run.idle_at + run.idle_n) % run.count] = <int>(conn - run.conns)
    run.idle_n += 1


cdef int64_t body_size(Conn* conn, char* end) noexcept nogil:
    """Of an answer that is 200 with a length; -2 for any other."""
    cdef char* p = conn.head
    cdef int64_t size = 0
    if conn.n < 12 or conn.head[9] != c'2':
        return -2
    while p < end:
        if strncasecmp(p, b"content-length:", 15) == 0:
            p += 15
            while p[0] == c' ':
                p += 1
            while c'0' <= p[0] <= c'9':
                size = size * 10 + (p[0] - c'0')
                p += 1
            return size
        p = <char*>memmem(p, end - p, b"\r\n", 2)
        if p == NULL:
            return -2
        p += 2
    return -2


cdef int on_head(Run* run, Conn* conn, ssize_t n) noexcept nogil:
    """`n` bytes lie in the chunk. 0, or -1 when the answer is not what was asked for."""
    cdef ssize_t part = n if n < HEAD - conn.n else HEAD - conn.n
    cdef ssize_t before = conn.n
    cdef char* end
    cdef int64_t size
    memcpy(&conn.head[conn.n], run.chunk, part)
    conn.n += <uint32_t>part
    end = <char*>memmem(conn.head, conn.n, b"\r\n\r\n", 4)
    if end == NULL:
        return -1 if conn.n == HEAD else 0
    size = body_size(conn, end)
    if size < 0:
        return -1
    conn.left = size - (n - (end + 4 - conn.head - before))
    return -1 if conn.left < 0 else 0


cdef void answered(Run* run, Conn* conn) noexcept nogil:
    cdef int64_t took = now_ns() - conn.began
    if run.done < LATENCIES:
        run.latencies[run.done] = <uint32_t>(took // 10)
    run.done += 1
    if run.after == CLIENT_CLOSES:
        close(conn.fd)
        conn.state = ENDING
        if not run.stopping:
            dial(run, conn)
    elif run.after == SERVER_CLOSES:
        conn.state = ENDING
    else:
        free_again(run, conn)


cdef void on_readable(Run* run, Conn* conn) noexcept nogil:
    # what is known to be a body is dropped in the kernel
    cdef bint drop = conn.state == WAITING and conn.left > 0 and not run.fixed
    cdef ssize_t n = recv(conn.fd, run.chunk, CHUNK, MSG_TRUNC if drop else 0)
    if n < 0 and (errno == EAGAIN or errno == EINTR):
        return
    if n <= 0 and conn.state == ENDING:
        close(conn.fd)
        if not run.stopping:
            dial(run, conn)
        return
    if n <= 0 or conn.state != WAITING:
        fail(run, conn)
        return
    run.bytes += n
    if conn.left < 0:
        if on_head(run, conn, n) < 0:
            fail(run, conn)
            return
    else:
        conn.left -= n
        if conn.left < 0:
            fail(run, conn)
            return
    if conn.left == 0:
        answered(run, conn)


cdef void on_event(Run* run, epoll_event* event) noexcept nogil:
    cdef Conn* conn = &run.conns[event.data.u32]
    cdef int error = 0
    cdef socklen_t size = sizeof(error)
    if conn.state != DIALLING:
        on_readable(run, conn)
        return
    getsockopt(conn.fd, SOL_SOCKET, SO_ERROR, &error, &size)
    if error:
        fail(run, conn)
        return
    watch(run.ep, EPOLL_CTL_MOD, conn.fd, EPOLLIN, event.data.u32)
    free_again(run, conn)


cdef int64_t gap(Run* run, double rate) noexcept nogil:
    """ns to the next arrival of a Poisson process (xorshift64*, exponential)."""
    run.dice ^= run.dice >> 12
    run.dice ^= run.dice << 25
    run.dice ^= run.dice >> 27
    return <int64_t>(-log(((run.dice * 0x2545F4914F6CDD1DULL >> 11) + 1) / 9007199254740993.0) * 1e9 / rate)


cdef int64_t loop(Run* run, double rate, int64_t length) noexcept nogil:
    """Returns how long it took, ns. With a rate, every request that was due is waited for, at most a second."""
    cdef epoll_event[256] events
    cdef timespec wait
    cdef int64_t start = now_ns(), now = start, until = start + length, due = start, rest
    cdef int count, i
    cdef Conn* conn
    while now < until:
        if rate > 0:
            while due <= now and run.idle_n:
                conn = &run.conns[run.idle[run.idle_at]]
                run.idle_at = (run.idle_at + 1) % run.count
                run.idle_n -= 1
                ask(run, conn, due)
                due += gap(run, rate)
        rest = until - now
        if rate > 0 and due > now and due - now < rest:
            rest = due - now
        wait.tv_sec, wait.tv_nsec = rest // 1_000_000_000, rest % 1_000_000_000
        count = epoll_pwait2(run.ep, events, 256, &wait, NULL)
        for i in range(count):
            on_event(run, &events[i])
        now = now_ns()
    return now - start


cdef void linger(Run* run) noexcept nogil:
    """Waits until what was asked is answered, so that the proxy's CPU for it is charged; at most a second."""
    cdef epoll_event[256] events
    cdef int64_t until = now_ns() + 1_000_000_000
    cdef int count, i, waiting = 1
    run.stopping = True
    while waiting and now_ns() < until:
        count = epoll_wait(run.ep, events, 256, 20)
        for i in range(count):
            on_event(run, &events[i])
        waiting = 0
        for i in range(run.count):
            waiting += run.conns[i].state == WAITING


cdef int compare(const void* a, const void* b) noexcept nogil:
    cdef uint32_t x = (<uint32_t*>a)[0], y = (<uint32_t*>b)[0]
    return (x > y) - (x < y)


cdef Run* prepare(str host, int port, int count, bytes request) except NULL:
    cdef Run* run = <Run*>calloc(1, sizeof(Run))
    run.address.sin_family = AF_INET
    run.address.sin_port = htons(port)
    host_bytes = host.encode()
    run.address.sin_addr.s_addr = inet_addr(host_bytes)
    run.conns = <Conn*>calloc(count, sizeof(Conn))
    run.idle = <int*>calloc(count, sizeof(int))
    run.chunk = <char*>malloc(CHUNK)
    run.latencies = <uint32_t*>malloc(LATENCIES * sizeof(uint32_t))
    run.count, run.dice = count, 0x9E3779B97F4A7C15ULL
    run.request, run.request_n = <const char*>request, len(request)
    run.ep = epoll_create1(0)
    prctl(PR_SET_TIMERSLACK, 1)     # ns: an open loop that wakes 50 us late would measure itself
    return run


def exchange(str host, int port, int connections, double seconds, bytes request, *, int64_t fixed=0, double rate=0, int after=KEEP):
    """Returns work (answers), seconds, failed and the latencies' percentiles in us."""
    cdef Run* run = prepare(host, port, connections, request)
    cdef int64_t took
    cdef int i
    run.fixed, run.after, run.closed_loop = fixed, after, rate == 0
    for i in range(connections):
        dial(run, &run.conns[i])
    if rate > 0:        # an open loop begins when every connection stands
        run.closed_loop = False
        loop(run, 0, 200_000_000)
    took = loop(run, rate, <int64_t>(seconds * 1e9))
    done = run.done
    linger(run)
    kept = min(run.done, <uint64_t>LATENCIES)
    qsort(run.latencies, kept, sizeof(uint32_t), compare)
    at = {f"p{name}_us": run.latencies[min(kept - 1, <uint64_t>(kept * share))] / 100
          for name, share in (("50", 0.5), ("99", 0.99))} if kept else {}
    return {"work": run.done, "rate": done / (took / 1e9), "seconds": took / 1e9, "failed": run.failed, **at}


def bulk(str host, int port, int streams, double seconds):
    """Returns work (bytes), seconds, failed."""
    cdef Run* run = prepare(host, port, streams, b"")
    cdef epoll_event[256] events
    cdef int64_t start, until
    cdef int count, i
    cdef ssize_t n
    for i in range(streams):
        dial(run, &run.conns[i])
        watch(run.ep, EPOLL_CTL_MOD, run.conns[i].fd, EPOLLIN, i)
    start = now_ns()
    until = start + <int64_t>(seconds * 1e9)
    with nogil:
        while now_ns() < until:
            count = epoll_wait(run.ep, events, 256, 100)
            for i in range(count):
                n = recv(run.conns[events[i].data.u32].fd, run.chunk, CHUNK, MSG_TRUNC)
                if n > 0:
                    run.bytes += n
                elif n == 0 or errno != EAGAIN:
                    run.failed += 1
                    watch(run.ep, EPOLL_CTL_DEL, run.conns[events[i].data.u32].fd, 0, 0)
    return {"work": run.bytes, "seconds": (now_ns() - start) / 1e9, "failed": run.failed}


def hold(str host, int port, int connections, bytes request):
    """Connections are opened 64 at a time; prints a line when every one has its answer, then holds them."""
    cdef Run* run = prepare(host, port, connections, request)
    cdef int opened = 0, more
    cdef int64_t until = now_ns() + 60_000_000_000
    while (opened < connections or run.idle_n < <uint32_t>connections) and now_ns() < until and not run.failed:
        more = min(64 - (opened - <int>run.done), connections - opened)
        for _ in range(more):
            dial(run, &run.conns[opened])
            opened += 1
        one_round(run)
    print(json.dumps({"held": run.done, "failed": run.failed}), flush=True)
    sys.stdin.read()


cdef void one_round(Run* run) noexcept nogil:
    cdef epoll_event[256] events
    cdef Conn* conn
    cdef int i, count = epoll_wait(run.ep, events, 256, 100)
    for i in range(count):
        conn = &run.conns[events[i].data.u32]
        if conn.state == DIALLING:
            on_event(run, &events[i])           # becomes idle: take it off again and ask
            run.idle_n -= 1
            ask(run, conn, now_ns())
        else:
            on_event(run, &events[i])


def main():
    """argv: a JSON object of what to call and its arguments. Prints one JSON line."""
    given = json.loads(sys.argv[1])
    what = {"exchange": exchange, "bulk": bulk, "hold": hold}[given.pop("do")]
    if "request" in given:
        given["request"] = given["request"].encode("latin-1")
    found = what(**given)
    if found is not None:
        print(json.dumps(found))
