"""See response.pxd."""
from libc.errno cimport EAGAIN, EINTR
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memset
from ext.core.buffer cimport (BUFFER_LARGE, buffer_compact, buffer_consume, buffer_drop, buffer_reserve, buffer_room,
                              buffer_used)
from ext.core.loop cimport loop_over
from ext.core.shm cimport (DETAIL_CANNOT_SAY, DETAIL_DOWNSTREAM_CLOSED, DETAIL_OVERLOAD, DETAIL_UPSTREAM_CLOSED, DETAIL_UPSTREAM_LATE,
                           DETAIL_UPSTREAM_PROTOCOL, DETAIL_UPSTREAM_PROTOCOL_LATE, DETAIL_UPSTREAM_RESET, FLAG_DC, FLAG_OM,
                           FLAG_UC, FLAG_UPE)
from ext.core.source cimport source_read, source_write2
from ext.proxy.answer cimport answer
from ext.proxy.budget cimport memory_tight, memory_wait
from ext.proxy.conn cimport conn_end
from ext.proxy.request cimport STEP_MORE, STEP_OVER, STEP_ROOM, STEP_WAIT, edits_size, give_up_replay
from ext.proxy.state cimport C_DEAD, PUMP_ROUNDS, X_FLOW, X_TUNNEL, X_UPSTREAM, Conn, Exchange, Upstream
from ext.proxy.tunnel cimport conn_parts
from ext.proxy.upstream cimport idempotent, upstream_drop
from ext.route.match cimport response_edits
from ext.route.shapes cimport EDITS_MAX
from ext.wire.body cimport body_closed, body_feed, body_start
from ext.wire.edit cimport HeaderOp
from ext.wire.forward cimport FORWARD_EXTRA, Forward, forward_response
from ext.wire.http1 cimport F_TUNNEL, F_UNTIL_CLOSE, HEAD_MAX_BYTES, PARSE_MORE, parse_response


cdef int upstream_failed(Conn* c, uint8_t flag, bint reset) noexcept nogil:
    """The server's connection is of no use any more and the response is not complete."""
    cdef Exchange* x = c.x
    cdef Upstream* up = c.up
    if x.responding:
        conn_end(c, flag, DETAIL_UPSTREAM_PROTOCOL_LATE if flag == FLAG_UPE else DETAIL_UPSTREAM_LATE, True)
        return STEP_OVER
    if flag == FLAG_UC and x.replay and not x.retried and up.exchanges > 0 and c.facts.first_byte_ns == 0 and \
            idempotent(x.method):
        upstream_drop(up, True)
        buffer_drop(&c.pod.buffers, &c.uhead)
        buffer_drop(&c.pod.buffers, &c.uin)
        x.retried = 1
        x.at = 0
        x.uscanned = 0
        x.state = X_UPSTREAM
        c.wait_until_ns = 0
        return STEP_OVER
    if flag == FLAG_UPE:
        answer(c, 502, flag, DETAIL_UPSTREAM_PROTOCOL)
    else:
        answer(c, 503, flag, DETAIL_UPSTREAM_RESET if reset else DETAIL_UPSTREAM_CLOSED)
    return STEP_OVER


cdef int put_head(Conn* c, bint final) noexcept nogil:
    """Writes the response head in w.head to dhead: 0, -1 no room until dhead is sent, -2 it cannot be said or is too large."""
    cdef HeaderOp[EDITS_MAX] ops
    cdef Forward how
    cdef uint32_t need
    cdef int64_t n
    memset(&how, 0, sizeof(Forward))
    if final:
        if c.weighted != NULL:
            how.n_ops = response_edits(c.route, c.weighted, ops)
            how.ops = ops
        if not c.x.request_done or c.w.draining or not c.pod.attached or conn_parts(c):
            c.x.down_keep = 0
        how.close = not c.x.down_keep and c.w.head.framing != F_TUNNEL
        how.keep_alive = c.x.version_minor == 0 and c.x.down_keep
    how.peer_http10 = c.x.version_minor == 0
    need = c.w.head.size + FORWARD_EXTRA + edits_size(ops, how.n_ops)
    if buffer_used(&c.dhead) + need > BUFFER_LARGE:
        return -1 if buffer_used(&c.dhead) > 0 else -2
    if buffer_reserve(&c.pod.buffers, &c.dhead, buffer_used(&c.dhead) + need) < 0:
        return -2
    n = forward_response(&c.w.head, &how, c.dhead.data + c.dhead.end, buffer_room(&c.dhead))
    if n < 0:
        return -2
    c.dhead.end += <uint32_t>n
    return 0


cdef int response_head(Conn* c) noexcept nogil:
    """Parses heads until the final one is there: STEP_WAIT (more bytes needed), STEP_ROOM (dhead is to be sent first), STEP_MORE (it
    is there), STEP_OVER."""
    cdef Exchange* x = c.x
    cdef int n, put
    while not x.responding:
        c.w.head_of = NULL
        n = parse_response(c.uin.data + c.uin.start, buffer_used(&c.uin), &x.uscanned, x.method, &c.w.head)
        if n == PARSE_MORE and buffer_used(&c.uin) < HEAD_MAX_BYTES:
            return STEP_WAIT
        if n <= 0:
            return upstream_failed(c, FLAG_UPE, False)
        if c.w.head.framing == F_TUNNEL and (not x.tunnel_asked or buffer_used(&c.uhead) > 0):
            return upstream_failed(c, FLAG_UPE, False)
        x.uscanned = 0
        if c.w.head.status < 200 and c.w.head.framing != F_TUNNEL:
            if x.version_minor == 1:    # an HTTP/1.0 client knows no interim responses (RFC 9110 15.2)
                put = put_head(c, False)
                if put == -1:
                    return STEP_ROOM
                if put < 0:
                    return upstream_failed(c, FLAG_UPE, False)
            buffer_consume(&c.pod.buffers, &c.uin, <uint32_t>n)
            if c.uin.data == NULL:
                return STEP_WAIT
            continue
        put = put_head(c, True)
        if put == -1:
            return STEP_ROOM
        if put < 0:
            answer(c, 502, FLAG_UPE, DETAIL_CANNOT_SAY)
            return STEP_OVER
        x.responding = 1
        c.facts.code = c.w.head.status
        c.facts.response_bytes += <uint64_t>n
        x.up_keep = x.up_keep and c.w.head.keep_alive and c.w.head.framing != F_UNTIL_CLOSE
        if c.w.head.framing == F_UNTIL_CLOSE:
            x.down_keep = 0
        body_start(&x.response, &c.w.head)
        buffer_consume(&c.pod.buffers, &c.uin, <uint32_t>n)
        if x.replay:
            give_up_replay(c)
        if c.w.head.framing == F_TUNNEL:
            x.state = X_TUNNEL
            return STEP_OVER
    return STEP_MORE


cdef int feed_response(Conn* c) noexcept nogil:
    cdef Exchange* x = c.x
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


cdef int response_send(Conn* c) noexcept nogil:
    cdef uint32_t head
    cdef int64_t n
    cdef bint last = c.x.response_done and not c.x.down_keep and c.x.state == X_FLOW    # exchange.complete ends it then
    while c.source.writable:
        head = buffer_used(&c.dhead)
        if head + c.x.uready == 0:
            return STEP_WAIT
        n = source_write2(&c.source, c.dhead.data + c.dhead.start, head, c.uin.data + c.uin.start, c.x.uready, last)
        if n == -EINTR:
            continue
        if n == -EAGAIN:
            c.source.writable = 0
            return STEP_WAIT
        if n < 0:
            conn_end(c, FLAG_DC, DETAIL_DOWNSTREAM_CLOSED, True)
            return STEP_OVER
        c.active_ns = c.w.loop.now_ns
        if n < head:
            c.dhead.start += <uint32_t>n
            continue
        if head > 0:
            buffer_drop(&c.pod.buffers, &c.dhead)
        n -= head
        if n > 0:
            c.x.uready -= <uint32_t>n
            buffer_consume(&c.pod.buffers, &c.uin, <uint32_t>n)
    return STEP_WAIT


cdef bint make_room(Conn* c, bint bulk) noexcept nogil:
    """In uin for another read. The large size for a head that needs it, and for a body whose reads fill the small one."""
    cdef bint large = bulk and c.w.tables.settings.buffer_bytes >= BUFFER_LARGE and not memory_tight(c.pod)
    if c.uin.data != NULL and buffer_room(&c.uin) > 0:
        return True
    if c.uin.data != NULL:
        buffer_compact(&c.uin)
        if buffer_room(&c.uin) > 0:
            return True
        if c.uin.size == BUFFER_LARGE or (c.x.responding and not large):
            return False
        large = True
    elif memory_wait(c):
        return False
    if buffer_reserve(&c.pod.buffers, &c.uin, BUFFER_LARGE if large else 0) == 0:
        return True
    if c.x.responding:
        conn_end(c, FLAG_OM, DETAIL_OVERLOAD, True)
    else:
        answer(c, 503, FLAG_OM, DETAIL_OVERLOAD)
    return False


cdef int response_read(Conn* c) noexcept nogil:
    cdef Exchange* x = c.x
    cdef int64_t n
    cdef int step, rounds = 0
    cdef bint blocked, bulk = c.uin.size == BUFFER_LARGE
    while True:
        blocked = False
        if buffer_used(&c.uin) > 0 and not x.responding:
            step = response_head(c)
            if step == STEP_OVER:
                return STEP_OVER
            blocked = step == STEP_ROOM
        if x.responding and not x.response_done:
            if feed_response(c) < 0:
                return upstream_failed(c, FLAG_UPE, False)
        if response_send(c) == STEP_OVER:
            return STEP_OVER
        if blocked and buffer_used(&c.dhead) == 0:
            continue                         # the head that had no room has it now, and no event will say so
        if x.response_done or not c.up.source.readable:
            return STEP_WAIT
        if rounds >= PUMP_ROUNDS and loop_over(&c.w.loop):
            return STEP_MORE
        rounds += 1
        if not make_room(c, bulk):
            if c.state == C_DEAD or x.state != X_FLOW:
                return STEP_OVER
            return STEP_WAIT                 # the client is slow
        n = source_read(&c.up.source, c.uin.data + c.uin.end, buffer_room(&c.uin))
        if n == -EINTR:
            continue
        if n == -EAGAIN:
            c.up.source.readable = 0
            if buffer_used(&c.uin) == 0:
                buffer_drop(&c.pod.buffers, &c.uin)
            return STEP_WAIT
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
