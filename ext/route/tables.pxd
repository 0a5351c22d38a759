"""What a worker knows: blobs decoded into C structs, looked up without the GIL. Sans-I/O: no descriptor, no clock.

One `Tables` per worker, one thread. A transaction is prepared (may fail; nothing changed) and then applied (cannot fail). Readers
that keep a pointer over a loop turn (a connection its cluster, a request its route) hold a reference; what was replaced is freed when the last
one lets go. Sketch to build against: the owner of this room may refine it.
"""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from ext.core.text cimport Span
from ext.wire.http1 cimport Head

cdef enum PortProtocol:
    PROTO_AUTO = 0
    PROTO_TCP = 1
    PROTO_HTTP = 2
    PROTO_HTTP2 = 3     # opaque for now
    PROTO_GRPC = 4      # opaque for now
    PROTO_TLS = 5

cdef struct Address:
    uint8_t family      # 4 or 6
    uint8_t ip[16]      # network order

cdef struct Endpoint:
    Address address
    uint16_t port
    uint16_t pad
    uint32_t weight
    uint32_t workload           # index, 0 unknown (resolved through the workload table when applied)
    uint32_t active             # requests and connections now in flight from this worker: least request reads it
    uint8_t healthy

cdef struct Cluster:
    uint32_t refs
    uint32_t service            # index
    Span name
    uint8_t balancer
    uint32_t connect_timeout_ms
    uint32_t n_endpoints
    Endpoint* endpoints
    # private state of the balancer follows in the .pyx

cdef struct HeaderEdit          # see tables.pyx
cdef struct Route
cdef struct Destination         # one (scope, host:port)
cdef struct Service
cdef struct Workload
cdef struct Pod
cdef struct Tables
