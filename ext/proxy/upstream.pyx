"""See upstream.pxd."""
from libc.errno cimport EHOSTUNREACH, EINPROGRESS, ENOMEM, ETIMEDOUT
from libc.stdint cimport uint32_t, uint64_t
from posix.unistd cimport close
from ext.core.loop cimport Source, loop_add, loop_bury, source_close
from ext.core.protocol cimport PORT_INBOUND, PORT_OUTBOUND
from ext.core.slab cimport slab_give, slab_take
from ext.core.source cimport source_abort, source_error, source_silent
from ext.core.timer cimport Timer, timer_clear, timer_init, timer_set
from ext.proxy.account cimport account_failure
from ext.proxy.early cimport early_cluster
from ext.proxy.near cimport Neighbour, near_fits, near_join, near_room, near_way
from ext.proxy.state cimport POOL_BUCKETS, T_DEAD, T_OPEN, U_CONNECTING, U_DEAD, U_IDLE, U_READY, Captured, Conn, Tunnel, Upstream, Worker
from ext.proxy.stock cimport stock_take, stock_wait
from ext.proxy.tunnel cimport tunnel_busy, tunnel_silence
from ext.proxy.tunnel_out cimport (TUNNEL_GOT, TUNNEL_QUEUED, WAY_LATER, WAY_PLAIN, WAY_TUNNEL, Asking, GotTunnel, Way,
                                   tunnel_fits, tunnel_get, tunnel_join, way_of)
from ext.sys.stream cimport Peer, same_ip, same_peer, stream_bind, stream_connect, stream_local
from ext.tunnel.shapes cimport Stream


# ---- the pool ---------------------------------------------------------------------------------------------------------------

cdef uint32_t bucket_of(const Peer* to) noexcept nogil:
    cdef uint32_t hash = 2166136261
    cdef int i
    for i in range(4 if to.family == 4 else 16):
        hash = (hash ^ to.ip[i]) * 16777619
    hash = (hash ^ (to.port & 0xff)) * 16777619
    hash = (hash ^ (to.port >> 8)) * 16777619
    return (hash ^ (hash >> 15)) % POOL_BUCKETS


cdef bint serves(const Upstream* up, const Peer* to, const Peer* source, const Asking* asking, const Neighbour* near) noexcept nogil:
    """`asking`: what its tunnel must be; `near`: in which pod it must end; both NULL: it must be a socket of its own."""
    if not same_peer(&up.remote, to) or (asking == NULL) != (up.tunnel == NULL) or (near == NULL) != (up.near == NULL):
        return False
    if near != NULL:
        return near_fits(up, near)
    if asking != NULL:
        return tunnel_fits(up.tunnel, asking) and (not up.tunnel.finishing or up.tunnel.bridged) and not tunnel_busy(up.tunnel)
    if source == NULL:
        return up.source_ip.family == 0
    return same_ip(&up.source_ip, source)


cdef void pool_take(Upstream* up) noexcept nogil:
    """Out of both lists of its pod; its timer is off. From here on it is nobody's, and whoever drops it must not take it again."""
    cdef Captured* pod = up.pod
    cdef uint32_t bucket = bucket_of(&up.remote)
    if up.prev != NULL:
        up.prev.next = up.next
    else:
        pod.pool[bucket] = up.next
    pod.pooled[bucket] -= 1
    if up.next != NULL:
        up.next.prev = up.prev
    if up.older != NULL:
        up.older.newer = up.newer
    else:
        pod.oldest = up.newer
    if up.newer != NULL:
        up.newer.older = up.older
    else:
        pod.newest = up.older
    up.prev = up.next = up.older = up.newer = NULL
    up.state = U_READY
    pod.idle -= 1
    up.w.stats.upstream_idle -= 1
    timer_clear(&up.w.loop.timers, &up.timer)


cdef bint still_open(Upstream* up) noexcept nogil:
    """Else it ended, or there are bytes that nobody asked for, which would be taken for the answer to the next request."""
    return source_silent(&up.source)


cdef inline bint unchanged(Upstream* up, bint again) noexcept nogil:
    """What the last poll said, some 100 us ago, is enough for a request that could be sent again: one recv less in each."""
    if up.source.hung or up.source.failed:
        return False
    return (again and not up.source.readable) or still_open(up)


cdef Upstream* pool_find(Captured* pod, const Peer* to, const Peer* source, const Asking* asking, const Neighbour* near,
                         bint again) noexcept nogil:
    cdef Upstream* up = pod.pool[bucket_of(to)]
    cdef Upstream* after
    while up != NULL:
        after = up.next
        if serves(up, to, source, asking, near):
            pool_take(up)
            if unchanged(up, again):
                return up
            upstream_drop(up, False)
        up = after
    return NULL


cdef void upstream_keep(Upstream* up) noexcept nogil:
    cdef Captured* pod = up.pod
    cdef Upstream* at
    cdef Upstream* last = NULL
    cdef uint32_t bucket, same = 0
    if not pod.attached or up.state != U_READY or up.source.hung or up.source.failed or up.w.draining or (
            up.tunnel != NULL and up.tunnel.finishing and not up.tunnel.bridged):
        upstream_drop(up, False)
        return
    if up.source.readable and not still_open(up):
        upstream_drop(up, False)        # ended, or more bytes than the response had
        return
    up.source.readable = 0
    bucket = bucket_of(&up.remote)
    if pod.pooled[bucket] >= up.w.tables.settings.pool_idle_per_endpoint:       # else there is no need to walk over cold memory
        at = pod.pool[bucket]
        while at != NULL:
            if same_peer(&at.remote, &up.remote):
                same += 1
                last = at
            at = at.next
    if same >= up.w.tables.settings.pool_idle_per_endpoint:
        if last == NULL:
            upstream_drop(up, False)
            return
        upstream_drop(last, False)
    up.conn = NULL
    up.state = U_IDLE
    up.prev = NULL
    up.next = pod.pool[bucket]
    if up.next != NULL:
        up.next.prev = up
    pod.pool[bucket] = up
    up.newer = NULL
    up.older = pod.newest
    if pod.newest != NULL:
        pod.newest.newer = up
    else:
        pod.oldest = up
    pod.newest = up
    pod.pooled[bucket] += 1
    pod.idle += 1
    up.w.stats.upstream_idle += 1
    timer_set(&up.w.loop.timers, &up.timer,
              up.w.loop.now_ns + <uint64_t>up.w.tables.settings.pool_idle_timeout_ms * 1000000)


cdef void pool_close(Captured* pod) noexcept nogil:
    while pod.oldest != NULL:
        upstream_drop(pod.oldest, False)


cdef void pool_part(Tunnel* t) noexcept nogil:
    cdef Stream* stream = t.session.first
    cdef Stream* after
    while stream != NULL:
        after = stream.next             # dropping an Upstream drops its own stream alone
        if stream.source != NULL and (<Upstream*>stream.source).state == U_IDLE:
            upstream_drop(<Upstream*>stream.source, False)
        stream = after


cdef void pool_shed(Captured* pod) noexcept nogil:
    cdef uint32_t keep = pod.idle // 2
    while pod.idle > keep:
        upstream_drop(pod.oldest, False)
        pod.w.stats.shed_sockets += 1


# ---- dialling -----------------------------------------------------------------------------------------------------------------

cdef void on_event(Source* source, uint32_t events) noexcept nogil:
    cdef Upstream* up = <Upstream*>source
    cdef int error
    if up.state == U_IDLE:
        if (events == 0 and up.source.carrier == NULL) or source.readable or source.hung or source.failed:
            upstream_drop(up, False)
        return
    if up.state == U_CONNECTING:
        if not (source.writable or source.failed or source.hung):
            return
        timer_clear(&up.w.loop.timers, &up.timer)
        # EPOLLOUT alone says that it is connected (tcp_poll says it in no other case)
        error = source_error(source) if source.carrier != NULL or source.failed or source.hung else 0
        up.error = error
        up.state = U_READY if error == 0 else U_DEAD
        if error == 0 and up.source.carrier == NULL and up.w.tables.settings.access_log:
            stream_local(source.fd, &up.local)
    if up.conn != NULL:
        up.w.advance(up.conn)


cdef void on_timer(Timer* timer) noexcept nogil:
    cdef Upstream* up = <Upstream*>timer.owner
    if up.state == U_IDLE:
        upstream_drop(up, False)
    elif up.state == U_CONNECTING:
        up.state = U_DEAD
        up.error = -ETIMEDOUT
        if up.conn != NULL and up.tunnel != NULL and up.tunnel.state != T_DEAD:     # one that ended in this moment has said why
            account_failure(up.conn, tunnel_silence(up.tunnel.state))
        if up.conn != NULL:
            up.w.advance(up.conn)


cdef void begin(Conn* c, Upstream* up, const Peer* to) noexcept nogil:
    up.source.ready = on_event
    up.source.flow = &c.pod.flow
    up.w = c.w
    up.pod = c.pod
    up.conn = c
    up.state = U_CONNECTING
    up.remote = to[0]
    up.dialled_ns = c.w.loop.now_ns
    timer_init(&up.timer, on_timer, up)


cdef void opened(Conn* c, Upstream* up, uint32_t connect_ms) noexcept nogil:
    timer_set(&c.w.loop.timers, &up.timer, c.w.loop.now_ns + <uint64_t>connect_ms * 1000000)
    c.pod.upstreams += 1
    c.w.stats.upstream_open += 1


cdef Upstream* dial(Conn* c, int fd, const Peer* to, const Peer* source, uint32_t connect_ms, int* error) noexcept nogil:
    """Takes the descriptor over. An address that cannot be bound is not worked around: the server would see a false client."""
    cdef Worker* w = c.w
    cdef Upstream* up
    error[0] = 0
    if source != NULL:
        error[0] = stream_bind(fd, source)
    if error[0] == 0:
        error[0] = stream_connect(fd, to)
    if error[0] != 0 and error[0] != -EINPROGRESS:
        close(fd)
        return NULL
    up = <Upstream*>slab_take(&w.upstreams)
    if up == NULL:
        error[0] = -ENOMEM
        close(fd)
        return NULL
    up.source.fd = fd
    up.source.shared = 1
    begin(c, up, to)
    if source != NULL:
        up.source_ip = source[0]
    if loop_add(&w.loop, &up.source) != 0:
        error[0] = -ENOMEM
        close(fd)
        slab_give(&w.upstreams, up)
        return NULL
    opened(c, up, connect_ms)
    error[0] = 0
    return up


cdef int carried(Conn* c, const Asking* asking, const Peer* to, uint32_t connect_ms, bint pooled, int* error) noexcept nogil:
    """A stream of a tunnel."""
    cdef Worker* w = c.w
    cdef Upstream* up
    cdef Tunnel* t
    cdef GotTunnel got
    cdef bint cold
    if pooled:
        up = pool_find(c.pod, to, NULL, asking, NULL, c.x.request_done and idempotent(c.x.method))
        if up != NULL:
            up.conn = c
            c.up = up
            return DIALLED
    got = tunnel_get(c, asking, connect_ms, &t, error)
    if got != TUNNEL_GOT:
        return QUEUED if got == TUNNEL_QUEUED else FAILED
    up = <Upstream*>slab_take(&w.upstreams)
    if up == NULL:
        error[0] = -ENOMEM
        return FAILED
    cold = t.early or t.state != T_OPEN
    begin(c, up, to)
    if not tunnel_join(t, up):
        error[0] = -ENOMEM
        slab_give(&w.upstreams, up)
        return FAILED
    opened(c, up, connect_ms)
    c.up = up
    if cold and c.cluster != NULL:
        early_cluster(c, c.cluster)
    return DIALLED


cdef int joined(Conn* c, const Neighbour* near, const Peer* to, uint32_t connect_ms, bint pooled, int* error) noexcept nogil:
    """To a pod of this worker. QUEUED: it has no room, nothing was done."""
    cdef Worker* w = c.w
    cdef Upstream* up
    if pooled:
        up = pool_find(c.pod, to, NULL, NULL, near, c.x.request_done and idempotent(c.x.method))
        if up != NULL:
            up.conn = c
            c.up = up
            return DIALLED
    if not near_room(near):
        return QUEUED
    up = <Upstream*>slab_take(&w.upstreams)
    if up == NULL:
        error[0] = -ENOMEM
        return FAILED
    begin(c, up, to)
    if not near_join(near, up, to):
        error[0] = -ENOMEM
        slab_give(&w.upstreams, up)
        return FAILED
    opened(c, up, connect_ms)
    c.up = up
    return DIALLED


cdef int upstream_get(Conn* c, const Peer* to, const Peer* source, uint32_t connect_ms, bint pooled,
                      int* error) noexcept nogil:
    cdef int fd
    cdef Upstream* up
    cdef Asking asking
    cdef Neighbour near
    cdef Way way
    cdef int got
    error[0] = 0
    if to.port == PORT_OUTBOUND or to.port == PORT_INBOUND:
        error[0] = -EHOSTUNREACH        # ourselves: a loop
        return FAILED
    if near_way(c, to, &near):
        got = joined(c, &near, to, connect_ms, pooled, error)
        if got != QUEUED:
            c.secure = near.secure
            return got
    way = way_of(c, to, &asking, error)
    if way == WAY_LATER:
        return QUEUED
    if way != WAY_PLAIN:                # never by a socket instead
        return carried(c, &asking, to, connect_ms, pooled, error) if way == WAY_TUNNEL else FAILED
    if pooled:
        up = pool_find(c.pod, to, source, NULL, NULL, c.x.request_done and idempotent(c.x.method))
        if up != NULL:
            up.conn = c
            c.up = up
            return DIALLED
    fd = stock_take(c, to.family)
    if fd < 0:
        stock_wait(c, to.family)
        return QUEUED
    up = dial(c, fd, to, source, connect_ms, error)
    if up == NULL:
        return FAILED
    c.up = up
    return DIALLED


cdef void upstream_drop(Upstream* up, bint abort) noexcept nogil:
    if up.source.fd < 0:
        return
    if up.state == U_IDLE:
        pool_take(up)
    timer_clear(&up.w.loop.timers, &up.timer)
    if abort:
        source_abort(&up.source)
    source_close(&up.w.loop, &up.source)
    up.state = U_DEAD
    if up.conn != NULL and up.conn.up == up:
        up.conn.up = NULL
    up.conn = NULL
    up.pod.upstreams -= 1
    up.w.stats.upstream_open -= 1
    loop_bury(&up.w.loop, &up.grave, &up.w.upstreams, up)
