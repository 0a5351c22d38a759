"""Round robin: by turns where all weigh the same, else earliest deadline first: an endpoint of weight w is due every 1/w,
the first time after half of that, which spreads the heavy one's turns evenly between the others' (Envoy schedules the same way).
Least request: two different ones drawn by weight, of which the one with less in flight per weight gets it.
"""
from libc.stdint cimport uint32_t
from ext.core.arena cimport arena_take
from ext.route.shapes cimport BALANCE_LEAST_REQUEST, BALANCE_ROUND_ROBIN

cdef enum:
    NOBODY = 0xffffffff
    STEP_BITS = 40          # a turn of weight 1; weight 2^32-1 still has 256 units
    WRAP_BITS = 62          # deadlines are set back before they overflow


cdef int balance_build(Cluster* c) noexcept nogil:
    cdef uint32_t i, n = 0
    cdef uint64_t total = 0
    c.even = 1
    c.turn = NOBODY
    c.ready = <uint32_t*>arena_take(&c.arena, c.n_endpoints * sizeof(uint32_t))
    c.upto = <uint64_t*>arena_take(&c.arena, c.n_endpoints * sizeof(uint64_t))
    if c.ready == NULL or c.upto == NULL:
        return -1
    for i in range(c.n_endpoints):
        if not c.endpoints[i].healthy:
            continue
        total += c.endpoints[i].weight
        c.ready[n] = i
        c.upto[n] = total
        c.even = c.even and c.endpoints[i].weight == c.endpoints[c.ready[0]].weight
        n += 1
    c.n_ready = n
    c.ready_weight = total
    if c.even or c.balancer != BALANCE_ROUND_ROBIN:
        return 0
    c.heap = <uint32_t*>arena_take(&c.arena, n * sizeof(uint32_t))
    c.deadline = <uint64_t*>arena_take(&c.arena, n * sizeof(uint64_t))
    if c.heap == NULL or c.deadline == NULL:
        return -1
    for i in range(n):
        c.heap[i] = i
        c.deadline[i] = step(c, i) // 2
    i = n // 2
    while i > 0:
        i -= 1
        sift_down(c, i)
    return 0


cdef Endpoint* at(Cluster* c, uint32_t position) noexcept nogil:
    return &c.endpoints[c.ready[position]]


cdef uint64_t weight_at(const Cluster* c, uint32_t position) noexcept nogil:
    return c.endpoints[c.ready[position]].weight


# ---- in turn -----------------------------------------------------------------------------------------------


cdef uint64_t step(const Cluster* c, uint32_t position) noexcept nogil:
    return (<uint64_t>1 << STEP_BITS) // weight_at(c, position)


cdef bint is_before(const Cluster* c, uint32_t a, uint32_t b) noexcept nogil:
    return c.deadline[a] < c.deadline[b] or (c.deadline[a] == c.deadline[b] and a < b)


cdef void sift_down(Cluster* c, uint32_t i) noexcept nogil:
    cdef uint32_t moving = c.heap[i]
    cdef uint64_t child = 2 * <uint64_t>i + 1
    while child < c.n_ready:
        if child + 1 < c.n_ready and is_before(c, c.heap[child + 1], c.heap[child]):
            child += 1
        if not is_before(c, c.heap[child], moving):
            break
        c.heap[i] = c.heap[child]
        i = <uint32_t>child
        child = 2 * child + 1
    c.heap[i] = moving


cdef uint32_t next_due(Cluster* c, uint32_t skip) noexcept nogil:
    cdef uint32_t i, place = 0, found
    cdef uint64_t least
    if c.heap[0] == skip and c.n_ready > 1:
        # the second earliest is one of the root's children
        place = 2 if c.n_ready > 2 and is_before(c, c.heap[2], c.heap[1]) else 1
    found = c.heap[place]
    c.deadline[found] += step(c, found)
    sift_down(c, place)
    if c.deadline[found] >> WRAP_BITS:
        least = c.deadline[c.heap[0]]
        for i in range(c.n_ready):
            c.deadline[i] -= least
    return found


cdef uint32_t next_turn(Cluster* c, uint64_t random, uint32_t skip) noexcept nogil:
    # workers and pods start at different places, so that they do not all fall upon the first endpoint
    c.turn = <uint32_t>random % c.n_ready if c.turn >= c.n_ready else c.turn + 1
    if c.turn >= c.n_ready:
        c.turn = 0
    if c.turn == skip and c.n_ready > 1:
        c.turn = c.turn + 1 if c.turn + 1 < c.n_ready else 0
    return c.turn


# ---- drawn -------------------------------------------------------------------------------------------------


cdef uint32_t draw(const Cluster* c, uint32_t random, uint32_t skip) noexcept nogil:
    # a position by weight, as if `skip` were not there; there is another
    cdef uint32_t low = 0, high = c.n_ready - 1, middle
    cdef uint64_t left_out = 0, before = 0, point
    if c.even:
        if skip == NOBODY:
            return <uint32_t>((<uint64_t>random * c.n_ready) >> 32)
        low = <uint32_t>((<uint64_t>random * (c.n_ready - 1)) >> 32)
        return low + 1 if low >= skip else low
    if skip != NOBODY:
        left_out = weight_at(c, skip)
        before = c.upto[skip] - left_out
    point = (<uint64_t>random * (c.ready_weight - left_out)) >> 32
    if skip != NOBODY and point >= before:
        point += left_out
    while low < high:
        middle = low + (high - low) // 2
        if c.upto[middle] > point:
            high = middle
        else:
            low = middle + 1
    return low


cdef uint32_t less_busy(Cluster* c, uint64_t random, uint32_t skip) noexcept nogil:
    cdef uint32_t first = draw(c, <uint32_t>random, skip)
    cdef uint32_t second = draw(c, <uint32_t>(random >> 32), skip)
    cdef uint32_t tries = 0
    while (second == first or second == skip) and tries < 2:
        second = second + 1 if second + 1 < c.n_ready else 0
        tries += 1
    if second == skip:
        return first
    # active_1 / weight_1 > active_2 / weight_2
    if at(c, first).load.active * weight_at(c, second) > at(c, second).load.active * weight_at(c, first):
        return second
    return first


cdef uint32_t position_of(const Cluster* c, const Endpoint* endpoint) noexcept nogil:
    # by what it is, not where: the one to exclude may be of a version that was replaced since
    cdef uint32_t i
    cdef const Endpoint* e
    for i in range(c.n_ready):
        e = &c.endpoints[c.ready[i]]
        if e.place == endpoint.place and e.port == endpoint.port:
            return i
    return NOBODY


cdef Endpoint* balance_pick(Cluster* cluster, uint64_t random, const Endpoint* exclude) noexcept nogil:
    cdef uint32_t skip = NOBODY
    if cluster.n_ready == 0:
        return NULL
    if cluster.n_ready == 1:
        return at(cluster, 0)
    if exclude != NULL:
        skip = position_of(cluster, exclude)
    if cluster.balancer == BALANCE_ROUND_ROBIN:
        return at(cluster, next_turn(cluster, random, skip) if cluster.even else next_due(cluster, skip))
    if cluster.balancer == BALANCE_LEAST_REQUEST:
        return at(cluster, less_busy(cluster, random, skip))
    return at(cluster, draw(cluster, <uint32_t>random, skip))
