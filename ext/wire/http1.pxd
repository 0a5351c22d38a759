"""Heads of HTTP/1.1 as bytes in, facts out (RFC 9112); bodies are in body.pxd. Sans-I/O: no descriptor, no clock, no allocation.

    parse_request, parse_response   bytes -> Head             whole head at hand, or "more"

Strict: what two parsers could read differently is refused, so that whatever is forwarded reads the same to any other. The rules, one
by one, with the test that holds each, are in docs/http1.md. One empty line before a request is skipped (RFC 9112 2.2).
"""
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from ext.core.text cimport Span

cdef enum:
    HEAD_MAX_BYTES = 61440        # 60 KiB, Envoy's max_request_headers_kb
    HEAD_MAX_HEADERS = 100        # Envoy's max_headers_count
    HEAD_MAX_OPTIONS = 32         # names in Connection: each is looked for in every field

cdef enum:                        # HeaderId: fields that the proxy acts upon; 0 for all others
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
    H_COUNT

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
    uint8_t hop         # 1: of this hop alone (named by Connection, or known to be), or framing: not forwarded as it is

# Spans point into the caller's buffer, except path and query of an absolute-form without a path (static memory).
cdef struct Head:
    Header headers[100]
    uint32_t n_headers
    uint32_t size               # bytes of the head, final CRLF CRLF and a skipped empty line included
    Span method
    Span target                 # request-target as received
    Span path                   # without query; of absolute-form only the path; "*" for OPTIONS *; empty for CONNECT
    Span query                  # without '?'; has_query tells `/a?` from `/a`
    Span authority              # Host's value, or that of absolute-form (which wins, RFC 9112 3.2.2), or CONNECT's target
    Span reason
    Span content_type           # value, n 0 if absent
    uint16_t first[17]          # by HeaderId: 1 + index of the first field of that kind, 0: none
    uint16_t status
    uint8_t method_id
    uint8_t version_minor       # 0 or 1; others are refused
    uint8_t framing
    uint8_t keep_alive          # what the message says of its connection
    uint8_t expect_continue     # Expect: 100-continue, HTTP/1.1
    uint8_t upgrade             # Upgrade with Connection: upgrade, HTTP/1.1. Never for `h2c`: that offer is dropped
    uint8_t has_query
    uint8_t has_length          # Content-Length was there (also where framing says no body: HEAD, 304)
    uint8_t chunked             # likewise Transfer-Encoding: chunked
    uint8_t te_trailers         # TE names `trailers`
    uint64_t content_length

cdef enum:
    PARSE_MORE = 0

# Both return the size of the head (> 0), PARSE_MORE, or minus the status to answer with: 400, 414 (the request line alone is over
# HEAD_MAX_BYTES), 431, 501 (unknown transfer coding), 505; for responses it is always -502. `scanned` carries the search position
# between calls on a growing buffer, so that the work stays linear; start with 0. A smaller bound on the head is the caller's:
# PARSE_MORE with that many bytes at hand is 431. A prefix of a message gives PARSE_MORE or the error that the whole would give.
cdef int parse_request(const char* data, size_t size, size_t* scanned, Head* head) noexcept nogil
# `request_method` is the Method the response answers. 1xx other than 101 has F_NONE: the final response is still to come.
cdef int parse_response(const char* data, size_t size, size_t* scanned, uint8_t request_method, Head* head) noexcept nogil

cdef inline Header* head_find(Head* head, uint8_t header_id) noexcept nogil:    # the first of that kind, or NULL
    return &head.headers[head.first[header_id] - 1] if head.first[header_id] != 0 else NULL

cdef inline Span head_value(const Head* head, uint8_t header_id) noexcept nogil:    # its value; n 0 if absent
    cdef Span none
    none.p = NULL
    none.n = 0
    return head.headers[head.first[header_id] - 1].value if head.first[header_id] != 0 else none
