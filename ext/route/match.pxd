"""Which route, which cluster. First match wins; the same answers as Envoy's for what both know (docs: HTTP routing).

    route_find(destination, head) -> Route     NULL: flag NR, 404
    route_pick(route, random)     -> Weighted  never NULL
    weighted_cluster(weighted)    -> Cluster   NULL: flag NC, 503      (shapes.pxd)
    balance_pick(cluster, ...)    -> Endpoint  NULL: flag UH, 503      (balance.pxd)
"""
from libc.stdint cimport uint32_t
from ext.core.text cimport Span
from ext.wire.edit cimport HeaderOp
from ext.wire.http1 cimport Head
from ext.route.shapes cimport Destination, Route, VirtualHost, Weighted

# The virtual host for an authority (port, if any, not looked at; any case): exact, then the longest `*.suffix`, then
# the longest `prefix.*`, then `*`; or NULL.
cdef VirtualHost* host_find(const Destination* destination, Span authority) noexcept nogil
cdef Route* route_find(const Destination* destination, const Head* head) noexcept nogil

# By weight; the same random gives the same answer.
cdef Weighted* route_pick(const Route* route, uint32_t random) noexcept nogil
cdef Weighted* tcp_pick(const Destination* destination, uint32_t random) noexcept nogil     # NULL: has_tcp is 0

# Edits of request (response) in the order to apply them: the weighted cluster's, then the route's (Envoy's order: the
# more general level speaks last). `out` has room for EDITS_MAX; returns how many. Spans live as long as the destination.
cdef uint32_t request_edits(const Route* route, const Weighted* weighted, HeaderOp* out) noexcept nogil
cdef uint32_t response_edits(const Route* route, const Weighted* weighted, HeaderOp* out) noexcept nogil
