"""See accept.pxd."""
from libc.errno cimport EAGAIN, ECONNABORTED, EINTR
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from posix.unistd cimport close
from ext.core.loop cimport Source, loop_listen, loop_over, source_close
from ext.core.pipes cimport pipes_shed
from ext.core.protocol cimport LISTEN_HBONE, LISTEN_INBOUND, LISTEN_OUTBOUND, PORT_INBOUND, PORT_OUTBOUND
from ext.core.shm cimport DETAIL_POD_CONNECTIONS, DETAIL_POD_DESCRIPTORS, DETAIL_POD_MEMORY, FLAG_OM, FLAG_UO
from ext.core.slab cimport slab_take
from ext.core.timer cimport Timer, timer_clear, timer_init, timer_set
from ext.proxy.account cimport account_begin_tcp
from ext.proxy.budget cimport admission, budget_share
from ext.proxy.conn cimport conn_end, conn_new, pod_retire
from ext.proxy.decide cimport identify
from ext.proxy.flow cimport flow_start
from ext.proxy.shed cimport shed_idle
from ext.proxy.state cimport (ACCEPT_BATCH, ACCEPT_PAUSE_MS, PAUSED_DESCRIPTORS, PAUSED_FULL, PORTS, REFUSING, RUNNING, Acceptor,
                              Captured, Conn, Worker, pod_find)
from ext.proxy.stock cimport stock_close, stock_open, stock_shed
from ext.proxy.tunnel cimport tunnels_finish
from ext.proxy.tunnel_in cimport tunnel_accept, tunnel_waits
from ext.proxy.upstream cimport pool_close, pool_shed
from ext.sys.stream cimport Peer, stream_abort, stream_accept, stream_local, stream_original

cdef enum:
    TELL_A_SECOND = 64          # refusals of one pod that are logged; all are counted


cdef void refuse(int fd) noexcept nogil:
    stream_abort(fd)
    close(fd)


cdef void accept_shed(Worker* w) noexcept nogil:
    """What is kept in advance gives way to who is waiting now."""
    cdef Captured* pod = w.first_pod
    while pod != NULL:
        stock_shed(pod)
        pool_shed(pod)
        pod = pod.next
    pipes_shed(&w.pipes)


cdef uint16_t may_accept(Acceptor* acceptor) noexcept nogil:
    """0, or the Detail that says why not, when nothing of the pod could make room."""
    cdef uint16_t why = admission(acceptor)
    if why == DETAIL_POD_DESCRIPTORS:
        stock_shed(acceptor.pod)
        pool_shed(acceptor.pod)
        why = admission(acceptor)
    if why != 0 and why != DETAIL_POD_MEMORY and shed_idle(acceptor.pod):
        why = admission(acceptor)
    return why


cdef void refuse_told(Conn* c, uint16_t why) noexcept nogil:
    """Reset, counted and, a bounded number of times, logged: the pod that floods must not fill the log of the others."""
    cdef Captured* pod = c.pod
    cdef Worker* w = c.w
    if w.loop.now_ns - pod.told_ns >= 1000000000:
        pod.told_ns = w.loop.now_ns
        pod.told = 0
    pod.told += 1
    c.unlogged = pod.told > TELL_A_SECOND
    if why == DETAIL_POD_CONNECTIONS:
        w.stats.refused_connections += 1
    elif why == DETAIL_POD_DESCRIPTORS:
        w.stats.refused_descriptors += 1
    else:
        w.stats.refused_memory += 1
    identify(c)
    account_begin_tcp(c)
    conn_end(c, FLAG_UO if why == DETAIL_POD_CONNECTIONS else FLAG_OM, why, True)


cdef void pause(Acceptor* acceptor, uint8_t how) noexcept nogil:
    cdef Worker* w = acceptor.w
    acceptor.paused = how
    loop_listen(&w.loop, &acceptor.source, 0)
    timer_set(&w.loop.timers, &acceptor.pause, w.loop.now_ns + <uint64_t>ACCEPT_PAUSE_MS * 1000000)


cdef int dialled(Acceptor* acceptor, int fd, const Peer* client, Peer* target) noexcept nogil:
    """Where the client connected to; -errno when no capture brought it here.

    With another local port than the listener's the kernel (sk_lookup) chose this listener for it, and its local address is the one that
    was dialled. Nobody else can bring that about.
    """
    if acceptor.kind == LISTEN_INBOUND and stream_local(fd, target) == 0 and target.family != 0 and target.port != PORT_INBOUND:
        return 0
    return stream_original(fd, client.family, target)


cdef void on_ready(Source* source, uint32_t events) noexcept nogil:
    cdef Acceptor* acceptor = <Acceptor*>source
    cdef Worker* w = acceptor.w
    cdef Peer client, target
    cdef Conn* c
    cdef uint16_t why
    cdef int _turn, fd
    cdef bint waits = acceptor.kind == LISTEN_HBONE and tunnel_waits(acceptor)
    for _turn in range(ACCEPT_BATCH):
        why = may_accept(acceptor)
        if (why != 0 or waits) and acceptor.paused != REFUSING:
            if acceptor.full_ns == 0:
                acceptor.full_ns = w.loop.now_ns
            pause(acceptor, PAUSED_FULL)
            return
        fd = stream_accept(source.fd, &client)
        if fd == -EAGAIN:
            return
        if fd == -ECONNABORTED or fd == -EINTR:
            continue
        if fd < 0:
            w.stats.accept_errors += 1
            accept_shed(w)
            pause(acceptor, PAUSED_DESCRIPTORS)
            return
        if acceptor.kind == LISTEN_HBONE:
            if why != 0:
                w.stats.refused_connections += 1
                refuse(fd)
            else:
                if not waits:
                    acceptor.paused = RUNNING
                    acceptor.full_ns = 0
                tunnel_accept(acceptor, fd, &client)
            if source.fd < 0 or loop_over(&w.loop):
                return
            continue
        if dialled(acceptor, fd, &client, &target) != 0 or target.port == PORT_OUTBOUND or target.port == PORT_INBOUND:
            refuse(fd)
            continue
        c = conn_new(acceptor, fd, &client, &target)
        if c == NULL:
            w.stats.accept_errors += 1
            continue
        if why != 0:
            refuse_told(c, why)
        else:
            acceptor.paused = RUNNING
            acceptor.full_ns = 0
            flow_start(c)
        if source.fd < 0 or loop_over(&w.loop):
            return


cdef void on_pause(Timer* timer) noexcept nogil:
    cdef Acceptor* acceptor = <Acceptor*>timer.owner
    cdef Worker* w = acceptor.w
    if acceptor.source.fd < 0 or (acceptor.paused != PAUSED_DESCRIPTORS and acceptor.paused != PAUSED_FULL):
        return
    if acceptor.paused == PAUSED_FULL and (may_accept(acceptor) != 0 or (acceptor.kind == LISTEN_HBONE and tunnel_waits(acceptor))):
        if w.loop.now_ns - acceptor.full_ns < <uint64_t>w.tables.settings.hold_timeout_ms * 1000000:
            timer_set(&w.loop.timers, &acceptor.pause, w.loop.now_ns + <uint64_t>ACCEPT_PAUSE_MS * 1000000)
            return
        acceptor.paused = REFUSING
    else:
        acceptor.paused = RUNNING
    loop_listen(&w.loop, &acceptor.source, 1)


cdef void close_listeners(Captured* pod) noexcept nogil:
    cdef int i
    for i in range(PORTS):
        timer_clear(&pod.w.loop.timers, &pod.acceptors[i].pause)
        source_close(&pod.w.loop, &pod.acceptors[i].source)


cdef int pod_attach(Worker* w, uint32_t handle, const uint8_t* kinds, const int* fds, uint32_t n) noexcept nogil:
    cdef Captured* pod = pod_find(w, handle)
    cdef Acceptor* acceptor
    cdef uint32_t i
    cdef bint fresh = pod == NULL
    if fresh:
        pod = <Captured*>slab_take(&w.pods)
        if pod == NULL:
            for i in range(n):
                close(fds[i])
            return -1
        pod.w = w
        pod.handle = handle
        budget_share(pod)
        pod.chain = w.by_handle[handle & 255]
        w.by_handle[handle & 255] = pod
        pod.next = w.first_pod
        w.first_pod = pod
        for i in range(PORTS):
            pod.acceptors[i].source.fd = -1
            timer_init(&pod.acceptors[i].pause, on_pause, &pod.acceptors[i])
    else:
        close_listeners(pod)
    pod.attached = 1
    for i in range(n):
        if i >= PORTS or kinds[i] < LISTEN_OUTBOUND or kinds[i] > LISTEN_HBONE or w.draining:
            close(fds[i])
            continue
        acceptor = &pod.acceptors[i]
        acceptor.source.fd = fds[i]
        acceptor.source.shared = 1
        acceptor.source.ready = on_ready
        acceptor.source.flow = &pod.flow
        acceptor.pod = pod
        acceptor.w = w
        acceptor.kind = kinds[i]
        acceptor.paused = RUNNING
        acceptor.full_ns = 0
        loop_listen(&w.loop, &acceptor.source, 1)
    if fresh:
        stock_open(pod)
    return 0


cdef void pod_detach(Captured* pod) noexcept nogil:
    close_listeners(pod)
    pod.attached = 0
    pool_close(pod)
    stock_close(pod)
    tunnels_finish(pod)
    pipes_shed(&pod.w.pipes)
    pod_retire(pod)
