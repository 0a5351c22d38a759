"""Tunnels that will be wanted, dialled before a request has to wait for one. tunnel_out's `tunnel_ahead` bounds it.

    a service comes into use    -> the endpoints that its balancer takes next        early_destination (a connection that may ask for
                                                                                     HTTP), early_cluster (a stream in a cold tunnel)
    a tunnel is nearly full     -> one more beside it                                tunnel_out
    it gets GOAWAY, or ends     -> one in its place                                  early_follows
    our certificate is renewed  -> one with the new one; the old serves until then   tunnel_out

Nothing is dialled ahead to a pod of this node, to one whose workload is not known, or without a certificate: what is not certain the
request finds out. What is there is not dialled again, so a second look costs a walk through the pod's tunnels.
"""
from ext.proxy.state cimport Conn, Tunnel
from ext.route.shapes cimport Cluster, Destination

cdef void early_destination(Conn* c, const Destination* destination) noexcept nogil
cdef void early_cluster(Conn* c, const Cluster* cluster) noexcept nogil
# Worker.follows
cdef void early_follows(Tunnel* t) noexcept nogil
