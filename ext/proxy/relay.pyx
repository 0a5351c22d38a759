"""See relay.pxd."""
from libc.errno cimport EAGAIN, EINTR, ENOBUFS, ENOMEM
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from ext.core.buffer cimport (BUFFER_LARGE, BUFFER_SMALL, Buffer, buffer_compact, buffer_drop, buffer_reserve, buffer_room,
                              buffer_used)
from ext.core.loop cimport Source, loop_again, loop_over
from ext.core.pipes cimport PIPE_BYTES, Pipe
from ext.core.shm cimport (DETAIL_DOWNSTREAM_CLOSED, DETAIL_NONE, DETAIL_OVERLOAD, DETAIL_IDLE, DETAIL_UPSTREAM_RESET,
                           FLAG_DC, FLAG_DT, FLAG_OM,
                           FLAG_UC)
from ext.core.source cimport source_shut
from ext.core.timer cimport timer_set
from ext.proxy.account cimport account_bytes
from ext.proxy.budget cimport memory_tight, memory_wait
from ext.proxy.conn cimport bulk_drop, bulk_pipe, conn_end, conn_timer
from ext.proxy.state cimport C_RELAY, PUMP_ROUNDS, Bulk, Conn, Worker
from ext.sys.stream cimport stream_read, stream_splice, stream_write
from ext.tunnel.shapes cimport FRAME_HEAD


cdef enum:
    BULK_LEAST = 16384          # of one read: below, copying costs less than the pipe's calls
    BULK_AFTER = 3              # reads in a row of at least so much
    BULK_UNTIL = 4              # splices in a row of less


cdef int flush(Worker* w, Source* sink, Buffer* b, Pipe* pipe) noexcept nogil:
    """Writes what is there: 0, or -1 for a broken sink."""
    cdef int64_t n
    while sink.writable:
        if buffer_used(b) > 0:
            if sink.carrier != NULL:
                n = sink.carrier.give(sink, b)
            else:
                n = stream_write(sink.fd, b.data + b.start, buffer_used(b))
                if n > 0:
                    b.start += <uint32_t>n
        elif pipe != NULL and pipe.held > 0:
            n = stream_splice(pipe.out, sink.fd, pipe.held)
            if n > 0:
                pipe.held -= <uint32_t>n
        else:
            break
        if n == -EAGAIN:
            sink.writable = 0
        elif n < 0 and n != -EINTR:
            return -1
    return 0


cdef int64_t draw(Conn* c, Source* source, Bulk* bulk) noexcept nogil:
    """From the socket into an empty pipe: bytes, 0 for the end, -errno; -ENOBUFS: there is no pipe, read instead."""
    cdef int64_t n
    if bulk.pipe == NULL:
        bulk.pipe = bulk_pipe(c)
        if bulk.pipe == NULL:
            return -ENOBUFS
    n = stream_splice(source.fd, bulk.pipe.into, PIPE_BYTES)
    if n > 0:
        bulk.pipe.held += <uint32_t>n
        bulk.small = 0 if n >= BULK_LEAST else bulk.small + 1
        if bulk.small == BULK_UNTIL:
            bulk.large = bulk.small = 0
    return n


cdef int64_t fetch(Conn* c, Source* source, Source* sink, Buffer* b, Bulk* bulk) noexcept nogil:
    """From the socket into the buffer: bytes, 0 for the end, -errno; -ENOMEM: no buffer, -ENOBUFS: it is full, or not its turn for one."""
    cdef int64_t n
    cdef uint32_t room
    cdef bint large = bulk.large > 0 and c.w.tables.settings.buffer_bytes >= BUFFER_LARGE and not memory_tight(c.pod)
    if source.carrier != NULL:
        if buffer_used(b) > 0:
            return -ENOBUFS             # what it has, it keeps as well as we would
        buffer_drop(&c.pod.buffers, b)
        return source.carrier.take(source, b)
    if buffer_used(b) == 0:
        b.start = b.end = 0
        if large and b.size == BUFFER_SMALL:
            buffer_drop(&c.pod.buffers, b)
    elif sink.carrier != NULL:
        return -ENOBUFS                 # it takes whole buffers; filling this one up would cost two copies
    if b.data == NULL and memory_wait(c):
        return -ENOBUFS
    if b.data == NULL and buffer_reserve(&c.pod.buffers, b, BUFFER_LARGE if large else 0) < 0:
        return -ENOMEM
    if buffer_used(b) == 0 and sink.carrier != NULL:
        b.start = b.end = FRAME_HEAD    # for the tunnel, which sends from here
    if buffer_room(b) == 0:
        buffer_compact(b)
        if buffer_room(b) == 0:
            return -ENOBUFS
    room = buffer_room(b)
    n = stream_read(source.fd, b.data + b.end, room)
    if n > 0:
        b.end += <uint32_t>n
        if n < BULK_LEAST and n < room:
            bulk.large = 0
        elif bulk.large < BULK_AFTER:
            bulk.large += 1
        if n < room and not source.hung:
            source.readable = 0
    return n


cdef int pump(Conn* c, bint onward) noexcept nogil:
    cdef Worker* w = c.w
    cdef Source* source = &c.source if onward else &c.up.source
    cdef Source* sink = &c.up.source if onward else &c.source
    cdef Buffer* b = &c.din if onward else &c.uin
    cdef Bulk* bulk = &c.onward if onward else &c.back
    cdef uint8_t* ended = &c.down_ended if onward else &c.up_ended
    cdef uint8_t* shut = &c.down_shut if onward else &c.up_shut
    cdef int64_t n
    cdef int rounds = 0
    while True:
        if flush(w, sink, b, bulk.pipe) < 0:
            return PUMP_WRITE_BROKE
        if ended[0] or not source.readable or (bulk.pipe != NULL and bulk.pipe.held > 0):
            break
        if rounds >= PUMP_ROUNDS and loop_over(&w.loop):
            return PUMP_AGAIN
        rounds += 1
        n = -ENOBUFS
        if bulk.large == BULK_AFTER and buffer_used(b) == 0 and source.carrier == NULL and sink.carrier == NULL:
            if not sink.writable:
                break
            n = draw(c, source, bulk)
        if n == -ENOBUFS:
            n = fetch(c, source, sink, b, bulk)
        if n > 0:
            if onward:
                c.facts.received += <uint64_t>n
            else:
                c.facts.sent += <uint64_t>n
        elif n == 0:
            ended[0] = 1
        elif n == -EAGAIN:
            source.readable = 0
        elif n == -ENOBUFS:
            break                       # the sink is slow
        elif n == -ENOMEM:
            return PUMP_NO_MEMORY
        elif n != -EINTR:
            return PUMP_READ_BROKE
    if buffer_used(b) == 0:
        buffer_drop(&c.pod.buffers, b)
    if bulk.pipe != NULL and bulk.pipe.held == 0:
        bulk_drop(c, bulk)
    if ended[0] and not shut[0] and buffer_used(b) == 0 and bulk.pipe == NULL:
        source_shut(sink)
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
    up = pump(c, True)
    down = pump(c, False)
    if c.facts.received + c.facts.sent != before:
        c.active_ns = w.loop.now_ns
        if c.facts.first_byte_ns == 0 and c.facts.sent > 0:
            c.facts.first_byte_ns = w.loop.now_ns
        account_bytes(c)
    if up == PUMP_NO_MEMORY or down == PUMP_NO_MEMORY:
        conn_end(c, FLAG_OM, DETAIL_OVERLOAD, True)
    elif up == PUMP_READ_BROKE or down == PUMP_WRITE_BROKE or (c.source.failed and up != PUMP_AGAIN):
        conn_end(c, FLAG_DC, DETAIL_DOWNSTREAM_CLOSED, True)
    elif up == PUMP_WRITE_BROKE or down == PUMP_READ_BROKE or (c.up.source.failed and down != PUMP_AGAIN):
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
