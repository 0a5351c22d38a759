"""What a worker knows: transactions of blobs applied in one step, looked up without the GIL. Sans-I/O: no descriptor, no clock.

One `Tables` per worker, one thread.

    tables_prepare(bytes) -> Prepared      decodes everything; fails with a text and without any effect
    tables_apply(Prepared)                 swaps it in, between two turns of the loop; cannot fail
    or tables_abandon(Prepared)

One Prepared at a time. After tables_apply every borrowed pointer is stale (see shapes.pxd for what may be held, and how).
"""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from ext.core.text cimport Span
from ext.route.shapes cimport (
    Address, Cluster, Destination, Identity, Pod, Service, ServicePort, Settings, Slot, Workload, WorkloadPort)
from ext.route.slots cimport Names

cdef enum:
    ERROR_BYTES = 512

cdef struct Operation:
    Slot* slot                      # held
    void* content                   # decoded; NULL for a delete

cdef struct Prepared:
    uint64_t id
    uint32_t n
    Operation* operations
    uint8_t has_settings
    Settings settings

cdef struct Tables:
    Settings settings               # defaults until a SETTINGS blob comes
    uint64_t generation             # +1 with every applied transaction
    uint64_t last                   # id of the last applied transaction
    uint64_t judgement              # +1 with every transaction after which a policy may decide otherwise
    uint64_t recalls                # +1 with every transaction that brings revocation lists
    uint64_t random_state
    Names names

cdef Tables* tables_new(uint64_t seed) noexcept nogil                 # NULL: out of memory
cdef void tables_free(Tables* t) noexcept nogil                       # nothing may be held any more

# NULL on failure, with a text in error (ERROR_BYTES, NUL-terminated) that names kind, key and reason.
# `data` may go after the return.
cdef Prepared* tables_prepare(Tables* t, const char* data, size_t size, char* error) noexcept nogil
cdef void tables_apply(Tables* t, Prepared* prepared) noexcept nogil
cdef void tables_abandon(Tables* t, Prepared* prepared) noexcept nogil

# 64 random bits (xorshift from the seed): for `match` and `balance`.
cdef uint64_t tables_random(Tables* t) noexcept nogil

# An IPv4 address in network order; 16 bytes, which may be IPv4-mapped.
cdef void address_from_v4(Address* out, const void* ip) noexcept nogil
cdef void address_from_v6(Address* out, const void* ip) noexcept nogil

# ---- who is where: NULL is unknown; pointers are borrowed until the next apply -----------------------------

# Virtual address and port of a service; *port is set with the service.
cdef Service* service_at(Tables* t, const Address* address, uint16_t port, ServicePort** found) noexcept nogil
# Any service that has that virtual address (the port is not one of its own).
cdef Service* service_by_address(Tables* t, const Address* address) noexcept nogil
cdef Workload* workload_by_address(Tables* t, const Address* address) noexcept nogil
cdef Workload* workload_by_index(Tables* t, uint32_t index) noexcept nogil
# The first service port that this workload serves on that target port; NULL: it declares none there.
cdef Service* service_by_index(Tables* t, uint32_t index) noexcept nogil
# (workload_port: of that service if it is one of them, 0: of any.)
cdef WorkloadPort* workload_port(const Workload* workload, uint16_t target_port, uint32_t service) noexcept nogil
cdef Pod* pod_by_handle(Tables* t, uint32_t handle) noexcept nogil
cdef Pod* pod_by_address(Tables* t, const Address* address) noexcept nogil

# ---- what to do: on demand ---------------------------------------------------------------------------------

# Destination of a pod's scope and a service port, or NULL: send MISS (below). No allocation.
cdef Destination* destination_find(Tables* t, const Pod* pod, const ServicePort* port) noexcept nogil
# The slot to wait in: held for the caller (slot_release when it stops waiting), its key is what MISS carries.
# NULL: out of memory.
# The commit that answers fills slot.current; look at the slots waited for when `generation` has moved.
cdef Slot* destination_wait(Tables* t, const Pod* pod, const ServicePort* port) noexcept nogil

# Any slot by kind and key, or NULL: for the door, and for what is not on the path of a request.
cdef Slot* slot_by_key(Tables* t, uint8_t kind, Span key) noexcept nogil

# The same, made if need be and held for the caller, who waits for its content (slot_release). NULL: out of memory.
cdef Slot* slot_wait(Tables* t, uint8_t kind, Span key) noexcept nogil

cdef void slot_hold(Slot* slot) noexcept nogil
cdef void slot_release(Tables* t, Slot* slot) noexcept nogil
cdef void destination_hold(Destination* destination) noexcept nogil
cdef void destination_release(Tables* t, Destination* destination) noexcept nogil
cdef void cluster_hold(Cluster* cluster) noexcept nogil
cdef void cluster_release(Tables* t, Cluster* cluster) noexcept nogil

# Who somebody is, kept while their connection lives: one that the tables know, or any that identity_split takes (NULL: out of memory).
cdef void identity_hold(Identity* identity) noexcept nogil
cdef Identity* identity_of(Tables* t, Span name) noexcept nogil
cdef void identity_release(Tables* t, Identity* identity) noexcept nogil
