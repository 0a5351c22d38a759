"""See request.pxd."""
from libc.errno cimport EAGAIN, EINTR
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memset
from ext.core.buffer cimport buffer_compact, buffer_consume, buffer_drop, buffer_reserve, buffer_room, buffer_used
from ext.core.loop cimport loop_over
from ext.core.shm cimport (DETAIL_DOWNSTREAM_CLOSED, DETAIL_HEAD_TOO_LARGE, DETAIL_MALFORMED, DETAIL_OVERLOAD, FLAG_DC, FLAG_DPE,
                           FLAG_OM)
from ext.core.source cimport source_read, source_write2
from ext.core.timer cimport timer_set
from ext.proxy.account cimport account_id
from ext.proxy.answer cimport answer, answer_malformed, exchange_arm
from ext.proxy.budget cimport memory_wait
from ext.proxy.conn cimport conn_end
from ext.proxy.state cimport PUMP_ROUNDS, X_FLOW, Conn, Exchange
from ext.route.match cimport request_edits
from ext.route.shapes cimport EDITS_MAX
from ext.wire.body cimport body_feed
from ext.wire.edit cimport HeaderOp
from ext.wire.forward cimport FORWARD_EXTRA, Forward, forward_request
from ext.wire.http1 cimport H_X_REQUEST_ID


cdef void request_begin(Conn* c) noexcept nogil:
    cdef HeaderOp[EDITS_MAX] ops
    cdef Forward how
    cdef Exchange* x = c.x
    cdef int64_t n
    memset(&how, 0, sizeof(Forward))
    if c.weighted != NULL:
        how.n_ops = request_edits(c.route, c.weighted, ops)
        how.ops = ops
    if c.w.head.first[<int>H_X_REQUEST_ID] == 0:
        account_id(c)
        how.request_id.p = x.request_id
        how.request_id.n = sizeof(x.request_id)
    how.forwarded_proto.p = b"http"
    how.forwarded_proto.n = 4
    how.keep_alive = x.version_minor == 0 and x.down_keep
    x.up_keep = x.version_minor == 1 or x.down_keep
    if buffer_reserve(&c.pod.buffers, &c.uhead, c.w.head.size + FORWARD_EXTRA + edits_size(ops, how.n_ops) + 64) < 0:
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
    c.x.replay = 0
    c.x.fed -= c.x.at
    if c.din.data != NULL:
        buffer_consume(&c.pod.buffers, &c.din, c.x.at)
    c.x.at = 0


cdef int request_feed(Conn* c) noexcept nogil:
    cdef Exchange* x = c.x
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


cdef void request_send(Conn* c) noexcept nogil:
    cdef Exchange* x = c.x
    cdef uint32_t head, body
    cdef int64_t n
    while c.up.source.writable and not x.up_broken:
        head = buffer_used(&c.uhead)
        body = x.fed - x.at
        if head + body == 0:
            return
        n = source_write2(&c.up.source, c.uhead.data + c.uhead.start, head, c.din.data + c.din.start + x.at, body, False)
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
            buffer_drop(&c.pod.buffers, &c.uhead)
        x.at += <uint32_t>n - head
        if not x.replay and x.at > 0:
            give_up_replay(c)


cdef int request_read(Conn* c) noexcept nogil:
    cdef int64_t n
    cdef int rounds = 0
    while not c.x.request_done and c.source.readable and not c.x.up_broken:
        if rounds >= PUMP_ROUNDS and loop_over(&c.w.loop):
            return STEP_MORE
        rounds += 1
        if c.din.data == NULL and memory_wait(c):
            return STEP_WAIT
        if c.din.data == NULL and buffer_reserve(&c.pod.buffers, &c.din, 0) < 0:
            conn_end(c, FLAG_OM, DETAIL_OVERLOAD, True)
            return STEP_OVER
        if buffer_room(&c.din) == 0:
            buffer_compact(&c.din)
            if buffer_room(&c.din) == 0:
                return STEP_WAIT
        n = source_read(&c.source, c.din.data + c.din.end, buffer_room(&c.din))
        if n == -EINTR:
            continue
        if n == -EAGAIN:
            c.source.readable = 0
            if buffer_used(&c.din) == 0:
                buffer_drop(&c.pod.buffers, &c.din)
            return STEP_WAIT
        if n <= 0:
            conn_end(c, FLAG_DC, DETAIL_DOWNSTREAM_CLOSED, True)
            return STEP_OVER
        if n < buffer_room(&c.din) and not c.source.hung:
            c.source.readable = 0
        c.din.end += <uint32_t>n
        c.active_ns = c.w.loop.now_ns
        if request_feed(c) < 0:
            if c.x.responding:
                conn_end(c, FLAG_DPE, DETAIL_MALFORMED, True)
            else:
                answer_malformed(c, 400)
            return STEP_OVER
        request_send(c)
    return STEP_WAIT
