"""The ends of connections and requests, and what is told of them: one series and one log record each, from the same facts.

    account_begin   once who talks to whom is known: TCP counts `opened`
    account_bytes   TCP: what was relayed since the last call, so that long connections show while they live
    account_end     flag and details of the one end; does nothing when nothing is open
"""
from libc.stdint cimport uint8_t, uint16_t
from ext.core.text cimport Span
from ext.proxy.state cimport Conn
from ext.wire.http1 cimport Head

cdef void account_begin_tcp(Conn* c) noexcept nogil
cdef void account_begin_http(Conn* c) noexcept nogil
cdef void account_bytes(Conn* c) noexcept nogil
cdef void account_end(Conn* c, uint8_t flag, uint16_t details) noexcept nogil

# Why there was no connection, in words, for the log: instead of what an errno says. Nothing when logging is off.
cdef void account_failure(Conn* c, Span why) noexcept nogil
# What the log wants of a request's head, copied, since the head is gone when the exchange ends. Nothing when logging is off.
cdef void account_text(Conn* c, const Head* head) noexcept nogil
# A request id (UUID version 4, RFC 9562) in x.request_id, made once an exchange.
cdef void account_id(Conn* c) noexcept nogil
