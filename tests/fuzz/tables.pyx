"""Transactions of blobs into a worker's tables, one behind the other, and the questions of the data path to what came of them.

Input: a flags byte (1: raw, the rest is one transaction as it is; 2: allocations fail), a byte (which allocation), then transactions. One
is a count byte and entries; an entry is op, kind, key length (u8), payload length (u16), key, payload: checksums and padding are put
around it, so that what is behind them is reached.

What must hold:
  1. A transaction that is refused says why and leaves the tables as they were, byte for byte, whatever allocation failed.
  2. One that is prepared and abandoned leaves them so too.
  3. Applying allocates nothing. What was put last is there, what was deleted last is not.
  4. Every question to what is in force gives an answer inside it: a route's cluster, an endpoint of that cluster, edits within bounds.
  5. When the tables go, no block of memory is left.
"""
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset, strlen
from ext.core.arena cimport Arena, Chunk, block_take, blocks_fail_at, blocks_live
from ext.core.hash cimport Node, crc32
from ext.core.protocol cimport (
    KIND_CERTIFICATE, KIND_CLUSTER, KIND_DESTINATION, KIND_POD, KIND_POLICY, KIND_SERVICE, KIND_TRUST, KIND_WORKLOAD, TXN_MAGIC,
    TXN_VERSION)
from ext.route.balance cimport balance_pick
from ext.route.match cimport request_edits, response_edits, route_find, route_pick, tcp_pick
from ext.route.shapes cimport (
    EDITS_MAX, Certificate, Cluster, Destination, Endpoint, Identity, Place, Pod, Policy, Route, Scope, Service, Slot, Trust, Weighted,
    Workload, weighted_cluster)
from ext.route.tables cimport (
    ERROR_BYTES, Prepared, Tables, slot_release, tables_abandon, tables_apply, tables_free, tables_new, tables_prepare, tables_random)
from ext.wire.edit cimport HeaderOp
from ext.wire.http1 cimport Head, parse_request
from driver cimport Feed, claim, feed_byte, run as drive

cdef extern from *:
    """
    #include <stddef.h>
    size_t __sanitizer_get_allocated_size(const volatile void *at);
    """
    size_t __sanitizer_get_allocated_size(const void* at) nogil

cdef enum:
    TRANSACTION_MAX = 65536

cdef Head heads[3]              # what requests ask; parsed once


# ---- what tables hold, as one number: independent of the order of chains, which growing changes ---------------------------------

cdef uint64_t mix(uint64_t h, const void* data, size_t size) noexcept nogil:
    cdef const uint8_t* p = <const uint8_t*>data
    cdef size_t i
    for i in range(size):
        h = (h ^ p[i]) * <uint64_t>1099511628211
    return h


cdef Arena* arena_of(uint8_t kind, void* content) noexcept nogil:
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


cdef uint64_t digest_content(uint8_t kind, void* content) noexcept nogil:
    """Every byte of every chunk, but the chain that the content is linked by."""
    cdef Arena* arena = arena_of(kind, content)
    cdef Chunk* chunk = arena.chunks
    cdef Node node
    cdef Node empty
    cdef Node* linked = <Node*>content if kind == KIND_WORKLOAD or kind == KIND_SERVICE or kind == KIND_POD else NULL
    cdef uint64_t h = 14695981039346656037u
    memset(&empty, 0, sizeof(Node))
    if linked != NULL:
        node = linked[0]
        linked[0] = empty
    while chunk != NULL:
        h = mix(h, chunk, __sanitizer_get_allocated_size(chunk))
        chunk = chunk.next
    if linked != NULL:
        linked[0] = node
    return h


cdef uint64_t digest(Tables* t) noexcept nogil:
    cdef uint64_t sum = 0, h
    cdef uint32_t i
    cdef Node* at
    cdef Slot* slot
    cdef Place* place
    cdef Scope* scope
    cdef Identity* identity
    sum = mix(14695981039346656037u, &t.settings, sizeof(t.settings))
    sum = mix(sum, &t.generation, 24)           # generation, last, random_state
    sum += t.names.slots.count + 3 * t.names.places.count + 5 * t.names.scopes.count + 7 * t.names.identities.count
    for i in range(t.names.slots.mask + 1):
        at = t.names.slots.heads[i]
        while at != NULL:
            slot = <Slot*>at
            h = mix(slot.kind, slot.key, slot.key_len)
            h = mix(h, &slot.refs, sizeof(slot.refs))
            h = mix(h, &slot.current, sizeof(slot.current))
            if slot.current != NULL:
                h += digest_content(slot.kind, slot.current)
            sum += h
            at = at.chain
    for i in range(t.names.places.mask + 1):
        at = t.names.places.heads[i]
        while at != NULL:
            place = <Place*>at
            h = mix(7, &place.address, sizeof(place.address))
            h = mix(h, &place.refs, sizeof(place.refs))
            h = mix(h, &place.workloads, 3 * sizeof(void*))
            sum += h
            at = at.chain
    for i in range(t.names.scopes.mask + 1):
        at = t.names.scopes.heads[i]
        while at != NULL:
            scope = <Scope*>at
            h = mix(11, scope.name.p, scope.name.n)
            sum += mix(h, &scope.refs, sizeof(scope.refs))
            at = at.chain
    for i in range(t.names.identities.mask + 1):
        at = t.names.identities.heads[i]
        while at != NULL:
            identity = <Identity*>at
            h = mix(13, identity.name.p, identity.name.n)
            sum += mix(h, &identity.refs, sizeof(identity.refs))
            at = at.chain
    return sum


# ---- questions ---------------------------------------------------------------------------------------------------------------

cdef void ask_cluster(Tables* t, Weighted* weighted) noexcept nogil:
    cdef Cluster* cluster = weighted_cluster(weighted)
    cdef Endpoint* picked
    cdef Endpoint* other
    if cluster == NULL:
        return
    picked = balance_pick(cluster, tables_random(t), NULL)
    if picked == NULL:
        claim(cluster.n_ready == 0, b"a cluster with a healthy endpoint gives one")
        return
    claim(picked >= cluster.endpoints and picked < cluster.endpoints + cluster.n_endpoints and picked.healthy,
          b"an endpoint is one of its cluster, and healthy")
    other = balance_pick(cluster, tables_random(t), picked)
    claim(other != picked or cluster.n_ready == 1, b"a retry goes to another endpoint if there is one")


cdef void ask_destination(Tables* t, Destination* d) noexcept nogil:
    cdef HeaderOp[EDITS_MAX] ops
    cdef Route* route
    cdef Weighted* weighted
    cdef uint32_t i
    for i in range(3):
        route = route_find(d, &heads[i])
        if route == NULL:
            continue
        weighted = route_pick(route, <uint32_t>tables_random(t))
        claim(weighted >= route.clusters and weighted < route.clusters + route.n_clusters, b"a route gives one of its clusters")
        claim(request_edits(route, weighted, ops) <= EDITS_MAX and response_edits(route, weighted, ops) <= EDITS_MAX, b"edits fit")
        ask_cluster(t, weighted)
    weighted = tcp_pick(d, <uint32_t>tables_random(t))
    claim((weighted != NULL) == (d.has_tcp != 0), b"a TCP destination gives a cluster")
    if weighted != NULL:
        ask_cluster(t, weighted)


cdef void ask(Tables* t) noexcept nogil:
    cdef Node* at
    cdef uint32_t i
    for i in range(t.names.slots.mask + 1):
        at = t.names.slots.heads[i]
        while at != NULL:
            if (<Slot*>at).kind == KIND_DESTINATION and (<Slot*>at).current != NULL:
                ask_destination(t, <Destination*>(<Slot*>at).current)
            at = at.chain


# ---- transactions ------------------------------------------------------------------------------------------------------------

cdef void put(char* out, size_t at, uint64_t value, size_t size) noexcept nogil:
    memcpy(out + at, &value, size)


cdef size_t compose(Feed* f, char* out, uint64_t id) noexcept nogil:
    """The next transaction of the input with what frames it; its size."""
    cdef size_t at = 24, key, payload
    cdef uint32_t n = feed_byte(f) % 8, _i, written = 0
    cdef uint8_t op, kind
    for _i in range(n):
        if f.left < 5:
            break
        op = feed_byte(f)
        kind = feed_byte(f)
        key = feed_byte(f)
        payload = feed_byte(f)
        payload |= <size_t>feed_byte(f) << 8
        if key > f.left:
            key = f.left
        if payload > f.left - key:
            payload = f.left - key
        if at + 12 + key + payload + 8 > TRANSACTION_MAX:
            break
        put(out, at, op % 3, 1)
        put(out, at + 1, kind, 1)
        put(out, at + 2, key, 2)
        put(out, at + 4, payload, 4)
        put(out, at + 8, crc32(0, f.at + key, payload), 4)
        memcpy(out + at + 12, f.at, key + payload)
        f.at += key + payload
        f.left -= key + payload
        at += 12 + key + payload
        while at & 7:
            out[at] = 0
            at += 1
        written += 1
    put(out, 0, TXN_MAGIC, 4)
    put(out, 4, TXN_VERSION, 2)
    put(out, 6, 0, 2)
    put(out, 8, id, 8)
    put(out, 16, written, 4)
    put(out, 20, crc32(0, out + 24, at - 24), 4)
    return at


cdef void check_applied(Tables* t, const Prepared* p, bint* still) noexcept nogil:
    """Before apply: notes which operations decide; an operation on the same slot later in the transaction overrules."""
    cdef uint32_t i, k
    for i in range(p.n):
        still[i] = True
        for k in range(i + 1, p.n):
            if p.operations[k].slot == p.operations[i].slot:
                still[i] = False


cdef void one_transaction(Tables* t, const char* data, size_t size, int64_t fail) noexcept nogil:
    cdef char[ERROR_BYTES] error
    cdef char* exact
    cdef Slot* slots[64]
    cdef void* contents[64]
    cdef bint still[64]
    cdef uint32_t i, n
    cdef uint64_t before = digest(t)
    cdef int64_t blocks = blocks_live()
    cdef Prepared* p
    exact = <char*>malloc(size)                 # reads beyond it are reported
    memcpy(exact, data, size)
    memset(error, 1, sizeof(error))
    blocks_fail_at(fail)
    p = tables_prepare(t, exact, size, error)
    blocks_fail_at(0)
    if p == NULL:
        claim(error[0] != 0 and strlen(error) < ERROR_BYTES, b"a refusal says why")
    else:
        tables_abandon(t, p)
    claim(digest(t) == before and blocks_live() == blocks, b"a transaction that is not applied leaves the tables as they were")
    if p == NULL and fail == 0:
        free(exact)
        return
    p = tables_prepare(t, exact, size, error)
    free(exact)                                 # `data` may go
    if p == NULL:
        claim(digest(t) == before and blocks_live() == blocks, b"a transaction that is refused leaves the tables as they were")
        return
    n = p.n if p.n < 64 else 0
    if n:
        check_applied(t, p, still)
    for i in range(n):
        slots[i] = p.operations[i].slot
        slots[i].refs += 1                      # held, so that it can be looked at afterwards
        contents[i] = p.operations[i].content
    blocks_fail_at(1)
    tables_apply(t, p)
    claim(block_take(1) == NULL, b"applying allocates nothing")
    blocks_fail_at(0)
    for i in range(n):
        claim(not still[i] or slots[i].current == contents[i], b"what was said last of a name is in force")
    for i in range(n):
        slot_release(t, slots[i])
    ask(t)


cdef int one_input(const uint8_t* raw, size_t raw_size) noexcept nogil:
    cdef Feed f
    cdef Tables* t
    cdef char* data
    cdef size_t size
    cdef int64_t blocks = blocks_live(), fail = 0
    cdef uint8_t flags
    cdef uint64_t id = 0
    f.at = raw
    f.left = raw_size
    flags = feed_byte(&f)
    if flags & 2:
        fail = 1 + feed_byte(&f)
    t = tables_new(7)
    if flags & 1:
        one_transaction(t, <const char*>f.at, f.left, fail)
    else:
        data = <char*>malloc(TRANSACTION_MAX)
        while f.left and id < 16:
            id += 1
            size = compose(&f, data, id)
            one_transaction(t, data, size, fail)
        free(data)
    tables_free(t)
    claim(blocks_live() == blocks, b"when the tables go no block is left")
    return 0


def run(list words):
    cdef size_t scanned
    requests = (b"GET /reviews/1?page=2 HTTP/1.1\r\nHost: reviews.default.svc.cluster.local:9080\r\nend-user: jason\r\nx-debug: ON\r\n\r\n",
                b"POST /a HTTP/1.1\r\nHost: a\r\n\r\n", b"OPTIONS * HTTP/1.0\r\n\r\n")
    keep = []
    for i, text in enumerate(requests):
        keep.append(text)
        scanned = 0
        assert parse_request(text, len(text), &scanned, &heads[<int>i]) > 0
    return drive(words, one_input)
