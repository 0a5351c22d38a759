"""See stream.pxd."""
from libc.errno cimport EAGAIN, ECONNREFUSED, ECONNRESET, ENOMEM, EPIPE
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t
from libc.string cimport memcpy
from ext.core.buffer cimport (BUFFER_LARGE, BUFFER_SMALL, BUFFER_TINY, Buffer, Buffers, buffer_consume, buffer_drop, buffer_reserve,
                              buffer_room, buffer_tiny, buffer_used)
from ext.core.loop cimport Source
from ext.core.slab cimport slab_give, slab_take
from ext.core.text cimport Span
from ext.tunnel.nghttp2 cimport *
from ext.tunnel.shapes cimport (FRAME_HEAD, SEND_BYTES, SINK_KEPT, STREAM_BROKEN, STREAM_OPEN, STREAM_OPENING, STREAM_REFUSED,
                                WIDE_AFTER, WINDOW_WIDE, Chunk, Pad, Session, Stream)
from ext.tunnel.tls cimport TLS_RECORD

cdef enum:
    SWEEPS = 3              # of the owner, some 10 s apart: what was let go and still is not over is reset


cdef inline void soil(Session* session) noexcept nogil:
    if not session.dirty:
        session.dirty = 1
        session.ops.dirty(session)


cdef inline void wake(Stream* stream) noexcept nogil:
    stream.session.ops.wakes(stream.session, stream.source)


# ---- received bytes --------------------------------------------------------------------------------------------------------------

cdef Chunk* chunk_new(Stream* stream) noexcept nogil:
    """`waiting` says already what it is for."""
    cdef Buffer b
    cdef Chunk* chunk
    b.data = NULL
    b.start = b.end = b.size = 0
    if stream.waiting <= BUFFER_TINY - sizeof(Chunk):
        if buffer_tiny(stream.pool, &b) != 0:
            return NULL
    elif buffer_reserve(stream.pool, &b, BUFFER_LARGE if stream.wide or stream.waiting > BUFFER_SMALL else 0) != 0:
        return NULL
    chunk = <Chunk*>b.data
    chunk.next = NULL
    chunk.size = b.size
    chunk.start = chunk.end = sizeof(Chunk)
    return chunk


cdef void chunk_free(Buffers* pool, Chunk* chunk) noexcept nogil:
    cdef Buffer b
    b.data = <char*>chunk
    b.size = chunk.size
    b.start = b.end = 0
    buffer_drop(pool, &b)


cdef int stream_received(Stream* stream, const uint8_t* data, uint32_t size) noexcept nogil:
    cdef Chunk* chunk = stream.last
    cdef uint32_t n
    if stream.source == NULL:
        if stream.fin_sent:
            hbone_abort(stream)         # nobody reads it: as a socket that is closed
        return 0
    if stream.error != 0:
        return 0                        # it is reset already; behind what had no room nothing may follow
    stream.waiting += size
    while size > 0:
        if chunk == NULL or chunk.end == chunk.size:
            chunk = chunk_new(stream)
            if chunk == NULL:
                return -1
            if stream.last != NULL:
                stream.last.next = chunk
            else:
                stream.first = chunk
            stream.last = chunk
        n = chunk.size - chunk.end
        if n > size:
            n = size
        memcpy(<char*>chunk + chunk.end, data, n)
        chunk.end += n
        data += n
        size -= n
    if not stream.source.readable:
        stream.source.readable = 1
        wake(stream)
    return 0


cdef void forget_received(Stream* stream) noexcept nogil:
    cdef Chunk* chunk = stream.first
    while chunk != NULL:
        stream.first = chunk.next
        chunk_free(stream.pool, chunk)
        chunk = stream.first
    stream.last = NULL
    stream.waiting = 0


cdef int64_t hbone_read(Stream* stream, void* data, size_t size) noexcept nogil:
    cdef Chunk* chunk = stream.first
    cdef uint32_t n
    cdef size_t got = 0
    while chunk != NULL and got < size:
        n = chunk.end - chunk.start
        if n > size - got:
            n = <uint32_t>(size - got)
        memcpy(<char*>data + got, <char*>chunk + chunk.start, n)
        got += n
        chunk.start += n
        if chunk.start == chunk.end:
            stream.first = chunk.next
            if stream.first == NULL:
                stream.last = NULL
            chunk_free(stream.pool, chunk)
        chunk = stream.first
    if got == 0:
        return nothing(stream)
    taken(stream, <uint32_t>got)
    return <int64_t>got


cdef inline int64_t nothing(const Stream* stream) noexcept nogil:
    """Of one without bytes. An error comes behind what came before it, as the kernel says it."""
    if stream.error != 0:
        return stream.error
    return 0 if stream.fin_in else -EAGAIN


cdef void taken(Stream* stream, uint32_t n) noexcept nogil:
    stream.waiting -= n
    stream.taken += n
    if stream.session != NULL and not stream.fin_in:
        stream.session.moved += n
        nghttp2_session_consume_stream(stream.session.h2, stream.id, n)
        if not stream.wide and stream.taken >= WIDE_AFTER:
            stream.wide = 1
            nghttp2_session_set_local_window_size(stream.session.h2, NGHTTP2_FLAG_NONE, stream.id, WINDOW_WIDE)
        if nghttp2_session_want_write(stream.session.h2):
            soil(stream.session)


cdef int64_t hbone_take(Stream* stream, Buffer* b) noexcept nogil:
    cdef Chunk* chunk = stream.first
    if chunk == NULL:
        return nothing(stream)
    stream.first = chunk.next
    if stream.first == NULL:
        stream.last = NULL
    b.size = chunk.size
    b.start = chunk.start
    b.end = chunk.end
    b.data = <char*>chunk               # its head is in front of the bytes, and free from now on
    taken(stream, b.end - b.start)
    return b.end - b.start


# ---- bytes to send -----------------------------------------------------------------------------------------------------------------

cdef ssize_t supply(nghttp2_session* h2, int32_t id, uint8_t* out, size_t size, uint32_t* flags, nghttp2_data_source* source,
                    void* owner) noexcept nogil:
    """How long a frame is; the session asks for its bytes (stream_out) at once, so they stay where they are until then."""
    cdef Stream* stream = <Stream*>source.ptr
    cdef const Pad* pad = stream.session.pad
    cdef uint32_t n = buffer_used(&stream.out)
    if n == 0 and (stream.resets or not stream.fin_out):
        stream.deferred = 1
        return NGHTTP2_ERR_DEFERRED
    if pad.sink.size - pad.sink.n <= SINK_KEPT:
        return NGHTTP2_ERR_PAUSE
    flags[0] |= NGHTTP2_DATA_FLAG_NO_COPY
    if size > TLS_RECORD - FRAME_HEAD:
        size = TLS_RECORD - FRAME_HEAD      # one record, with its head
    if n > size:
        return <ssize_t>size
    if stream.fin_out and not stream.resets:
        flags[0] |= NGHTTP2_DATA_FLAG_EOF
        stream.fin_sent = 1
    return n


cdef uint32_t stream_out(Stream* stream, char** data) noexcept nogil:
    data[0] = stream.out.data + stream.out.start
    return buffer_used(&stream.out)


cdef void stream_sent(Stream* stream, uint32_t n) noexcept nogil:
    buffer_consume(stream.pool, &stream.out, n)
    stream.session.moved += n
    if stream.resets and buffer_used(&stream.out) == 0:
        nghttp2_submit_rst_stream(stream.session.h2, NGHTTP2_FLAG_NONE, stream.id, NGHTTP2_CANCEL)
    if stream.source != NULL and not stream.fin_out and not stream.source.writable and buffer_used(&stream.out) <= SEND_BYTES // 2:
        stream.source.writable = 1
        wake(stream)


cdef inline void resume(Stream* stream) noexcept nogil:
    if stream.session == NULL:
        return
    if stream.deferred:
        stream.deferred = 0
        nghttp2_session_resume_data(stream.session.h2, stream.id)
    soil(stream.session)


cdef int64_t hbone_write(Stream* stream, const void* data, size_t size) noexcept nogil:
    cdef uint32_t n = buffer_used(&stream.out)
    if stream.error != 0:
        return stream.error
    if stream.session == NULL or stream.fin_out:
        return -EPIPE
    if stream.state != STREAM_OPEN or n == SEND_BYTES:
        return -EAGAIN
    if size > SEND_BYTES - n:
        size = SEND_BYTES - n
    if stream.out.data == NULL:
        if size <= BUFFER_TINY - FRAME_HEAD:
            if buffer_tiny(stream.pool, &stream.out) != 0:
                return -ENOMEM
        elif buffer_reserve(stream.pool, &stream.out, <uint32_t>size) != 0:
            return -ENOMEM
        if size + FRAME_HEAD <= stream.out.size:
            stream.out.start = stream.out.end = FRAME_HEAD
    if size > buffer_room(&stream.out) and buffer_reserve(stream.pool, &stream.out, n + <uint32_t>size) != 0:
        if buffer_room(&stream.out) == 0:
            return -EAGAIN if n > 0 else -ENOMEM
        size = buffer_room(&stream.out)
    memcpy(stream.out.data + stream.out.end, data, size)
    stream.out.end += <uint32_t>size
    resume(stream)
    return <int64_t>size


cdef int64_t hbone_give(Stream* stream, Buffer* b) noexcept nogil:
    cdef uint32_t size = buffer_used(b)
    cdef int64_t n
    if size <= BUFFER_TINY - FRAME_HEAD or stream.error != 0 or stream.session == NULL or stream.fin_out or stream.state != STREAM_OPEN \
            or stream.out.data != NULL:
        if buffer_used(&stream.out) > 0 and size > BUFFER_TINY and size > buffer_room(&stream.out):
            return stream.error if stream.error != 0 else -EAGAIN
        n = hbone_write(stream, b.data + b.start, size)
        if n > 0:
            b.start += <uint32_t>n
        return n
    stream.out = b[0]
    b.data = NULL
    b.start = b.end = b.size = 0
    resume(stream)
    return size


cdef void hbone_shut(Stream* stream) noexcept nogil:
    if not stream.fin_out:
        stream.fin_out = 1
        resume(stream)


# ---- its life ------------------------------------------------------------------------------------------------------------------------

cdef Stream* stream_new(Session* session, Source* source, Buffers* pool) noexcept nogil:
    cdef Stream* stream = <Stream*>slab_take(&session.pad.streams)
    if stream == NULL:
        return NULL
    stream.session = session
    stream.source = source
    stream.pool = pool
    stream.server = session.server
    stream.next = session.first
    if stream.next != NULL:
        stream.next.prev = stream
    session.first = stream
    session.streams += 1
    session.opened += 1
    return stream


cdef void unlink(Stream* stream) noexcept nogil:
    cdef Session* session = stream.session
    if stream.prev != NULL:
        stream.prev.next = stream.next
    else:
        session.first = stream.next
    if stream.next != NULL:
        stream.next.prev = stream.prev
    session.streams -= 1
    if stream.source == NULL:
        session.let_go -= 1
    stream.session = NULL


cdef void field(nghttp2_nv* out, const char* name, size_t n, const char* value, size_t size) noexcept nogil:
    out.name = <uint8_t*>name
    out.namelen = n
    out.value = <uint8_t*>value
    out.valuelen = size
    out.flags = NGHTTP2_NV_FLAG_NONE


cdef Stream* hbone_open(Session* session, Source* source, Buffers* pool, const Span* authority, const Span* forwarded, const Span* baggage,
                        const Span* trace) noexcept nogil:
    cdef nghttp2_nv[5] fields
    cdef nghttp2_data_provider data
    cdef Stream* stream
    cdef int n = 2
    if session.h2 == NULL or session.going or session.leaving or session.trouble:
        return NULL
    stream = stream_new(session, source, pool)
    if stream == NULL:
        return NULL
    field(&fields[0], b":method", 7, b"CONNECT", 7)
    field(&fields[1], b":authority", 10, authority.p, authority.n)
    if forwarded.n > 0:
        field(&fields[n], b"forwarded", 9, forwarded.p, forwarded.n)
        fields[n].flags = NGHTTP2_NV_FLAG_NO_INDEX      # never the same again: in both sides' tables it would only cost
        n += 1
    if baggage.n > 0:
        field(&fields[n], b"baggage", 7, baggage.p, baggage.n)
        n += 1
    if trace.n > 0:
        field(&fields[n], b"traceparent", 11, trace.p, trace.n)
        fields[n].flags = NGHTTP2_NV_FLAG_NO_INDEX
        n += 1
    data.source.ptr = stream
    data.read_callback = supply
    stream.id = nghttp2_submit_request(session.h2, NULL, fields, n, &data, stream)
    if stream.id < 0:
        unlink(stream)
        slab_give(&session.pad.streams, stream)
        return NULL
    soil(session)
    return stream


cdef Stream* hbone_accept(Session* session, int32_t id, bint ended, Source* source, Buffers* pool) noexcept nogil:
    cdef Stream* stream = stream_new(session, source, pool)
    if stream == NULL:
        nghttp2_submit_rst_stream(session.h2, NGHTTP2_FLAG_NONE, id, NGHTTP2_REFUSED_STREAM)
        soil(session)
        return NULL
    stream.id = id
    nghttp2_session_set_stream_user_data(session.h2, id, stream)
    if ended:
        stream.fin_in = 1
        source.readable = source.hung = 1
    return stream


cdef void hbone_refuse(Session* session, int32_t id, uint16_t status) noexcept nogil:
    cdef nghttp2_nv[1] fields
    cdef char[3] digits
    digits[0] = <char>(48 + status // 100)
    digits[1] = <char>(48 + status // 10 % 10)
    digits[2] = <char>(48 + status % 10)
    field(&fields[0], b":status", 7, digits, 3)
    nghttp2_submit_response(session.h2, id, fields, 1, NULL)
    soil(session)


cdef void hbone_answer(Stream* stream, uint16_t status, const Span* baggage) noexcept nogil:
    cdef nghttp2_nv[2] fields
    cdef nghttp2_data_provider data
    cdef int n = 1
    if stream.session == NULL or stream.state != STREAM_OPENING:
        return
    stream.status = status
    if status != 200:
        stream.state = STREAM_REFUSED
        stream.error = -ECONNRESET
        stream.fin_out = stream.fin_sent = 1
        hbone_refuse(stream.session, stream.id, status)
        return
    stream.state = STREAM_OPEN
    field(&fields[0], b":status", 7, b"200", 3)
    if baggage != NULL and baggage.n > 0:
        field(&fields[1], b"baggage", 7, baggage.p, baggage.n)
        n = 2
    data.source.ptr = stream
    data.read_callback = supply
    nghttp2_submit_response(stream.session.h2, stream.id, fields, n, &data)
    stream.source.writable = 1
    soil(stream.session)


cdef void stream_answered(Stream* stream, uint16_t status) noexcept nogil:
    if stream.state != STREAM_OPENING or status < 200:
        return
    stream.status = status
    if status < 300:
        stream.state = STREAM_OPEN
        if stream.source != NULL:
            stream.source.writable = 1
            wake(stream)
        return
    stream.state = STREAM_REFUSED
    stream.error = -ECONNREFUSED
    nghttp2_submit_rst_stream(stream.session.h2, NGHTTP2_FLAG_NONE, stream.id, NGHTTP2_CANCEL)
    soil(stream.session)
    if stream.source != NULL:
        stream.source.failed = stream.source.readable = stream.source.writable = 1
        wake(stream)


cdef void stream_ended(Stream* stream) noexcept nogil:
    stream.fin_in = 1
    if stream.source != NULL:
        stream.source.hung = stream.source.readable = 1
        wake(stream)


cdef void stream_broken(Stream* stream, uint32_t code, int error) noexcept nogil:
    """The last event of HTTP/2. An end that both sides have said is none for the user, who may still have bytes to read."""
    cdef Pad* pad = stream.session.pad
    if stream.source == NULL:
        unlink(stream)
        buffer_drop(stream.pool, &stream.out)
        slab_give(&pad.streams, stream)
        return
    if stream.state == STREAM_OPEN and stream.fin_in and stream.fin_sent and code == NGHTTP2_NO_ERROR:
        unlink(stream)
        return
    stream.code = code
    if stream.error == 0:
        stream.error = error
    if stream.state != STREAM_REFUSED:
        stream.state = STREAM_BROKEN
    # hung: who reads what came before must go on to the error
    stream.source.failed = stream.source.hung = stream.source.readable = stream.source.writable = 1
    wake(stream)
    buffer_drop(stream.pool, &stream.out)
    unlink(stream)


cdef void hbone_abort(Stream* stream) noexcept nogil:
    """libnghttp2 sends RST_STREAM before any DATA that waits, so it is told of it behind the last byte (stream_sent). More bytes than
    the peer's windows have room for now are not kept: they would be held for as long as it does not read."""
    cdef int32_t most, whole
    if stream.session == NULL or stream.resets or (stream.fin_in and stream.fin_sent):
        return
    stream.fin_out = stream.resets = 1
    stream.error = -ECONNRESET
    if buffer_used(&stream.out) > 0:
        most = nghttp2_session_get_stream_remote_window_size(stream.session.h2, stream.id)
        whole = nghttp2_session_get_remote_window_size(stream.session.h2)
        if whole < most:
            most = whole
        if most > 0:
            if buffer_used(&stream.out) > <uint32_t>most:
                stream.out.end = stream.out.start + <uint32_t>most
            soil(stream.session)
            return
    buffer_drop(stream.pool, &stream.out)
    nghttp2_submit_rst_stream(stream.session.h2, NGHTTP2_FLAG_NONE, stream.id, NGHTTP2_CANCEL)
    soil(stream.session)


cdef void hbone_drop(Stream* stream, Pad* pad) noexcept nogil:
    cdef bint unread = stream.waiting > 0
    forget_received(stream)
    if stream.session == NULL:
        buffer_drop(stream.pool, &stream.out)
        slab_give(&pad.streams, stream)
        return
    stream.source = NULL
    stream.session.let_go += 1
    if stream.error != 0:
        return                          # it was reset
    if unread or stream.state == STREAM_OPENING:
        hbone_abort(stream)             # as a socket that is closed with unread bytes
    else:
        hbone_shut(stream)


cdef bint stream_stale(Stream* stream) noexcept nogil:
    if stream.source != NULL:
        return False
    stream.swept += 1
    return stream.swept >= SWEEPS
