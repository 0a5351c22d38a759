"""See session.pxd."""
from libc.errno cimport ECONNREFUSED, ECONNRESET, ENOMEM
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcmp, memcpy, memset
from ext.core.slab cimport slab_free, slab_give, slab_take
from ext.core.text cimport Span
from ext.tunnel.nghttp2 cimport *
from ext.tunnel.shapes cimport (AUTHORITY_MAX, BAGGAGE_MAX, FORWARDED_MAX, FRAME_HEAD, HEADERS_CLIENT, HEADERS_SERVER, ODD_MOST, QUEUE_MOST,
                                RESETS_BURST, RESETS_RATE, SINK_BYTES, SINK_KEPT, STREAMS_MOST, TRACE_MAX,
                                TROUBLE_CLOSED, TROUBLE_FLOOD, TROUBLE_HTTP2, TROUBLE_MEMORY, TROUBLE_SILENT, TROUBLE_TLS,
                                UPDATES_MOST, WHOLE_LEAST, WINDOW, WINDOW_CONNECTION, Asked, Ops, Pad, Session, Stream)
from ext.tunnel.stream cimport (stream_answered, stream_broken, stream_ended, stream_out, stream_received, stream_sent,
                                stream_stale)
from ext.tunnel.tls cimport (TLS_RECORD, Credentials, tls_end, tls_free, tls_handshake, tls_init, tls_open, tls_read,
                             tls_text, tls_write)

cdef extern from "<stdio.h>" nogil:
    int snprintf(char* out, size_t size, const char* how, ...)

cdef nghttp2_session_callbacks* callbacks
cdef nghttp2_option* options


cdef int pad_open(Pad* pad) noexcept nogil:
    global callbacks, options
    if tls_open() != 0:
        return -1
    if callbacks == NULL:
        if nghttp2_session_callbacks_new(&callbacks) != 0 or nghttp2_option_new(&options) != 0:
            return -1
        nghttp2_session_callbacks_set_on_begin_headers_callback(callbacks, on_begin)
        nghttp2_session_callbacks_set_on_header_callback(callbacks, on_header)
        nghttp2_session_callbacks_set_on_frame_recv_callback(callbacks, on_frame)
        nghttp2_session_callbacks_set_on_frame_send_callback(callbacks, on_sent)
        nghttp2_session_callbacks_set_on_invalid_frame_recv_callback(callbacks, on_invalid)
        nghttp2_session_callbacks_set_on_data_chunk_recv_callback(callbacks, on_data)
        nghttp2_session_callbacks_set_on_stream_close_callback(callbacks, on_close)
        nghttp2_session_callbacks_set_send_data_callback(callbacks, on_send)
        nghttp2_option_set_no_auto_window_update(options, 1)
        nghttp2_option_set_no_closed_streams(options, 1)
        nghttp2_option_set_peer_max_concurrent_streams(options, 100)        # until its SETTINGS say
        nghttp2_option_set_stream_reset_rate_limit(options, RESETS_BURST, RESETS_RATE)
    pad.plain = <char*>malloc(TLS_RECORD)
    pad.gather = <char*>malloc(TLS_RECORD)
    pad.sink.data = <char*>malloc(SINK_BYTES)
    pad.sink.n = 0
    pad.sink.size = SINK_BYTES
    pad.streams.size = sizeof(Stream)
    pad.asked.size = sizeof(Asked)
    return 0 if pad.plain != NULL and pad.gather != NULL and pad.sink.data != NULL else -1


cdef void pad_close(Pad* pad) noexcept nogil:
    free(pad.plain)
    free(pad.gather)
    free(pad.sink.data)
    slab_free(&pad.streams)
    slab_free(&pad.asked)


# ---- what libnghttp2 tells ----------------------------------------------------------------------------------------------------------

cdef void forget_asked(Session* session) noexcept nogil:
    if session.asked != NULL:
        slab_give(&session.pad.asked, session.asked)
        session.asked = NULL


cdef int on_begin(nghttp2_session* h2, const nghttp2_frame* frame, void* owner) noexcept nogil:
    cdef Session* session = <Session*>owner
    forget_asked(session)                                       # of a list that was refused in its middle
    session.asked = <Asked*>slab_take(&session.pad.asked)       # all zero
    return 0 if session.asked != NULL else NGHTTP2_ERR_CALLBACK_FAILURE


cdef inline bint named(const uint8_t* name, size_t n, const char* wanted, size_t size) noexcept nogil:
    return n == size and memcmp(name, wanted, size) == 0


cdef inline uint32_t keep(char* out, uint32_t most, const uint8_t* value, size_t n) noexcept nogil:
    if n > most:
        return 0
    memcpy(out, value, n)
    return <uint32_t>n


cdef int on_header(nghttp2_session* h2, const nghttp2_frame* frame, const uint8_t* name, size_t n, const uint8_t* value, size_t size,
                   uint8_t flags, void* owner) noexcept nogil:
    cdef Session* session = <Session*>owner
    cdef Asked* asked = session.asked
    cdef uint32_t most = HEADERS_SERVER if session.server else HEADERS_CLIENT
    if n + size + 32 > most - asked.bytes:      # RFC 9113 6.5.2: 32 for each field
        session.odd = ODD_MOST + 1              # whoever may send another makes us decode 30 MB out of 12 KB again
        return NGHTTP2_ERR_TEMPORAL_CALLBACK_FAILURE
    asked.bytes += <uint32_t>(n + size + 32)
    if frame.headers.cat == NGHTTP2_HCAT_HEADERS:
        return 0                                # trailers say nothing here
    if named(name, n, b":method", 7):
        asked.method = named(value, size, b"CONNECT", 7)
    elif named(name, n, b":status", 7) and size == 3:
        asked.status = (value[0] - 48) * 100 + (value[1] - 48) * 10 + value[2] - 48
    elif named(name, n, b":authority", 10):
        asked.authority_n = keep(asked.authority, AUTHORITY_MAX, value, size)
        asked.authority_n_high = size > AUTHORITY_MAX
    elif named(name, n, b"forwarded", 9):
        asked.forwarded_n = keep(asked.forwarded, FORWARDED_MAX, value, size)
    elif named(name, n, b"baggage", 7):
        asked.baggage_n = keep(asked.baggage, BAGGAGE_MAX, value, size)
    elif named(name, n, b"traceparent", 11):
        asked.trace_n = keep(asked.trace, TRACE_MAX, value, size)
    return 0


cdef int on_frame(nghttp2_session* h2, const nghttp2_frame* frame, void* owner) noexcept nogil:
    cdef Session* session = <Session*>owner
    cdef Stream* stream
    cdef bint ended = frame.hd.flags & NGHTTP2_FLAG_END_STREAM
    cdef int type = frame.hd.type
    if type == NGHTTP2_DATA:
        if ended:
            stream = <Stream*>nghttp2_session_get_stream_user_data(h2, frame.hd.stream_id)
            if stream != NULL:
                stream_ended(stream)
        elif frame.hd.length == 0:
            session.odd += 1
    elif type == NGHTTP2_HEADERS:
        if frame.headers.cat == NGHTTP2_HCAT_REQUEST:
            session.ops.asks(session, frame.hd.stream_id, session.asked, ended)
        else:
            stream = <Stream*>nghttp2_session_get_stream_user_data(h2, frame.hd.stream_id)
            if stream != NULL and session.asked.status != 0 and not session.server:
                stream_answered(stream, session.asked.status)
            if stream != NULL and ended:
                stream_ended(stream)
        forget_asked(session)
    elif type == NGHTTP2_PING:
        if frame.hd.flags & NGHTTP2_FLAG_ACK:
            session.pinged = 0
        else:
            session.odd += 1
    elif type == NGHTTP2_GOAWAY:
        session.going = 1
        session.ops.going(session)
    elif type == NGHTTP2_WINDOW_UPDATE:
        session.updates += 1
    else:
        session.odd += 1
    return 0


cdef int on_invalid(nghttp2_session* h2, const nghttp2_frame* frame, int code, void* owner) noexcept nogil:
    """What makes us reset a stream costs as much as what the peer resets, which libnghttp2 counts (CVE-2025-8671)."""
    (<Session*>owner).odd += 1
    (<Session*>owner).broke = code
    return 0


cdef int on_data(nghttp2_session* h2, uint8_t flags, int32_t id, const uint8_t* data, size_t size, void* owner) noexcept nogil:
    cdef Stream* stream = <Stream*>nghttp2_session_get_stream_user_data(h2, id)
    nghttp2_session_consume_connection(h2, size)        # one who does not read must not stop the others
    if stream == NULL:
        return 0
    if stream_received(stream, data, <uint32_t>size) != 0:
        stream.error = -ENOMEM
        nghttp2_submit_rst_stream(h2, NGHTTP2_FLAG_NONE, id, NGHTTP2_ENHANCE_YOUR_CALM)
    return 0


cdef int flush(Session* session) noexcept nogil:
    cdef uint32_t n = session.pad.gathered
    session.pad.gathered = 0
    return tls_write(&session.tls, session.pad.gather, n) if n > 0 else 0


cdef int gather(Session* session, const char* data, size_t n) noexcept nogil:
    """A TLS record for as many frames as fit in it: each costs a tag and a call. 0, or -1."""
    cdef Pad* pad = session.pad
    cdef uint32_t part
    while n > 0:
        part = TLS_RECORD - pad.gathered
        if part > n:
            part = <uint32_t>n
        memcpy(pad.gather + pad.gathered, data, part)
        pad.gathered += part
        data += part
        n -= part
        if pad.gathered == TLS_RECORD and flush(session) != 0:
            return -1
    return 0


cdef int on_send(nghttp2_session* h2, nghttp2_frame* frame, const uint8_t* head, size_t size, nghttp2_data_source* source,
                 void* owner) noexcept nogil:
    """A DATA frame. A long one is encrypted from where it lies: its head goes before it, where bytes were that are gone."""
    cdef Session* session = <Session*>owner
    cdef Stream* stream = <Stream*>source.ptr
    cdef char* data
    cdef int result
    if stream_out(stream, &data) < size:
        return NGHTTP2_ERR_CALLBACK_FAILURE             # cannot be: supply has just said so
    if size >= WHOLE_LEAST and stream.out.start >= FRAME_HEAD:
        result = flush(session)
        memcpy(data - FRAME_HEAD, head, FRAME_HEAD)
        if result == 0:
            result = tls_write(&session.tls, data - FRAME_HEAD, <uint32_t>size + FRAME_HEAD)
    else:
        result = gather(session, <const char*>head, FRAME_HEAD)
        if result == 0:
            result = gather(session, data, size)
    if result != 0:
        return NGHTTP2_ERR_CALLBACK_FAILURE
    if size > 0:
        stream_sent(stream, <uint32_t>size)
    return 0


cdef int on_sent(nghttp2_session* h2, const nghttp2_frame* frame, void* owner) noexcept nogil:
    """A refusal is out: what the client would still send is not wanted (RFC 9113 8.1)."""
    cdef int32_t id = frame.hd.stream_id
    if frame.hd.type == NGHTTP2_HEADERS and frame.hd.flags & NGHTTP2_FLAG_END_STREAM and (<Session*>owner).server \
            and nghttp2_session_get_stream_remote_close(h2, id) == 0:
        nghttp2_submit_rst_stream(h2, NGHTTP2_FLAG_NONE, id, NGHTTP2_NO_ERROR)
    return 0


cdef int on_close(nghttp2_session* h2, int32_t id, uint32_t code, void* owner) noexcept nogil:
    cdef Stream* stream = <Stream*>nghttp2_session_get_stream_user_data(h2, id)
    if stream != NULL:
        stream_broken(stream, code, -ECONNREFUSED if code == NGHTTP2_REFUSED_STREAM else -ECONNRESET)
    return 0


# ---- its life -------------------------------------------------------------------------------------------------------------------------

cdef inline void soil(Session* session) noexcept nogil:
    if not session.dirty:
        session.dirty = 1
        session.ops.dirty(session)


cdef void setting(nghttp2_settings_entry* out, int what, uint32_t value) noexcept nogil:
    out.settings_id = what
    out.value = value


cdef int session_init(Session* session, Pad* pad, const Ops* ops, void* owner, Credentials* credentials, bint server, const Span* expected,
                      uint32_t n_expected) noexcept nogil:
    cdef nghttp2_settings_entry[3] settings
    cdef int result
    memset(session, 0, sizeof(Session))
    session.pad = pad
    session.ops = ops
    session.owner = owner
    session.server = server
    if server:
        result = nghttp2_session_server_new2(&session.h2, callbacks, session, options)
        setting(&settings[0], NGHTTP2_SETTINGS_MAX_CONCURRENT_STREAMS, STREAMS_MOST)
    else:
        result = nghttp2_session_client_new2(&session.h2, callbacks, session, options)
        setting(&settings[0], NGHTTP2_SETTINGS_ENABLE_PUSH, 0)
    if result != 0:
        session.h2 = NULL
        return -1
    setting(&settings[1], NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE, WINDOW)
    setting(&settings[2], NGHTTP2_SETTINGS_MAX_HEADER_LIST_SIZE, HEADERS_SERVER if server else HEADERS_CLIENT)
    if nghttp2_submit_settings(session.h2, NGHTTP2_FLAG_NONE, settings, 3) != 0 \
            or nghttp2_session_set_local_window_size(session.h2, NGHTTP2_FLAG_NONE, 0, WINDOW_CONNECTION) != 0 \
            or tls_init(&session.tls, credentials, server, expected, n_expected) != 0:
        nghttp2_session_del(session.h2)
        session.h2 = NULL
        return -1
    if not server:
        soil(session)
    return 0


cdef int give_up(Session* session, uint8_t trouble, int code) noexcept nogil:
    if session.trouble == 0:
        session.trouble = trouble
        session.code = code
    soil(session)
    return -1


cdef int take(Session* session, const char* plain, uint32_t size) noexcept nogil:
    cdef int64_t taken = nghttp2_session_mem_recv(session.h2, <const uint8_t*>plain, size)
    if taken == NGHTTP2_ERR_FLOODED:
        return give_up(session, TROUBLE_FLOOD, 0)
    if taken < 0:
        return give_up(session, TROUBLE_HTTP2, <int>taken)
    if session.odd > ODD_MOST or session.updates > UPDATES_MOST or nghttp2_session_get_outbound_queue_size(session.h2) > QUEUE_MOST:
        nghttp2_session_terminate_session(session.h2, NGHTTP2_ENHANCE_YOUR_CALM)
        return give_up(session, TROUBLE_FLOOD, 0)
    return 0


cdef int session_feed(Session* session, const char* data, uint32_t size, uint64_t now_ns) noexcept nogil:
    cdef Pad* pad = session.pad
    cdef int64_t n
    cdef int done
    if session.trouble:
        return -1
    if now_ns - session.odd_ns >= 1000000000:
        session.odd_ns = now_ns
        session.odd = session.updates = 0
    session.tls.given.p = data
    session.tls.given.n = size
    session.tls.sink = &pad.sink
    if not session.tls.done:
        done = tls_handshake(&session.tls)
        if done < 0:
            return give_up(session, TROUBLE_TLS, 0)
        soil(session)
        if done == 0:
            return 0
        session.ops.ready(session)
    while True:
        n = tls_read(&session.tls, pad.plain, TLS_RECORD)
        if n < 0:
            return give_up(session, TROUBLE_TLS, 0)
        if n == 0:
            break
        if take(session, pad.plain, <uint32_t>n) != 0:
            return -1
    if nghttp2_session_want_write(session.h2):
        soil(session)
    if session.tls.ended:
        return give_up(session, TROUBLE_CLOSED, 0)
    return 0


cdef bint session_pull(Session* session) noexcept nogil:
    cdef Pad* pad = session.pad
    cdef const uint8_t* data = NULL
    cdef ssize_t n
    session.dirty = 0
    if session.h2 == NULL:
        return False
    session.tls.sink = &pad.sink
    if not session.tls.done:
        session.tls.given.n = 0
        if session.trouble == 0 and tls_handshake(&session.tls) < 0:
            give_up(session, TROUBLE_TLS, 0)
        return False
    while pad.sink.size - pad.sink.n > SINK_KEPT:
        n = nghttp2_session_mem_send(session.h2, &data)
        if n <= 0:
            if n < 0:
                session.trouble = TROUBLE_HTTP2 if session.trouble == 0 else session.trouble
                session.code = <int>n
            break
        if gather(session, <const char*>data, <size_t>n) != 0:
            pad.gathered = 0
            return False
    flush(session)
    if nghttp2_session_want_write(session.h2) and pad.sink.size - pad.sink.n <= SINK_KEPT:
        session.dirty = 1
        return True
    if session_over(session):
        if session.trouble == 0 and not session.leaving and not session.going:
            session.trouble = TROUBLE_HTTP2         # libnghttp2 said GOAWAY, for this
            session.code = session.broke
        tls_end(&session.tls)
    return False


cdef bint session_over(Session* session) noexcept nogil:
    return session.trouble != 0 or session.h2 == NULL or (
        session.tls.done and not nghttp2_session_want_read(session.h2) and not nghttp2_session_want_write(session.h2))


cdef void session_close(Session* session) noexcept nogil:
    if session.h2 == NULL:
        return
    while session.first != NULL:
        stream_broken(session.first, NGHTTP2_CANCEL, -ECONNRESET)
    nghttp2_session_del(session.h2)
    session.h2 = NULL
    forget_asked(session)
    tls_free(&session.tls)


cdef void session_ping(Session* session) noexcept nogil:
    session.pinged = 1
    nghttp2_submit_ping(session.h2, NGHTTP2_FLAG_NONE, NULL)
    soil(session)


cdef void session_leave(Session* session) noexcept nogil:
    if session.h2 == NULL or session.leaving == 2:
        return
    if session.server and session.leaving == 0:
        nghttp2_submit_shutdown_notice(session.h2)
        session.leaving = 1
    else:
        nghttp2_submit_goaway(session.h2, NGHTTP2_FLAG_NONE, nghttp2_session_get_last_proc_stream_id(session.h2), NGHTTP2_NO_ERROR, NULL, 0)
        session.leaving = 2
    soil(session)


cdef void session_end(Session* session) noexcept nogil:
    if session.h2 != NULL:
        session.leaving = 2
        nghttp2_session_terminate_session(session.h2, NGHTTP2_NO_ERROR)
        soil(session)


cdef void session_sweep(Session* session) noexcept nogil:
    cdef Stream* stream = session.first
    if session.let_go == 0 or session.h2 == NULL:
        return
    while stream != NULL:
        if stream_stale(stream):
            nghttp2_submit_rst_stream(session.h2, NGHTTP2_FLAG_NONE, stream.id, NGHTTP2_CANCEL)
            soil(session)
        stream = stream.next


cdef uint32_t session_room(const Session* session) noexcept nogil:
    cdef uint32_t most = 100                            # ztunnel's POOL_MAX_STREAMS_PER_CONNECTION
    cdef uint32_t allowed
    if session.h2 == NULL or session.going or session.leaving or session.trouble:
        return 0
    allowed = nghttp2_session_get_remote_settings(<nghttp2_session*>session.h2, NGHTTP2_SETTINGS_MAX_CONCURRENT_STREAMS)
    if allowed < most:
        most = allowed
    return most - session.streams if session.streams < most else 0


cdef uint32_t session_text(const Session* session, char* out, uint32_t size) noexcept nogil:
    cdef int n = 0
    out[0] = 0
    if session.trouble == TROUBLE_TLS:
        return tls_text(&session.tls, out, size)
    if session.trouble == TROUBLE_HTTP2:
        if session.code == 0:           # what libnghttp2 gives no reason for, such as a frame that is too long
            n = snprintf(out, size, b"the peer broke HTTP/2")
        else:
            n = snprintf(out, size, b"the peer broke HTTP/2 (%s)", nghttp2_strerror(session.code))
    elif session.trouble == TROUBLE_FLOOD:
        n = snprintf(out, size, b"the peer sent more frames that carry nothing, or longer headers, than any use needs")
    elif session.trouble == TROUBLE_CLOSED:
        n = snprintf(out, size, b"the peer closed the tunnel")
    elif session.trouble == TROUBLE_SILENT:
        n = snprintf(out, size, b"the peer did not answer a PING in time")
    elif session.trouble == TROUBLE_MEMORY:
        n = snprintf(out, size, b"no memory")
    return <uint32_t>n if 0 <= n < <int>size else size - 1
