from libc.stdint cimport uint64_t
from libc.string cimport memchr, memcmp, memcpy
from ext.core.arena cimport block_give, block_take
from ext.core.hash cimport (
    buckets_first, buckets_free, buckets_init, buckets_insert, buckets_remove, buckets_reserve, hash_bytes, hash_pair)

cdef enum:
    IDENTITY_BYTES = 2048       # the longest SPIFFE ID (SPIFFE-ID 2.3)


cdef int names_init(Names* names) noexcept nogil:
    if (buckets_init(&names.slots) | buckets_init(&names.places) | buckets_init(&names.scopes) | buckets_init(&names.identities)
            | buckets_init(&names.workloads) | buckets_init(&names.services) | buckets_init(&names.pods)) == 0:
        return 0
    names_free(names)
    return -1


cdef void names_free(Names* names) noexcept nogil:
    buckets_free(&names.slots)
    buckets_free(&names.places)
    buckets_free(&names.scopes)
    buckets_free(&names.identities)
    buckets_free(&names.workloads)
    buckets_free(&names.services)
    buckets_free(&names.pods)


# ---- names -------------------------------------------------------------------------------------------------


cdef int64_t split_key(Span key) noexcept nogil:
    cdef const char* bar = <const char*>memchr(key.p, c'|', key.n) if key.n > 0 else NULL
    return bar - key.p if bar != NULL else -1


cdef uint32_t text_hash(Span text) noexcept nogil:
    return hash_bytes(text.p, text.n, 0)


cdef uint32_t pair_hash(uint8_t kind, uint32_t scope_hash, uint32_t rest_hash) noexcept nogil:
    return hash_pair(scope_hash + kind, rest_hash)


cdef uint32_t key_hash(uint8_t kind, Span key) noexcept nogil:
    cdef int64_t bar = split_key(key)
    if bar < 0:
        return hash_bytes(key.p, key.n, kind)
    return pair_hash(kind, hash_bytes(key.p, <size_t>bar, 0), hash_bytes(key.p + bar + 1, key.n - <size_t>bar - 1, 0))


cdef Slot* slot_find(Names* names, uint8_t kind, Span key) noexcept nogil:
    cdef uint32_t hash = key_hash(kind, key)
    cdef Slot* slot = <Slot*>buckets_first(&names.slots, hash)
    while slot != NULL:
        if slot.node.hash == hash and slot.kind == kind and slot.key_len == key.n and memcmp(slot.key, key.p, key.n) == 0:
            return slot
        slot = <Slot*>slot.node.chain
    return NULL


cdef Slot* slot_find_pair(Names* names, uint8_t kind, uint32_t hash, Span scope, Span rest) noexcept nogil:
    cdef Slot* slot = <Slot*>buckets_first(&names.slots, hash)
    while slot != NULL:
        if (slot.node.hash == hash and slot.kind == kind and slot.key_len == <uint64_t>scope.n + 1 + rest.n
                and memcmp(slot.key, scope.p, scope.n) == 0 and slot.key[scope.n] == c'|'
                and memcmp(slot.key + scope.n + 1, rest.p, rest.n) == 0):
            return slot
        slot = <Slot*>slot.node.chain
    return NULL


cdef Slot* slot_new(Names* names, uint8_t kind, uint32_t hash, Span first, Span second, bint pair) noexcept nogil:
    # `first`, or `first|second`; the key lies behind the struct
    cdef uint64_t size = <uint64_t>first.n + second.n + pair
    cdef Slot* slot
    if size > 0xffff or buckets_reserve(&names.slots, 1) < 0:
        return NULL
    slot = <Slot*>block_take(sizeof(Slot) + size + 1)
    if slot == NULL:
        return NULL
    slot.key = <char*>(slot + 1)
    slot.key_len = <uint32_t>size
    memcpy(slot.key, first.p, first.n)
    if pair:
        slot.key[first.n] = c'|'
        memcpy(slot.key + first.n + 1, second.p, second.n)
    slot.kind = kind
    slot.refs = 1
    slot.node.hash = hash
    buckets_insert(&names.slots, &slot.node)
    return slot


cdef Slot* slot_intern(Names* names, uint8_t kind, Span key) noexcept nogil:
    cdef Slot* slot = slot_find(names, kind, key)
    cdef Span nothing
    if slot != NULL:
        slot.refs += 1
        return slot
    nothing.p = NULL
    nothing.n = 0
    return slot_new(names, kind, key_hash(kind, key), key, nothing, False)


cdef Slot* slot_intern_pair(Names* names, uint8_t kind, Span scope, Span rest) noexcept nogil:
    cdef uint32_t hash = pair_hash(kind, text_hash(scope), text_hash(rest))
    cdef Slot* slot = slot_find_pair(names, kind, hash, scope, rest)
    if slot != NULL:
        slot.refs += 1
        return slot
    return slot_new(names, kind, hash, scope, rest, True)


cdef void slot_drop(Names* names, Slot* slot) noexcept nogil:
    slot.refs -= 1
    if slot.refs == 0:
        buckets_remove(&names.slots, &slot.node)
        block_give(slot)


# ---- addresses ---------------------------------------------------------------------------------------------


cdef uint32_t address_hash(const Address* address) noexcept nogil:
    return hash_bytes(address.ip, 16 if address.family == 6 else 4, address.family)


cdef Place* place_find(Names* names, const Address* address) noexcept nogil:
    cdef uint32_t hash = address_hash(address)
    cdef Place* place = <Place*>buckets_first(&names.places, hash)
    while place != NULL:
        if (place.node.hash == hash and place.address.family == address.family
                and memcmp(place.address.ip, address.ip, 16 if address.family == 6 else 4) == 0):
            return place
        place = <Place*>place.node.chain
    return NULL


cdef Place* place_intern(Names* names, const Address* address) noexcept nogil:
    cdef Place* place = place_find(names, address)
    if place != NULL:
        place.refs += 1
        return place
    if buckets_reserve(&names.places, 1) < 0:
        return NULL
    place = <Place*>block_take(sizeof(Place))
    if place == NULL:
        return NULL
    place.address = address[0]
    place.refs = 1
    place.node.hash = address_hash(address)
    buckets_insert(&names.places, &place.node)
    return place


cdef void place_drop(Names* names, Place* place) noexcept nogil:
    place.refs -= 1
    if place.refs == 0:
        buckets_remove(&names.places, &place.node)
        block_give(place)


cdef void claim_link(Claim** list, Claim* claim) noexcept nogil:
    claim.prev = NULL
    claim.next = list[0]
    if list[0] != NULL:
        list[0].prev = claim
    list[0] = claim


cdef void claim_unlink(Claim** list, Claim* claim) noexcept nogil:
    if claim.prev != NULL:
        claim.prev.next = claim.next
    else:
        list[0] = claim.next
    if claim.next != NULL:
        claim.next.prev = claim.prev
    claim.prev = NULL
    claim.next = NULL


# ---- scopes ------------------------------------------------------------------------------------------------


cdef Scope* scope_intern(Names* names, Span name) noexcept nogil:
    cdef uint32_t hash = text_hash(name)
    cdef Scope* scope = <Scope*>buckets_first(&names.scopes, hash)
    cdef char* text
    while scope != NULL:
        if scope.node.hash == hash and scope.name.n == name.n and memcmp(scope.name.p, name.p, name.n) == 0:
            scope.refs += 1
            return scope
        scope = <Scope*>scope.node.chain
    if buckets_reserve(&names.scopes, 1) < 0:
        return NULL
    scope = <Scope*>block_take(sizeof(Scope) + name.n + 1)
    if scope == NULL:
        return NULL
    text = <char*>(scope + 1)
    memcpy(text, name.p, name.n)
    scope.name.p = text
    scope.name.n = name.n
    scope.refs = 1
    scope.node.hash = hash
    buckets_insert(&names.scopes, &scope.node)
    return scope


cdef void scope_drop(Names* names, Scope* scope) noexcept nogil:
    scope.refs -= 1
    if scope.refs == 0:
        buckets_remove(&names.scopes, &scope.node)
        block_give(scope)


# ---- identities --------------------------------------------------------------------------------------------

cdef bint part(Span* rest, Span* out) noexcept nogil:
    """Up to the next slash, which is taken too. False: nothing there."""
    cdef const char* slash = <const char*>memchr(rest.p, c'/', rest.n) if rest.n > 0 else NULL
    out.p = rest.p
    out.n = <uint32_t>(slash - rest.p) if slash != NULL else rest.n
    rest.p += out.n + (slash != NULL)
    rest.n -= out.n + (slash != NULL)
    return out.n > 0


cdef int identity_split(Span name, IdentityParts* parts) noexcept nogil:
    cdef Span rest = name
    cdef Span ns, sa
    if name.n > IDENTITY_BYTES or name.n < 9 or memcmp(name.p, b"spiffe://", 9) != 0:
        return -1
    rest.p += 9
    rest.n -= 9
    parts.principal = rest
    if (part(&rest, &parts.domain) and part(&rest, &ns) and ns.n == 2 and memcmp(ns.p, b"ns", 2) == 0
            and part(&rest, &parts.namespace) and part(&rest, &sa) and sa.n == 2 and memcmp(sa.p, b"sa", 2) == 0
            and part(&rest, &parts.account) and rest.n == 0 and name.p[name.n - 1] != c'/'):
        return 0
    return -1


cdef Identity* identity_intern(Names* names, Span name) noexcept nogil:
    cdef uint32_t hash = text_hash(name)
    cdef Identity* identity = <Identity*>buckets_first(&names.identities, hash)
    cdef char* text
    while identity != NULL:
        if identity.node.hash == hash and identity.name.n == name.n and memcmp(identity.name.p, name.p, name.n) == 0:
            identity.refs += 1
            return identity
        identity = <Identity*>identity.node.chain
    if buckets_reserve(&names.identities, 1) < 0:
        return NULL
    identity = <Identity*>block_take(sizeof(Identity) + name.n + 1)
    if identity == NULL:
        return NULL
    text = <char*>(identity + 1)
    memcpy(text, name.p, name.n)
    identity.name.p = text
    identity.name.n = name.n
    identity_split(identity.name, &identity.parts)
    identity.refs = 1
    identity.node.hash = hash
    buckets_insert(&names.identities, &identity.node)
    return identity


cdef void identity_drop(Names* names, Identity* identity) noexcept nogil:
    identity.refs -= 1
    if identity.refs == 0:
        buckets_remove(&names.identities, &identity.node)
        block_give(identity)
