from libc.stdio cimport snprintf
from libc.string cimport memcpy, memset
from ext.core.arena cimport block_give, block_take
from ext.core.blob cimport (
    Cursor, cursor_init, cursor_left, take_bytes, take_u8, take_u16, take_u32, take_u64)
from ext.core.hash cimport Buckets, Node, buckets_first, buckets_insert, buckets_remove, buckets_reserve, crc32, hash_u32
from ext.core.protocol cimport (
    KIND_CERTIFICATE, KIND_CLUSTER, KIND_DESTINATION, KIND_KEEPER_ONLY, KIND_POD, KIND_POLICY, KIND_SERVICE, KIND_SETTINGS, KIND_TRUST,
    KIND_WORKLOAD, OP_DELETE, OP_PUT, TXN_MAGIC, TXN_VERSION)
from ext.route.decode cimport content_decode, content_drop, settings_decode, settings_default
from ext.route.reader cimport REASON_BYTES
from ext.route.shapes cimport SCOPE_GLOBAL, SCOPE_NAMESPACE, Claim, Place, Policy, Trust
from ext.route.slots cimport (
    claim_link, claim_unlink, identity_drop, identity_intern, names_free, names_init, pair_hash, place_find, slot_drop,
    slot_find, slot_find_pair, slot_intern, slot_intern_pair)

cdef enum:
    TXN_HEADER = 24
    ENTRY_HEADER = 12


cdef Tables* tables_new(uint64_t seed) noexcept nogil:
    cdef Tables* t = <Tables*>block_take(sizeof(Tables))
    if t == NULL:
        return NULL
    if names_init(&t.names) < 0:
        block_give(t)
        return NULL
    settings_default(&t.settings)
    t.random_state = seed if seed != 0 else <uint64_t>0x9e3779b97f4a7c15
    return t


cdef void tables_free(Tables* t) noexcept nogil:
    cdef uint32_t i
    cdef Slot* slot
    # emptying a slot may make others of its chain go: start the chain again each time
    for i in range(t.names.slots.mask + 1):
        slot = <Slot*>t.names.slots.heads[i]
        while slot != NULL:
            if slot.current == NULL:
                slot = <Slot*>slot.node.chain
                continue
            fill(t, slot, NULL)
            slot = <Slot*>t.names.slots.heads[i]
    names_free(&t.names)
    block_give(t)


cdef uint64_t tables_random(Tables* t) noexcept nogil:
    # xorshift64* (Marsaglia 2003, Vigna 2016): the low bits of plain xorshift are too regular for choosing by weight
    cdef uint64_t x = t.random_state
    x ^= x >> 12
    x ^= x << 25
    x ^= x >> 27
    t.random_state = x
    return x * <uint64_t>0x2545f4914f6cdd1d


# ---- applying: cannot fail ---------------------------------------------------------------------------------


cdef Buckets* numbers_of(Tables* t, uint8_t kind) noexcept nogil:
    if kind == KIND_WORKLOAD:
        return &t.names.workloads
    if kind == KIND_SERVICE:
        return &t.names.services
    if kind == KIND_POD:
        return &t.names.pods
    return NULL


cdef Policy** policies_of(Tables* t, const Policy* policy) noexcept nogil:
    if policy.scope == SCOPE_GLOBAL:
        return &t.names.policies
    return &policy.namespace.policies if policy.scope == SCOPE_NAMESPACE else NULL


cdef void policy_link(Policy** list, Policy* policy) noexcept nogil:
    policy.prev = NULL
    policy.next = list[0]
    if list[0] != NULL:
        list[0].prev = policy
    list[0] = policy


cdef void policy_unlink(Policy** list, Policy* policy) noexcept nogil:
    if policy.prev != NULL:
        policy.prev.next = policy.next
    else:
        list[0] = policy.next
    if policy.next != NULL:
        policy.next.prev = policy.prev


cdef bint judges_otherwise(const Slot* slot, const void* content) noexcept nogil:
    """Whether a policy may decide otherwise about open connections once `content` (or NULL) is in the slot."""
    cdef const Workload* old = <const Workload*>slot.current
    cdef const Workload* new = <const Workload*>content
    cdef uint32_t i
    if slot.kind == KIND_POLICY:
        return True
    if slot.kind == KIND_POD:
        return slot.current != NULL
    if slot.kind != KIND_WORKLOAD or old == NULL:
        return False
    if new == NULL or old.n_policies != new.n_policies:
        return True
    for i in range(old.n_policies):
        if old.policies[i] != new.policies[i]:      # interned: the same name is the same slot
            return True
    return False


cdef void link(Tables* t, uint8_t kind, void* content) noexcept nogil:
    cdef uint32_t i
    if numbers_of(t, kind) != NULL:
        buckets_insert(numbers_of(t, kind), <Node*>content)
    if kind == KIND_WORKLOAD:
        for i in range((<Workload*>content).n_claims):
            claim_link(&(<Workload*>content).claims[i].place.workloads, &(<Workload*>content).claims[i])
    elif kind == KIND_SERVICE:
        for i in range((<Service*>content).n_claims):
            claim_link(&(<Service*>content).claims[i].place.services, &(<Service*>content).claims[i])
    elif kind == KIND_POD:
        for i in range((<Pod*>content).n_claims):
            claim_link(&(<Pod*>content).claims[i].place.pods, &(<Pod*>content).claims[i])
    elif kind == KIND_POLICY and policies_of(t, <Policy*>content) != NULL:
        policy_link(policies_of(t, <Policy*>content), <Policy*>content)


cdef void unlink(Tables* t, uint8_t kind, void* content) noexcept nogil:
    cdef uint32_t i
    if numbers_of(t, kind) != NULL:
        buckets_remove(numbers_of(t, kind), <Node*>content)
    if kind == KIND_WORKLOAD:
        for i in range((<Workload*>content).n_claims):
            claim_unlink(&(<Workload*>content).claims[i].place.workloads, &(<Workload*>content).claims[i])
    elif kind == KIND_SERVICE:
        for i in range((<Service*>content).n_claims):
            claim_unlink(&(<Service*>content).claims[i].place.services, &(<Service*>content).claims[i])
    elif kind == KIND_POD:
        for i in range((<Pod*>content).n_claims):
            claim_unlink(&(<Pod*>content).claims[i].place.pods, &(<Pod*>content).claims[i])
    elif kind == KIND_POLICY and policies_of(t, <Policy*>content) != NULL:
        policy_unlink(policies_of(t, <Policy*>content), <Policy*>content)


cdef void fill(Tables* t, Slot* slot, void* content) noexcept nogil:
    # content (or NULL) takes the place of what is in the slot; the slot may be gone afterwards
    cdef void* old = slot.current
    cdef uint8_t kind = slot.kind
    if content != NULL:
        slot.refs += 1
        link(t, kind, content)
    slot.current = content
    if old != NULL:
        unlink(t, kind, old)
        content_drop(&t.names, kind, old)
        slot_drop(&t.names, slot)


cdef void tables_apply(Tables* t, Prepared* p) noexcept nogil:
    cdef uint32_t i
    cdef Operation* o
    cdef bint otherwise = False, lists = False
    for i in range(p.n):
        o = &p.operations[i]
        otherwise = otherwise or judges_otherwise(o.slot, o.content)
        lists = lists or (o.slot.kind == KIND_TRUST and o.content != NULL and (<Trust*>o.content).n_lists > 0)
        fill(t, o.slot, o.content)
        slot_drop(&t.names, o.slot)
    if p.has_settings:
        t.settings = p.settings
    t.generation += 1
    t.judgement += otherwise
    t.recalls += lists
    t.last = p.id
    block_give(p.operations)
    block_give(p)


cdef void tables_abandon(Tables* t, Prepared* p) noexcept nogil:
    cdef uint32_t i
    cdef Operation* o
    for i in range(p.n):
        o = &p.operations[i]
        if o.content != NULL:
            content_drop(&t.names, o.slot.kind, o.content)
        slot_drop(&t.names, o.slot)
    block_give(p.operations)
    block_give(p)


# ---- preparing: changes nothing that anybody can see -------------------------------------------------------


cdef const char* kind_name(uint8_t kind) noexcept nogil:
    if kind == KIND_SETTINGS:
        return b"SETTINGS"
    if kind == KIND_WORKLOAD:
        return b"WORKLOAD"
    if kind == KIND_SERVICE:
        return b"SERVICE"
    if kind == KIND_DESTINATION:
        return b"DESTINATION"
    if kind == KIND_CLUSTER:
        return b"CLUSTER"
    if kind == KIND_POD:
        return b"POD"
    if kind == KIND_TRUST:
        return b"TRUST"
    if kind == KIND_CERTIFICATE:
        return b"CERTIFICATE"
    if kind == KIND_POLICY:
        return b"POLICY"
    return b"blob of unknown kind"


cdef int refuse_entry(char* error, uint8_t kind, Span key, const char* reason) noexcept nogil:
    snprintf(error, ERROR_BYTES, b"%s %.*s: %s", kind_name(kind), <int>(key.n if key.n < 200 else 200), key.p, reason)
    return -1


cdef int prepare_entry(Tables* t, Prepared* p, Cursor* c, uint32_t number, char* error) noexcept nogil:
    cdef char[REASON_BYTES] reason
    cdef const char* start = c.at
    cdef uint8_t op = take_u8(c)
    cdef uint8_t kind = take_u8(c)
    cdef Span key, payload
    cdef uint32_t crc
    cdef size_t padding
    cdef const char* pad
    cdef Operation* o
    key.n = take_u16(c)
    payload.n = take_u32(c)
    crc = take_u32(c)
    key.p = take_bytes(c, key.n)
    payload.p = take_bytes(c, payload.n)
    padding = <size_t>(-(c.at - start)) & 7
    pad = take_bytes(c, padding)
    if c.bad:
        snprintf(error, ERROR_BYTES, b"entry %u ends beyond the transaction", number)
        return -1
    while padding > 0:
        padding -= 1
        if pad[padding] != 0:
            return refuse_entry(error, kind, key, b"padding is not zero")
    if crc32(0, payload.p, payload.n) != crc:
        return refuse_entry(error, kind, key, b"checksum of the payload differs")
    if op != OP_PUT and (op != OP_DELETE or payload.n != 0):
        return refuse_entry(error, kind, key, b"neither a put nor a delete without payload")
    if kind >= KIND_KEEPER_ONLY:
        return 0
    if kind == KIND_SETTINGS:
        if key.n != 0:
            return refuse_entry(error, kind, key, b"has no key")
        p.has_settings = 1
        if op == OP_DELETE:
            settings_default(&p.settings)
        elif settings_decode(payload, &p.settings, reason) < 0:
            return refuse_entry(error, kind, key, reason)
        return 0
    if kind > KIND_CERTIFICATE or kind == 0 or key.n == 0:
        return refuse_entry(error, kind, key, b"unknown kind, or no key")
    o = &p.operations[p.n]
    o.slot = slot_intern(&t.names, kind, key)
    if o.slot == NULL:
        return refuse_entry(error, kind, key, b"out of memory")
    p.n += 1
    if op == OP_DELETE:
        return 0
    o.content = content_decode(&t.names, o.slot, payload, reason)
    if o.content == NULL:
        return refuse_entry(error, kind, key, reason)
    if numbers_of(t, kind) != NULL and buckets_reserve(numbers_of(t, kind), p.n) < 0:
        return refuse_entry(error, kind, key, b"out of memory")
    return 0


cdef Prepared* tables_prepare(Tables* t, const char* data, size_t size, char* error) noexcept nogil:
    cdef Cursor c
    cdef Prepared* p
    cdef uint32_t magic, n, crc, i
    cdef uint16_t version, flags
    cdef uint64_t id
    error[0] = 0
    cursor_init(&c, data, size)
    magic = take_u32(&c)
    version = take_u16(&c)
    flags = take_u16(&c)
    id = take_u64(&c)
    n = take_u32(&c)
    crc = take_u32(&c)
    if c.bad or magic != TXN_MAGIC:
        snprintf(error, ERROR_BYTES, b"not a transaction: %zu bytes, magic %08x", size, magic)
        return NULL
    if version != TXN_VERSION or flags != 0:
        snprintf(error, ERROR_BYTES, b"transaction of version %u flags %u: this worker reads version %u without flags",
                 <unsigned int>version, <unsigned int>flags, <unsigned int>TXN_VERSION)
        return NULL
    if crc32(0, c.at, cursor_left(&c)) != crc:
        snprintf(error, ERROR_BYTES, b"transaction %llu: checksum of the body differs", <unsigned long long>id)
        return NULL
    if n > cursor_left(&c) // ENTRY_HEADER:
        snprintf(error, ERROR_BYTES, b"transaction %llu: %u entries in %zu bytes", <unsigned long long>id, n, size)
        return NULL
    p = <Prepared*>block_take(sizeof(Prepared))
    if p != NULL:
        p.operations = <Operation*>block_take(n * sizeof(Operation))
    if p == NULL or p.operations == NULL:
        snprintf(error, ERROR_BYTES, b"transaction %llu: out of memory", <unsigned long long>id)
        block_give(p)
        return NULL
    p.id = id
    for i in range(n):
        if prepare_entry(t, p, &c, i, error) < 0:
            tables_abandon(t, p)
            return NULL
    if cursor_left(&c) != 0:
        snprintf(error, ERROR_BYTES, b"transaction %llu: %zu bytes after the last entry", <unsigned long long>id,
                 cursor_left(&c))
        tables_abandon(t, p)
        return NULL
    return p


# ---- asking ------------------------------------------------------------------------------------------------


cdef void address_from_v4(Address* out, const void* ip) noexcept nogil:
    memset(out, 0, sizeof(Address))
    out.family = 4
    memcpy(out.ip, ip, 4)


cdef void address_from_v6(Address* out, const void* ip) noexcept nogil:
    cdef const uint8_t* b = <const uint8_t*>ip
    cdef uint8_t other = 0
    cdef int i
    for i in range(10):
        other |= b[i]
    if other == 0 and b[10] == 0xff and b[11] == 0xff:
        address_from_v4(out, b + 12)
        return
    out.family = 6
    memcpy(out.ip, ip, 16)


cdef Service* service_at(Tables* t, const Address* address, uint16_t port, ServicePort** found) noexcept nogil:
    cdef Place* place = place_find(&t.names, address)
    cdef Claim* claim = place.services if place != NULL else NULL
    cdef Service* service
    cdef uint32_t i
    while claim != NULL:
        service = <Service*>claim.owner
        for i in range(service.n_ports):
            if service.ports[i].port == port:
                found[0] = &service.ports[i]
                return service
        claim = claim.next
    found[0] = NULL
    return NULL


cdef Service* service_by_address(Tables* t, const Address* address) noexcept nogil:
    cdef Place* place = place_find(&t.names, address)
    return <Service*>place.services.owner if place != NULL and place.services != NULL else NULL


cdef Workload* workload_by_address(Tables* t, const Address* address) noexcept nogil:
    cdef Place* place = place_find(&t.names, address)
    return <Workload*>place.workloads.owner if place != NULL and place.workloads != NULL else NULL


cdef Workload* workload_by_index(Tables* t, uint32_t index) noexcept nogil:
    cdef Workload* w = <Workload*>buckets_first(&t.names.workloads, hash_u32(index))
    while w != NULL and w.index != index:
        w = <Workload*>w.node.chain
    return w


cdef Service* service_by_index(Tables* t, uint32_t index) noexcept nogil:
    cdef Service* s = <Service*>buckets_first(&t.names.services, hash_u32(index))
    while s != NULL and s.index != index:
        s = <Service*>s.node.chain
    return s


cdef Pod* pod_by_handle(Tables* t, uint32_t handle) noexcept nogil:
    cdef Pod* p = <Pod*>buckets_first(&t.names.pods, hash_u32(handle))
    while p != NULL and p.handle != handle:
        p = <Pod*>p.node.chain
    return p


cdef Pod* pod_by_address(Tables* t, const Address* address) noexcept nogil:
    cdef Place* place = place_find(&t.names, address)
    return <Pod*>place.pods.owner if place != NULL and place.pods != NULL else NULL


cdef WorkloadPort* workload_port(const Workload* workload, uint16_t target_port, uint32_t service) noexcept nogil:
    cdef WorkloadPort* found = NULL
    cdef uint32_t i
    for i in range(workload.n_ports):
        if workload.ports[i].target_port != target_port:
            continue
        if service == 0 or workload.ports[i].service == service:
            return &workload.ports[i]
        if found == NULL:
            found = &workload.ports[i]
    return found


cdef Destination* destination_find(Tables* t, const Pod* pod, const ServicePort* port) noexcept nogil:
    cdef uint32_t hash = pair_hash(KIND_DESTINATION, pod.scope.node.hash, port.hash)
    cdef Slot* slot = slot_find_pair(&t.names, KIND_DESTINATION, hash, pod.scope.name, port.authority)
    return <Destination*>slot.current if slot != NULL else NULL


cdef Slot* destination_wait(Tables* t, const Pod* pod, const ServicePort* port) noexcept nogil:
    return slot_intern_pair(&t.names, KIND_DESTINATION, pod.scope.name, port.authority)


cdef Slot* slot_by_key(Tables* t, uint8_t kind, Span key) noexcept nogil:
    return slot_find(&t.names, kind, key)


cdef Slot* slot_wait(Tables* t, uint8_t kind, Span key) noexcept nogil:
    return slot_intern(&t.names, kind, key)


# ---- holding -----------------------------------------------------------------------------------------------


cdef void slot_hold(Slot* slot) noexcept nogil:
    slot.refs += 1


cdef void slot_release(Tables* t, Slot* slot) noexcept nogil:
    slot_drop(&t.names, slot)


cdef void destination_hold(Destination* destination) noexcept nogil:
    destination.refs += 1


cdef void destination_release(Tables* t, Destination* destination) noexcept nogil:
    content_drop(&t.names, KIND_DESTINATION, destination)


cdef void cluster_hold(Cluster* cluster) noexcept nogil:
    cluster.refs += 1


cdef void cluster_release(Tables* t, Cluster* cluster) noexcept nogil:
    content_drop(&t.names, KIND_CLUSTER, cluster)


cdef void identity_hold(Identity* identity) noexcept nogil:
    identity.refs += 1


cdef Identity* identity_of(Tables* t, Span name) noexcept nogil:
    return identity_intern(&t.names, name)


cdef void identity_release(Tables* t, Identity* identity) noexcept nogil:
    identity_drop(&t.names, identity)
