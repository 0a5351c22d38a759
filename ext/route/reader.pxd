"""One payload on its way to a struct: where reading stands, where memory comes from, and why it was refused.

Functions that return int give 0, or -1 with a reason: the first one stays.
"""
from libc.stdint cimport uint32_t, uint64_t
from ext.core.arena cimport Arena
from ext.core.blob cimport Cursor
from ext.core.text cimport Span
from ext.route.shapes cimport Address, Destination, Ports
from ext.route.slots cimport Names

cdef enum:
    REASON_BYTES = 256
    LEAST_ADDRESS = 5       # bytes; what a count of addresses is held against before anything is allocated

cdef struct Reader:
    Cursor c
    Arena* arena                # of what is being read
    Names* names
    char* reason                # REASON_BYTES
    Span scope                  # of the key, for DESTINATION and CLUSTER
    Destination* destination    # for DESTINATION: keeps the expressions that are compiled on the way

# These return -1, so that callers can `return refuse(...)`.
cdef int refuse(Reader* r, const char* reason) noexcept nogil
cdef int refuse_text(Reader* r, const char* reason, Span text) noexcept nogil
cdef int refuse_number(Reader* r, const char* reason, uint64_t number) noexcept nogil
cdef int no_memory(Reader* r) noexcept nogil
cdef int cut(Reader* r) noexcept nogil

# n zeroed items, or NULL (refused). n has been held against the payload's size (take_count), so that this cannot overflow.
cdef void* take(Reader* r, uint32_t n, size_t size) noexcept nogil
# A str, copied; with `lower` in lower case (ASCII).
cdef int read_text(Reader* r, Span* out, bint lower) noexcept nogil

cdef bint text_is(Span text, const char* word, size_t size) noexcept nogil
cdef bint is_token(Span text) noexcept nogil

# `out` is zeroed.
cdef int read_address(Reader* r, Address* out) noexcept nogil
cdef int read_ports(Reader* r, Ports* out) noexcept nogil
