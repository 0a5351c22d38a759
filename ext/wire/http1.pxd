"""HTTP/1.1 messages as bytes in, facts out (RFC 9112). Sans-I/O: no descriptor, no clock, no allocation.

Sketch to build against; the owner of this room may refine names, never the rules: strict (bare LF, obs-fold, space before
colon, NUL and control bytes, `Transfer-Encoding` with `Content-Length`, differing lengths, unknown codings are refused), and
whatever is forwarded reads the same to any other parser.
"""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t, int64_t
from ext.core.text cimport Span

cdef enum:
    HEAD_MAX_BYTES = 61440        # 60 KiB, Envoy's max_request_headers_kb
    HEAD_MAX_HEADERS = 100        # Envoy's max_headers_count
    CHUNK_LINE_MAX = 256          # RFC 9112 7.1.1 asks for a bound on extensions; ours are refused anyway

cdef enum HeaderId:               # headers that the proxy acts upon; 0 for all others
    H_OTHER = 0
    H_HOST
    H_CONNECTION
    H_KEEP_ALIVE
    H_PROXY_CONNECTION
    H_TE
    H_TRAILER
    H_TRANSFER_ENCODING
    H_UPGRADE
    H_CONTENT_LENGTH
    H_EXPECT
    H_USER_AGENT
    H_X_REQUEST_ID
    H_X_FORWARDED_FOR
    H_X_FORWARDED_PROTO
    H_CONTENT_TYPE
    H_GRPC_STATUS

cdef enum Method:
    M_OTHER = 0
    M_GET
    M_HEAD
    M_POST
    M_PUT
    M_DELETE
    M_CONNECT
    M_OPTIONS
    M_TRACE
    M_PATCH

cdef enum Framing:
    F_NONE = 0          # no body
    F_LENGTH = 1        # content_length bytes
    F_CHUNKED = 2
    F_UNTIL_CLOSE = 3   # response only (RFC 9112 6.3 item 8)
    F_TUNNEL = 4        # 101, or 2xx to CONNECT: opaque bytes follow

cdef struct Header:
    Span name           # as received, case kept
    Span value          # without surrounding white space
    Span line           # whole field line with CRLF: to forward untouched
    uint8_t id          # HeaderId
    uint8_t hop         # 1: hop-by-hop (named by Connection, or known to be): not forwarded

cdef struct Head:       # spans point into the caller's buffer
    Header headers[100]
    uint32_t n_headers
    uint32_t size               # bytes of the head, final CRLF CRLF included
    Span method
    Span target                 # request-target as received
    Span path                   # without query; of absolute-form only the path
    Span query                  # without '?'
    Span authority              # Host's value, or that of absolute-form (which wins, RFC 9112 3.2.2)
    Span reason
    uint16_t status
    uint8_t method_id
    uint8_t version_minor       # HTTP/1.x; others are refused
    uint8_t framing
    uint8_t keep_alive          # what the message says of its connection
    uint8_t expect_continue
    uint8_t upgrade             # Upgrade with Connection: upgrade
    uint64_t content_length

cdef enum:
    PARSE_MORE = 0

# Both return bytes of the head (> 0), PARSE_MORE, or minus the status to answer with: -400, -408 never, -414 (request line
# alone over the bound), -431, -501 (unknown transfer coding), -505. For responses every error is negative (-502).
# `scanned` carries the search position between calls on a growing buffer, so that the work stays linear; start with 0.
cdef int parse_request(const char* data, size_t size, size_t* scanned, Head* head) noexcept nogil
cdef int parse_response(const char* data, size_t size, size_t* scanned, uint8_t request_method, Head* head) noexcept nogil

cdef struct Body:               # follows a body's framing in the bytes as they are relayed untouched
    uint8_t framing
    uint8_t state
    uint8_t n_line
    uint8_t pad
    uint32_t trailer_bytes
    uint64_t left               # of the length or of the present chunk
    uint64_t payload            # payload bytes seen

cdef void body_start(Body* body, const Head* head) noexcept nogil

# Takes bytes that belong to this message: returns how many (<= size), or -1 for a framing error. *done is set to 1 once the
# message is complete; bytes beyond the returned count belong to the next message.
cdef int64_t body_feed(Body* body, const char* data, size_t size, uint8_t* done) noexcept nogil
