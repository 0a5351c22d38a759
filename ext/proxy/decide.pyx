"""See decide.pxd."""
from libc.stdint cimport uint8_t, uint32_t
from ext.core.protocol cimport INDEX_PASSTHROUGH, INDEX_UNKNOWN, LISTEN_INBOUND
from ext.proxy.held cimport held_wait
from ext.proxy.state cimport Conn
from ext.route.shapes cimport (PROTO_TCP, Address, Destination, Pod, Service, ServicePort, Workload, WorkloadPort,
                               pod_workload)
from ext.route.tables cimport (destination_find, destination_hold, pod_by_handle, service_at, workload_by_address,
                               workload_by_index, workload_port)


cdef uint8_t identify(Conn* c) noexcept nogil:
    cdef const Pod* pod = pod_by_handle(c.w.tables, c.pod.handle)
    cdef uint32_t own = pod_workload(pod) if pod != NULL else <uint32_t>INDEX_UNKNOWN
    cdef Workload* peer
    cdef Workload* workload
    cdef ServicePort* port = NULL
    cdef Service* service
    c.facts.service = INDEX_UNKNOWN
    c.is_service = 0
    if c.kind == LISTEN_INBOUND:
        peer = workload_by_address(c.w.tables, <const Address*>&c.client)
        c.facts.source = peer.index if peer != NULL else <uint32_t>INDEX_UNKNOWN
        workload = workload_by_index(c.w.tables, own) if own != 0 else NULL
        if workload == NULL:
            workload = workload_by_address(c.w.tables, <const Address*>&c.target)
        return declared(c, workload)
    c.facts.source = own
    service = service_at(c.w.tables, <const Address*>&c.target, c.target.port, &port)
    if service != NULL:
        c.is_service = 1
        c.facts.service = service.index
        c.facts.destination = INDEX_UNKNOWN
        return port.protocol
    workload = workload_by_address(c.w.tables, <const Address*>&c.target)
    if workload == NULL:
        c.facts.service = INDEX_PASSTHROUGH
    return declared(c, workload)


cdef uint8_t declared(Conn* c, Workload* workload) noexcept nogil:
    """What a workload says of the port that was dialled."""
    cdef WorkloadPort* port
    c.facts.destination = INDEX_UNKNOWN
    if workload == NULL:
        return PROTO_TCP
    c.facts.destination = workload.index
    port = workload_port(workload, c.target.port, c.named)
    if port == NULL:
        return PROTO_TCP
    c.facts.service = port.service
    return port.protocol


cdef int find_destination(Conn* c, Destination** out) noexcept nogil:
    cdef ServicePort* port = NULL
    cdef Service* service = service_at(c.w.tables, <const Address*>&c.target, c.target.port, &port)
    cdef const Pod* pod = pod_by_handle(c.w.tables, c.pod.handle)
    out[0] = NULL
    if service == NULL or pod == NULL:
        return FOUND_NONE
    out[0] = destination_find(c.w.tables, pod, port)
    if out[0] == NULL:
        if c.unconfigured:
            return FOUND_NONE
        return FOUND_LATER if held_wait(c, pod, port) == 0 else FOUND_FULL
    c.unconfigured = 0
    if not out[0].has_http and not out[0].has_tcp:
        out[0] = NULL
        return FOUND_NONE
    destination_hold(out[0])
    return FOUND
