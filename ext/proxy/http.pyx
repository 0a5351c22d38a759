"""See http.pxd. Steps return True when the next one is to be tried at once, False when an event has to come first."""
from libc.errno cimport EAGAIN, EINTR, ETIMEDOUT
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp
from ext.core.buffer cimport buffer_drop, buffer_reserve, buffer_room, buffer_used
from ext.core.loop cimport clock_ns, loop_again, loop_over, wall_us
from ext.core.shm cimport (DETAIL_DOWNSTREAM_CLOSED, DETAIL_NO_CLUSTER, DETAIL_NO_CONFIG, DETAIL_CONNECT_FAILURE, DETAIL_CONNECT_TIMEOUT,
                           DETAIL_NO_HEALTHY_UPSTREAM, DETAIL_NO_SOCKET, DETAIL_OVERLOAD,
                           DETAIL_REQUEST_BODY_TIMEOUT, DETAIL_REQUEST_HEAD_TIMEOUT,
                           DETAIL_RESPONSE_TIMEOUT,
                           DETAIL_ROUTE_NOT_FOUND, DETAIL_STREAM_IDLE, DETAIL_HELD_OVERFLOW, FLAG_DC, FLAG_DT, FLAG_NC, FLAG_NR, FLAG_OM,
                           FLAG_SI, FLAG_UF, FLAG_UH, FLAG_UO, FLAG_UT)
from ext.core.slab cimport slab_take
from ext.core.source cimport source_read
from ext.core.timer cimport Timer, timer_clear, timer_set
from ext.proxy.account cimport account_begin_http, account_begin_tcp, account_text
from ext.proxy.answer cimport answer, answer_advance, answer_malformed, awaits_body, exchange_arm, exchange_next
from ext.proxy.budget cimport memory_wait
from ext.proxy.conn cimport conn_end
from ext.proxy.decide cimport FOUND_FULL, FOUND_LATER, FOUND_NONE, find_destination, identify
from ext.proxy.exchange cimport exchange_flow, tunnel_advance
from ext.proxy.request cimport request_begin, request_feed
from ext.proxy.state cimport (C_HTTP, Q_HELD, Q_STOCK, STOCK_WAIT_MS, U_CONNECTING, U_DEAD, X_FLOW, X_HEAD, X_HELD, X_IDLE,
                              X_REPLY, X_TUNNEL, X_UPSTREAM, Conn, Exchange)
from ext.proxy.upstream cimport FAILED, QUEUED, kept_source, upstream_get
from ext.route.balance cimport balance_pick, endpoint_begin
from ext.route.match cimport route_find, route_pick
from ext.route.shapes cimport Address, Cluster, Destination, endpoint_address, endpoint_workload, weighted_cluster
from ext.route.tables cimport cluster_hold, tables_random
from ext.wire.body cimport body_start
from ext.wire.http1 cimport M_CONNECT, parse_request

cdef enum:
    STEPS = 8               # of one event before the clock is looked at: a client that pipelines leaves time for the others


cdef void http_start(Conn* c) noexcept nogil:
    cdef uint8_t waited = c.unconfigured
    c.x = <Exchange*>slab_take(&c.w.exchanges)
    if c.x == NULL:
        account_begin_tcp(c)
        conn_end(c, FLAG_OM, DETAIL_OVERLOAD, True)
        return
    c.state = C_HTTP
    timer_clear(&c.w.loop.timers, &c.timer)
    exchange_next(c)
    c.unconfigured = waited             # the first request does not wait a second time
    http_advance(c)


cdef void http_advance(Conn* c) noexcept nogil:
    cdef int steps = 0
    cdef bint more = True
    while more and c.state == C_HTTP:
        if steps >= STEPS and loop_over(&c.w.loop):
            loop_again(&c.w.loop, &c.source)
            return
        steps += 1
        if c.x.state <= X_HEAD:
            more = read_request(c)
        elif c.x.state == X_HELD or c.x.state == X_UPSTREAM:
            more = find_upstream(c)
        elif c.x.state == X_FLOW:
            more = exchange_flow(c)
        elif c.x.state == X_REPLY:
            more = answer_advance(c)
        else:
            more = tunnel_advance(c)


# ---- a request's head -------------------------------------------------------------------------------------------

cdef bint read_request(Conn* c) noexcept nogil:
    cdef int64_t n
    while True:
        if buffer_used(&c.din) > 0:
            if c.x.state == X_IDLE:
                c.x.state = X_HEAD
                c.facts.start_ns = clock_ns()
                c.facts.start_us = wall_us()
            c.w.head_of = NULL
            n = parse_request(c.din.data + c.din.start, buffer_used(&c.din), &c.x.scanned, &c.w.head)
            if n > <int64_t>c.w.tables.settings.head_bytes or \
                    (n == 0 and buffer_used(&c.din) >= c.w.tables.settings.head_bytes):
                n = -431
            if n > 0:
                begin_request(c, <uint32_t>n)
                return True
            if n < 0:
                answer_malformed(c, <int>-n)
                return True
        if c.down_ended:
            return end_of_client(c)
        if not c.source.readable:
            exchange_arm(c)
            return False
        if c.din.data == NULL and memory_wait(c):
            exchange_arm(c)
            return False
        if buffer_reserve(&c.pod.buffers, &c.din, buffer_used(&c.din) + 1 if c.din.data != NULL else 0) < 0:
            conn_end(c, FLAG_OM, DETAIL_OVERLOAD, True)
            return False
        n = source_read(&c.source, c.din.data + c.din.end, buffer_room(&c.din))
        if n == -EAGAIN:
            c.source.readable = 0
            if buffer_used(&c.din) == 0:
                buffer_drop(&c.pod.buffers, &c.din)
        elif n == 0 or (n < 0 and n != -EINTR):
            c.down_ended = 1
        elif n > 0:
            if n < buffer_room(&c.din) and not c.source.hung:
                c.source.readable = 0
            c.din.end += <uint32_t>n
            c.active_ns = c.w.loop.now_ns


cdef bint end_of_client(Conn* c) noexcept nogil:
    """Between requests: the proper end. Within a head: it went away."""
    if buffer_used(&c.din) > 0:
        account_begin_http(c)
        conn_end(c, FLAG_DC, DETAIL_DOWNSTREAM_CLOSED, False)
    else:
        conn_end(c, 0, 0, False)
    return False


cdef void begin_request(Conn* c, uint32_t size) noexcept nogil:
    cdef Exchange* x = c.x
    c.w.head_of = c
    x.head = x.fed = size
    x.method = c.w.head.method_id
    x.version_minor = c.w.head.version_minor
    x.down_keep = c.w.head.keep_alive
    x.tunnel_asked = c.w.head.upgrade or c.w.head.method_id == M_CONNECT
    x.grpc = c.w.head.content_type.n >= 16 and memcmp(c.w.head.content_type.p, b"application/grpc", 16) == 0
    identify(c)
    account_begin_http(c)
    account_text(c, &c.w.head)
    c.facts.request_bytes = size
    body_start(&x.request, &c.w.head)
    x.state = X_UPSTREAM
    c.wait_until_ns = 0
    if request_feed(c) < 0:
        answer_malformed(c, 400)


# ---- route, cluster, endpoint, connection -------------------------------------------------------------------------

cdef bint know_head(Conn* c) noexcept nogil:
    """The head is parsed again after a wait: other connections used the scratch, and the buffer may have moved."""
    cdef size_t scanned = 0
    if c.w.head_of != c:
        if parse_request(c.din.data + c.din.start, c.x.head, &scanned, &c.w.head) <= 0:
            return False
        c.w.head_of = c
    return True


cdef bint choose(Conn* c) noexcept nogil:
    """Sets `goal`, or answers. True: chosen."""
    cdef Destination* destination
    cdef Cluster* cluster
    cdef const Address* at
    cdef int found
    if not c.is_service:
        c.goal = c.target
        c.connect_ms = c.w.tables.settings.connect_timeout_ms
        return True
    found = find_destination(c, &destination)
    if found == FOUND_LATER:
        c.x.state = X_HELD
        return False
    if found == FOUND_FULL:
        answer(c, 503, FLAG_UO, DETAIL_HELD_OVERFLOW)
        return False
    if found == FOUND_NONE:
        answer(c, 503, FLAG_NC, DETAIL_NO_CONFIG)
        return False
    c.destination = destination
    if not destination.has_http:
        answer(c, 503, FLAG_NC, DETAIL_NO_CONFIG)
        return False
    c.route = route_find(destination, &c.w.head)
    if c.route == NULL:
        answer(c, 404, FLAG_NR, DETAIL_ROUTE_NOT_FOUND)
        return False
    c.weighted = route_pick(c.route, <uint32_t>tables_random(c.w.tables))
    cluster = weighted_cluster(c.weighted)
    if cluster == NULL:
        answer(c, 503, FLAG_NC, DETAIL_NO_CLUSTER)
        return False
    if cluster.service != 0:
        c.facts.service = cluster.service
    cluster_hold(cluster)
    c.cluster = cluster
    c.endpoint = balance_pick(cluster, tables_random(c.w.tables), NULL)
    if c.endpoint == NULL:
        answer(c, 503, FLAG_UH, DETAIL_NO_HEALTHY_UPSTREAM)
        return False
    endpoint_begin(c.endpoint)
    c.facts.destination = endpoint_workload(c.endpoint)
    c.connect_ms = cluster.connect_timeout_ms
    c.x.timeout_ms = c.route.timeout_ms
    at = endpoint_address(c.endpoint, c.target.family)
    c.goal.family = at.family
    c.goal.ip = at.ip
    c.goal.port = c.endpoint.port
    return True


cdef bint find_upstream(Conn* c) noexcept nogil:
    cdef int error = 0, got
    if c.queue == Q_HELD or c.queue == Q_STOCK:
        if c.source.failed:
            conn_end(c, FLAG_DC, DETAIL_DOWNSTREAM_CLOSED, True)
        return False
    if c.up == NULL:
        if not know_head(c):
            answer_malformed(c, 400)
            return True
        c.x.state = X_UPSTREAM
        if c.goal.family == 0 and not choose(c):
            if c.x.state == X_HELD:
                c.w.head_of = NULL
                return False
            return True
        start_clock(c)
        got = upstream_get(c, &c.goal, kept_source(c), c.connect_ms, not c.x.retried, &error)
        if got == QUEUED:
            c.w.head_of = NULL
            if c.queue == Q_HELD:
                return False
            if c.wait_until_ns == 0:
                c.wait_until_ns = c.w.loop.now_ns + <uint64_t>STOCK_WAIT_MS * 1000000
            exchange_arm(c)
            return False
        if got == FAILED:
            c.facts.failure = error
            answer(c, 503, FLAG_UF, DETAIL_CONNECT_FAILURE)
            return True
    if c.up.state == U_CONNECTING:
        c.w.head_of = NULL
        if c.source.failed:
            conn_end(c, FLAG_DC, DETAIL_DOWNSTREAM_CLOSED, True)
        return False
    if c.up.state == U_DEAD:
        c.facts.failure = c.up.error
        answer(c, 503, FLAG_UF, DETAIL_CONNECT_TIMEOUT if c.up.error == -ETIMEDOUT else DETAIL_CONNECT_FAILURE)
        return True
    if not know_head(c):
        answer_malformed(c, 400)
        return True
    request_begin(c)
    return True


cdef void start_clock(Conn* c) noexcept nogil:
    """The route's timeout counts from the request's last byte; the wait for a connection is part of it."""
    if c.x.timeout_ms != 0 and c.x.request_done and c.request_timer.due_ns == 0:
        timer_set(&c.w.loop.timers, &c.request_timer, c.x.complete_ns + <uint64_t>c.x.timeout_ms * 1000000)


# ---- deadlines ----------------------------------------------------------------------------------------------------

cdef void http_expire(Conn* c, Timer* timer) noexcept nogil:
    expire(c, timer)
    if c.state == C_HTTP:
        http_advance(c)


cdef void expire(Conn* c, Timer* timer) noexcept nogil:
    if timer == &c.request_timer:
        if c.x.responding:
            conn_end(c, FLAG_UT, DETAIL_RESPONSE_TIMEOUT, True)
        else:
            answer(c, 504, FLAG_UT, DETAIL_RESPONSE_TIMEOUT)
        return
    exchange_arm(c)
    if c.timer.due_ns > c.w.loop.now_ns:
        return
    timer_clear(&c.w.loop.timers, &c.timer)
    if c.x.state == X_IDLE or c.x.state == X_REPLY:
        conn_end(c, 0, 0, False)
    elif c.x.state == X_HEAD:
        account_begin_http(c)
        c.w.stats.refused_head_timeout += 1
        answer(c, 408, FLAG_SI, DETAIL_REQUEST_HEAD_TIMEOUT)
    elif c.queue == Q_STOCK:
        answer(c, 503, FLAG_OM, DETAIL_NO_SOCKET)
    elif c.x.state == X_TUNNEL:
        conn_end(c, FLAG_DT, DETAIL_STREAM_IDLE, True)
    elif c.x.responding:
        conn_end(c, FLAG_SI, DETAIL_STREAM_IDLE, True)
    elif awaits_body(c):
        c.w.stats.refused_body_timeout += 1
        answer(c, 408, FLAG_SI, DETAIL_REQUEST_BODY_TIMEOUT)
    else:
        answer(c, 504 if c.x.request_done else 408, FLAG_SI, DETAIL_STREAM_IDLE)
