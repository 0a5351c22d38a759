"""See flow.pxd."""
from libc.errno cimport EAGAIN, EINTR, ETIMEDOUT
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from ext.core.buffer cimport buffer_reserve, buffer_room, buffer_used
from ext.core.protocol cimport LISTEN_INBOUND, LISTEN_OUTBOUND
from ext.core.shm cimport (DETAIL_DOWNSTREAM_CLOSED, DETAIL_NO_CONFIG, DETAIL_CONNECT_FAILURE, DETAIL_CONNECT_TIMEOUT,
                           DETAIL_NO_HEALTHY_UPSTREAM,
                           DETAIL_NO_SOCKET, DETAIL_OVERLOAD, DETAIL_HELD_OVERFLOW, FLAG_DC, FLAG_NC, FLAG_OM, FLAG_UF, FLAG_UH, FLAG_UO)
from ext.core.source cimport source_read
from ext.core.timer cimport Timer, timer_clear
from ext.proxy.account cimport account_begin_tcp
from ext.proxy.budget cimport memory_wait
from ext.proxy.conn cimport conn_end, conn_release, conn_timer, linger_advance
from ext.proxy.decide cimport FOUND_FULL, FOUND_LATER, FOUND_NONE, find_destination, identify
from ext.proxy.early cimport early_destination
from ext.proxy.held cimport held_expire
from ext.proxy.http cimport http_advance, http_expire, http_start
from ext.proxy.near cimport Neighbour, near_accept, near_way
from ext.proxy.permit cimport PERMIT_YES, permit_enter
from ext.proxy.relay cimport relay_advance, relay_expire, relay_start
from ext.proxy.state cimport (C_DEAD, C_DETECT, C_DIAL, C_HELD, C_HTTP, C_LINGER, C_NEW, C_RELAY, GO_DETECT, GO_HTTP, GO_TCP, Q_HELD,
                              Q_STOCK, STOCK_WAIT_MS, U_DEAD, U_READY, Conn)
from ext.proxy.stock cimport stock_forget
from ext.proxy.tunnel_in cimport tunnel_accepted
from ext.proxy.tunnel_out cimport secure_way
from ext.proxy.upstream cimport FAILED, QUEUED, kept_source, upstream_drop, upstream_get, upstream_keep
from ext.route.balance cimport balance_pick, endpoint_begin
from ext.route.match cimport tcp_pick
from ext.route.shapes cimport (PROTO_AUTO, PROTO_HTTP, Address, Cluster, Destination, Weighted, endpoint_address, endpoint_workload,
                               weighted_cluster)
from ext.route.tables cimport cluster_hold, destination_hold, tables_random
from ext.wire.sniff cimport SNIFF_HTTP1, SNIFF_MAX, SNIFF_MORE, sniff


# ---- which way -----------------------------------------------------------------------------------------------------------------

cdef void flow_start(Conn* c) noexcept nogil:
    cdef uint8_t protocol = identify(c)
    if c.kind == LISTEN_INBOUND and permit_enter(c) != PERMIT_YES:
        return
    if c.is_service:
        decide_service(c, protocol)
        return
    c.intent = GO_HTTP if protocol == PROTO_HTTP else GO_TCP
    proceed(c)


cdef void decide_service(Conn* c, uint8_t protocol) noexcept nogil:
    """By the destination in force. Unknown to the control plane: HTTP gets its 503, opaque bytes a close (both NC)."""
    cdef Destination* destination
    cdef int found = find_destination(c, &destination)
    if found == FOUND_LATER:
        c.state = C_HELD
        return
    if found == FOUND_FULL:
        account_begin_tcp(c)
        conn_end(c, FLAG_UO, DETAIL_HELD_OVERFLOW, True)
        return
    if found == FOUND_NONE:
        c.intent = GO_HTTP if protocol == PROTO_HTTP else (GO_DETECT if protocol == PROTO_AUTO else GO_TCP)
    else:
        c.destination = destination
        if destination.has_http and destination.has_tcp:
            c.intent = GO_DETECT
        else:
            c.intent = GO_HTTP if destination.has_http else GO_TCP
        if c.intent != GO_TCP:
            early_destination(c, destination)
    proceed(c)


cdef void proceed(Conn* c) noexcept nogil:
    if c.tunnel != NULL:
        start_dial(c)                   # 200 comes behind the application's connection, whatever will be spoken
    elif c.intent == GO_HTTP:
        conn_release(c)
        near_accept(c)
        http_start(c)
    elif c.intent == GO_DETECT:
        c.state = C_DETECT
        conn_timer(c, c.w.tables.settings.detect_dial_ms)
        detect(c)
    else:
        go_tcp(c)


# ---- which protocol ---------------------------------------------------------------------------------------------------------------

cdef void detect(Conn* c) noexcept nogil:
    """Until the client's first bytes say it, the server speaks first, or the time is over (opaque). Ends in an answer."""
    cdef int64_t n
    cdef int said = SNIFF_MORE
    if c.source.failed:
        account_begin_tcp(c)
        conn_end(c, FLAG_DC, DETAIL_DOWNSTREAM_CLOSED, True)
        return
    while c.source.readable and not c.down_ended and buffer_used(&c.din) < SNIFF_MAX:
        if c.din.data == NULL and memory_wait(c):
            break
        if buffer_reserve(&c.pod.buffers, &c.din, 0) < 0:
            account_begin_tcp(c)
            conn_end(c, FLAG_OM, DETAIL_OVERLOAD, True)
            return
        n = source_read(&c.source, c.din.data + c.din.end, buffer_room(&c.din))
        if n == -EINTR:
            continue
        if n == -EAGAIN:
            c.source.readable = 0
        elif n < 0:
            account_begin_tcp(c)
            conn_end(c, FLAG_DC, DETAIL_DOWNSTREAM_CLOSED, True)
            return
        elif n == 0:
            c.down_ended = 1
        else:
            if n < buffer_room(&c.din) and not c.source.hung:
                c.source.readable = 0
            c.din.end += <uint32_t>n
            c.facts.received += <uint64_t>n
    if buffer_used(&c.din) > 0:
        said = sniff(<const uint8_t*>c.din.data + c.din.start, buffer_used(&c.din))
    if said == SNIFF_HTTP1:
        leave_detect(c)
        if c.up != NULL:
            if c.up.state == U_READY:
                upstream_keep(c.up)
            else:
                upstream_drop(c.up, False)
            c.up = NULL
        conn_release(c)
        http_start(c)
    elif said != SNIFF_MORE or c.down_ended:
        leave_detect(c)
        go_tcp(c)
    elif c.up != NULL and c.up.state == U_DEAD:
        upstream_drop(c.up, False)      # refused; the client may still say HTTP and be told so
        forget_choice(c)
    elif c.up != NULL and c.up.state == U_READY and c.up.source.readable:
        leave_detect(c)
        go_tcp(c)                       # the server speaks first (or has ended)
    elif c.up == NULL and c.dialled_early == 1 and c.queue == 0:
        dial_early(c)                   # the stock has a socket now


cdef void leave_detect(Conn* c) noexcept nogil:
    timer_clear(&c.w.loop.timers, &c.timer)
    stock_forget(c)


cdef void detect_expire(Conn* c) noexcept nogil:
    if not c.dialled_early:
        c.dialled_early = 1
        conn_timer(c, c.w.tables.settings.detect_timeout_ms)
        dial_early(c)
        return
    leave_detect(c)
    go_tcp(c)


cdef void dial_early(Conn* c) noexcept nogil:
    cdef int error = 0
    if choose_tcp(c) != 0:
        c.dialled_early = 2             # nowhere to dial: the end of detection chooses anew, and says it
        forget_choice(c)
        return
    if upstream_get(c, &c.goal, NULL, c.connect_ms, False, &error) != QUEUED:
        c.dialled_early = 2


# ---- opaque TCP ---------------------------------------------------------------------------------------------------------------------

cdef void forget_choice(Conn* c) noexcept nogil:
    """The endpoint chosen for TCP, but not the destination."""
    cdef Destination* destination = c.destination
    if destination != NULL:
        destination_hold(destination)
    conn_release(c)
    c.destination = destination
    c.goal.family = 0


cdef int choose_tcp(Conn* c) noexcept nogil:
    """Sets `goal` once: 0, or the flag that says why there is none."""
    cdef Weighted* weighted
    cdef Cluster* cluster
    cdef const Address* at
    if c.goal.family != 0:
        return 0
    if not c.is_service:
        c.goal = c.target
        c.connect_ms = c.w.tables.settings.connect_timeout_ms
        return 0
    if c.destination == NULL or not c.destination.has_tcp:
        return FLAG_NC
    weighted = tcp_pick(c.destination, <uint32_t>tables_random(c.w.tables))
    cluster = weighted_cluster(weighted) if weighted != NULL else NULL
    if cluster == NULL:
        return FLAG_NC
    if cluster.service != 0:
        c.facts.service = cluster.service
    cluster_hold(cluster)
    c.cluster = cluster
    c.endpoint = balance_pick(cluster, tables_random(c.w.tables), NULL)
    if c.endpoint == NULL:
        return FLAG_UH
    endpoint_begin(c.endpoint)
    c.facts.destination = endpoint_workload(c.endpoint)
    c.connect_ms = cluster.connect_timeout_ms
    at = endpoint_address(c.endpoint, c.target.family)
    c.goal.family = at.family
    c.goal.ip = at.ip
    c.goal.port = c.endpoint.port
    return 0


cdef void go_tcp(Conn* c) noexcept nogil:
    cdef Neighbour near
    cdef int why = choose_tcp(c)
    if why == 0 and c.kind == LISTEN_OUTBOUND:
        c.secure = near.secure if near_way(c, &c.goal, &near) else secure_way(c, &c.goal)
    account_begin_tcp(c)
    if why != 0:
        conn_end(c, <uint8_t>why, DETAIL_NO_CONFIG if why == FLAG_NC else DETAIL_NO_HEALTHY_UPSTREAM, True)
        return
    start_dial(c)


cdef void start_dial(Conn* c) noexcept nogil:
    if c.tunnel != NULL:
        choose_tcp(c)
        if c.intent != GO_HTTP:
            account_begin_tcp(c)
    c.state = C_DIAL
    c.wait_until_ns = c.w.loop.now_ns + <uint64_t>STOCK_WAIT_MS * 1000000
    dial(c)


cdef void dial(Conn* c) noexcept nogil:
    """Until the upstream is connected. The client's address is kept on the last hop, except when a pod calls itself."""
    cdef int error = 0, got
    if c.source.failed:
        conn_end(c, FLAG_DC, DETAIL_DOWNSTREAM_CLOSED, True)
        return
    if c.up == NULL:
        if c.queue == Q_STOCK or c.queue == Q_HELD:
            return
        got = upstream_get(c, &c.goal, kept_source(c), c.connect_ms, False, &error)
        if got == QUEUED:
            if c.queue != Q_HELD:
                conn_timer(c, STOCK_WAIT_MS)
            return
        if got == FAILED:
            c.facts.failure = error
            account_begin_tcp(c)
            conn_end(c, FLAG_UF, DETAIL_CONNECT_FAILURE, True)
            return
        timer_clear(&c.w.loop.timers, &c.timer)
    if c.up.state == U_DEAD:
        c.facts.failure = c.up.error
        account_begin_tcp(c)
        conn_end(c, FLAG_UF, DETAIL_CONNECT_TIMEOUT if c.up.error == -ETIMEDOUT else DETAIL_CONNECT_FAILURE, True)
    elif c.up.state == U_READY:
        tunnel_accepted(c)
        near_accept(c)
        if c.intent == GO_HTTP:
            upstream_keep(c.up)         # the first request finds it in the pool
            c.up = NULL
            http_start(c)
        else:
            relay_start(c)


# ---- every event and deadline of a connection --------------------------------------------------------------------------------------

cdef void flow_advance(Conn* c) noexcept nogil:
    if c.state == C_HTTP:
        http_advance(c)
    elif c.state == C_RELAY:
        relay_advance(c)
    elif c.state == C_DIAL:
        dial(c)
    elif c.state == C_DETECT:
        detect(c)
    elif c.state == C_LINGER:
        linger_advance(c)
    elif c.state == C_NEW:
        flow_start(c)                   # came by a tunnel
    elif c.state == C_HELD:
        if c.source.failed:
            account_begin_tcp(c)
            conn_end(c, FLAG_DC, DETAIL_DOWNSTREAM_CLOSED, True)
        elif c.queue != Q_HELD:
            flow_start(c)       # the wait is over, one way or the other; the service may have gone meanwhile


cdef void flow_expire(Conn* c, Timer* timer) noexcept nogil:
    if c.state == C_DEAD:
        return
    if c.queue == Q_HELD and timer == &c.timer:
        held_expire(c)
    elif c.state == C_HTTP:
        http_expire(c, timer)
    elif c.state == C_RELAY:
        relay_expire(c)
    elif c.state == C_DIAL:
        conn_end(c, FLAG_OM, DETAIL_NO_SOCKET, True)
    elif c.state == C_DETECT:
        detect_expire(c)
    elif c.state == C_LINGER:
        conn_end(c, 0, 0, False)
