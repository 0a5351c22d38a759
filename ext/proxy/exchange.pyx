"""See exchange.pxd."""
from libc.stdint cimport uint64_t
from ext.core.buffer cimport buffer_drop, buffer_used
from ext.core.loop cimport loop_again
from ext.core.shm cimport (DETAIL_DOWNSTREAM_CLOSED, DETAIL_OVERLOAD, DETAIL_UPSTREAM_LATE, DETAIL_VIA_UPSTREAM, FLAG_DC, FLAG_OM,
                           FLAG_UC)
from ext.core.timer cimport timer_clear
from ext.proxy.account cimport account_end
from ext.proxy.answer cimport client_close, exchange_arm, exchange_next
from ext.proxy.conn cimport conn_end, conn_linger, conn_release
from ext.proxy.relay cimport PUMP_AGAIN, PUMP_NO_MEMORY, PUMP_READ_BROKE, PUMP_WRITE_BROKE, pump
from ext.proxy.request cimport STEP_MORE, STEP_OVER, request_read, request_send
from ext.proxy.response cimport response_read, response_send
from ext.proxy.state cimport Conn, Exchange, Upstream
from ext.proxy.tunnel cimport conn_parts
from ext.proxy.upstream cimport upstream_drop, upstream_keep


cdef bint exchange_flow(Conn* c) noexcept nogil:
    cdef int asked, answered
    if c.source.failed:
        conn_end(c, FLAG_DC, DETAIL_DOWNSTREAM_CLOSED, True)
        return False
    request_send(c)
    asked = request_read(c)
    if asked == STEP_OVER:
        return True
    answered = response_read(c)
    if answered == STEP_OVER:
        return True
    if c.x.responding and c.x.response_done and c.x.uready == 0 and buffer_used(&c.dhead) == 0:
        complete(c)
        return True
    if asked == STEP_MORE or answered == STEP_MORE:
        loop_again(&c.w.loop, &c.source)
    exchange_arm(c)
    return False


cdef void complete(Conn* c) noexcept nogil:
    """The response is out. A response that came before the request's end leaves both connections out of step: close them."""
    cdef Exchange* x = c.x
    cdef Upstream* up = c.up
    cdef bint whole = x.request_done and x.fed == x.at and buffer_used(&c.uhead) == 0
    timer_clear(&c.w.loop.timers, &c.request_timer)
    account_end(c, 0, DETAIL_VIA_UPSTREAM)
    conn_release(c)
    buffer_drop(&c.pod.buffers, &c.uhead)
    if x.up_keep and whole and not conn_parts(c) and not x.up_broken and buffer_used(&c.uin) == 0:
        up.exchanges += 1
        c.up = NULL
        upstream_keep(up)
    else:
        upstream_drop(up, False)
    buffer_drop(&c.pod.buffers, &c.uin)
    if not x.request_done:
        conn_linger(c)
    elif not x.down_keep:
        client_close(c)
    else:
        exchange_next(c)


cdef bint tunnel_advance(Conn* c) noexcept nogil:
    """Opaque bytes until both sides ended; what came behind the heads goes first."""
    cdef int up, down
    cdef uint64_t before
    if response_send(c) == STEP_OVER:
        return False
    if buffer_used(&c.dhead) > 0 or buffer_used(&c.uhead) > 0:
        return False
    if not c.x.tunnelling:
        c.x.tunnelling = 1
        c.facts.received += buffer_used(&c.din)
        c.facts.sent += buffer_used(&c.uin)
        c.active_ns = c.w.loop.now_ns
        timer_clear(&c.w.loop.timers, &c.request_timer)
        if c.source.hung:
            c.source.readable = 1
        if c.up.source.hung:
            c.up.source.readable = 1
    before = c.facts.received + c.facts.sent
    up = pump(c, True)
    down = pump(c, False)
    if c.facts.received + c.facts.sent != before:
        c.active_ns = c.w.loop.now_ns   # bytes alone: a look at the clock is no sign of life
    if up == PUMP_NO_MEMORY or down == PUMP_NO_MEMORY:
        conn_end(c, FLAG_OM, DETAIL_OVERLOAD, True)
    elif up == PUMP_READ_BROKE or down == PUMP_WRITE_BROKE or (c.source.failed and up != PUMP_AGAIN):
        conn_end(c, FLAG_DC, DETAIL_DOWNSTREAM_CLOSED, True)
    elif up == PUMP_WRITE_BROKE or down == PUMP_READ_BROKE or (c.up.source.failed and down != PUMP_AGAIN):
        conn_end(c, FLAG_UC, DETAIL_UPSTREAM_LATE, True)
    elif c.down_shut and c.up_shut:
        conn_end(c, 0, DETAIL_VIA_UPSTREAM, False)
    else:
        if up == PUMP_AGAIN or down == PUMP_AGAIN:
            loop_again(&c.w.loop, &c.source)
        exchange_arm(c)
    return False
