"""See conn.pxd."""
from libc.errno cimport EAGAIN, EINTR
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from posix.unistd cimport close
from ext.core.buffer cimport buffer_drop, buffers_count, buffers_uncount
from ext.core.loop cimport Source, flow_forget, loop_add, loop_again, loop_bury, loop_listen, loop_over, source_close, wall_us
from ext.core.pipes cimport Pipe, pipe_give, pipe_take, pipes_shed
from ext.core.protocol cimport LISTEN_INBOUND
from ext.core.slab cimport slab_give, slab_take
from ext.core.source cimport source_abort, source_read, source_shut
from ext.core.timer cimport Timer, timer_clear, timer_init, timer_set
from ext.proxy.account cimport account_end
from ext.proxy.budget cimport admission, memory_forget, memory_tight
from ext.proxy.held cimport held_forget
from ext.proxy.state cimport (C_DEAD, C_LINGER, LINGER_BYTES, LINGER_MS, PAUSED_FULL, POD_PIPES, PORTS, PUMP_ROUNDS, RUNNING, Acceptor,
                              Bulk, Captured, Conn, Tunnel, Worker)
from ext.proxy.stock cimport stock_close, stock_forget
from ext.proxy.tunnel cimport tunnel_leave
from ext.proxy.upstream cimport pool_close, upstream_drop
from ext.route.balance cimport endpoint_end
from ext.route.tables cimport cluster_release, destination_release, identity_hold, identity_release, slot_release
from ext.sys.stream cimport Peer


cdef void on_event(Source* source, uint32_t events) noexcept nogil:
    cdef Conn* c = <Conn*>source
    c.w.advance(c)


cdef void on_timer(Timer* timer) noexcept nogil:
    """Deadlines are compared where the state is known; `advance` sees that the timer is not armed."""
    cdef Conn* c = <Conn*>timer.owner
    c.w.expire(c, timer)


cdef Conn* make(Captured* pod, uint8_t kind, const Peer* client, const Peer* target) noexcept nogil:
    cdef Worker* w = pod.w
    cdef Conn* c = <Conn*>slab_take(&w.conns)
    if c == NULL:
        return NULL
    c.source.fd = -1
    c.source.ready = on_event
    c.source.flow = &pod.flow
    c.w = w
    c.pod = pod
    c.kind = kind
    c.refusal = 503
    c.client = client[0]
    c.target = target[0]
    timer_init(&c.timer, on_timer, c)
    timer_init(&c.request_timer, on_timer, c)
    c.active_ns = w.loop.now_ns
    c.facts.start_ns = w.loop.now_ns
    c.facts.start_us = wall_us()
    return c


cdef void count(Conn* c) noexcept nogil:
    cdef Worker* w = c.w
    c.next = c.pod.first_conn
    if c.next != NULL:
        c.next.prev = c
    c.pod.first_conn = c
    w.n_conns += 1
    c.pod.conns += 1
    c.pod.of_kind[c.kind] += 1
    w.stats.downstream_open += 1
    w.stats.accepted += 1


cdef Conn* conn_new(Acceptor* acceptor, int fd, const Peer* client, const Peer* target) noexcept nogil:
    cdef Conn* c = make(acceptor.pod, acceptor.kind, client, target)
    if c == NULL:
        close(fd)
        return NULL
    c.source.fd = fd
    if loop_add(&c.w.loop, &c.source) != 0:
        close(fd)
        slab_give(&c.w.conns, c)
        return NULL
    count(c)
    return c


cdef Conn* conn_carried(Tunnel* t, const Peer* client, const Peer* target) noexcept nogil:
    cdef Conn* c = make(t.pod, LISTEN_INBOUND, client, target)
    if c != NULL:
        c.tunnel = t
        c.secure = 1
        t.users += 1
        count(c)
    return c


cdef Conn* conn_near(Captured* pod, const Peer* client, const Peer* target, Identity* who, bint secure) noexcept nogil:
    cdef Conn* c = make(pod, LISTEN_INBOUND, client, target)
    if c != NULL:
        if who != NULL:
            identity_hold(who)
            c.peer = who
        c.secure = secure
        count(c)
    return c


cdef Conn* conn_refused(Captured* pod, uint8_t kind, const Peer* client, const Peer* target) noexcept nogil:
    cdef Conn* c = make(pod, kind, client, target)
    if c != NULL:
        count(c)
    return c


cdef void conn_timer(Conn* c, uint32_t ms) noexcept nogil:
    timer_set(&c.w.loop.timers, &c.timer, c.w.loop.now_ns + <uint64_t>ms * 1000000)


cdef void conn_release(Conn* c) noexcept nogil:
    if c.endpoint != NULL:
        endpoint_end(c.endpoint)
        c.endpoint = NULL
    if c.cluster != NULL:
        cluster_release(c.w.tables, c.cluster)
        c.cluster = NULL
    if c.destination != NULL:
        destination_release(c.w.tables, c.destination)
        c.destination = NULL
    c.route = NULL
    c.weighted = NULL


cdef Pipe* bulk_pipe(Conn* c) noexcept nogil:
    """Counted as the pod's memory with all that it may hold: what is in it now may be more in the next call."""
    cdef Pipe* pipe
    if c.pod.pipes >= POD_PIPES or memory_tight(c.pod):
        return NULL
    pipe = pipe_take(&c.w.pipes, c.w.loop.now_ns)
    if pipe == NULL:
        return NULL
    if not buffers_count(&c.pod.buffers, pipe.size):
        pipe_give(&c.w.pipes, pipe)
        return NULL
    c.pod.pipes += 1
    return pipe


cdef void bulk_drop(Conn* c, Bulk* bulk) noexcept nogil:
    if bulk.pipe != NULL:
        buffers_uncount(&c.pod.buffers, bulk.pipe.size)
        pipe_give(&c.w.pipes, bulk.pipe)
        bulk.pipe = NULL
        c.pod.pipes -= 1


cdef void conn_end(Conn* c, uint8_t flag, uint16_t details, bint abort) noexcept nogil:
    cdef Worker* w = c.w
    cdef Captured* pod = c.pod
    if c.state == C_DEAD:
        return
    account_end(c, flag, details)
    c.state = C_DEAD
    if c.peer != NULL:
        identity_release(w.tables, c.peer)
        c.peer = NULL
    if c.judge != NULL:
        slot_release(w.tables, c.judge)
        c.judge = NULL
    held_forget(c)
    stock_forget(c)
    memory_forget(c)
    timer_clear(&w.loop.timers, &c.timer)
    timer_clear(&w.loop.timers, &c.request_timer)
    if c.up != NULL:
        upstream_drop(c.up, abort)
    conn_release(c)
    buffer_drop(&pod.buffers, &c.din)
    buffer_drop(&pod.buffers, &c.uhead)
    buffer_drop(&pod.buffers, &c.uin)
    buffer_drop(&pod.buffers, &c.dhead)
    bulk_drop(c, &c.onward)
    bulk_drop(c, &c.back)
    if c.texts != NULL:
        slab_give(&w.texts, c.texts)
        c.texts = NULL
    if abort:
        source_abort(&c.source)
    source_close(&w.loop, &c.source)
    if c.tunnel != NULL:
        tunnel_leave(c.tunnel)          # `tunnel` stays for whoever looks at a dead one within this turn
    if c.prev != NULL:
        c.prev.next = c.next
    else:
        pod.first_conn = c.next
    if c.next != NULL:
        c.next.prev = c.prev
    if pod.hand == c:
        pod.hand = c.next
    if pod.review == c:
        pod.review = c.next
    w.n_conns -= 1
    w.stats.downstream_open -= 1
    pod.conns -= 1
    pod.of_kind[c.kind] -= 1
    if c.x != NULL:
        loop_bury(&w.loop, &c.x.grave, &w.exchanges, c.x)      # `x` stays, as `tunnel` does
    loop_bury(&w.loop, &c.grave, &w.conns, c)
    if pod.attached:
        pod_resume(pod)
    else:
        pod_retire(pod)


cdef void conn_linger(Conn* c) noexcept nogil:
    if c.up != NULL:
        upstream_drop(c.up, True)
    conn_release(c)
    timer_clear(&c.w.loop.timers, &c.request_timer)
    buffer_drop(&c.pod.buffers, &c.din)
    buffer_drop(&c.pod.buffers, &c.uin)
    source_shut(&c.source)
    c.state = C_LINGER
    c.held_bytes = 0
    conn_timer(c, LINGER_MS)
    linger_advance(c)


cdef void linger_advance(Conn* c) noexcept nogil:
    """Reads and forgets. `held_bytes` counts; the exchange was accounted before."""
    cdef char[16384] sink
    cdef int64_t n
    cdef int rounds = 0
    while c.source.readable:
        if rounds >= PUMP_ROUNDS and loop_over(&c.w.loop):
            loop_again(&c.w.loop, &c.source)
            return
        rounds += 1
        n = source_read(&c.source, sink, sizeof(sink))
        if n == -EINTR:
            continue
        if n == -EAGAIN:
            c.source.readable = 0
            return
        c.held_bytes += <uint64_t>n if n > 0 else 0
        if n <= 0 or c.held_bytes > LINGER_BYTES:
            conn_end(c, 0, 0, False)
            return


# ---- pods -----------------------------------------------------------------------------------------------------------------------

cdef void pod_resume(Captured* pod) noexcept nogil:
    cdef int i
    for i in range(PORTS):
        if pod.acceptors[i].paused == PAUSED_FULL and pod.acceptors[i].source.fd >= 0 and admission(&pod.acceptors[i]) == 0:
            timer_clear(&pod.w.loop.timers, &pod.acceptors[i].pause)
            pod.acceptors[i].paused = RUNNING
            loop_listen(&pod.w.loop, &pod.acceptors[i].source, 1)


cdef void pod_retire(Captured* pod) noexcept nogil:
    """A detached pod goes, once, with its last connection and its last tunnel: also with one that ends because the pod is detached."""
    cdef Worker* w = pod.w
    cdef Captured** at
    if pod.attached or pod.retired or pod.conns > 0 or pod.first_tunnel != NULL:
        return
    pod.retired = 1
    pool_close(pod)
    stock_close(pod)
    pipes_shed(&w.pipes)                # its connections' too, which ended since it was detached
    at = &w.by_handle[pod.handle & 255]
    while at[0] != NULL and at[0] != pod:
        at = &at[0].chain
    if at[0] == pod:
        at[0] = pod.chain
    at = &w.first_pod
    while at[0] != NULL and at[0] != pod:
        at = &at[0].next
    if at[0] == pod:
        at[0] = pod.next
    flow_forget(&w.loop, &pod.flow)
    loop_bury(&w.loop, &pod.grave, &w.pods, pod)
