"""Interned names, addresses and scopes: found or made, counted, gone with their last holder."""
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from ext.core.hash cimport Buckets
from ext.core.text cimport Span
from ext.route.shapes cimport Address, Claim, Identity, IdentityParts, Place, Policy, Scope, Slot

cdef struct Names:
    Buckets slots           # Slot by (kind, key)
    Buckets places          # Place by address
    Buckets scopes          # Scope by name
    Buckets identities      # Identity by name
    Buckets workloads       # Workload by index
    Buckets services        # Service by index
    Buckets pods            # Pod by handle
    uint64_t versions       # given to Trust and Certificate
    Policy* policies        # those for every workload

cdef int names_init(Names* names) noexcept nogil                    # -1: out of memory; nothing to free
cdef void names_free(Names* names) noexcept nogil                   # all must be released before

# Keys of the form `scope|rest` hash as a pair, so that a destination is found from a pod's scope and a service's port without
# writing the key down. split_key: how long the scope is, or -1.
cdef int64_t split_key(Span key) noexcept nogil
cdef uint32_t key_hash(uint8_t kind, Span key) noexcept nogil
cdef uint32_t pair_hash(uint8_t kind, uint32_t scope_hash, uint32_t rest_hash) noexcept nogil
cdef uint32_t text_hash(Span text) noexcept nogil

# `*_find` borrows or returns NULL; `*_intern` finds or makes, holds it for the caller, and returns NULL when out of memory.
cdef Slot* slot_find(Names* names, uint8_t kind, Span key) noexcept nogil
cdef Slot* slot_find_pair(Names* names, uint8_t kind, uint32_t hash, Span scope, Span rest) noexcept nogil
cdef Slot* slot_intern(Names* names, uint8_t kind, Span key) noexcept nogil
cdef Slot* slot_intern_pair(Names* names, uint8_t kind, Span scope, Span rest) noexcept nogil
cdef void slot_drop(Names* names, Slot* slot) noexcept nogil

cdef Place* place_find(Names* names, const Address* address) noexcept nogil
cdef Place* place_intern(Names* names, const Address* address) noexcept nogil
cdef void place_drop(Names* names, Place* place) noexcept nogil

cdef Scope* scope_intern(Names* names, Span name) noexcept nogil
cdef void scope_drop(Names* names, Scope* scope) noexcept nogil

# Into parts, which point into `name`; -1: not `spiffe://<trust domain>/ns/<namespace>/sa/<service account>`.
cdef int identity_split(Span name, IdentityParts* parts) noexcept nogil
cdef Identity* identity_intern(Names* names, Span name) noexcept nogil        # what identity_split takes
cdef void identity_drop(Names* names, Identity* identity) noexcept nogil

cdef void claim_link(Claim** list, Claim* claim) noexcept nogil
cdef void claim_unlink(Claim** list, Claim* claim) noexcept nogil
