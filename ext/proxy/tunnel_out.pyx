"""See tunnel_out.pxd."""
from libc.errno cimport EACCES, EAGAIN, ECONNREFUSED, EINPROGRESS, EMFILE, ENOMEM
from libc.stdint cimport int32_t, int64_t, uint32_t
from libc.string cimport strlen
from posix.unistd cimport close
from ext.core.buffer cimport Buffer
from ext.core.loop cimport CARRIED, Carrier, Source, loop_again
from ext.core.protocol cimport KIND_CERTIFICATE, KIND_TRUST, LISTEN_OUTBOUND, PORT_HBONE
from ext.core.text cimport Span
from ext.proxy.account cimport account_failure
from ext.proxy.held cimport held_wait_key
from ext.proxy.keys cimport LACK_CERTIFICATE, LACK_NONE, Lack, credentials_of, lack_text, may_come
from ext.proxy.state cimport C_DETECT, T_OPEN, TUNNEL_OPEN_MS, TUNNELS_EACH, TUNNELS_POD, Captured, Conn, Tunnel, Upstream
from ext.proxy.stock cimport stock_forget, stock_take, stock_wait
from ext.proxy.tunnel cimport (tunnel_busy, tunnel_dirty, tunnel_finish, tunnel_going, tunnel_leave, tunnel_new, tunnel_opened,
                               tunnel_wakes)
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
    return workload != NULL and workload.tunnel == TUNNEL_HBONE and workload.index != c.facts.source


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


cdef GotTunnel tunnel_get(Conn* c, const Asking* asking, uint32_t open_ms, Tunnel** out, int* error) noexcept nogil:
    cdef Captured* pod = c.pod
    cdef Tunnel* t = pod.first_tunnel
    cdef Tunnel* after
    cdef Tunnel* busy = NULL
    cdef uint32_t same = 0
    cdef int fd
    out[0] = NULL
    while t != NULL:
        after = t.next
        if not t.server and not t.finishing and tunnel_fits(t, asking):
            if t.session.tls.credentials != asking.credentials:
                tunnel_finish(t)        # ours were renewed
            elif t.users < STREAMS_EACH and (t.state != T_OPEN or session_room(&t.session) > 0):
                same += 1
                if t.state != T_OPEN or not tunnel_busy(t):
                    out[0] = t
                    break
                busy = t
        t = after
    if out[0] == NULL and busy != NULL and same >= TUNNELS_EACH:
        out[0] = busy
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
    error[0] = stream_connect(fd, &asking.to)
    if error[0] != 0 and error[0] != -EINPROGRESS:
        close(fd)
        return TUNNEL_FAILED
    error[0] = 0
    t = tunnel_new(pod, fd, &OPS, asking.credentials, asking.own, asking.wanted, open_ms if open_ms < TUNNEL_OPEN_MS else TUNNEL_OPEN_MS)
    if t == NULL:
        error[0] = -ENOMEM
        return TUNNEL_FAILED
    t.remote = asking.to
    out[0] = t
    return TUNNEL_GOT


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
    if t.state == T_OPEN:
        if not open_stream(t, up):
            return False
        t.users += 1
        return True
    t.users += 1
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
