"""See tunnel.pxd."""
from libc.errno cimport EAGAIN, ECONNREFUSED, EINTR, ETIMEDOUT
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, strlen
from posix.unistd cimport close
from ext.core.buffer cimport buffers_count, buffers_uncount
from ext.core.loop cimport Source, loop_add, loop_again, loop_bury, loop_over, source_close, wall_us
from ext.core.slab cimport slab_give, slab_take
from ext.core.text cimport Span
from ext.core.timer cimport Timer, timer_clear, timer_init, timer_set
from ext.proxy.account cimport account_failure
from ext.proxy.budget cimport memory_tight
from ext.proxy.state cimport (BUSY_BYTES, PUMP_ROUNDS, T_CONNECTING, T_DEAD, T_OPEN, T_SHAKING, Captured, Tunnel, Upstream, Worker)
from ext.route.shapes cimport Identity
from ext.route.slots cimport identity_drop
from ext.sys.stream cimport Peer, same_peer, stream_error, stream_read, stream_write
from ext.tunnel.session cimport (pad_open, session_close, session_end, session_feed, session_init, session_leave, session_over,
                                 session_ping, session_pull, session_sweep, session_text)
from ext.tunnel.shapes cimport (SEALED_BYTES, SINK_BYTES, TROUBLE_CLOSED, TROUBLE_FLOOD, TROUBLE_HTTP2, TROUBLE_NONE,
                                TROUBLE_SILENT, Ops, Session)
from ext.tunnel.tls cimport TLS_ERROR_BYTES, Credentials, tls_keep_buffers

cdef enum:
    LEFT_BYTES = SINK_BYTES + 65536     # what one pull makes, and an alert behind it
    LEAVE_MS = 1000                     # between "there will be a last stream" and "this was it": a round trip, generously
    SHUN_NS = 10000000000               # a destination whose tunnel failed is not dialled ahead for so long


cdef int tunnels_open(Worker* w) noexcept nogil:
    w.tunnels.size = sizeof(Tunnel)
    w.sealed = <char*>malloc(SEALED_BYTES)
    tls_keep_buffers()
    return 0 if w.sealed != NULL and pad_open(&w.pad) == 0 else -1


# ---- its life ---------------------------------------------------------------------------------------------------------------------

cdef Tunnel* tunnel_new(Captured* pod, int fd, const Ops* ops, Credentials* credentials, Identity* own, Identity* wanted,
                        uint32_t open_ms) noexcept nogil:
    cdef Worker* w = pod.w
    cdef Tunnel* t = <Tunnel*>slab_take(&w.tunnels)
    cdef bint server = wanted == NULL
    if t == NULL:
        close(fd)
        return NULL
    t.source.fd = fd
    t.source.shared = not server
    t.source.ready = on_event
    t.source.flow = &pod.flow
    t.w = w
    t.pod = pod
    t.server = server
    t.state = T_SHAKING if server else T_CONNECTING
    if not server:
        t.expected = wanted.name
    if loop_add(&w.loop, &t.source) != 0 or session_init(&t.session, &w.pad, ops, t, credentials, server, &t.expected,
                                                         0 if server else 1) != 0:
        close(fd)
        slab_give(&w.tunnels, t)
        return NULL
    t.own = own
    t.wanted = wanted
    own.refs += 1
    if wanted != NULL:
        wanted.refs += 1
    t.next = pod.first_tunnel
    if t.next != NULL:
        t.next.prev = t
    pod.first_tunnel = t
    pod.tunnels += 1
    w.n_tunnels += 1
    w.stats.tunnels_open += 1
    t.used_ns = t.second_ns = w.loop.now_ns
    t.opened_us = wall_us()
    timer_init(&t.timer, on_timer, t)
    timer_set(&w.loop.timers, &t.timer, w.loop.now_ns + <uint64_t>open_ms * 1000000)
    return t


cdef void bury(Tunnel* t) noexcept nogil:
    if t.state == T_DEAD and t.users == 0:
        t.users = 0xffffffff            # once
        loop_bury(&t.w.loop, &t.grave, &t.w.tunnels, t)


cdef void tunnel_leave(Tunnel* t) noexcept nogil:
    t.users -= 1
    bury(t)


cdef Span tunnel_silence(uint8_t state) noexcept nogil:
    cdef Span why
    if state == T_CONNECTING:
        why.p = b"no answer on 15008 of the destination in time: does a NetworkPolicy or a firewall stand between the nodes?"
    elif state == T_SHAKING:
        why.p = b"the destination's proxy took 15008's connection and did not finish the handshake in time: does it wait for a certificate?"
    else:
        why.p = b"the destination's proxy did not answer in time: could it reach the application?"
    why.n = <uint32_t>strlen(why.p)
    return why


cdef void tell_waiters(Tunnel* t, uint8_t state) noexcept nogil:
    """`state`: which it was in when it failed."""
    cdef char[TLS_ERROR_BYTES] text
    cdef Span why
    cdef Upstream* up = t.waits_first
    why.p = text
    why.n = 0
    if up != NULL and t.error == -ETIMEDOUT:
        why = tunnel_silence(state)
    elif up != NULL and t.error == -ECONNREFUSED:
        why.p = b"15008 of the destination refused the connection: no mesh proxy listens for that pod now"
        why.n = <uint32_t>strlen(why.p)
    elif up != NULL and state == T_SHAKING and t.session.trouble == TROUBLE_CLOSED:
        why.p = b"the destination's proxy closed 15008 within the handshake: it has no certificate, or does not believe ours"
        why.n = <uint32_t>strlen(why.p)
    elif up != NULL and t.session.trouble != TROUBLE_NONE:
        why.n = session_text(&t.session, text, sizeof(text))
    while up != NULL:
        t.waits_first = up.wait_next
        up.waits = 0
        up.wait_prev = up.wait_next = NULL
        up.error = t.error if t.error != 0 else -ECONNREFUSED
        up.source.failed = 1
        if up.conn != NULL and why.n > 0:
            account_failure(up.conn, why)
        loop_again(&t.w.loop, &up.source)
        up = t.waits_first
    t.waits_last = NULL


cdef uint64_t* shunned(Worker* w, const Peer* to) noexcept nogil:
    cdef uint32_t hash = 2166136261
    cdef int i
    for i in range(4 if to.family == 4 else 16):
        hash = (hash ^ to.ip[i]) * 16777619
    return &w.shunned[(hash ^ (hash >> 15)) & 255]


cdef bint tunnel_shunned(Worker* w, const Peer* to) noexcept nogil:
    cdef uint64_t since = shunned(w, to)[0]
    return since != 0 and w.loop.now_ns - since < SHUN_NS


cdef void tried(Tunnel* t, bint reached) noexcept nogil:
    """A dialled one is open, or will never be: who bridged the time until then need not do so any longer."""
    cdef Tunnel* one = t.pod.first_tunnel
    cdef Tunnel* after
    while one != NULL:
        after = one.next
        if one != t and one.own == t.own and one.wanted == t.wanted and same_peer(&one.remote, &t.remote):
            one.bridged = 0
            if one.parting:
                loop_again(&t.w.loop, &one.source)
            if reached and one.session.tls.credentials != t.session.tls.credentials:
                tunnel_finish(one)      # ours were renewed
        one = after
    shunned(t.w, &t.remote)[0] = 0 if reached else t.w.loop.now_ns


cdef void tunnel_fail(Tunnel* t, uint8_t trouble) noexcept nogil:
    cdef Worker* w = t.w
    cdef Captured* pod = t.pod
    cdef uint8_t state
    if t.state == T_DEAD:
        return
    if t.session.trouble == TROUBLE_NONE:
        t.session.trouble = trouble
    if not t.server and t.state != T_OPEN:
        tried(t, False)
    elif not t.server and (not t.finishing or t.gone) and t.session.trouble == TROUBLE_CLOSED:
        w.follows(t)
    if t.server and (t.session.trouble == TROUBLE_FLOOD or t.session.trouble == TROUBLE_HTTP2 or t.state == T_SHAKING and (
            t.session.tls.fault != 0 or t.session.trouble == TROUBLE_SILENT)):
        w.distrusts(t)
    w.stats.tunnels_failed += t.state != T_OPEN
    state = t.state
    t.state = T_DEAD
    tell_waiters(t, state)
    session_close(&t.session)
    timer_clear(&w.loop.timers, &t.timer)
    source_close(&w.loop, &t.source)
    forget_left(t)
    identity_drop(&w.tables.names, t.own)
    if t.wanted != NULL:
        identity_drop(&w.tables.names, t.wanted)
    if t.prev != NULL:
        t.prev.next = t.next
    else:
        pod.first_tunnel = t.next
    if t.next != NULL:
        t.next.prev = t.prev
    if pod.recall == t:
        pod.recall = t.next
    pod.tunnels -= 1
    w.n_tunnels -= 1
    w.ended += 1
    w.stats.tunnels_open -= 1
    bury(t)
    if not pod.attached:
        w.retire(pod)


cdef void forget_left(Tunnel* t) noexcept nogil:
    if t.left != NULL:
        buffers_uncount(&t.pod.buffers, LEFT_BYTES)
        free(t.left)
        t.left = NULL


cdef void settle(Tunnel* t) noexcept nogil:
    """Ends one that is finishing and has nothing left to do."""
    if t.state == T_DEAD or not t.finishing:
        return
    if t.state == T_OPEN:
        if t.session.streams == 0 and t.session.leaving != 3 and not (t.server and t.session.leaving == 1 and t.pod.attached):
            session_end(&t.session)
            t.session.leaving = 3
    elif t.waits_first == NULL:
        tunnel_fail(t, TROUBLE_CLOSED)


cdef void tunnel_finish(Tunnel* t) noexcept nogil:
    if t.state == T_DEAD:
        return
    if not t.finishing and t.server and t.state == T_OPEN and t.session.streams > 0:
        session_leave(&t.session)
        timer_set(&t.w.loop.timers, &t.timer, t.w.loop.now_ns + <uint64_t>LEAVE_MS * 1000000)
    t.finishing = 1
    settle(t)


cdef void tunnels_retire(Captured* pod) noexcept nogil:
    """RFC 9113 6.8: the notice first, and the last stream's number when what a peer sent before it heard has come. Who asks then is
    served, unlike by a pod that is not attached any more."""
    cdef Tunnel* t = pod.first_tunnel
    while t != NULL:
        if t.server and t.state == T_OPEN and not t.finishing:
            session_leave(&t.session)
            timer_set(&t.w.loop.timers, &t.timer, t.w.loop.now_ns + <uint64_t>LEAVE_MS * 1000000)
            t.finishing = 1
        t = t.next


cdef void tunnels_finish(Captured* pod) noexcept nogil:
    cdef Tunnel* t = pod.first_tunnel
    cdef Tunnel* after
    while t != NULL:
        after = t.next
        tunnel_finish(t)
        t = after


cdef void tunnel_opened(Tunnel* t) noexcept nogil:
    t.state = T_OPEN
    t.w.stats.tunnels_opened += 1
    if not t.server:
        tried(t, True)
    timer_set(&t.w.loop.timers, &t.timer, t.w.loop.now_ns + (1 if t.doubted else <uint64_t>ping_ms(t) * 1000000))


cdef uint32_t ping_ms(const Tunnel* t) noexcept nogil:
    """Until it is looked at next; one that we dialled ends in time when nobody uses it."""
    cdef uint32_t ping = t.w.tables.settings.tunnel_ping_ms
    if not t.server and t.w.tables.settings.tunnel_idle_ms < ping:
        return t.w.tables.settings.tunnel_idle_ms
    return ping


cdef bint tunnel_busy(Tunnel* t) noexcept nogil:
    cdef uint64_t now = t.w.loop.now_ns
    if now - t.second_ns >= 1000000000:
        t.rate = (t.session.moved - t.second_moved) * 1000000000 // (now - t.second_ns)
        t.second_moved = t.session.moved
        t.second_ns = now
    return t.rate > BUSY_BYTES or t.session.moved - t.second_moved > BUSY_BYTES


cdef void tunnel_dirty(Session* session) noexcept nogil:
    cdef Tunnel* t = <Tunnel*>session.owner
    if t.state != T_CONNECTING:
        loop_again(&t.w.loop, &t.source)


cdef void tunnel_going(Session* session) noexcept nogil:
    cdef Tunnel* t = <Tunnel*>session.owner
    t.gone = not t.server and not t.finishing
    t.parting = not t.server
    t.finishing = 1                     # settled when what came has been fed


cdef void tunnel_wakes(Session* session, Source* source) noexcept nogil:
    loop_again(&(<Tunnel*>session.owner).w.loop, source)


# ---- bytes --------------------------------------------------------------------------------------------------------------------------

cdef int write_left(Tunnel* t) noexcept nogil:
    """0: all that was left is out, or the socket takes no more. -1: it is broken."""
    cdef int64_t n
    while t.left_at < t.left_end and t.source.writable:
        n = stream_write(t.source.fd, t.left + t.left_at, t.left_end - t.left_at)
        if n > 0:
            t.left_at += <uint32_t>n
        elif n == -EAGAIN:
            t.source.writable = 0
        elif n != -EINTR:
            return -1
    if t.left_at == t.left_end:
        t.left_at = t.left_end = 0
        if t.left != NULL and memory_tight(t.pod):
            forget_left(t)              # rather than in on_timer: others of the pod need the bytes
    return 0


cdef int send(Tunnel* t) noexcept nogil:
    """What is in the sink, behind what was left. 0, or -1: broken, or no memory."""
    cdef char* data = t.w.pad.sink.data
    cdef uint32_t at = 0, n = t.w.pad.sink.n
    cdef int64_t sent
    t.w.pad.sink.n = 0
    while at < n and t.left_at == t.left_end and t.source.writable:
        sent = stream_write(t.source.fd, data + at, n - at)
        if sent > 0:
            at += <uint32_t>sent
        elif sent == -EAGAIN:
            t.source.writable = 0
        elif sent != -EINTR:
            return -1
    if at == n:
        return 0
    if t.left == NULL:
        if not buffers_count(&t.pod.buffers, LEFT_BYTES):
            return -1                   # a pod whose peers do not read has no more for them
        t.left = <char*>malloc(LEFT_BYTES)
        t.left_at = t.left_end = 0
        if t.left == NULL:
            buffers_uncount(&t.pod.buffers, LEFT_BYTES)
            return -1
    if LEFT_BYTES - t.left_end < n - at:
        return -1                       # only who never reads and never stops asking comes here
    memcpy(t.left + t.left_end, data + at, n - at)
    t.left_end += n - at
    return 0


cdef bint write(Tunnel* t) noexcept nogil:
    """False: it is over."""
    cdef bint more = True
    if write_left(t) != 0:
        return False
    while t.left_at == t.left_end and t.session.dirty and more:
        more = session_pull(&t.session)
        if send(t) != 0:
            return False
        if more and loop_over(&t.w.loop):
            break
    if t.session.dirty and t.left_at == t.left_end:
        loop_again(&t.w.loop, &t.source)
    return not (session_over(&t.session) and t.left_at == t.left_end)


cdef bint read(Tunnel* t) noexcept nogil:
    """False: it is over."""
    cdef Worker* w = t.w
    cdef int64_t n
    cdef int fed, rounds = 0
    while t.source.readable:
        if rounds >= PUMP_ROUNDS and loop_over(&w.loop):
            loop_again(&w.loop, &t.source)
            return True
        rounds += 1
        n = stream_read(t.source.fd, w.sealed, SEALED_BYTES)
        if n == -EINTR:
            continue
        if n == -EAGAIN:
            t.source.readable = 0
            return True
        if n <= 0:
            return False
        if n < SEALED_BYTES and not t.source.hung:
            t.source.readable = 0
        fed = session_feed(&t.session, w.sealed, <uint32_t>n, w.loop.now_ns)
        if w.pad.sink.n > 0 and send(t) != 0:
            return False
        if fed != 0:
            write(t)                    # GOAWAY, as far as the socket takes it
            return False
    return True


cdef void on_event(Source* source, uint32_t events) noexcept nogil:
    cdef Tunnel* t = <Tunnel*>source
    if t.state == T_DEAD:
        return
    if t.state == T_CONNECTING:
        if not (source.writable or source.failed or source.hung):
            return
        t.error = stream_error(source.fd)
        if t.error != 0:
            tunnel_fail(t, TROUBLE_NONE)
            return
        t.state = T_SHAKING
        t.session.dirty = 1
    if not read(t) or not write(t):
        tunnel_fail(t, TROUBLE_CLOSED)
        return
    if t.finishing:
        if t.gone:
            t.gone = 0
            t.w.follows(t)
        if t.parting and not t.bridged:
            t.parting = 0
            t.w.parts(t)
        settle(t)


# ---- time -----------------------------------------------------------------------------------------------------------------------------

cdef void on_timer(Timer* timer) noexcept nogil:
    cdef Tunnel* t = <Tunnel*>timer.owner
    cdef Worker* w = t.w
    cdef uint64_t now = w.loop.now_ns
    if t.state != T_OPEN:
        t.error = -ETIMEDOUT
        tunnel_fail(t, TROUBLE_SILENT)
        return
    if t.doubted:
        t.doubted = 0
        w.recalls(t)
        if t.state == T_DEAD:
            return
    timer_set(&w.loop.timers, &t.timer, now + <uint64_t>ping_ms(t) * 1000000)
    if t.finishing and t.server and t.session.leaving == 1:
        session_leave(&t.session)
    if not t.session.pinged:
        session_ping(&t.session)
        t.pinged_ns = now
    elif now - t.pinged_ns >= <uint64_t>w.tables.settings.tunnel_pong_ms * 1000000:
        w.stats.tunnels_silent += 1
        tunnel_fail(t, TROUBLE_SILENT)
        return
    session_sweep(&t.session)
    if t.left_at == t.left_end:
        forget_left(t)
    if t.session.streams > 0:
        t.used_ns = now
    elif not t.server and now - t.used_ns >= <uint64_t>w.tables.settings.tunnel_idle_ms * 1000000:
        w.stats.tunnels_idle += not t.finishing
        tunnel_finish(t)
