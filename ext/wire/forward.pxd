"""A parsed head written anew for the next hop, and answers of our own. Sans-I/O, into memory that the caller gives.

What goes out: the start line rebuilt; Host from Head.authority, first; every end-to-end field as received and in order; fields that the
edits add; framing exactly once, from what was parsed; one Connection line where there is something to say. Fields of the hop that ended
here are dropped, `TE: trailers` and an upgrade are said again.
"""
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t
from ext.core.text cimport Span
from ext.wire.edit cimport HeaderOp
from ext.wire.http1 cimport Head

cdef enum:
    # room that a forwarded head needs at most beyond head.size, ids, and the sums of names and values of the edits (+ 4 an edit)
    FORWARD_EXTRA = 512

cdef struct Forward:            # all zero: forward as it is
    const HeaderOp* ops         # applied in order; of `host` only EDIT_SET acts, and replaces the authority
    uint32_t n_ops
    Span request_id             # x-request-id when the message has none (request; n 0: do not add)
    Span forwarded_proto        # x-forwarded-proto likewise
    uint8_t close               # say `connection: close`
    uint8_t keep_alive          # say `connection: keep-alive` (to a peer of HTTP/1.0)
    uint8_t peer_http10         # response: the client speaks HTTP/1.0; a chunked body cannot be told to it

# Bytes written; -1: no room (or more than 4 GiB); -2: cannot be said to that peer (chunked to HTTP/1.0), answer 502 or dechunk.
# A request keeps its version: an HTTP/1.0 client may then get no chunked response. The upgrade of a request is forwarded if
# head.upgrade. A response is written as HTTP/1.1; framing by close says `connection: close` on its own.
cdef int64_t forward_request(const Head* head, const Forward* how, char* out, size_t room) noexcept nogil
cdef int64_t forward_response(const Head* head, const Forward* how, char* out, size_t room) noexcept nogil

# An answer of our own: status line, content-type, content-length, `connection: close` if asked, and `text` (n 0: the phrase of the
# status). `head_only`: the request was HEAD. Status is one of 400 403 404 408 413 414 417 421 429 431 500 501 502 503 504 505.
# Bytes written, -1: no room (256 + text.n always suffice).
cdef int64_t local_reply(uint16_t status, Span text, uint8_t close, uint8_t head_only, char* out, size_t room) noexcept nogil
# 1 if `name` (lower case) is the field's name in any case
cdef int same_name(Span field, Span name) noexcept nogil
