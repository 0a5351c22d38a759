"""Bodies of HTTP/1.1: where a message ends, found in its bytes while they are relayed untouched (RFC 9112 6, 7).

    body_start, body_feed           Head, bytes -> how far

Strict as heads are: no chunk extension, no trailer that frames or routes, CRLF alone ends a line (docs/http1.md).
"""
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from ext.wire.http1 cimport F_TUNNEL, F_UNTIL_CLOSE, Head

cdef enum:
    CHUNK_SIZE_DIGITS = 16        # hex digits of a chunk size, leading zeros counted
    TRAILER_MAX_BYTES = 8192      # of all trailers together

cdef enum BodyState:
    B_DATA = 0          # F_LENGTH, F_UNTIL_CLOSE, F_TUNNEL; payload of a chunk
    B_SIZE              # hex digits
    B_SIZE_LF
    B_DATA_CR
    B_DATA_LF
    B_LINE              # start of a trailer line, or of the last empty one
    B_NAME
    B_VALUE
    B_VALUE_LF
    B_END_LF
    B_DONE
    B_BAD

cdef struct Body:               # follows a body's framing in the bytes as they are relayed untouched
    uint8_t framing
    uint8_t state               # BodyState
    uint8_t digits              # of the present chunk size
    uint8_t last                # the chunk of size 0 was seen
    uint32_t trailer_bytes
    uint32_t name_hash          # of the present trailer's name
    uint64_t left               # of the length or of the present chunk
    uint64_t payload            # payload bytes seen

cdef void body_start(Body* body, const Head* head) noexcept nogil

# Takes bytes that belong to this message: returns how many (<= size), or -1 for a framing error (and from then on). *done is set
# to 1 once the message is complete; bytes beyond the returned count belong to the next message. Call it once with size 0
# after body_start: a message without a body is done at once. F_UNTIL_CLOSE and F_TUNNEL are never done.
cdef int64_t body_feed(Body* body, const char* data, size_t size, uint8_t* done) noexcept nogil

# The sender closed: 1 if that is a proper end of this body, 0 if it is cut short.
cdef inline int body_closed(const Body* body) noexcept nogil:
    return body.state == B_DONE or (body.state == B_DATA and (body.framing == F_UNTIL_CLOSE or body.framing == F_TUNNEL))
