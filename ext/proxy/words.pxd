"""What CONNECT says: the authority, and the headers that ztunnel's peers expect (mesh-facts 1.6)."""
from libc.stdint cimport uint16_t, uint32_t
from ext.core.text cimport Span
from ext.proxy.state cimport Conn
from ext.sys.stream cimport Peer

cdef enum:
    AUTHORITY_BYTES = 56        # [v6]:port

# `ip:port`, `[v6]:port`; its length.
cdef uint32_t authority_write(char* out, const Peer* peer) noexcept nogil
# 0, or -1: not an address and a port. Names are not resolved here.
cdef int authority_read(const char* text, uint32_t n, Peer* out) noexcept nogil
# `name:port`: 0, or -1. The port is not 0.
cdef int named_read(const char* text, uint32_t n, Span* name, uint16_t* port) noexcept nogil
# The value of `host` in the first element of a Forwarded field (RFC 7239 4), a token or quoted; n 0: none.
cdef Span forwarded_host(const char* text, uint32_t n) noexcept nogil
# Host names, whatever their case.
cdef bint same_name(Span one, Span other) noexcept nogil
# for="client";host=service (RFC 7239 4), the host only if a service was dialled.
cdef uint32_t forwarded_write(char* out, uint32_t size, const Conn* c) noexcept nogil
# k8s.cluster.name, k8s.namespace.name, k8s.pod.name of our pod (W3C Baggage).
cdef uint32_t baggage_write(char* out, uint32_t size, const Conn* c) noexcept nogil
# traceparent of this connection (W3C Trace Context), not sampled.
cdef uint32_t trace_write(char* out, const Conn* c) noexcept nogil
