"""See near.pxd."""
from libc.errno cimport EAGAIN, ECONNREFUSED, ECONNRESET, ENOMEM, EPIPE
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t
from libc.string cimport memcpy, memset, strlen
from ext.core.buffer cimport (BUFFER_LARGE, Buffer, Buffers, buffer_compact, buffer_consume, buffer_drop, buffer_reserve, buffer_room,
                              buffer_used)
from ext.core.loop cimport CARRIED, Carrier, Source, loop_again, loop_bury
from ext.core.protocol cimport LISTEN_INBOUND, LISTEN_OUTBOUND, PORT_HBONE, PORT_INBOUND, PORT_OUTBOUND
from ext.core.slab cimport slab_give, slab_take
from ext.core.text cimport Span
from ext.proxy.account cimport account_failure
from ext.proxy.budget cimport admits
from ext.proxy.state cimport PORTS, Near, Worker, pod_find
from ext.route.shapes cimport Address, Pod, Workload
from ext.route.tables cimport pod_by_address, pod_by_handle, workload_by_address, workload_by_index
from ext.sys.stream cimport link_local, same_ip


# ---- the ends -----------------------------------------------------------------------------------------------------------------------

cdef inline void wake(Near* near, int end) noexcept nogil:
    if near.ends[end] != NULL:
        loop_again(&near.w.loop, near.ends[end])


cdef inline void resume(Near* near, int end) noexcept nogil:
    """There is room for what this end writes, or nobody who would read it."""
    if near.stopped[end] and near.ends[end] != NULL:
        near.stopped[end] = 0
        near.ends[end].writable = 1
        wake(near, end)


cdef int64_t take(Near* near, int me, void* data, size_t size) noexcept nogil:
    cdef Buffer* b = &near.unread[me]
    cdef size_t n = buffer_used(b)
    cdef int other = 1 - me
    if n == 0 and near.errors[me] != 0:
        return near.errors[me]              # behind what came before it, as the kernel says it
    if n == 0:
        return 0 if near.shut[other] else -EAGAIN
    if n > size:
        n = size
    memcpy(data, b.data + b.start, n)
    buffer_consume(near.memory[me], b, <uint32_t>n)
    resume(near, other)
    return <int64_t>n


cdef int64_t take_whole(Near* near, int me, Buffer* b) noexcept nogil:
    """The buffer itself: it is of this end's pod already."""
    cdef Buffer* mine = &near.unread[me]
    cdef char nothing
    if buffer_used(mine) == 0:
        return take(near, me, &nothing, 0)
    b[0] = mine[0]
    mine.data = NULL
    mine.start = mine.end = mine.size = 0
    resume(near, 1 - me)
    return buffer_used(b)


cdef int64_t put(Near* near, int me, const void* data, size_t size) noexcept nogil:
    cdef int other = 1 - me
    cdef Buffer* b = &near.unread[other]
    cdef uint32_t used = buffer_used(b)
    cdef size_t n = size
    if near.errors[me] != 0:
        return near.errors[me]
    if near.ends[other] == NULL:
        return -EPIPE
    if n > <size_t>(BUFFER_LARGE - used):
        n = BUFFER_LARGE - used
    if n == 0 or not near.open:
        near.stopped[me] = 1
        return -EAGAIN
    if n > buffer_room(b):
        if buffer_reserve(near.memory[other], b, used + <uint32_t>n) < 0:
            if used == 0:
                return -ENOMEM              # its pod has all that it may have
            buffer_compact(b)
            n = buffer_room(b) if buffer_room(b) < n else n
            if n == 0:
                near.stopped[me] = 1
                return -EAGAIN
    memcpy(b.data + b.end, data, n)
    b.end += <uint32_t>n
    near.ends[other].readable = 1
    wake(near, other)
    return <int64_t>n


cdef int64_t put_whole(Near* near, int me, Buffer* b) noexcept nogil:
    """The buffer itself, when the other end has none and its pod may have one of this size."""
    cdef int other = 1 - me
    cdef Buffers* theirs = near.memory[other]
    cdef uint32_t n = buffer_used(b)
    cdef int64_t copied
    if near.errors[me] != 0 or near.ends[other] == NULL or not near.open or near.unread[other].data != NULL or \
            theirs.taken + b.size > theirs.limit:
        copied = put(near, me, b.data + b.start, n)
        if copied > 0:
            b.start += <uint32_t>copied
        return copied
    near.memory[me].taken -= b.size         # shares of one pool
    theirs.taken += b.size
    near.unread[other] = b[0]
    b.data = NULL
    b.start = b.end = b.size = 0
    near.ends[other].readable = 1
    wake(near, other)
    return n


cdef void say_last(Near* near, int me) noexcept nogil:
    cdef int other = 1 - me
    if near.shut[me]:
        return
    near.shut[me] = 1
    if near.ends[other] != NULL:
        near.ends[other].hung = near.ends[other].readable = 1
        wake(near, other)


cdef void fail(Near* near, int end, int error) noexcept nogil:
    cdef Source* source = near.ends[end]
    if source == NULL or near.errors[end] != 0:
        return
    near.errors[end] = error
    # hung: who reads what came before must go on to the error
    source.failed = source.hung = source.readable = source.writable = 1
    wake(near, end)


cdef void reset(Near* near, int me) noexcept nogil:
    if near.open and near.shut[0] and near.shut[1]:
        return                              # both have ended; what is unread is still the other's
    near.shut[me] = 1
    fail(near, 1 - me, -ECONNRESET)


cdef void leave(Near* near, int me) noexcept nogil:
    """A socket that is closed with unread bytes, or before it was accepted, is reset."""
    cdef int other = 1 - me
    cdef bint unread = buffer_used(&near.unread[me]) > 0
    buffer_drop(near.memory[me], &near.unread[me])
    near.ends[me] = NULL
    if near.ends[other] == NULL:
        loop_bury(&near.w.loop, &near.grave, &near.w.nears, near)
    elif unread or not near.open:
        reset(near, me)
    else:
        say_last(near, me)
        resume(near, other)


cdef inline bint quiet(const Near* near, int me) noexcept nogil:
    return near.errors[me] == 0 and buffer_used(&near.unread[me]) == 0 and not near.shut[1 - me]


# ---- end 0: the client's Upstream -----------------------------------------------------------------------------------------------------

cdef int64_t from_read(Source* source, void* data, size_t size) noexcept nogil:
    return take(<Near*>source.stream, 0, data, size)


cdef int64_t from_write(Source* source, const void* data, size_t size) noexcept nogil:
    return put(<Near*>source.stream, 0, data, size)


cdef int64_t from_take(Source* source, Buffer* b) noexcept nogil:
    return take_whole(<Near*>source.stream, 0, b)


cdef int64_t from_give(Source* source, Buffer* b) noexcept nogil:
    return put_whole(<Near*>source.stream, 0, b)


cdef void from_shut(Source* source) noexcept nogil:
    say_last(<Near*>source.stream, 0)


cdef void from_abort(Source* source) noexcept nogil:
    reset(<Near*>source.stream, 0)


cdef void from_close(Source* source) noexcept nogil:
    leave(<Near*>source.stream, 0)


cdef int from_error(Source* source) noexcept nogil:
    cdef Near* near = <Near*>source.stream
    cdef Upstream* up = <Upstream*>source
    cdef Span why
    if near.refusal == 401 and up.conn != NULL:
        why.p = b"the destination's policy denies this identity"
        why.n = <uint32_t>strlen(why.p)
        account_failure(up.conn, why)
    return near.errors[0]


cdef bint from_silent(Source* source) noexcept nogil:
    return quiet(<Near*>source.stream, 0)


cdef Carrier FROM
FROM.read = from_read
FROM.write = from_write
FROM.take = from_take
FROM.give = from_give
FROM.shut = from_shut
FROM.abort = from_abort
FROM.close = from_close
FROM.error = from_error
FROM.silent = from_silent


# ---- end 1: the Conn of the destination's pod -------------------------------------------------------------------------------------------

cdef int64_t onto_read(Source* source, void* data, size_t size) noexcept nogil:
    return take(<Near*>source.stream, 1, data, size)


cdef int64_t onto_write(Source* source, const void* data, size_t size) noexcept nogil:
    return put(<Near*>source.stream, 1, data, size)


cdef int64_t onto_take(Source* source, Buffer* b) noexcept nogil:
    return take_whole(<Near*>source.stream, 1, b)


cdef int64_t onto_give(Source* source, Buffer* b) noexcept nogil:
    return put_whole(<Near*>source.stream, 1, b)


cdef void onto_shut(Source* source) noexcept nogil:
    say_last(<Near*>source.stream, 1)


cdef void refuse(Near* near, const Conn* c) noexcept nogil:
    """It ends before it was taken: the client learns why."""
    near.refusal = c.refusal
    near.shut[1] = 1
    fail(near, 0, c.facts.failure if c.facts.failure != 0 else -ECONNREFUSED)


cdef void onto_abort(Source* source) noexcept nogil:
    cdef Near* near = <Near*>source.stream
    if near.open:
        reset(near, 1)
    else:
        refuse(near, <Conn*>source)


cdef void onto_close(Source* source) noexcept nogil:
    cdef Near* near = <Near*>source.stream
    if not near.open:
        refuse(near, <Conn*>source)
    leave(near, 1)


cdef int onto_error(Source* source) noexcept nogil:
    return (<Near*>source.stream).errors[1]


cdef bint onto_silent(Source* source) noexcept nogil:
    return quiet(<Near*>source.stream, 1)


cdef Carrier ONTO
ONTO.read = onto_read
ONTO.write = onto_write
ONTO.take = onto_take
ONTO.give = onto_give
ONTO.shut = onto_shut
ONTO.abort = onto_abort
ONTO.close = onto_close
ONTO.error = onto_error
ONTO.silent = onto_silent


cdef void near_accept(Conn* c) noexcept nogil:
    cdef Near* near = c.near
    if near == NULL or near.open:
        return
    near.open = 1
    near.stopped[0] = 1
    resume(near, 0)


# ---- who is near ------------------------------------------------------------------------------------------------------------------------

cdef bint redirected(const Pod* known, uint16_t port) noexcept nogil:
    """The runtime's word: new connections to this port of the pod are captured."""
    cdef uint32_t i
    if not known.direct:
        return False
    for i in range(known.excluded.n):
        if known.excluded.items[i] == port:
            return False
    return True


cdef bint captured_at(const Captured* pod, const Pod* known, uint16_t port) noexcept nogil:
    cdef uint32_t i
    if not pod.attached or not redirected(known, port):
        return False
    for i in range(PORTS):
        if pod.acceptors[i].kind == LISTEN_INBOUND and pod.acceptors[i].source.fd >= 0:
            return True
    return False


cdef bint client_address(const Conn* c, const Pod* own, uint8_t family, Peer* out) noexcept nogil:
    """The client's, if the runtime says that it is the pod's: a pod may dial from any address (CAP_NET_RAW), and policies look at it. For
    the other family, which its own address cannot be kept in, one of the pod's."""
    cdef uint32_t i
    cdef bint its = False
    cdef const Peer* claimed
    out[0] = c.client
    for i in range(own.n_claims):
        claimed = <const Peer*>&own.claims[i].place.address
        if same_ip(claimed, &c.client):
            its = True
        elif claimed.family == family and c.client.family != family and out.family != family and not link_local(claimed):
            memset(out, 0, sizeof(Peer))
            memcpy(out, &own.claims[i].place.address, sizeof(Address))
            out.port = c.client.port
    return its and out.family == family


cdef const Pod* same_node(const Conn* c, const Peer* to) noexcept nogil:
    """The pod of this node that `to` is an address of, for an outbound connection that may know it; else NULL."""
    cdef const Pod* other
    cdef const Workload* workload = NULL
    if c.kind != LISTEN_OUTBOUND or c.w.tables.settings.same_node_tunnel or to.port == PORT_OUTBOUND or to.port == PORT_INBOUND or \
            to.port == PORT_HBONE or link_local(to) or link_local(&c.client):
        return NULL
    other = pod_by_address(c.w.tables, <const Address*>to)
    if other == NULL or other.workload.current == NULL or other.handle == c.pod.handle:
        return NULL
    if c.facts.destination != 0:
        workload = workload_by_index(c.w.tables, c.facts.destination)
    if workload == NULL:
        workload = workload_by_address(c.w.tables, <const Address*>to)
    return other if workload == other.workload.current else NULL    # else runtime and control plane do not agree on who that is


cdef bint near_node(const Conn* c, const Peer* to) noexcept nogil:
    cdef const Pod* other = same_node(c, to)
    cdef const Pod* own
    cdef const Peer* claimed
    cdef uint32_t i
    if other == NULL or other.identity == NULL or not redirected(other, to.port):
        return False
    own = pod_by_handle(c.w.tables, c.pod.handle)
    if own == NULL or own.identity == NULL:
        return False
    for i in range(own.n_claims):           # what it comes from is one of these: that is how it is known there
        claimed = <const Peer*>&own.claims[i].place.address
        if claimed.family == to.family and not link_local(claimed):
            return True
    return False


cdef bint near_way(Conn* c, const Peer* to, Neighbour* out) noexcept nogil:
    cdef const Pod* own
    cdef const Pod* other = same_node(c, to)
    if other == NULL:
        return False
    out.pod = pod_find(c.w, other.handle)
    if out.pod == NULL or not captured_at(out.pod, other, to.port):
        return False
    own = pod_by_handle(c.w.tables, c.pod.handle)
    if own == NULL or not client_address(c, own, to.family, &out.source):
        return False
    out.who = own.identity
    out.secure = own.identity != NULL and other.identity != NULL
    return True


cdef bint near_room(const Neighbour* to) noexcept nogil:
    return admits(to.pod, LISTEN_INBOUND) == 0


cdef bint near_fits(const Upstream* up, const Neighbour* to) noexcept nogil:
    return up.near.ends[1] != NULL and up.near.pod == to.pod and up.near.who == to.who and same_ip(&up.source_ip, &to.source)


cdef bint near_join(const Neighbour* neighbour, Upstream* up, const Peer* to) noexcept nogil:
    cdef Captured* pod = neighbour.pod
    cdef Worker* w = pod.w
    cdef Near* near = <Near*>slab_take(&w.nears)
    cdef Conn* c
    if near == NULL:
        return False
    c = w.enters(pod, &neighbour.source, to, neighbour.who, neighbour.secure)
    if c == NULL:
        slab_give(&w.nears, near)
        return False
    near.w = w
    near.pod = pod
    near.who = neighbour.who
    near.ends[0] = &up.source
    near.ends[1] = &c.source
    near.memory[0] = &up.pod.buffers
    near.memory[1] = &pod.buffers
    up.near = c.near = near
    up.source_ip = neighbour.source
    up.source.fd = c.source.fd = CARRIED
    up.source.carrier = &FROM
    c.source.carrier = &ONTO
    up.source.stream = c.source.stream = near
    c.source.writable = 1
    loop_again(&w.loop, &c.source)          # begins in its own pod's turn
    return True
