"""See early.pxd."""
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy, memset
from ext.core.protocol cimport LISTEN_OUTBOUND, PORT_HBONE
from ext.proxy.keys cimport LACK_NONE, Lack, credentials_of
from ext.proxy.state cimport Worker
from ext.proxy.tunnel_out cimport AHEAD_COMING, Asking, tunnel_ahead
from ext.route.shapes cimport (TUNNEL_HBONE, Address, Endpoint, Identity, Pod, VirtualHost, Weighted, Workload, endpoint_address,
                               endpoint_workload, weighted_cluster)
from ext.route.tables cimport pod_by_address, pod_by_handle, tables_random, workload_by_address, workload_by_index
from ext.tunnel.tls cimport TLS_ERROR_BYTES

cdef enum:
    NEXT = 8                    # endpoints of a cluster, from the one whose turn is next
    CLUSTERS = 4                # names of clusters of a destination whose request is not known yet, missing ones counted
    HOSTS = 4                   # of those, each of which may have no route to look at
    LOOK_NS = 1000000000        # between two looks of a pod at one destination's clusters
    USED_NS = 10000000000       # a tunnel that had a stream within so long is in use


cdef bint asking_of(Worker* w, Identity* own, Identity* wanted, const Address* to, Asking* out) noexcept nogil:
    cdef char[TLS_ERROR_BYTES] text
    cdef Lack lack = LACK_NONE
    if own == NULL or wanted == NULL:
        return False
    out.own = own
    out.wanted = wanted
    memset(&out.to, 0, sizeof(out.to))
    memcpy(&out.to, to, sizeof(Address))
    out.to.port = PORT_HBONE
    out.credentials = credentials_of(w, own, &lack, text)
    return out.credentials != NULL


cdef void early_endpoint(Conn* c, Identity* own, const Endpoint* endpoint) noexcept nogil:
    cdef Worker* w = c.w
    cdef const Address* at = endpoint_address(endpoint, c.target.family)
    cdef const Workload* workload = workload_by_index(w.tables, endpoint_workload(endpoint))
    cdef const Pod* other
    cdef Asking asking
    if workload == NULL or workload.tunnel != TUNNEL_HBONE or workload.index == c.facts.source:
        return
    other = pod_by_address(w.tables, at)
    if other != NULL and other.direct and not w.tables.settings.same_node_tunnel:
        return                          # of this node: no tunnel
    if asking_of(w, own, workload.identity, at, &asking):
        tunnel_ahead(c.pod, &asking)


cdef void early_cluster(Conn* c, const Cluster* cluster) noexcept nogil:
    cdef const Pod* pod = pod_by_handle(c.w.tables, c.pod.handle)
    cdef uint32_t i, at, n = cluster.n_ready if cluster.n_ready < NEXT else NEXT
    if c.w.tables.settings.early_tunnels == 0 or pod == NULL or pod.identity == NULL or n == 0:
        return
    at = cluster.turn + 1 if cluster.turn < cluster.n_ready else <uint32_t>tables_random(c.w.tables)
    for i in range(n):
        early_endpoint(c, pod.identity, &cluster.endpoints[cluster.ready[(at + i) % cluster.n_ready]])


cdef uint32_t look(Conn* c, const Weighted* clusters, uint32_t n, uint32_t left) noexcept nogil:
    """How many more may be looked at."""
    cdef const Cluster* cluster
    cdef uint64_t* looked
    cdef uint32_t i
    for i in range(n):
        if left == 0:
            break
        left -= 1                       # whether it is there or not: every new connection walks here
        cluster = weighted_cluster(&clusters[i])
        if cluster == NULL:
            continue
        looked = &c.pod.early_ns[(<size_t>cluster >> 6) & 15]
        if looked[0] == 0 or c.w.loop.now_ns - looked[0] >= LOOK_NS:
            looked[0] = c.w.loop.now_ns
            early_cluster(c, cluster)
    return left


cdef void early_destination(Conn* c, const Destination* destination) noexcept nogil:
    cdef const VirtualHost* host
    cdef uint32_t left = CLUSTERS, i, j, n_hosts = destination.n_hosts if destination.n_hosts < HOSTS else HOSTS
    if c.kind != LISTEN_OUTBOUND or c.w.tables.settings.early_tunnels == 0:
        return
    left = look(c, destination.tcp, destination.n_tcp, left)
    for i in range(n_hosts):
        host = &destination.hosts[i]
        for j in range(host.n_routes):
            if left == 0:
                return                  # a route has at least one cluster (ext/route/routes), so that this ends
            left = look(c, host.routes[j].clusters, host.routes[j].n_clusters, left)


cdef void early_follows(Tunnel* t) noexcept nogil:
    cdef Worker* w = t.w
    cdef const Workload* workload = workload_by_address(w.tables, <const Address*>&t.remote)
    cdef Asking asking
    if workload == NULL or workload.tunnel != TUNNEL_HBONE:
        return                          # it left the mesh, which is why it said GOAWAY
    if t.session.opened == 0 or (t.session.streams == 0 and w.loop.now_ns - t.used_ns >= USED_NS):
        return
    if asking_of(w, t.own, t.wanted, <const Address*>&t.remote, &asking):
        t.bridged = tunnel_ahead(t.pod, &asking) == AHEAD_COMING
