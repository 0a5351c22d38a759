"""See answer.pxd."""
from libc.errno cimport EAGAIN, EINTR
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memset
from ext.core.buffer cimport buffer_consume, buffer_drop, buffer_reserve, buffer_room, buffer_used
from ext.core.shm cimport DETAIL_BAD_CODING, DETAIL_HEAD_TOO_LARGE, DETAIL_BAD_VERSION, DETAIL_MALFORMED, FLAG_DPE
from ext.core.source cimport source_write2
from ext.core.text cimport Span
from ext.core.timer cimport timer_clear, timer_set
from ext.proxy.account cimport account_begin_http, account_end
from ext.proxy.conn cimport conn_end, conn_linger, conn_release
from ext.proxy.held cimport held_forget
from ext.proxy.state cimport (HALF_CLOSED_MS, Q_HELD, Q_STOCK, X_HEAD, X_IDLE, X_REPLY, X_TUNNEL, Conn,
                              Exchange)
from ext.proxy.stock cimport stock_forget
from ext.proxy.tunnel cimport conn_parts
from ext.proxy.upstream cimport upstream_drop
from ext.wire.forward cimport local_reply
from ext.wire.http1 cimport M_HEAD


cdef uint64_t due(Conn* c) noexcept nogil:
    """When this state has lasted too long, by the last byte (or the head's first)."""
    cdef uint64_t limit
    if c.queue == Q_STOCK:
        return c.wait_until_ns
    if c.x.state == X_IDLE:
        limit = c.w.tables.settings.http_idle_timeout_ms
    elif c.x.state == X_HEAD:
        return c.facts.start_ns + <uint64_t>c.w.tables.settings.request_head_timeout_ms * 1000000
    elif c.x.state == X_TUNNEL:
        limit = c.w.tables.settings.tcp_idle_timeout_ms
    else:
        limit = c.w.tables.settings.stream_idle_timeout_ms
        if awaits_body(c) and limit > c.w.tables.settings.request_body_timeout_ms:
            limit = c.w.tables.settings.request_body_timeout_ms
        if c.source.hung and limit > HALF_CLOSED_MS:
            limit = HALF_CLOSED_MS
    return c.active_ns + limit * 1000000


cdef void exchange_arm(Conn* c) noexcept nogil:
    cdef uint64_t when
    if c.queue == Q_HELD:
        return                          # held arms its own
    when = due(c)
    if c.timer.due_ns == 0 or c.timer.due_ns > when:
        timer_set(&c.w.loop.timers, &c.timer, when)


cdef void answer(Conn* c, uint16_t status, uint8_t flag, uint16_t details) noexcept nogil:
    cdef Span none
    cdef int64_t n
    none.p = NULL
    none.n = 0
    timer_clear(&c.w.loop.timers, &c.request_timer)
    held_forget(c)
    stock_forget(c)
    if c.w.draining or not c.pod.attached or conn_parts(c):
        c.x.down_keep = 0
    c.x.lingers = not c.x.request_done
    if c.x.lingers:
        c.x.down_keep = 0
    buffer_drop(&c.pod.buffers, &c.uhead)
    buffer_drop(&c.pod.buffers, &c.uin)
    if buffer_reserve(&c.pod.buffers, &c.dhead, buffer_used(&c.dhead) + 512) < 0:
        conn_end(c, flag, details, True)
        return
    n = local_reply(status, none, not c.x.down_keep, c.x.method == M_HEAD, c.dhead.data + c.dhead.end, buffer_room(&c.dhead))
    if n < 0:
        conn_end(c, flag, details, True)
        return
    c.dhead.end += <uint32_t>n
    c.facts.code = status
    c.facts.response_bytes += <uint64_t>n
    account_end(c, flag, details)
    if c.up != NULL:
        upstream_drop(c.up, True)
    conn_release(c)
    c.x.state = X_REPLY
    exchange_arm(c)


cdef void answer_malformed(Conn* c, int status) noexcept nogil:
    cdef uint16_t details = DETAIL_MALFORMED
    if status == 431 or status == 414:
        details = DETAIL_HEAD_TOO_LARGE
        c.w.stats.refused_head_size += 1
    elif status == 501:
        details = DETAIL_BAD_CODING
    elif status == 505:
        details = DETAIL_BAD_VERSION
    c.w.stats.parse_errors += 1
    account_begin_http(c)
    c.x.request_done = 0
    answer(c, <uint16_t>status, FLAG_DPE, details)


cdef bint answer_advance(Conn* c) noexcept nogil:
    cdef int64_t n
    while buffer_used(&c.dhead) > 0:
        if not c.source.writable:
            return False
        n = source_write2(&c.source, c.dhead.data + c.dhead.start, buffer_used(&c.dhead), NULL, 0, c.x.lingers or not c.x.down_keep)
        if n == -EINTR:
            continue
        if n == -EAGAIN:
            c.source.writable = 0
            return False
        if n < 0:
            conn_end(c, 0, 0, True)
            return True
        c.active_ns = c.w.loop.now_ns
        buffer_consume(&c.pod.buffers, &c.dhead, <uint32_t>n)
    if c.x.lingers:
        conn_linger(c)
    elif not c.x.down_keep:
        client_close(c)
    else:
        exchange_next(c)
    return True


cdef void client_close(Conn* c) noexcept nogil:
    """A close with unread bytes is a reset, which may overtake the answer on its way."""
    if c.x.fed > 0:
        buffer_consume(&c.pod.buffers, &c.din, c.x.fed)
        c.x.fed = 0
    if buffer_used(&c.din) == 0 and (not c.source.readable or c.source.hung):
        conn_end(c, 0, 0, False)
    else:
        conn_linger(c)


cdef void exchange_next(Conn* c) noexcept nogil:
    if c.x.fed > 0:
        buffer_consume(&c.pod.buffers, &c.din, c.x.fed)
    memset(c.x, 0, sizeof(Exchange))
    c.goal.family = 0
    c.unconfigured = 0                  # the next request may ask again
    if c.w.draining or not c.pod.attached:
        client_close(c)
        return
    c.x.state = X_IDLE
    c.active_ns = c.w.loop.now_ns
    exchange_arm(c)
