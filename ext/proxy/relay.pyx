"""See relay.pxd."""
from libc.errno cimport EAGAIN, EINTR
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from ext.core.buffer cimport (BUFFER_LARGE, BUFFER_SMALL, Buffer, buffer_compact, buffer_drop, buffer_reserve, buffer_room,
                              buffer_used)
from ext.core.loop cimport Source, loop_again, loop_over
from ext.core.shm cimport (DETAIL_DOWNSTREAM_CLOSED, DETAIL_NONE, DETAIL_OVERLOAD, DETAIL_IDLE, DETAIL_UPSTREAM_RESET,
                           FLAG_DC, FLAG_DT, FLAG_OM,
                           FLAG_UC)
from ext.core.timer cimport timer_set
from ext.proxy.account cimport account_bytes
from ext.proxy.conn cimport conn_end, conn_timer
from ext.proxy.state cimport C_RELAY, PUMP_ROUNDS, Conn, Worker
from ext.sys.stream cimport SHUT_WR, shutdown, stream_read, stream_write


cdef int flush(Worker* w, Source* sink, Buffer* b) noexcept nogil:
    """Writes what is there: 0, or -1 for a broken sink."""
    cdef int64_t n
    while buffer_used(b) > 0 and sink.writable:
        n = stream_write(sink.fd, b.data + b.start, buffer_used(b))
        if n == -EINTR:
            continue
        if n == -EAGAIN:
            sink.writable = 0
            break
        if n < 0:
            return -1
        b.start += <uint32_t>n
    return 0


cdef int pump(Worker* w, Source* source, Source* sink, Buffer* b, uint8_t* ended, uint8_t* shut,
              uint64_t* count) noexcept nogil:
    cdef int64_t n
    cdef uint32_t room
    cdef int rounds = 0
    cdef bint bulk = b.size == BUFFER_LARGE
    while True:
        if flush(w, sink, b) < 0:
            return PUMP_WRITE_BROKE
        if ended[0] or not source.readable:
            break
        if rounds >= PUMP_ROUNDS and loop_over(&w.loop):
            return PUMP_AGAIN
        rounds += 1
        if buffer_used(b) == 0:
            b.start = b.end = 0
            if bulk and b.size == BUFFER_SMALL and w.tables.settings.buffer_bytes >= BUFFER_LARGE:
                buffer_drop(&w.buffers, b)
        if b.data == NULL and buffer_reserve(&w.buffers, b, BUFFER_LARGE if bulk else 0) < 0:
            return PUMP_NO_MEMORY
        if buffer_room(b) == 0:
            buffer_compact(b)
            if buffer_room(b) == 0:
                return PUMP_WAIT        # the sink is slow
        room = buffer_room(b)
        n = stream_read(source.fd, b.data + b.end, room)
        if n == -EINTR:
            continue
        if n == -EAGAIN:
            source.readable = 0
        elif n < 0:
            return PUMP_READ_BROKE
        elif n == 0:
            ended[0] = 1
        else:
            b.end += <uint32_t>n
            count[0] += <uint64_t>n
            if n == room:
                bulk = w.tables.settings.buffer_bytes >= BUFFER_LARGE
            elif not source.hung:
                source.readable = 0
    if buffer_used(b) == 0:
        buffer_drop(&w.buffers, b)
        if ended[0] and not shut[0]:
            shutdown(sink.fd, SHUT_WR)
            shut[0] = 1
    return PUMP_WAIT


cdef void relay_start(Conn* c) noexcept nogil:
    c.state = C_RELAY
    c.up_reached = 1
    c.active_ns = c.w.loop.now_ns
    account_bytes(c)                    # what was read (and counted) while the protocol was looked for shows from now on
    conn_timer(c, c.w.tables.settings.tcp_idle_timeout_ms)
    relay_advance(c)


cdef void relay_advance(Conn* c) noexcept nogil:
    cdef Worker* w = c.w
    cdef uint64_t before = c.facts.received + c.facts.sent
    cdef int up, down
    up = pump(w, &c.source, &c.up.source, &c.din, &c.down_ended, &c.down_shut, &c.facts.received)
    down = pump(w, &c.up.source, &c.source, &c.uin, &c.up_ended, &c.up_shut, &c.facts.sent)
    if c.facts.received + c.facts.sent != before:
        c.active_ns = w.loop.now_ns
        if c.facts.first_byte_ns == 0 and c.facts.sent > 0:
            c.facts.first_byte_ns = w.loop.now_ns
        account_bytes(c)
    if up == PUMP_NO_MEMORY or down == PUMP_NO_MEMORY:
        conn_end(c, FLAG_OM, DETAIL_OVERLOAD, True)
    elif up == PUMP_READ_BROKE or down == PUMP_WRITE_BROKE or (c.source.failed and c.down_ended):
        conn_end(c, FLAG_DC, DETAIL_DOWNSTREAM_CLOSED, True)
    elif up == PUMP_WRITE_BROKE or down == PUMP_READ_BROKE or (c.up.source.failed and c.up_ended):
        conn_end(c, FLAG_UC, DETAIL_UPSTREAM_RESET, True)
    elif c.down_shut and c.up_shut:
        conn_end(c, 0, DETAIL_NONE, False)
    else:
        if up == PUMP_AGAIN:
            loop_again(&w.loop, &c.source)
        if down == PUMP_AGAIN:
            loop_again(&w.loop, &c.up.source)


cdef void relay_expire(Conn* c) noexcept nogil:
    cdef uint64_t due = c.active_ns + <uint64_t>c.w.tables.settings.tcp_idle_timeout_ms * 1000000
    if c.w.loop.now_ns >= due:
        conn_end(c, FLAG_DT, DETAIL_IDLE, True)
    else:
        timer_set(&c.w.loop.timers, &c.timer, due)
