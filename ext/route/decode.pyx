from libc.stdint cimport int64_t, uint32_t
from libc.stdio cimport snprintf
from libc.string cimport memchr, memset
from ext.core.arena cimport Arena, arena_copy, arena_free, arena_take
from ext.core.blob cimport (
    cursor_init, cursor_left, take_count, take_str, take_u8, take_u16, take_u32)
from ext.core.hash cimport hash_u32
from ext.core.protocol cimport (
    KIND_CERTIFICATE, KIND_CLUSTER, KIND_DESTINATION, KIND_POD, KIND_POLICY, KIND_SERVICE, KIND_TRUST, KIND_WORKLOAD)
from ext.wire.http1 cimport HEAD_MAX_BYTES
from ext.route.clusters cimport cluster_free, read_cluster
from ext.route.policies cimport policy_free, read_policy
from ext.route.reader cimport (
    LEAST_ADDRESS, REASON_BYTES, Reader, cut, no_memory, read_address, read_ports, refuse, refuse_number, refuse_text, take)
from ext.route.routes cimport destination_free, read_destination
from ext.route.shapes cimport (
    PROTO_TLS, TUNNEL_HBONE, Address, Certificate, Claim, Cluster, Destination, Identity, IdentityParts, Pod, Policy, Service,
    ServicePort, Slot, Trust, Workload, WorkloadPort)
from ext.route.slots cimport (
    identity_drop, identity_intern, identity_split, place_drop, place_intern, scope_drop, scope_intern, slot_drop, slot_intern,
    split_key, text_hash)
from ext.route.trust cimport read_certificate, read_trust


# ---- settings ----------------------------------------------------------------------------------------------

cdef enum:
    SETTINGS_COUNT = 26
    DAY_MS = 86_400_000
    MEBIBYTE = 1_048_576

cdef struct Range:
    const char* name
    uint32_t least
    uint32_t most
    uint32_t start              # default: that of agent/model/settings.py, which says why; a test compares


cdef Range range_of(uint32_t i) noexcept nogil:
    # in the order of the blob
    cdef Range[SETTINGS_COUNT] ranges = [
        Range(b"access_log", 0, 1, 1),
        Range(b"detect_dial_ms", 1, 60_000, 50),
        Range(b"detect_timeout_ms", 1, 60_000, 5_000),
        Range(b"hold_timeout_ms", 1, 60_000, 5_000),
        Range(b"hold_bytes", 1_024, MEBIBYTE, 65_536),
        Range(b"hold_connections", 1, MEBIBYTE, 1_024),
        Range(b"request_head_timeout_ms", 1, DAY_MS, 60_000),
        Range(b"http_idle_timeout_ms", 1, DAY_MS, 3_600_000),
        Range(b"stream_idle_timeout_ms", 1, DAY_MS, 3_600_000),
        Range(b"tcp_idle_timeout_ms", 1, DAY_MS, 3_600_000),
        Range(b"connect_timeout_ms", 1, DAY_MS, 10_000),
        Range(b"head_bytes", 1_024, HEAD_MAX_BYTES, HEAD_MAX_BYTES),
        Range(b"buffer_bytes", 4_096, 16 * MEBIBYTE, 65_536),
        Range(b"connections_per_pod", 1, MEBIBYTE, 16_384),
        Range(b"pool_idle_per_endpoint", 0, 65_536, 32),
        Range(b"pool_idle_timeout_ms", 1, DAY_MS, 60_000),
        Range(b"buffered_bytes_per_worker", 4 * MEBIBYTE, 4095 * <uint32_t>MEBIBYTE, 512 * MEBIBYTE),
        Range(b"buffered_bytes_per_pod", MEBIBYTE, 4095 * <uint32_t>MEBIBYTE, 128 * MEBIBYTE),
        Range(b"descriptors_per_worker", 0, 1024 * MEBIBYTE, 0),
        Range(b"request_body_timeout_ms", 1, DAY_MS, 300_000),
        Range(b"tunnel_ping_ms", 10, DAY_MS, 10_000),
        Range(b"tunnel_pong_ms", 10, DAY_MS, 20_000),
        Range(b"tunnel_idle_ms", 10, DAY_MS, 300_000),
        Range(b"same_node_tunnel", 0, 1, 0),
        Range(b"early_tunnels", 0, 1_024, 8),
        Range(b"access_log_tcp", 0, 1, 0),
    ]
    return ranges[i]


cdef void settings_set(Settings* s, uint32_t i, uint32_t value) noexcept nogil:
    if i == 0:
        s.access_log = <uint8_t>value
    else:
        # the rest are u32, declared in the order of the blob
        (&s.detect_dial_ms)[i - 1] = value


cdef void settings_default(Settings* settings) noexcept nogil:
    cdef uint32_t i
    for i in range(SETTINGS_COUNT):
        settings_set(settings, i, range_of(i).start)


cdef int settings_decode(Span payload, Settings* settings, char* reason) noexcept nogil:
    cdef Reader r
    cdef Range allowed
    cdef uint32_t i, n, value
    r.reason = reason
    reason[0] = 0
    settings_default(settings)
    cursor_init(&r.c, payload.p, payload.n)
    n = take_count(&r.c, 4)
    for i in range(n):
        value = take_u32(&r.c)
        if i >= SETTINGS_COUNT:
            continue                # of a newer agent
        allowed = range_of(i)
        if value < allowed.least or value > allowed.most:
            snprintf(reason, REASON_BYTES, b"%s %u: expected %u to %u", allowed.name, value, allowed.least, allowed.most)
            return -1
        settings_set(settings, i, value)
    if r.c.bad or cursor_left(&r.c) != 0:
        return cut(&r)
    return 0


# ---- who is where ------------------------------------------------------------------------------------------


cdef int read_protocol(Reader* r, uint8_t* out) noexcept nogil:
    out[0] = take_u8(&r.c)
    return refuse_number(r, b"protocol of a port", out[0]) if out[0] > PROTO_TLS else 0


cdef int read_claims(Reader* r, void* owner, uint32_t* n, Claim** out) noexcept nogil:
    cdef uint32_t i, count = take_count(&r.c, LEAST_ADDRESS)
    cdef Claim* claims = <Claim*>take(r, count, sizeof(Claim))
    cdef Address address
    if claims == NULL:
        return -1
    out[0] = claims
    n[0] = count
    for i in range(count):
        memset(&address, 0, sizeof(Address))
        if read_address(r, &address) < 0:
            return -1
        claims[i].owner = owner
        claims[i].place = place_intern(r.names, &address)
        if claims[i].place == NULL:
            return no_memory(r)
    return 0


cdef int read_identity(Reader* r, Identity** out) noexcept nogil:
    """Interned; an empty one stays NULL."""
    cdef IdentityParts parts
    cdef Span name = take_str(&r.c)
    if r.c.bad:
        return cut(r)
    if name.n == 0:
        return 0
    if identity_split(name, &parts) < 0:
        return refuse_text(r, b"identity is not spiffe://<trust domain>/ns/<namespace>/sa/<service account>", name)
    out[0] = identity_intern(r.names, name)
    return no_memory(r) if out[0] == NULL else 0


cdef int read_policies(Reader* r, Workload* w) noexcept nogil:
    cdef Span name
    cdef uint32_t i, n = take_count(&r.c, 4)
    w.policies = <Slot**>take(r, n, sizeof(Slot*))
    if w.policies == NULL:
        return -1
    for i in range(n):
        name = take_str(&r.c)
        if r.c.bad:
            return cut(r)
        if name.n == 0 or name.n > 0xffff:
            return refuse_number(r, b"length of a policy's name", name.n)
        w.policies[i] = slot_intern(r.names, KIND_POLICY, name)
        if w.policies[i] == NULL:
            return no_memory(r)
        w.n_policies = i + 1
    return 0


cdef int read_workload(Reader* r, Workload* w) noexcept nogil:
    cdef uint32_t i
    w.index = take_u32(&r.c)
    w.node.hash = hash_u32(w.index)
    w.healthy = take_u8(&r.c)
    if read_claims(r, w, &w.n_claims, &w.claims) < 0:
        return -1
    w.n_ports = take_count(&r.c, 9)
    w.ports = <WorkloadPort*>take(r, w.n_ports, sizeof(WorkloadPort))
    if w.ports == NULL:
        return -1
    for i in range(w.n_ports):
        w.ports[i].service = take_u32(&r.c)
        w.ports[i].service_port = take_u16(&r.c)
        w.ports[i].target_port = take_u16(&r.c)
        if read_protocol(r, &w.ports[i].protocol) < 0:
            return -1
    w.tunnel = take_u8(&r.c)
    if w.tunnel > TUNNEL_HBONE:
        return refuse_number(r, b"tunnel of a workload", w.tunnel)
    if read_identity(r, &w.identity) < 0 or read_policies(r, w) < 0:
        return -1
    if w.index == 0 and not r.c.bad:
        return refuse(r, b"index 0 means unknown and cannot be a workload's")
    return 0


cdef int read_service(Reader* r, Service* s) noexcept nogil:
    cdef uint32_t i
    cdef Span name
    cdef char* text
    cdef int size
    s.index = take_u32(&r.c)
    s.node.hash = hash_u32(s.index)
    name = take_str(&r.c)
    if r.c.bad:
        return cut(r)
    if s.index == 0:
        return refuse(r, b"index 0 means unknown and cannot be a service's")
    if name.n == 0 or name.n > 255:
        return refuse_number(r, b"length of the hostname", name.n)
    s.hostname.p = arena_copy(r.arena, name.p, name.n)
    s.hostname.n = name.n
    if s.hostname.p == NULL:
        return no_memory(r)
    if read_claims(r, s, &s.n_claims, &s.claims) < 0:
        return -1
    s.n_ports = take_count(&r.c, 5)
    s.ports = <ServicePort*>take(r, s.n_ports, sizeof(ServicePort))
    if s.ports == NULL:
        return -1
    for i in range(s.n_ports):
        s.ports[i].port = take_u16(&r.c)
        s.ports[i].target_port = take_u16(&r.c)
        if read_protocol(r, &s.ports[i].protocol) < 0:
            return -1
        text = <char*>arena_take(r.arena, name.n + 7)       # `:65535` and NUL
        if text == NULL:
            return no_memory(r)
        size = snprintf(text, name.n + 7, b"%.*s:%u", <int>name.n, name.p, <unsigned int>s.ports[i].port)
        s.ports[i].authority.p = text
        s.ports[i].authority.n = <uint32_t>size
        s.ports[i].hash = text_hash(s.ports[i].authority)
    return 0


cdef int read_pod(Reader* r, Pod* p) noexcept nogil:
    cdef Span uid, scope
    p.handle = take_u32(&r.c)
    p.node.hash = hash_u32(p.handle)
    uid = take_str(&r.c)
    scope = take_str(&r.c)
    if r.c.bad:
        return cut(r)
    if uid.n == 0 or uid.n > 0xffff or scope.n == 0 or scope.n > 0xffff or memchr(scope.p, c'|', scope.n) != NULL:
        return refuse(r, b"workload uid and scope must be given, and a scope has no `|`")
    p.workload = slot_intern(r.names, KIND_WORKLOAD, uid)
    p.scope = scope_intern(r.names, scope)
    if p.workload == NULL or p.scope == NULL:
        return no_memory(r)
    if read_claims(r, p, &p.n_claims, &p.claims) < 0:
        return -1
    if read_identity(r, &p.identity) < 0:
        return -1
    p.direct = take_u8(&r.c)
    if p.direct > 1:
        return refuse_number(r, b"direct", p.direct)
    return read_ports(r, &p.excluded)


# ---- contents ----------------------------------------------------------------------------------------------


cdef size_t content_size(uint8_t kind) noexcept nogil:
    if kind == KIND_WORKLOAD:
        return sizeof(Workload)
    if kind == KIND_SERVICE:
        return sizeof(Service)
    if kind == KIND_DESTINATION:
        return sizeof(Destination)
    if kind == KIND_CLUSTER:
        return sizeof(Cluster)
    if kind == KIND_TRUST:
        return sizeof(Trust)
    if kind == KIND_CERTIFICATE:
        return sizeof(Certificate)
    if kind == KIND_POLICY:
        return sizeof(Policy)
    return sizeof(Pod)


cdef Arena* content_arena(uint8_t kind, void* content) noexcept nogil:
    if kind == KIND_WORKLOAD:
        return &(<Workload*>content).arena
    if kind == KIND_SERVICE:
        return &(<Service*>content).arena
    if kind == KIND_DESTINATION:
        return &(<Destination*>content).arena
    if kind == KIND_CLUSTER:
        return &(<Cluster*>content).arena
    if kind == KIND_TRUST:
        return &(<Trust*>content).arena
    if kind == KIND_CERTIFICATE:
        return &(<Certificate*>content).arena
    if kind == KIND_POLICY:
        return &(<Policy*>content).arena
    return &(<Pod*>content).arena


cdef void* content_decode(Names* names, const Slot* slot, Span payload, char* reason) noexcept nogil:
    cdef Reader r
    cdef Arena arena
    cdef Span key
    cdef void* content
    cdef int64_t bar
    cdef int done
    reason[0] = 0
    memset(&arena, 0, sizeof(Arena))
    r.names = names
    r.reason = reason
    r.destination = NULL
    key.p = slot.key
    key.n = slot.key_len
    r.scope = key
    cursor_init(&r.c, payload.p, payload.n)
    if slot.kind == KIND_DESTINATION or slot.kind == KIND_CLUSTER:
        bar = split_key(key)
        if bar <= 0 or bar + 1 >= key.n:
            refuse(&r, b"key is not `scope|name`")
            return NULL
        r.scope.n = <uint32_t>bar
    content = arena_take(&arena, content_size(slot.kind))
    if content == NULL:
        no_memory(&r)
        return NULL
    # the arena moves into what it holds: from here on it is taken from there
    r.arena = content_arena(slot.kind, content)
    r.arena[0] = arena
    if slot.kind == KIND_WORKLOAD:
        done = read_workload(&r, <Workload*>content)
    elif slot.kind == KIND_SERVICE:
        done = read_service(&r, <Service*>content)
    elif slot.kind == KIND_POD:
        done = read_pod(&r, <Pod*>content)
    elif slot.kind == KIND_TRUST:
        done = read_trust(&r, <Trust*>content)
    elif slot.kind == KIND_CERTIFICATE:
        done = read_certificate(&r, <Certificate*>content, key)
    elif slot.kind == KIND_POLICY:
        done = read_policy(&r, <Policy*>content, slot)
    elif slot.kind == KIND_DESTINATION:
        r.destination = <Destination*>content
        r.destination.refs = 1
        done = read_destination(&r, r.destination)
    else:
        (<Cluster*>content).refs = 1
        done = read_cluster(&r, <Cluster*>content, key, <const Cluster*>slot.current)
    if done == 0 and r.c.bad:
        done = cut(&r)
    if done == 0 and cursor_left(&r.c) != 0:
        done = refuse_number(&r, b"bytes too many at the end of the payload", cursor_left(&r.c))
    if done == 0:
        return content
    content_drop(names, slot.kind, content)
    return NULL


cdef void claims_drop(Names* names, uint32_t n, Claim* claims) noexcept nogil:
    cdef uint32_t i
    for i in range(n):
        if claims[i].place != NULL:
            place_drop(names, claims[i].place)


cdef void workload_drop(Names* names, Workload* w) noexcept nogil:
    cdef uint32_t i
    claims_drop(names, w.n_claims, w.claims)
    for i in range(w.n_policies):
        slot_drop(names, w.policies[i])
    if w.identity != NULL:
        identity_drop(names, w.identity)
    arena_free(&w.arena)


cdef void content_drop(Names* names, uint8_t kind, void* content) noexcept nogil:
    if kind == KIND_DESTINATION:
        (<Destination*>content).refs -= 1
        if (<Destination*>content).refs == 0:
            destination_free(names, <Destination*>content)
    elif kind == KIND_CLUSTER:
        (<Cluster*>content).refs -= 1
        if (<Cluster*>content).refs == 0:
            cluster_free(names, <Cluster*>content)
    elif kind == KIND_WORKLOAD:
        workload_drop(names, <Workload*>content)
    elif kind == KIND_POLICY:
        policy_free(names, <Policy*>content)
    elif kind == KIND_SERVICE:
        claims_drop(names, (<Service*>content).n_claims, (<Service*>content).claims)
        arena_free(&(<Service*>content).arena)
    elif kind == KIND_TRUST:
        arena_free(&(<Trust*>content).arena)
    elif kind == KIND_CERTIFICATE:
        arena_free(&(<Certificate*>content).arena)
    else:
        claims_drop(names, (<Pod*>content).n_claims, (<Pod*>content).claims)
        if (<Pod*>content).workload != NULL:
            slot_drop(names, (<Pod*>content).workload)
        if (<Pod*>content).scope != NULL:
            scope_drop(names, (<Pod*>content).scope)
        if (<Pod*>content).identity != NULL:
            identity_drop(names, (<Pod*>content).identity)
        arena_free(&(<Pod*>content).arena)
