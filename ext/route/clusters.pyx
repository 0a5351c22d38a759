from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memset
from ext.core.arena cimport arena_copy, arena_free, block_give, block_take
from ext.core.blob cimport take_count, take_u8, take_u16, take_u32
from ext.core.hash cimport hash_pair
from ext.route.balance cimport balance_build
from ext.route.reader cimport LEAST_ADDRESS, cut, no_memory, read_address, refuse, refuse_number, take
from ext.route.shapes cimport BALANCE_RANDOM, BALANCE_ROUND_ROBIN, Address, Endpoint, Load
from ext.route.slots cimport place_drop, place_intern


cdef int share_loads(Reader* r, Cluster* fresh, const Cluster* old) noexcept nogil:
    # An endpoint that was there before keeps its count of what is in flight. A scratch table of the old ones, so that
    # a cluster of n costs n.
    cdef uint64_t size = 1
    cdef uint32_t i, at
    cdef uint32_t* table
    cdef Endpoint* e
    cdef const Endpoint* o
    while size < 2 * <uint64_t>old.n_endpoints:
        size *= 2
    table = <uint32_t*>block_take(size * sizeof(uint32_t))
    if table == NULL:
        return no_memory(r)
    for i in range(old.n_endpoints):
        o = &old.endpoints[i]
        at = hash_pair(o.place.node.hash, o.port) & <uint32_t>(size - 1)
        while table[at] != 0:
            at = (at + 1) & <uint32_t>(size - 1)
        table[at] = i + 1
    for i in range(fresh.n_endpoints):
        e = &fresh.endpoints[i]
        at = hash_pair(e.place.node.hash, e.port) & <uint32_t>(size - 1)
        while table[at] != 0:
            o = &old.endpoints[table[at] - 1]
            if o.place == e.place and o.port == e.port:
                e.load = o.load
                e.load.refs += 1
                break
            at = (at + 1) & <uint32_t>(size - 1)
    block_give(table)
    return 0


cdef int read_cluster(Reader* r, Cluster* c, Span key, const Cluster* old) noexcept nogil:
    cdef uint32_t i, n
    cdef uint64_t total = 0
    cdef Address address
    cdef Endpoint* e
    # copied: a cluster in use outlives its slot
    c.scope.p = arena_copy(r.arena, key.p, key.n)
    if c.scope.p == NULL:
        return no_memory(r)
    c.scope.n = r.scope.n
    c.name.p = c.scope.p + c.scope.n + 1
    c.name.n = key.n - c.scope.n - 1
    c.balancer = take_u8(&r.c)
    c.connect_timeout_ms = take_u32(&r.c)
    c.service = take_u32(&r.c)
    n = take_count(&r.c, LEAST_ADDRESS + 7)
    if r.c.bad:
        return cut(r)
    if c.balancer < BALANCE_ROUND_ROBIN or c.balancer > BALANCE_RANDOM:
        return refuse_number(r, b"balancer", c.balancer)
    if c.connect_timeout_ms == 0:
        return refuse(r, b"connect timeout 0: every wait has an end")
    c.endpoints = <Endpoint*>take(r, n, sizeof(Endpoint))
    if c.endpoints == NULL:
        return -1
    c.n_endpoints = n
    for i in range(c.n_endpoints):
        e = &c.endpoints[i]
        memset(&address, 0, sizeof(Address))
        if read_address(r, &address) < 0:
            return -1
        e.port = take_u16(&r.c)
        e.weight = take_u32(&r.c)
        e.healthy = take_u8(&r.c)
        if r.c.bad:
            return cut(r)
        if e.port == 0 or e.weight == 0 or e.healthy > 1:
            return refuse_number(r, b"port 0, weight 0 or health other than 0 and 1 of endpoint", i)
        total += e.weight
        e.place = place_intern(r.names, &address)
        if e.place == NULL:
            return no_memory(r)
    if total >> 32 != 0:
        return refuse_number(r, b"weights of the endpoints add up to more than 32 bits", total)
    if old != NULL and old.n_endpoints > 0 and share_loads(r, c, old) < 0:
        return -1
    for i in range(c.n_endpoints):
        e = &c.endpoints[i]
        if e.load == NULL:
            e.load = <Load*>block_take(sizeof(Load))
            if e.load == NULL:
                return no_memory(r)
            e.load.refs = 1
    if balance_build(c) < 0:
        return no_memory(r)
    return 0


cdef void cluster_free(Names* names, Cluster* c) noexcept nogil:
    cdef uint32_t i
    cdef Load* load
    for i in range(c.n_endpoints):
        if c.endpoints[i].place != NULL:
            place_drop(names, c.endpoints[i].place)
        load = c.endpoints[i].load
        if load != NULL:
            load.refs -= 1
            if load.refs == 0:
                block_give(load)
    arena_free(&c.arena)
