"""One change to the header fields of a message: what a route asks for and what the forwarded head is written with."""
from libc.stdint cimport uint8_t
from ext.core.text cimport Span

cdef enum HeaderOpKind:
    EDIT_REMOVE = 1     # every field of that name; `value` is empty
    EDIT_SET = 2        # replaces every field of that name by one
    EDIT_ADD = 3        # appends one field, keeps those there are

# Applied in the order of the array. Names are lower case, checked to be tokens (RFC 9110 5.1) and none of those that
# frame a message or belong to one hop; `host` comes only as EDIT_SET of a request (it replaces the authority). Values are
# without control characters and surrounding white space.
cdef struct HeaderOp:
    Span name
    Span value
    uint8_t op          # HeaderOpKind
