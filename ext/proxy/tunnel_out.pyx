"""See tunnel_out.pxd."""
from libc.errno cimport EACCES, EAGAIN, ECONNREFUSED, EINPROGRESS, EMFILE, ENOMEM
from libc.stdint cimport int32_t, int64_t, uint32_t
from libc.string cimport strlen
from posix.unistd cimport close
from ext.core.buffer cimport Buffer
from ext.core.loop cimport CARRIED, Carrier, Source, loop_again, wall_us
from ext.core.protocol cimport KIND_CERTIFICATE, KIND_TRUST, LISTEN_OUTBOUND, PORT_HBONE
from ext.core.text cimport Span
from ext.proxy.account cimport account_failure
from ext.proxy.budget cimport descriptors_short, memory_tight
from ext.proxy.held cimport held_wait_key
from ext.proxy.keys cimport LACK_CERTIFICATE, LACK_NONE, Lack, credentials_of, lack_text, may_come
from ext.proxy.near cimport near_node
from ext.proxy.state cimport C_DETECT, T_OPEN, TUNNEL_OPEN_MS, TUNNELS_EACH, TUNNELS_POD, Captured, Conn, Tunnel, Upstream, Worker
from ext.proxy.stock cimport stock_forget, stock_spare, stock_take, stock_wait
from ext.proxy.tunnel cimport (tunnel_busy, tunnel_dirty, tunnel_finish, tunnel_going, tunnel_leave, tunnel_new, tunnel_opened,
                               tunnel_shunned, tunnel_wakes)
from ext.proxy.words cimport AUTHORITY_BYTES, authority_write, baggage_write, forwarded_write, trace_write
from ext.route.shapes cimport TUNNEL_HBONE, Address, Pod, Workload
from ext.route.tables cimport pod_by_handle, workload_by_address, workload_by_index
from ext.sys.stream cimport same_peer, stream_connect
from ext.tunnel.session cimport session_room
from ext.tunnel.shapes cimport Asked, Ops, Session, Stream
from ext.tunnel.stream cimport (hbone_abort, hbone_drop, hbone_give, hbone_open, hbone_read, hbone_shut, hbone_take,
                                hbone_write)
from ext.tunnel.tls cimport TLS_ERROR_BYTES

cdef enum:
    STREAMS_EACH = 100          # ztunnel's bound for one tunnel
    AHEAD_SHAKING = 4           # of a pod: more handshakes at a time are of requests that wait for them


# ---- what carries an Upstream ------------------------------------------------------------------------------------------------------

cdef int64_t carried_read(Source* source, void* data, size_t size) noexcept nogil:
    return hbone_read(<Stream*>source.stream, data, size) if source.stream != NULL else -EAGAIN


cdef int64_t carried_write(Source* source, const void* data, size_t size) noexcept nogil:
    return hbone_write(<Stream*>source.stream, data, size) if source.stream != NULL else -EAGAIN


cdef int64_t carried_take(Source* source, Buffer* b) noexcept nogil:
    return hbone_take(<Stream*>source.stream, b) if source.stream != NULL else -EAGAIN


cdef int64_t carried_give(Source* source, Buffer* b) noexcept nogil:
    return hbone_give(<Stream*>source.stream, b) if source.stream != NULL else -EAGAIN


cdef void carried_shut(Source* source) noexcept nogil:
    if source.stream != NULL:
        hbone_shut(<Stream*>source.stream)


cdef void carried_abort(Source* source) noexcept nogil:
    if source.stream != NULL:
        hbone_abort(<Stream*>source.stream)


cdef void carried_close(Source* source) noexcept nogil:
    cdef Upstream* up = <Upstream*>source
    if up.waits:
        forget_wait(up)
    if source.stream != NULL:
        hbone_drop(<Stream*>source.stream, &up.w.pad)
        source.stream = NULL
    tunnel_leave(up.tunnel)             # `tunnel` stays for whoever looks at a dead one within this turn


cdef int carried_error(Source* source) noexcept nogil:
    cdef Upstream* up = <Upstream*>source
    cdef Stream* stream = <Stream*>source.stream
    if stream == NULL:
        return up.error if up.error != 0 else -ECONNREFUSED
    if stream.error != 0 and stream.waiting > 0:
        return 0                        # it was answered, spoke and was reset, all within a turn: the error is behind the bytes
    if stream.error != 0 and up.conn != NULL:
        tell_status(up.conn, stream)
    return stream.error


cdef bint carried_silent(Source* source) noexcept nogil:
    cdef Stream* stream = <Stream*>source.stream
    return stream != NULL and stream.error == 0 and stream.waiting == 0 and not stream.fin_in


cdef void tell_status(Conn* c, const Stream* stream) noexcept nogil:
    cdef Span why
    if stream.status == 401:
        why.p = b"the destination's proxy answered 401: its policy denies this identity"
    elif stream.status == 503:
        why.p = b"the destination's proxy answered 503: it could not connect to the application"
    elif stream.status == 400:
        why.p = b"the destination's proxy answered 400: it does not serve that address"
    elif stream.status != 0:
        why.p = b"the destination's proxy refused the connection"
    else:
        why.p = b"the tunnel's stream was reset before it was answered"
    why.n = <uint32_t>strlen(why.p)
    account_failure(c, why)


cdef Carrier CARRIER
CARRIER.read = carried_read
CARRIER.write = carried_write
CARRIER.take = carried_take
CARRIER.give = carried_give
CARRIER.shut = carried_shut
CARRIER.abort = carried_abort
CARRIER.close = carried_close
CARRIER.error = carried_error
CARRIER.silent = carried_silent


# ---- who must be reached, and as whom ---------------------------------------------------------------------------------------------------

cdef Way refuse(Conn* c, const char* text, int* error) noexcept nogil:
    cdef Span why
    why.p = text
    why.n = <uint32_t>strlen(text)
    account_failure(c, why)
    error[0] = -EACCES
    return WAY_NONE


cdef Workload* destination_of(Conn* c, const Peer* to) noexcept nogil:
    cdef Workload* workload = NULL
    if c.facts.destination != 0:
        workload = workload_by_index(c.w.tables, c.facts.destination)
    return workload if workload != NULL else workload_by_address(c.w.tables, <const Address*>to)


cdef bint secure_way(Conn* c, const Peer* to) noexcept nogil:
    cdef Workload* workload = destination_of(c, to)
    return workload != NULL and workload.tunnel == TUNNEL_HBONE and workload.index != c.facts.source and not near_node(c, to)


cdef Way way_of(Conn* c, const Peer* to, Asking* out, int* error) noexcept nogil:
    cdef char[TLS_ERROR_BYTES] text
    cdef Workload* workload
    cdef const Pod* pod
    cdef const char* why
    cdef Lack lack = LACK_NONE
    if c.kind != LISTEN_OUTBOUND:
        return WAY_PLAIN
    c.secure = secure_way(c, to)
    if not c.secure:
        return WAY_PLAIN                # not of the mesh, or the pod itself
    workload = destination_of(c, to)
    pod = pod_by_handle(c.w.tables, c.pod.handle)
    if pod == NULL or pod.identity == NULL:
        return refuse(c, b"the destination wants a tunnel, and this pod has no identity", error)
    if workload.identity == NULL:
        return refuse(c, b"the destination wants a tunnel, and its identity is not known", error)
    out.own = pod.identity
    out.wanted = workload.identity
    out.to = to[0]
    out.to.port = PORT_HBONE
    out.credentials = credentials_of(c.w, pod.identity, &lack, text)
    if out.credentials == NULL:
        if c.state == C_DETECT:
            error[0] = -EACCES          # dialled early: the end of detection waits
            return WAY_NONE
        if not c.unconfigured and may_come(lack):
            if held_wait_key(c, KIND_CERTIFICATE if lack == LACK_CERTIFICATE else KIND_TRUST,
                             pod.identity.name if lack == LACK_CERTIFICATE else pod.identity.parts.domain) == 0:
                return WAY_LATER
        c.unconfigured = 0
        why = lack_text(lack)
        if text[0] != 0:
            why = text
        return refuse(c, why, error)
    c.unconfigured = 0
    return WAY_TUNNEL


# ---- which tunnel ------------------------------------------------------------------------------------------------------------------------

cdef bint tunnel_fits(const Tunnel* t, const Asking* asking) noexcept nogil:
    return t.wanted == asking.wanted and t.own == asking.own and same_peer(&t.remote, &asking.to)


cdef inline uint32_t room_of(const Tunnel* t) noexcept nogil:
    """For so many more streams: of an open one."""
    cdef uint32_t room = session_room(&t.session)
    if t.users >= STREAMS_EACH:
        return 0
    return room if room < STREAMS_EACH - t.users else STREAMS_EACH - t.users


cdef inline bint nearly_full(const Tunnel* t, uint32_t room) noexcept nogil:
    return t.users >= 3 * room


cdef Tunnel* start(Captured* pod, int fd, const Asking* asking, uint32_t open_ms, int* error) noexcept nogil:
    """Takes the descriptor over."""
    cdef Tunnel* t
    error[0] = stream_connect(fd, &asking.to)
    if error[0] != 0 and error[0] != -EINPROGRESS:
        close(fd)
        return NULL
    t = tunnel_new(pod, fd, &OPS, asking.credentials, asking.own, asking.wanted, open_ms if open_ms < TUNNEL_OPEN_MS else TUNNEL_OPEN_MS)
    error[0] = 0 if t != NULL else -ENOMEM
    if t != NULL:
        t.remote = asking.to
    return t


cdef Ahead tunnel_ahead(Captured* pod, const Asking* asking) noexcept nogil:
    cdef Worker* w = pod.w
    cdef Tunnel* t = pod.first_tunnel
    cdef uint32_t unused = 0, shaking = 0, room
    cdef int fd, error = 0
    if w.tables.settings.early_tunnels == 0 or not pod.attached or w.draining:
        return AHEAD_NONE
    while t != NULL:
        if not t.server and not t.finishing and t.session.tls.credentials == asking.credentials and tunnel_fits(t, asking):
            if t.state != T_OPEN:
                return AHEAD_COMING
            room = room_of(t)
            if room > 0 and not nearly_full(t, room) and not tunnel_busy(t):
                return AHEAD_THERE
        if not t.server:
            unused += t.early
            shaking += t.state != T_OPEN
        t = t.next
    if unused >= w.tables.settings.early_tunnels or shaking >= AHEAD_SHAKING or pod.tunnels >= TUNNELS_POD // 2 or memory_tight(pod) or \
            descriptors_short(pod, 1) or tunnel_shunned(w, &asking.to):
        return AHEAD_NONE
    fd = stock_spare(pod, asking.to.family)
    if fd < 0:
        return AHEAD_NONE
    t = start(pod, fd, asking, TUNNEL_OPEN_MS, &error)
    if t == NULL:
        return AHEAD_NONE
    t.early = 1
    w.stats.tunnels_early += 1
    return AHEAD_COMING


cdef void finish_old(Captured* pod, const Asking* asking) noexcept nogil:
    """Our credentials were renewed."""
    cdef Tunnel* t = pod.first_tunnel
    cdef Tunnel* after
    while t != NULL:
        after = t.next
        if not t.server and not t.finishing and tunnel_fits(t, asking) and t.session.tls.credentials != asking.credentials:
            tunnel_finish(t)
        t = after


cdef Tunnel* find(Captured* pod, const Asking* asking) noexcept nogil:
    """An open one before one that is still shaking hands; one that a bulk transfer has only when there may be no more. NULL: dial."""
    cdef Tunnel* t = pod.first_tunnel
    cdef Tunnel* full = NULL
    cdef Tunnel* coming = NULL
    cdef Tunnel* busy = NULL
    cdef Tunnel* old = NULL
    cdef uint32_t same = 0, room
    cdef bint renewed = False
    while t != NULL:
        if not t.server and not t.finishing and tunnel_fits(t, asking):
            room = room_of(t) if t.state == T_OPEN else 0
            if t.session.tls.credentials != asking.credentials:
                renewed = True
                if room > 0 and t.session.tls.credentials.not_after > wall_us() // 1000000:
                    old = t
            elif t.state != T_OPEN:
                if t.users < STREAMS_EACH:
                    same += 1
                    coming = t
            elif room > 0:
                same += 1
                if tunnel_busy(t):
                    busy = t
                elif not nearly_full(t, room):
                    return t
                else:
                    full = t
        t = t.next
    if full != NULL:
        if coming == NULL:
            tunnel_ahead(pod, asking)
        return full
    if old != NULL and tunnel_ahead(pod, asking) == AHEAD_COMING:
        return old                      # until the new one is open, or cannot be
    if renewed:
        finish_old(pod, asking)
    if coming == NULL and same >= TUNNELS_EACH:
        return busy
    return coming


cdef GotTunnel tunnel_get(Conn* c, const Asking* asking, uint32_t open_ms, Tunnel** out, int* error) noexcept nogil:
    cdef Captured* pod = c.pod
    cdef int fd
    out[0] = find(pod, asking)
    if out[0] != NULL:
        stock_forget(c)
        return TUNNEL_GOT
    if pod.tunnels >= TUNNELS_POD:
        error[0] = -EMFILE
        return TUNNEL_FAILED
    fd = stock_take(c, asking.to.family)
    if fd < 0:
        stock_wait(c, asking.to.family)
        return TUNNEL_QUEUED
    out[0] = start(pod, fd, asking, open_ms, error)
    return TUNNEL_GOT if out[0] != NULL else TUNNEL_FAILED


cdef void forget_wait(Upstream* up) noexcept nogil:
    cdef Tunnel* t = up.tunnel
    up.waits = 0
    if up.wait_prev != NULL:
        up.wait_prev.wait_next = up.wait_next
    else:
        t.waits_first = up.wait_next
    if up.wait_next != NULL:
        up.wait_next.wait_prev = up.wait_prev
    else:
        t.waits_last = up.wait_prev
    up.wait_prev = up.wait_next = NULL


cdef bint open_stream(Tunnel* t, Upstream* up) noexcept nogil:
    cdef char[AUTHORITY_BYTES] authority
    cdef char[512] forwarded
    cdef char[1024] baggage
    cdef char[64] trace
    cdef Span[4] texts
    cdef Conn* c = up.conn
    texts[0].p = authority
    texts[0].n = authority_write(authority, &up.remote)
    texts[1].p = forwarded
    texts[1].n = forwarded_write(forwarded, sizeof(forwarded), c)
    texts[2].p = baggage
    texts[2].n = baggage_write(baggage, sizeof(baggage), c)
    texts[3].p = trace
    texts[3].n = trace_write(trace, c)
    up.source.stream = hbone_open(&t.session, &up.source, &t.pod.buffers, &texts[0], &texts[1], &texts[2], &texts[3])
    return up.source.stream != NULL


cdef bint tunnel_join(Tunnel* t, Upstream* up) noexcept nogil:
    up.source.fd = CARRIED
    up.source.carrier = &CARRIER
    up.tunnel = t
    if t.early:
        t.early = 0
        t.w.stats.tunnels_early_used += 1
    if t.state == T_OPEN:
        if not open_stream(t, up):
            return False
        t.users += 1
        return True
    t.users += 1
    t.w.stats.tunnels_waited += 1
    up.waits = 1
    up.wait_next = NULL
    up.wait_prev = t.waits_last
    if t.waits_last != NULL:
        t.waits_last.wait_next = up
    else:
        t.waits_first = up
    t.waits_last = up
    return True


cdef void on_ready(Session* session) noexcept nogil:
    cdef Tunnel* t = <Tunnel*>session.owner
    cdef Upstream* up = t.waits_first
    tunnel_opened(t)
    while up != NULL:
        forget_wait(up)
        if not open_stream(t, up):
            up.error = -ENOMEM
            up.source.failed = 1
            loop_again(&t.w.loop, &up.source)
        up = t.waits_first


cdef void on_asks(Session* session, int32_t id, Asked* asked, bint ended) noexcept nogil:
    pass                                # a server asks nothing; libnghttp2 lets none through


cdef Ops OPS
OPS.ready = on_ready
OPS.dirty = tunnel_dirty
OPS.going = tunnel_going
OPS.asks = on_asks
OPS.wakes = tunnel_wakes
