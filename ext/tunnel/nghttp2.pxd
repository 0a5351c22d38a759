"""What of libnghttp2 is used: the API of 1.52 (Debian 12). See its documentation, nghttp2.org/documentation."""
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t

cdef extern from "<nghttp2/nghttp2.h>" nogil:
    ctypedef struct nghttp2_session:
        pass
    ctypedef struct nghttp2_session_callbacks:
        pass
    ctypedef struct nghttp2_option:
        pass
    ctypedef struct nghttp2_nv:
        uint8_t* name
        uint8_t* value
        size_t namelen
        size_t valuelen
        uint8_t flags
    ctypedef struct nghttp2_settings_entry:
        int32_t settings_id
        uint32_t value
    ctypedef union nghttp2_data_source:
        int fd
        void* ptr
    ctypedef ssize_t (*nghttp2_data_source_read_callback)(nghttp2_session*, int32_t, uint8_t*, size_t, uint32_t*, nghttp2_data_source*,
                                                          void*) noexcept nogil
    ctypedef struct nghttp2_data_provider:
        nghttp2_data_source source
        nghttp2_data_source_read_callback read_callback
    ctypedef struct nghttp2_frame_hd:
        size_t length
        int32_t stream_id
        uint8_t type
        uint8_t flags
    ctypedef struct nghttp2_headers:
        int cat
    ctypedef union nghttp2_frame:
        nghttp2_frame_hd hd
        nghttp2_headers headers

    int NGHTTP2_DATA
    int NGHTTP2_HEADERS
    int NGHTTP2_PRIORITY
    int NGHTTP2_RST_STREAM
    int NGHTTP2_SETTINGS
    int NGHTTP2_PING
    int NGHTTP2_GOAWAY
    int NGHTTP2_WINDOW_UPDATE
    int NGHTTP2_FLAG_NONE
    int NGHTTP2_FLAG_END_STREAM
    int NGHTTP2_FLAG_ACK
    int NGHTTP2_HCAT_REQUEST
    int NGHTTP2_HCAT_RESPONSE
    int NGHTTP2_HCAT_HEADERS
    int NGHTTP2_NV_FLAG_NONE
    int NGHTTP2_NV_FLAG_NO_INDEX
    int NGHTTP2_NV_FLAG_NO_COPY_NAME
    int NGHTTP2_NV_FLAG_NO_COPY_VALUE
    int NGHTTP2_SETTINGS_ENABLE_PUSH
    int NGHTTP2_SETTINGS_MAX_CONCURRENT_STREAMS
    int NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE
    int NGHTTP2_SETTINGS_MAX_HEADER_LIST_SIZE
    int NGHTTP2_NO_ERROR
    int NGHTTP2_PROTOCOL_ERROR
    int NGHTTP2_REFUSED_STREAM
    int NGHTTP2_CANCEL
    int NGHTTP2_CONNECT_ERROR
    int NGHTTP2_ENHANCE_YOUR_CALM
    int NGHTTP2_ERR_DEFERRED
    int NGHTTP2_ERR_PAUSE
    int NGHTTP2_ERR_CALLBACK_FAILURE
    int NGHTTP2_ERR_TEMPORAL_CALLBACK_FAILURE
    int NGHTTP2_ERR_FLOODED
    uint32_t NGHTTP2_DATA_FLAG_EOF
    uint32_t NGHTTP2_DATA_FLAG_NO_COPY

    const char* nghttp2_strerror(int error)
    const char* nghttp2_http2_strerror(uint32_t error)

    int nghttp2_option_new(nghttp2_option** option)
    void nghttp2_option_set_no_auto_window_update(nghttp2_option* option, int on)
    void nghttp2_option_set_peer_max_concurrent_streams(nghttp2_option* option, uint32_t n)
    void nghttp2_option_set_no_closed_streams(nghttp2_option* option, int on)
    void nghttp2_option_set_max_outbound_ack(nghttp2_option* option, size_t n)
    void nghttp2_option_set_stream_reset_rate_limit(nghttp2_option* option, uint64_t burst, uint64_t rate)

    int nghttp2_session_callbacks_new(nghttp2_session_callbacks** callbacks)
    void nghttp2_session_callbacks_set_on_begin_headers_callback(
        nghttp2_session_callbacks* callbacks, int (*call)(nghttp2_session*, const nghttp2_frame*, void*) noexcept nogil)
    void nghttp2_session_callbacks_set_on_header_callback(
        nghttp2_session_callbacks* callbacks, int (*call)(nghttp2_session*, const nghttp2_frame*, const uint8_t*, size_t, const uint8_t*,
                                                          size_t, uint8_t, void*) noexcept nogil)
    void nghttp2_session_callbacks_set_on_frame_recv_callback(
        nghttp2_session_callbacks* callbacks, int (*call)(nghttp2_session*, const nghttp2_frame*, void*) noexcept nogil)
    void nghttp2_session_callbacks_set_on_frame_send_callback(
        nghttp2_session_callbacks* callbacks, int (*call)(nghttp2_session*, const nghttp2_frame*, void*) noexcept nogil)
    void nghttp2_session_callbacks_set_on_invalid_frame_recv_callback(
        nghttp2_session_callbacks* callbacks, int (*call)(nghttp2_session*, const nghttp2_frame*, int, void*) noexcept nogil)
    void nghttp2_session_callbacks_set_on_data_chunk_recv_callback(
        nghttp2_session_callbacks* callbacks, int (*call)(nghttp2_session*, uint8_t, int32_t, const uint8_t*, size_t, void*) noexcept nogil)
    void nghttp2_session_callbacks_set_send_data_callback(
        nghttp2_session_callbacks* callbacks, int (*call)(nghttp2_session*, nghttp2_frame*, const uint8_t*, size_t, nghttp2_data_source*,
                                                          void*) noexcept nogil)
    void nghttp2_session_callbacks_set_on_stream_close_callback(
        nghttp2_session_callbacks* callbacks, int (*call)(nghttp2_session*, int32_t, uint32_t, void*) noexcept nogil)

    int nghttp2_session_server_new2(nghttp2_session** session, const nghttp2_session_callbacks* callbacks, void* owner,
                                    const nghttp2_option* option)
    int nghttp2_session_client_new2(nghttp2_session** session, const nghttp2_session_callbacks* callbacks, void* owner,
                                    const nghttp2_option* option)
    void nghttp2_session_del(nghttp2_session* session)
    ssize_t nghttp2_session_mem_recv(nghttp2_session* session, const uint8_t* data, size_t size)
    ssize_t nghttp2_session_mem_send(nghttp2_session* session, const uint8_t** data)
    size_t nghttp2_session_get_outbound_queue_size(nghttp2_session* session)
    int nghttp2_session_want_read(nghttp2_session* session)
    int nghttp2_session_want_write(nghttp2_session* session)
    void* nghttp2_session_get_stream_user_data(nghttp2_session* session, int32_t id)
    int nghttp2_session_set_stream_user_data(nghttp2_session* session, int32_t id, void* data)
    int nghttp2_session_get_stream_remote_close(nghttp2_session* session, int32_t id)
    int32_t nghttp2_session_get_stream_remote_window_size(nghttp2_session* session, int32_t id)
    int32_t nghttp2_session_get_remote_window_size(nghttp2_session* session)
    int nghttp2_session_resume_data(nghttp2_session* session, int32_t id)
    int nghttp2_session_consume_connection(nghttp2_session* session, size_t n)
    int nghttp2_session_consume_stream(nghttp2_session* session, int32_t id, size_t n)
    int nghttp2_session_set_local_window_size(nghttp2_session* session, uint8_t flags, int32_t id, int32_t size)
    uint32_t nghttp2_session_get_remote_settings(nghttp2_session* session, int what)
    int32_t nghttp2_session_get_last_proc_stream_id(nghttp2_session* session)
    int nghttp2_session_terminate_session(nghttp2_session* session, uint32_t error)
    int nghttp2_submit_settings(nghttp2_session* session, uint8_t flags, const nghttp2_settings_entry* entries, size_t n)
    int32_t nghttp2_submit_request(nghttp2_session* session, const void* priority, const nghttp2_nv* fields, size_t n,
                                   const nghttp2_data_provider* data, void* stream)
    int nghttp2_submit_response(nghttp2_session* session, int32_t id, const nghttp2_nv* fields, size_t n, const nghttp2_data_provider* data)
    int nghttp2_submit_rst_stream(nghttp2_session* session, uint8_t flags, int32_t id, uint32_t error)
    int nghttp2_submit_ping(nghttp2_session* session, uint8_t flags, const uint8_t* data)
    int nghttp2_submit_goaway(nghttp2_session* session, uint8_t flags, int32_t last, uint32_t error, const uint8_t* data, size_t n)
    int nghttp2_submit_shutdown_notice(nghttp2_session* session)
