"""See exchange.pxd."""
from libc.errno cimport EAGAIN, EINTR
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memset
from ext.core.buffer cimport (BUFFER_LARGE, Buffer, buffer_compact, buffer_consume, buffer_drop, buffer_reserve, buffer_room,
                              buffer_used)
from ext.core.loop cimport loop_again
from ext.core.shm cimport (DETAIL_CANNOT_SAY, DETAIL_DOWNSTREAM_CLOSED, DETAIL_HEAD_TOO_LARGE, DETAIL_MALFORMED, DETAIL_NONE, DETAIL_OVERLOAD,
                           DETAIL_UPSTREAM_CLOSED, DETAIL_UPSTREAM_LATE, DETAIL_UPSTREAM_PROTOCOL, DETAIL_UPSTREAM_PROTOCOL_LATE,
                           DETAIL_UPSTREAM_RESET, DETAIL_VIA_UPSTREAM, FLAG_DC, FLAG_DPE, FLAG_OM, FLAG_UC, FLAG_UPE)
from ext.core.text cimport Span
from ext.core.timer cimport timer_clear, timer_set
from ext.proxy.account cimport account_end, account_id
from ext.proxy.answer cimport answer, answer_malformed, client_close, exchange_arm, exchange_next
from ext.proxy.conn cimport conn_end, conn_linger, conn_release
from ext.proxy.relay cimport (PUMP_AGAIN, PUMP_NO_MEMORY, PUMP_READ_BROKE, PUMP_WRITE_BROKE, pump)
from ext.proxy.state cimport C_DEAD, PUMP_ROUNDS, X_FLOW, X_TUNNEL, X_UPSTREAM, Conn, Exchange, Upstream
from ext.proxy.upstream cimport upstream_drop, upstream_keep
from ext.route.match cimport request_edits, response_edits
from ext.route.shapes cimport EDITS_MAX
from ext.sys.stream cimport stream_read, stream_write2
from ext.wire.edit cimport HeaderOp
from ext.wire.forward cimport FORWARD_EXTRA, Forward, forward_request, forward_response
from ext.wire.http1 cimport (F_TUNNEL, F_UNTIL_CLOSE, H_X_REQUEST_ID, HEAD_MAX_BYTES, M_DELETE, M_GET, M_HEAD, M_OPTIONS,
                             M_PUT, M_TRACE, PARSE_MORE, body_closed, body_feed, body_start, parse_response)

cdef enum Step:
    IDLE = 0                # nothing to do now
    MORE = 1                # fairness: go on next turn
    OVER = 2                # the exchange or the connection left FLOW


# ---- the request ----------------------------------------------------------------------------------------------------

cdef uint32_t edits_size(const HeaderOp* ops, uint32_t n) noexcept nogil:
    cdef uint32_t i, size = 0
    for i in range(n):
        size += ops[i].name.n + ops[i].value.n + 4
    return size


cdef void exchange_begin(Conn* c) noexcept nogil:
    cdef HeaderOp[EDITS_MAX] ops
    cdef Forward how
    cdef Exchange* x = &c.x
    cdef int64_t n
    memset(&how, 0, sizeof(Forward))
    if x.weighted != NULL:
        how.n_ops = request_edits(x.route, x.weighted, ops)
        how.ops = ops
    if c.w.head.first[<int>H_X_REQUEST_ID] == 0:
        account_id(c)
        how.request_id.p = x.request_id
        how.request_id.n = sizeof(x.request_id)
    how.forwarded_proto.p = b"http"
    how.forwarded_proto.n = 4
    how.keep_alive = x.version_minor == 0 and x.down_keep
    x.up_keep = x.version_minor == 1 or x.down_keep
    if buffer_reserve(&c.w.buffers, &c.uhead, c.w.head.size + FORWARD_EXTRA + edits_size(ops, how.n_ops) + 64) < 0:
        answer(c, 431, FLAG_DPE, DETAIL_HEAD_TOO_LARGE)
        return
    n = forward_request(&c.w.head, &how, c.uhead.data, c.uhead.size)
    if n < 0:
        answer(c, 431, FLAG_DPE, DETAIL_HEAD_TOO_LARGE)
        return
    c.uhead.start = 0
    c.uhead.end = <uint32_t>n
    x.replay = x.request_done
    x.at = x.head
    x.up_broken = 0
    if not x.replay:
        give_up_replay(c)
    c.w.head_of = NULL
    x.state = X_FLOW
    c.active_ns = c.w.loop.now_ns
    exchange_arm(c)


cdef void give_up_replay(Conn* c) noexcept nogil:
    """What was sent leaves din."""
    c.x.replay = 0
    c.x.fed -= c.x.at
    if c.din.data != NULL:
        buffer_consume(&c.w.buffers, &c.din, c.x.at)
    c.x.at = 0


cdef int exchange_feed(Conn* c) noexcept nogil:
    cdef Exchange* x = &c.x
    cdef uint8_t done = 0
    cdef uint64_t before = x.request.payload
    cdef int64_t n
    if x.request_done:
        return 0
    n = body_feed(&x.request, c.din.data + c.din.start + x.fed if c.din.data != NULL else NULL,
                  buffer_used(&c.din) - x.fed, &done)
    if n < 0:
        return -1
    x.fed += <uint32_t>n
    c.facts.request_bytes += <uint64_t>n
    c.facts.received += x.request.payload - before
    if done:
        x.request_done = 1
        x.complete_ns = c.w.loop.now_ns
        if x.timeout_ms != 0 and x.state == X_FLOW:
            timer_set(&c.w.loop.timers, &c.request_timer, x.complete_ns + <uint64_t>x.timeout_ms * 1000000)
    return 0


cdef void send_request(Conn* c) noexcept nogil:
    cdef Exchange* x = &c.x
    cdef uint32_t head, body
    cdef int64_t n
    while c.up.source.writable and not x.up_broken:
        head = buffer_used(&c.uhead)
        body = x.fed - x.at
        if head + body == 0:
            return
        n = stream_write2(c.up.source.fd, c.uhead.data + c.uhead.start, head, c.din.data + c.din.start + x.at, body)
        if n == -EINTR:
            continue
        if n == -EAGAIN:
            c.up.source.writable = 0
            return
        if n < 0:
            x.up_broken = 1             # it may have answered before it closed: read on
            return
        c.active_ns = c.w.loop.now_ns
        if n < head:
            c.uhead.start += <uint32_t>n
            continue
        if head > 0:
            buffer_drop(&c.w.buffers, &c.uhead)
        x.at += <uint32_t>n - head
        if not x.replay and x.at > 0:
            give_up_replay(c)


cdef int read_request_body(Conn* c) noexcept nogil:
    """IDLE, MORE or OVER. Reads only what the present request still needs, one buffer ahead of the server."""
    cdef int64_t n
    cdef int rounds = 0
    while not c.x.request_done and c.source.readable and not c.x.up_broken:
        if rounds == PUMP_ROUNDS:
            return MORE
        rounds += 1
        if c.din.data == NULL and buffer_reserve(&c.w.buffers, &c.din, 0) < 0:
            conn_end(c, FLAG_OM, DETAIL_OVERLOAD, True)
            return OVER
        if buffer_room(&c.din) == 0:
            buffer_compact(&c.din)
            if buffer_room(&c.din) == 0:
                return IDLE
        n = stream_read(c.source.fd, c.din.data + c.din.end, buffer_room(&c.din))
        if n == -EINTR:
            continue
        if n == -EAGAIN:
            c.source.readable = 0
            if buffer_used(&c.din) == 0:
                buffer_drop(&c.w.buffers, &c.din)
            return IDLE
        if n <= 0:
            conn_end(c, FLAG_DC, DETAIL_DOWNSTREAM_CLOSED, True)
            return OVER
        if n < buffer_room(&c.din) and not c.source.hung:
            c.source.readable = 0
        c.din.end += <uint32_t>n
        c.active_ns = c.w.loop.now_ns
        if exchange_feed(c) < 0:
            if c.x.responding:
                conn_end(c, FLAG_DPE, DETAIL_MALFORMED, True)
            else:
                answer_malformed(c, 400)
            return OVER
        send_request(c)
    return IDLE


# ---- the response ---------------------------------------------------------------------------------------------------

cdef int upstream_failed(Conn* c, uint8_t flag, bint reset) noexcept nogil:
    """The server's connection is of no use any more and the response is not complete."""
    cdef Exchange* x = &c.x
    cdef Upstream* up = c.up
    if x.responding:
        conn_end(c, flag, DETAIL_UPSTREAM_PROTOCOL_LATE if flag == FLAG_UPE else DETAIL_UPSTREAM_LATE, True)
        return OVER
    if flag == FLAG_UC and x.replay and not x.retried and up.exchanges > 0 and c.facts.first_byte_ns == 0 and \
            (x.method == M_GET or x.method == M_HEAD or x.method == M_PUT or x.method == M_DELETE or
             x.method == M_OPTIONS or x.method == M_TRACE):
        upstream_drop(up, True)
        buffer_drop(&c.w.buffers, &c.uhead)
        buffer_drop(&c.w.buffers, &c.uin)
        x.retried = 1
        x.at = 0
        x.uscanned = 0
        x.state = X_UPSTREAM
        c.wait_until_ns = 0
        return OVER
    if flag == FLAG_UPE:
        answer(c, 502, flag, DETAIL_UPSTREAM_PROTOCOL)
    else:
        answer(c, 503, flag, DETAIL_UPSTREAM_RESET if reset else DETAIL_UPSTREAM_CLOSED)
    return OVER


cdef int put_head(Conn* c, bint final) noexcept nogil:
    """Writes the response head in w.head to dhead: 0, -1 no room until dhead is sent, -2 it cannot be said or is too large."""
    cdef HeaderOp[EDITS_MAX] ops
    cdef Forward how
    cdef uint32_t need
    cdef int64_t n
    memset(&how, 0, sizeof(Forward))
    if final:
        if c.x.weighted != NULL:
            how.n_ops = response_edits(c.x.route, c.x.weighted, ops)
            how.ops = ops
        if not c.x.request_done or c.w.draining or not c.pod.attached:
            c.x.down_keep = 0
        how.close = not c.x.down_keep and c.w.head.framing != F_TUNNEL
        how.keep_alive = c.x.version_minor == 0 and c.x.down_keep
    how.peer_http10 = c.x.version_minor == 0
    need = c.w.head.size + FORWARD_EXTRA + edits_size(ops, how.n_ops)
    if buffer_used(&c.dhead) + need > BUFFER_LARGE:
        return -1 if buffer_used(&c.dhead) > 0 else -2
    if buffer_reserve(&c.w.buffers, &c.dhead, buffer_used(&c.dhead) + need) < 0:
        return -2
    n = forward_response(&c.w.head, &how, c.dhead.data + c.dhead.end, buffer_room(&c.dhead))
    if n < 0:
        return -2
    c.dhead.end += <uint32_t>n
    return 0


cdef int response_head(Conn* c) noexcept nogil:
    """Parses heads until the final one is there: IDLE (more bytes needed), MORE (it is there), OVER."""
    cdef Exchange* x = &c.x
    cdef int n, put
    while not x.responding:
        c.w.head_of = NULL
        n = parse_response(c.uin.data + c.uin.start, buffer_used(&c.uin), &x.uscanned, x.method, &c.w.head)
        if n == PARSE_MORE and buffer_used(&c.uin) < HEAD_MAX_BYTES:
            return IDLE
        if n <= 0:
            return upstream_failed(c, FLAG_UPE, False)
        if c.w.head.framing == F_TUNNEL and (not x.tunnel_asked or buffer_used(&c.uhead) > 0):
            return upstream_failed(c, FLAG_UPE, False)
        x.uscanned = 0
        if c.w.head.status < 200 and c.w.head.framing != F_TUNNEL:
            if x.version_minor == 1:    # an HTTP/1.0 client knows no interim responses (RFC 9110 15.2)
                put = put_head(c, False)
                if put == -1:
                    return IDLE
                if put < 0:
                    return upstream_failed(c, FLAG_UPE, False)
            buffer_consume(&c.w.buffers, &c.uin, <uint32_t>n)
            if c.uin.data == NULL:
                return IDLE
            continue
        put = put_head(c, True)
        if put == -1:
            return IDLE
        if put < 0:
            answer(c, 502, FLAG_UPE, DETAIL_CANNOT_SAY)
            return OVER
        x.responding = 1
        c.facts.code = c.w.head.status
        c.facts.response_bytes += <uint64_t>n
        x.up_keep = x.up_keep and c.w.head.keep_alive and c.w.head.framing != F_UNTIL_CLOSE
        if c.w.head.framing == F_UNTIL_CLOSE:
            x.down_keep = 0
        body_start(&x.response, &c.w.head)
        buffer_consume(&c.w.buffers, &c.uin, <uint32_t>n)
        if x.replay:
            give_up_replay(c)
        if c.w.head.framing == F_TUNNEL:
            x.state = X_TUNNEL
            return OVER
    return MORE


cdef int feed_response(Conn* c) noexcept nogil:
    cdef Exchange* x = &c.x
    cdef uint64_t before = x.response.payload
    cdef int64_t n
    if x.response_done:
        return 0
    n = body_feed(&x.response, c.uin.data + c.uin.start + x.uready if c.uin.data != NULL else NULL,
                  buffer_used(&c.uin) - x.uready, &x.response_done)
    if n < 0:
        return -1
    x.uready += <uint32_t>n
    c.facts.response_bytes += <uint64_t>n
    c.facts.sent += x.response.payload - before
    return 0


cdef int send_response(Conn* c) noexcept nogil:
    """IDLE or OVER (the client is gone)."""
    cdef uint32_t head
    cdef int64_t n
    while c.source.writable:
        head = buffer_used(&c.dhead)
        if head + c.x.uready == 0:
            return IDLE
        n = stream_write2(c.source.fd, c.dhead.data + c.dhead.start, head, c.uin.data + c.uin.start, c.x.uready)
        if n == -EINTR:
            continue
        if n == -EAGAIN:
            c.source.writable = 0
            return IDLE
        if n < 0:
            conn_end(c, FLAG_DC, DETAIL_DOWNSTREAM_CLOSED, True)
            return OVER
        c.active_ns = c.w.loop.now_ns
        if n < head:
            c.dhead.start += <uint32_t>n
            continue
        if head > 0:
            buffer_drop(&c.w.buffers, &c.dhead)
        n -= head
        if n > 0:
            c.x.uready -= <uint32_t>n
            buffer_consume(&c.w.buffers, &c.uin, <uint32_t>n)
    return IDLE


cdef bint make_room(Conn* c, bint bulk) noexcept nogil:
    """In uin for another read. The large size for a head that needs it, and for a body whose reads fill the small one."""
    cdef bint large = bulk and c.w.tables.settings.buffer_bytes >= BUFFER_LARGE
    if c.uin.data != NULL and buffer_room(&c.uin) > 0:
        return True
    if c.uin.data != NULL:
        buffer_compact(&c.uin)
        if buffer_room(&c.uin) > 0:
            return True
        if c.uin.size == BUFFER_LARGE or (c.x.responding and not large):
            return False
        large = True
    if buffer_reserve(&c.w.buffers, &c.uin, BUFFER_LARGE if large else 0) == 0:
        return True
    if c.x.responding:
        conn_end(c, FLAG_OM, DETAIL_OVERLOAD, True)
    else:
        answer(c, 503, FLAG_OM, DETAIL_OVERLOAD)
    return False


cdef int read_response(Conn* c) noexcept nogil:
    """IDLE, MORE or OVER. Reads, understands, and sends what it understood."""
    cdef Exchange* x = &c.x
    cdef int64_t n
    cdef int step, rounds = 0
    cdef bint bulk = c.uin.size == BUFFER_LARGE
    while True:
        if buffer_used(&c.uin) > 0 and not x.responding:
            step = response_head(c)
            if step == OVER:
                return OVER
        if x.responding and not x.response_done:
            if feed_response(c) < 0:
                return upstream_failed(c, FLAG_UPE, False)
        if send_response(c) == OVER:
            return OVER
        if x.response_done or not c.up.source.readable:
            return IDLE
        if rounds == PUMP_ROUNDS:
            return MORE
        rounds += 1
        if not make_room(c, bulk):
            if c.state == C_DEAD or x.state != X_FLOW:
                return OVER
            return IDLE                 # the client is slow
        n = stream_read(c.up.source.fd, c.uin.data + c.uin.end, buffer_room(&c.uin))
        if n == -EINTR:
            continue
        if n == -EAGAIN:
            c.up.source.readable = 0
            if buffer_used(&c.uin) == 0:
                buffer_drop(&c.w.buffers, &c.uin)
            return IDLE
        if n == 0 and x.responding and body_closed(&x.response):
            x.response_done = 1
            x.up_keep = 0
            continue
        if n <= 0:
            c.up.source.readable = 0
            return upstream_failed(c, FLAG_UC, n < 0)
        if n == buffer_room(&c.uin):
            bulk = True
        elif not c.up.source.hung:
            c.up.source.readable = 0
        c.uin.end += <uint32_t>n
        c.active_ns = c.w.loop.now_ns
        if c.facts.first_byte_ns == 0:
            c.facts.first_byte_ns = c.w.loop.now_ns


# ---- both -------------------------------------------------------------------------------------------------------------

cdef bint exchange_flow(Conn* c) noexcept nogil:
    cdef int asked, answered
    if c.source.failed:
        conn_end(c, FLAG_DC, DETAIL_DOWNSTREAM_CLOSED, True)
        return False
    send_request(c)
    asked = read_request_body(c)
    if asked == OVER:
        return True
    answered = read_response(c)
    if answered == OVER:
        return True
    if c.x.responding and c.x.response_done and c.x.uready == 0 and buffer_used(&c.dhead) == 0:
        complete(c)
        return True
    if asked == MORE or answered == MORE:
        loop_again(&c.w.loop, &c.source)
    exchange_arm(c)
    return False


cdef void complete(Conn* c) noexcept nogil:
    """The response is out. A response that came before the request's end leaves both connections out of step: close them."""
    cdef Exchange* x = &c.x
    cdef Upstream* up = c.up
    cdef bint whole = x.request_done and x.fed == x.at and buffer_used(&c.uhead) == 0
    timer_clear(&c.w.loop.timers, &c.request_timer)
    account_end(c, 0, DETAIL_VIA_UPSTREAM)
    conn_release(c)
    buffer_drop(&c.w.buffers, &c.uhead)
    if x.up_keep and whole and not x.up_broken and buffer_used(&c.uin) == 0:
        up.exchanges += 1
        c.up = NULL
        upstream_keep(up)
    else:
        upstream_drop(up, False)
    buffer_drop(&c.w.buffers, &c.uin)
    if not x.request_done:
        conn_linger(c)
    elif not x.down_keep:
        client_close(c)
    else:
        exchange_next(c)


cdef bint tunnel_advance(Conn* c) noexcept nogil:
    """Opaque bytes until both sides ended; what came behind the heads goes first."""
    cdef int up, down
    if send_response(c) == OVER:
        return False
    if buffer_used(&c.dhead) > 0 or buffer_used(&c.uhead) > 0:
        return False
    if not c.x.tunnelling:
        c.x.tunnelling = 1
        c.facts.received += buffer_used(&c.din)
        c.facts.sent += buffer_used(&c.uin)
        timer_clear(&c.w.loop.timers, &c.request_timer)
        if c.source.hung:
            c.source.readable = 1
        if c.up.source.hung:
            c.up.source.readable = 1
    up = pump(c.w, &c.source, &c.up.source, &c.din, &c.down_ended, &c.down_shut, &c.facts.received)
    down = pump(c.w, &c.up.source, &c.source, &c.uin, &c.up_ended, &c.up_shut, &c.facts.sent)
    c.active_ns = c.w.loop.now_ns
    if up == PUMP_NO_MEMORY or down == PUMP_NO_MEMORY:
        conn_end(c, FLAG_OM, DETAIL_OVERLOAD, True)
    elif up == PUMP_READ_BROKE or down == PUMP_WRITE_BROKE or (c.source.failed and c.down_ended):
        conn_end(c, FLAG_DC, DETAIL_DOWNSTREAM_CLOSED, True)
    elif up == PUMP_WRITE_BROKE or down == PUMP_READ_BROKE or (c.up.source.failed and c.up_ended):
        conn_end(c, FLAG_UC, DETAIL_UPSTREAM_LATE, True)
    elif c.down_shut and c.up_shut:
        conn_end(c, 0, DETAIL_VIA_UPSTREAM, False)
    else:
        if up == PUMP_AGAIN or down == PUMP_AGAIN:
            loop_again(&c.w.loop, &c.source)
        exchange_arm(c)
    return False
