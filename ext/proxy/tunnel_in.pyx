"""See tunnel_in.pxd."""
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t
from libc.string cimport memset, strlen
from posix.unistd cimport close
from ext.core.buffer cimport Buffer
from ext.core.loop cimport CARRIED, Carrier, Source, loop_again
from ext.core.protocol cimport LISTEN_INBOUND, LISTEN_OUTBOUND, PORT_HBONE, PORT_INBOUND, PORT_OUTBOUND
from ext.core.shm cimport (DETAIL_DISTRUST, DETAIL_POD_CONNECTIONS, DETAIL_POD_DESCRIPTORS, DETAIL_TUNNEL_PROTOCOL, FLAG_DPE, FLAG_OM,
                           FLAG_UO)
from ext.core.text cimport Span
from ext.proxy.account cimport account_begin_tcp, account_failure
from ext.proxy.budget cimport admits
from ext.proxy.conn cimport conn_carried, conn_end, conn_refused
from ext.proxy.decide cimport identify
from ext.proxy.keys cimport LACK_NONE, Lack, credentials_of, lack_text, may_come
from ext.proxy.state cimport T_SHAKING, TUNNEL_OPEN_MS, TUNNELS_POD, Acceptor, Captured, Conn, Tunnel, Worker
from ext.proxy.tunnel cimport tunnel_dirty, tunnel_fail, tunnel_going, tunnel_new, tunnel_opened, tunnel_wakes
from ext.proxy.words cimport authority_read, baggage_write, forwarded_host, named_read, same_name
from ext.route.shapes cimport Pod, Service, Workload, WorkloadPort
from ext.route.tables cimport Tables, pod_by_handle, service_by_index
from ext.sys.stream cimport same_ip, stream_abort, stream_local
from ext.tunnel.session cimport session_text
from ext.tunnel.shapes cimport BAGGAGE_MAX, STREAM_OPENING, TROUBLE_SILENT, Asked, Ops, Session, Stream
from ext.tunnel.stream cimport (hbone_abort, hbone_accept, hbone_answer, hbone_drop, hbone_give, hbone_read, hbone_refuse, hbone_shut,
                                hbone_take, hbone_write)
from ext.tunnel.tls cimport TLS_ERROR_BYTES, Credentials

cdef enum:
    TELL_A_SECOND = 64          # of one pod, as in accept


# ---- what carries a Conn --------------------------------------------------------------------------------------------------------------

cdef int64_t carried_read(Source* source, void* data, size_t size) noexcept nogil:
    return hbone_read(<Stream*>source.stream, data, size)


cdef int64_t carried_write(Source* source, const void* data, size_t size) noexcept nogil:
    return hbone_write(<Stream*>source.stream, data, size)


cdef int64_t carried_take(Source* source, Buffer* b) noexcept nogil:
    return hbone_take(<Stream*>source.stream, b)


cdef int64_t carried_give(Source* source, Buffer* b) noexcept nogil:
    return hbone_give(<Stream*>source.stream, b)


cdef void carried_shut(Source* source) noexcept nogil:
    hbone_shut(<Stream*>source.stream)


cdef void carried_abort(Source* source) noexcept nogil:
    if (<Stream*>source.stream).state != STREAM_OPENING:        # else close answers
        hbone_abort(<Stream*>source.stream)


cdef void carried_close(Source* source) noexcept nogil:
    cdef Conn* c = <Conn*>source
    cdef Stream* stream = <Stream*>source.stream
    if stream.state == STREAM_OPENING:
        hbone_answer(stream, c.refusal, NULL)
    hbone_drop(stream, &c.w.pad)
    source.stream = NULL


cdef int carried_error(Source* source) noexcept nogil:
    return (<Stream*>source.stream).error


cdef bint carried_silent(Source* source) noexcept nogil:
    cdef Stream* stream = <Stream*>source.stream
    return stream.error == 0 and stream.waiting == 0 and not stream.fin_in


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


# ---- CONNECT ---------------------------------------------------------------------------------------------------------------------------

cdef bint is_ours(const Tunnel* t, const Peer* target) noexcept nogil:
    """An address of this pod, by what was dialled or by what the runtime told."""
    cdef const Pod* pod
    cdef uint32_t i
    if same_ip(&t.local, target):
        return True
    pod = pod_by_handle(t.w.tables, t.pod.handle)
    if pod != NULL:
        for i in range(pod.n_claims):
            if same_ip(<const Peer*>&pod.claims[i].place.address, target):
                return True
    return False


cdef bint find_target(const Tunnel* t, const Asked* asked, Peer* target, uint32_t* service) noexcept nogil:
    """The authority: an address of this pod, or a service that its workload is of, by name and port. `service` is that one, or
    the one that `forwarded` names: as ztunnel, by nothing else of that field is anybody believed (mesh-facts 1.6)."""
    cdef const Pod* pod = pod_by_handle(t.w.tables, t.pod.handle)
    cdef const Workload* workload = <const Workload*>pod.workload.current if pod != NULL else NULL
    cdef Span name
    cdef const WorkloadPort* port
    cdef uint16_t number = 0
    if authority_read(asked.authority, asked.authority_n, target) == 0:
        name = forwarded_host(asked.forwarded, asked.forwarded_n)
        if name.n > 0 and workload != NULL:
            port = named_port(t.w.tables, workload, name, 0, target.port)
            service[0] = port.service if port != NULL else 0
        return is_ours(t, target)
    if workload == NULL or named_read(asked.authority, asked.authority_n, &name, &number) != 0:
        return False
    port = named_port(t.w.tables, workload, name, number, 0)
    if port == NULL:
        return False
    target[0] = t.local
    target.port = port.target_port
    service[0] = port.service
    return True


cdef const WorkloadPort* named_port(Tables* tables, const Workload* workload, Span name, uint16_t port, uint16_t target) noexcept nogil:
    """A port of the service of that name; `port` is the service's, `target` the workload's, 0: any."""
    cdef const WorkloadPort* one
    cdef Service* service
    cdef uint32_t i
    for i in range(workload.n_ports):
        one = &workload.ports[i]
        if (port != 0 and one.service_port != port) or (target != 0 and one.target_port != target):
            continue
        service = service_by_index(tables, one.service)
        if service != NULL and same_name(service.hostname, name):
            return one
    return NULL


cdef void on_asks(Session* session, int32_t id, Asked* asked, bint ended) noexcept nogil:
    cdef Tunnel* t = <Tunnel*>session.owner
    cdef Captured* pod = t.pod
    cdef Peer target
    cdef Conn* c
    cdef Stream* stream
    cdef uint32_t service = 0
    cdef uint16_t details
    if not asked.method or not find_target(t, asked, &target, &service) or \
            target.port == PORT_OUTBOUND or target.port == PORT_INBOUND or target.port == PORT_HBONE:
        hbone_refuse(session, id, 400)
        return
    details = admits(pod, LISTEN_INBOUND)
    if not pod.attached or details != 0:
        hbone_refuse(session, id, 503)
        if details != 0:
            overloaded(t, details)
        return
    c = conn_carried(t, &t.remote, &target)
    if c == NULL:
        hbone_refuse(session, id, 503)
        return
    c.named = service
    c.source.fd = CARRIED
    c.source.carrier = &CARRIER
    stream = hbone_accept(session, id, ended, &c.source, &pod.buffers)
    c.source.stream = stream
    if stream == NULL:
        c.source.fd = -1
        conn_end(c, 0, 0, False)
        return
    loop_again(&t.w.loop, &c.source)    # begins in its own turn, not within the tunnel's


cdef void tunnel_accepted(Conn* c) noexcept nogil:
    cdef char[BAGGAGE_MAX] baggage
    cdef Span ours
    if c.tunnel != NULL and (<Stream*>c.source.stream).state == STREAM_OPENING:
        ours.p = baggage
        ours.n = baggage_write(baggage, sizeof(baggage), c)
        hbone_answer(<Stream*>c.source.stream, 200, &ours)


# ---- connections -------------------------------------------------------------------------------------------------------------------------

cdef void on_ready(Session* session) noexcept nogil:
    tunnel_opened(<Tunnel*>session.owner)


cdef Ops OPS
OPS.ready = on_ready
OPS.dirty = tunnel_dirty
OPS.going = tunnel_going
OPS.asks = on_asks
OPS.wakes = tunnel_wakes


cdef void tell(Captured* pod, uint8_t kind, const Peer* client, const Peer* target, Span why, uint8_t flag,
               uint16_t details) noexcept nogil:
    """Counted and, a bounded number of times, logged, as a connection that was refused."""
    cdef Conn* c
    cdef Worker* w = pod.w
    if w.loop.now_ns - pod.told_ns >= 1000000000:
        pod.told_ns = w.loop.now_ns
        pod.told = 0
    pod.told += 1
    c = conn_refused(pod, kind, client, target)
    if c == NULL:
        return
    c.unlogged = pod.told > TELL_A_SECOND
    identify(c)
    account_begin_tcp(c)
    if why.n > 0:
        account_failure(c, why)
    conn_end(c, flag, details, False)


cdef void tunnel_tell(Tunnel* t, Span why, uint8_t flag, uint16_t details) noexcept nogil:
    cdef Peer own
    if t.server:
        tell(t.pod, LISTEN_INBOUND, &t.remote, &t.local, why, flag, details)
        return
    memset(&own, 0, sizeof(Peer))
    stream_local(t.source.fd, &own)     # that it fails leaves the address out
    tell(t.pod, LISTEN_OUTBOUND, &own, &t.remote, why, flag, details)


cdef void tunnel_distrusts(Tunnel* t) noexcept nogil:
    cdef char[TLS_ERROR_BYTES] text
    cdef Span why
    why.p = text
    if t.state == T_SHAKING and t.session.tls.fault == 0:
        why.p = b"the handshake was not finished in time"
        why.n = <uint32_t>strlen(why.p)
    else:
        why.n = session_text(&t.session, text, sizeof(text))
    tunnel_tell(t, why, FLAG_DPE, DETAIL_DISTRUST if t.state == T_SHAKING else DETAIL_TUNNEL_PROTOCOL)


cdef void overloaded(Tunnel* t, uint16_t details) noexcept nogil:
    """A CONNECT for which the pod has no room: counted where accept counts."""
    cdef Span why
    if details == DETAIL_POD_CONNECTIONS:
        t.w.stats.refused_connections += 1
    elif details == DETAIL_POD_DESCRIPTORS:
        t.w.stats.refused_descriptors += 1
    else:
        t.w.stats.refused_memory += 1
    why.p = NULL
    why.n = 0
    tunnel_tell(t, why, FLAG_UO if details == DETAIL_POD_CONNECTIONS else FLAG_OM, details)


cdef bint shed_shaking(Captured* pod) noexcept nogil:
    """The oldest handshake of a full pod gives way to who comes now: who stalls them must not keep out those who do not. False: there
    is none."""
    cdef Tunnel* t = pod.first_tunnel
    cdef Tunnel* oldest = NULL
    while t != NULL:                    # the newest is first
        if t.server and t.state == T_SHAKING:
            oldest = t
        t = t.next
    if oldest == NULL:
        return False
    tunnel_fail(oldest, TROUBLE_SILENT)
    return True


cdef bint tunnel_waits(const Acceptor* acceptor) noexcept nogil:
    cdef char[TLS_ERROR_BYTES] text
    cdef const Pod* known = pod_by_handle(acceptor.w.tables, acceptor.pod.handle)
    cdef Lack lack = LACK_NONE
    if known == NULL:
        return True
    return known.identity != NULL and credentials_of(acceptor.w, known.identity, &lack, text) == NULL and may_come(lack)


cdef void tunnel_accept(Acceptor* acceptor, int fd, const Peer* client) noexcept nogil:
    cdef char[TLS_ERROR_BYTES] text
    cdef Captured* pod = acceptor.pod
    cdef const Pod* known = pod_by_handle(acceptor.w.tables, pod.handle)
    cdef Credentials* credentials = NULL
    cdef Lack lack = LACK_NONE
    cdef Peer local
    cdef Span why
    cdef Tunnel* t
    if pod.tunnels >= TUNNELS_POD and not shed_shaking(pod) or stream_local(fd, &local) != 0:
        acceptor.w.stats.refused_connections += 1
        stream_abort(fd)
        close(fd)
        return
    why.p = b"this pod has no identity: the runtime told none"
    if known != NULL and known.identity != NULL:
        credentials = credentials_of(acceptor.w, known.identity, &lack, text)
        why.p = lack_text(lack)
        if text[0] != 0:
            why.p = text
    if credentials == NULL:
        stream_abort(fd)
        close(fd)
        why.n = <uint32_t>strlen(why.p)
        tell(pod, LISTEN_INBOUND, client, &local, why, FLAG_DPE, DETAIL_DISTRUST)
        return
    t = tunnel_new(pod, fd, &OPS, credentials, known.identity, NULL, TUNNEL_OPEN_MS)
    if t == NULL:
        return
    t.remote = client[0]
    t.local = local
