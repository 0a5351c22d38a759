"""The hash tables below the tables: names, addresses, scopes and numbers, interned and counted."""
from libc.stdint cimport uint8_t, uint16_t, uint32_t
from ext.route.shapes cimport Address, Place, Pod, Scope, Service, Slot, Workload

cdef struct Names:
    uint32_t n_slots
    uint32_t n_places
    uint32_t n_scopes
    uint32_t n_workloads
    uint32_t n_services
    uint32_t n_pods
    uint32_t slot_mask              # buckets - 1
    uint32_t place_mask
    uint32_t scope_mask
    uint32_t workload_mask
    uint32_t service_mask
    uint32_t pod_mask
    Slot** slots
    Place** places
    Scope** scopes
    Workload** workloads            # by index
    Service** services              # by index
    Pod** pods                      # by handle
