"""See claims.pxd; the sentences in full are at the head of connections.pyx."""
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdio cimport fprintf, stderr
from libc.string cimport memcmp, memcpy, memset
from ext.core.hash cimport Node
from ext.core.loop cimport Grave
from ext.core.pipes cimport pipes_shed
from ext.core.protocol cimport KIND_CLUSTER, KIND_DESTINATION
from ext.core.ring cimport LOG_BYTES, LOG_SKIP, LogAddress, LogRecord
from ext.core.shm cimport REPORTER_DESTINATION, SERIES_TCP, STATS_SLOTS, Series, SeriesKey, stats_series
from ext.core.slab cimport slab_give
from ext.proxy.accept cimport pod_detach
from ext.proxy.state cimport Worker
from ext.proxy.tunnel cimport tunnel_fail
from ext.route.shapes cimport Cluster, Destination, Slot
from ext.sys.stream cimport Peer
from ext.tunnel.shapes cimport TROUBLE_CLOSED
from ext.wire.body cimport Body, body_feed, body_start
from ext.wire.http1 cimport M_CONNECT, M_HEAD, Head, parse_request
from driver cimport claim
from stage cimport OTHER_POD, SIDES, Side, Stage, stage
from strict cimport READ_PART, READ_WHOLE, READ_WRONG, Message, read_message, tag_of

cdef enum:
    EXCHANGES = 64
    SERIES = 128

cdef struct Asked:              # one request of a client, as ext/wire reads it: its method decides how the answer is read
    uint8_t head
    uint8_t connect

cdef struct Told:               # what the log says of one client
    uint32_t tcp
    uint32_t http
    uint8_t reached             # a server, as opaque TCP
    uint32_t within             # of TCP: by the second pod, of what was joined to it in memory
    uint16_t[64] codes

cdef uint32_t[8] tags_given
cdef Told[8] told
cdef Head scratch
cdef Series* series_seen[128]   # of one script


cdef uint32_t tag(uint32_t client, uint32_t n) noexcept nogil:
    return ((client + 1) * 256 + n) * <uint32_t>2654435761


cdef uint32_t tag_next(uint32_t client) noexcept nogil:
    tags_given[client] += 1
    return tag(client, tags_given[client] - 1)


cdef void tags_forget() noexcept nogil:
    memset(tags_given, 0, sizeof(tags_given))


# ---- what is left ----------------------------------------------------------------------------------------------------------------

cdef void bury(Worker* w) noexcept nogil:
    """A worker that ended leaves the rest to the kernel: the graves of its last turn, and pods that came while it drained."""
    cdef Grave* grave
    cdef Grave* after
    while w.first_pod != NULL:
        while w.first_pod != NULL and w.first_pod.first_tunnel != NULL:
            tunnel_fail(w.first_pod.first_tunnel, TROUBLE_CLOSED)
        if w.first_pod != NULL:
            pod_detach(w.first_pod)
    grave = w.loop.graves
    while grave != NULL:
        after = grave.next
        slab_give(grave.slab, grave.item)
        grave = after
    w.loop.graves = NULL


cdef void check_left(Worker* w) noexcept nogil:
    cdef Node* at
    cdef Slot* slot
    cdef Cluster* cluster
    cdef uint32_t i, k
    if w.stop:
        bury(w)
    claim(w.n_conns == 0 and w.conns.live == 0, b"no connection is left")
    claim(w.exchanges.live == 0, b"no exchange is left")
    claim(w.upstreams.live == 0, b"no connection to a server is left")
    claim(w.nears.live == 0, b"nothing that joined two pods is left")
    claim(w.n_tunnels == 0 and w.tunnels.live == 0 and w.pad.streams.live == 0, b"no tunnel is left, and no stream")
    claim(w.texts.live == 0, b"no text for a log record is left")
    claim(w.n_held == 0 and w.held_first == NULL and w.held_last == NULL and w.n_waiting == 0, b"nobody waits")
    claim(w.memory.taken == 0, b"no buffer is left")
    pipes_shed(&w.pipes)        # the idle ones are kept for whoever comes
    claim(w.pipes.n_open == 0, b"no pipe is held")
    claim(w.pods.live == 0 and w.first_pod == NULL, b"no pod is left")
    claim(w.stop or (w.loop.timers.armed == 1 and w.loop.timers.root == &w.survey), b"no timer is left but the worker's own")
    claim(w.stop or (w.loop.fresh.first == NULL and w.loop.busy.first == NULL), b"no flow is left")
    claim(w.stats.downstream_open == 0 and w.stats.upstream_open == 0 and w.stats.upstream_idle == 0 and w.stats.held == 0
          and w.stats.sockets_ready == 0 and w.stats.tunnels_open == 0, b"every gauge says 0")
    claim(w.pending_fd < 0, b"no transaction waits")
    for i in range(w.tables.names.slots.mask + 1):
        at = w.tables.names.slots.heads[i]
        while at != NULL:
            slot = <Slot*>at
            claim(slot.user == NULL and slot.refs >= 1, b"nobody is counted as waiting for configuration")
            if slot.kind == KIND_CLUSTER and slot.current != NULL:
                cluster = <Cluster*>slot.current
                claim(cluster.refs == 1, b"no cluster is held")
                for k in range(cluster.n_endpoints):
                    claim(cluster.endpoints[k].load.active == 0, b"no request is in flight")
            elif slot.kind == KIND_DESTINATION and slot.current != NULL:
                claim((<Destination*>slot.current).refs == 1, b"no destination is held")
            at = at.chain


# ---- what was said and heard -----------------------------------------------------------------------------------------------------

cdef uint32_t asked_of(const Side* client, Asked* asked) noexcept nogil:
    """The requests of a client, whole or not, as far as they are well-formed; how many."""
    cdef uint32_t n = 0
    cdef size_t at = 0, scanned
    cdef int64_t size
    cdef uint8_t done
    cdef Body body
    while n < EXCHANGES:
        scanned = 0
        size = parse_request(client.said + at, client.n_said - at, &scanned, &scratch)
        if size <= 0:
            break
        asked[n].head = scratch.method_id == M_HEAD
        asked[n].connect = scratch.method_id == M_CONNECT
        n += 1
        at += size
        body_start(&body, &scratch)
        done = 0
        size = body_feed(&body, client.said + at, client.n_said - at, &done)
        if size < 0 or not done:
            break
        at += size
    return n


cdef void tell_side(const char* who, const Side* side) noexcept nogil:
    fprintf(stderr, b"\n%s of port %u: shut %d reset %d ended %d broken %d\n  said %u: %.*s\n  heard %u: %.*s\n", who, side.port, side.shut,
            side.reset, side.ended, side.broken, side.n_said, side.n_said if side.n_said < 2000 else 2000, side.said, side.n_heard,
            side.n_heard if side.n_heard < 2000 else 2000, side.heard)


cdef uint32_t owner(uint32_t value) noexcept nogil:
    """The client whose request has this tag; SIDES: nobody's."""
    cdef uint32_t i, k
    for i in range(SIDES):
        for k in range(tags_given[i]):
            if tag(i, k) == value:
                return i
    return SIDES


cdef void check_body(const char* body, size_t n, uint32_t value) noexcept nogil:
    """Whoever reuses a connection on which a request was not whole says his own head into that one's body."""
    cdef size_t at = 0
    cdef uint32_t who
    while at + 15 <= n:
        if body[at] == 120 and memcmp(body + at, b"x-tag: ", 7) == 0:
            who = owner(tag_of(body + at + 7, 8))
            claim(who == SIDES or owner(value) == SIDES or who == owner(value), b"the body of a request is its client's")
        at += 1


cdef void check_server(const Side* server) noexcept nogil:
    cdef size_t at = 0
    cdef Message m
    cdef int read = READ_WHOLE
    while at < server.n_heard and read == READ_WHOLE:
        read = read_message(server.heard + at, server.n_heard - at, False, False, False, &m)
        claim(read != READ_WRONG, b"a server gets well-formed requests")
        if m.tag != 0 and m.head != 0 and not m.asks_tunnel:
            check_body(server.heard + at + m.head, (m.size if read == READ_WHOLE else server.n_heard - at) - m.head, m.tag)
        if m.head != 0 and m.asks_tunnel:
            return                  # what follows may be opaque
        at += m.size


cdef void check_client(const Side* client, uint32_t who, const Told* log) noexcept nogil:
    """Of HTTP: what it heard, beside what it asked and what the log says."""
    cdef Asked[64] asked
    cdef uint32_t n_asked = asked_of(client, asked), n = 0, last_seq = 0, i, k
    cdef size_t at = 0, rest
    cdef Message m
    cdef int read = READ_WHOLE
    cdef bint bare, connect, whole = True, tunnel = False
    while at < client.n_heard and not tunnel:
        bare = n < n_asked and asked[n].head
        connect = n < n_asked and asked[n].connect
        rest = client.n_heard - at
        read = read_message(client.heard + at, rest, True, bare, connect, &m)
        claim(read != READ_WRONG, b"a client gets well-formed responses")
        if read == READ_PART and m.head == 0:
            whole = False
            break
        if m.status >= 200 or m.status == 101:
            if n < EXCHANGES and n < log.http and not stage().quiet:
                claim(log.codes[n] == m.status, b"the log has the code that the client got")
            n += 1
        if m.tag != 0:
            for i in range(SIDES):
                for k in range(tags_given[i]):
                    if tag(i, k) == m.tag:
                        claim(i == who, b"a client gets the answer to its own request")
                        claim(not client.denied, b"policies that let nobody in let no answer out")
                        claim(k + 1 >= last_seq, b"a client gets answers in the order of its requests")
                        last_seq = k + 1
        tunnel = m.tunnel
        whole = read == READ_WHOLE or m.to_end
        if not whole:
            break
        # an answer of ours to a HEAD that was not read to its end has a body
        if bare and m.status >= 400 and m.length == rest - m.head:
            m.size = rest
        at += m.size
    if client.ended and not tunnel:
        if not whole:
            tell_side(b"client", client)
        claim(whole, b"what is cut ends with a reset")
    if n < EXCHANGES and not stage().quiet:
        claim(n <= log.http, b"every response is logged")
        if client.ended:
            claim(log.http <= n + 1, b"no exchange is logged twice")
        claim(log.http <= n_asked + 1, b"no exchange is logged that there was not")


cdef bint prefix(const Side* heard, const Side* said) noexcept nogil:
    return heard.n_heard <= said.n_said and memcmp(heard.heard, said.said, heard.n_heard) == 0


cdef void check_relay(const Side* client, const Side* server, const LogRecord* record) noexcept nogil:
    claim(prefix(server, client), b"a server gets a prefix of what its client said")
    claim(prefix(client, server), b"a client gets a prefix of what its server said")
    claim(server.n_heard <= record.received and record.received <= client.n_said, b"bytes of a client are counted as they came")
    claim(client.n_heard <= record.sent and record.sent <= server.n_said, b"bytes of a server are counted as they came")
    if client.ended:
        if client.n_heard != server.n_said or not (server.shut or server.closed):
            tell_side(b"client", client)
            tell_side(b"server", server)
        claim(client.n_heard == server.n_said and (server.shut or server.closed), b"an end comes behind all bytes of the server")
    if server.ended:
        if server.n_heard != client.n_said or not (client.shut or client.closed):
            tell_side(b"client", client)
            tell_side(b"server", server)
        claim(server.n_heard == client.n_said and (client.shut or client.closed), b"an end comes behind all bytes of the client")
    if record.flag != 0 and not stage().disturbed:
        fprintf(stderr, b"flag %u details %u\n", record.flag, record.details)
        tell_side(b"client", client)
        tell_side(b"server", server)
    claim(record.flag == 0 or stage().disturbed, b"what nobody disturbs ends properly")
    if record.flag == 0:
        claim(record.received == client.n_said and record.sent == server.n_said, b"a proper end comes behind all bytes")


# ---- what was counted ------------------------------------------------------------------------------------------------------------

cdef void key_of(const LogRecord* record, SeriesKey* key) noexcept nogil:
    memset(key, 0, sizeof(SeriesKey))
    key.source = record.source
    key.destination = record.destination
    key.service = record.service
    key.code = record.code
    key.reporter = record.reporter
    key.protocol = record.protocol
    key.flag = record.flag
    key.grpc_status = 0xff


cdef bint same_address(const Peer* peer, const uint8_t* logged) noexcept nogil:
    cdef const LogAddress* address = <const LogAddress*>logged
    return address.family == 4 and address.port == peer.port and memcmp(address.ip, peer.ip, 4) == 0


cdef uint32_t ip_of(const uint8_t* logged) noexcept nogil:
    cdef uint32_t ip
    memcpy(&ip, (<const LogAddress*>logged).ip, 4)
    return ip


cdef bint agree(const Side* client, const Side* server) noexcept nogil:
    return prefix(server, client) and prefix(client, server)


cdef void check_tunnelled(const LogRecord* record, uint8_t* known) noexcept nogil:
    """Of opaque bytes behind a tunnel, where all clients have one address: some client said what the server heard, and the other way."""
    cdef Stage* s = stage()
    cdef uint32_t i, k
    cdef bint found
    for k in range(s.n_servers):
        if not same_address(&s.servers[k].there, record.addresses + 57) or not same_address(&s.servers[k].here, record.addresses + 38):
            continue
        claim(not known[k], b"a server of opaque bytes has one client")
        known[k] = 1
        found = False
        for i in range(s.n_clients):
            if agree(&s.clients[i], &s.servers[k]):
                found = True
                told[i].reached = 1
        claim(found, b"what a server heard by a tunnel one client said, and heard the answer")


cdef void check_record(const LogRecord* record, uint8_t* known) noexcept nogil:
    cdef Stage* s = stage()
    cdef uint16_t port = (<const LogAddress*>record.addresses).port
    cdef bint within = record.reporter == REPORTER_DESTINATION and ip_of(record.addresses + 19) == OTHER_POD
    cdef uint32_t i, k
    if within and (record.protocol != SERIES_TCP or ip_of(record.addresses) == OTHER_POD):
        if record.protocol == SERIES_TCP:
            check_tunnelled(record, known)
        return                                  # of HTTP: one for several clients of its pool; they have records of their own
    for i in range(s.n_clients):
        if s.clients[i].port == port:
            if record.protocol == SERIES_TCP:
                if within:
                    told[i].within += 1
                else:
                    told[i].tcp += 1
                for k in range(s.n_servers):
                    if same_address(&s.servers[k].there, record.addresses + 57) and same_address(&s.servers[k].here, record.addresses + 38):
                        claim(not known[k], b"a server of opaque bytes has one client")
                        known[k] = 1            # also on 7001, when nobody says any more that it takes requests
                        told[i].reached = 1
                        claim(not s.clients[i].denied, b"policies that let nobody in let no byte in")
                        check_relay(&s.clients[i], &s.servers[k], record)
            else:
                if told[i].http < EXCHANGES:
                    told[i].codes[told[i].http] = record.code
                told[i].http += 1
            return
    claim(s.n_clients == SIDES, b"a log record names a client")


cdef Series* noted(Worker* w, const SeriesKey* key, uint32_t* n) noexcept nogil:
    cdef Series* series = stats_series(&w.table, key)
    cdef uint32_t i
    for i in range(n[0]):
        if series_seen[i] == series:
            return series
    if n[0] < SERIES:
        series_seen[n[0]] = series
        n[0] += 1
    return series


cdef void take_away(Worker* w, const LogRecord* record, uint32_t* n) noexcept nogil:
    """One less of these."""
    cdef SeriesKey key
    cdef Series* series
    key_of(record, &key)
    series = noted(w, &key, n)
    if series.closed == 0:                      # the log does not say which were secure
        key.security = 1
        series = noted(w, &key, n)
    series.closed -= 1
    if record.protocol == SERIES_TCP:           # opened before anybody knew how it would end
        key.flag = key.security = 0
        series = noted(w, &key, n)
        if series.opened == 0:
            key.security = 1
            series = noted(w, &key, n)
    series.opened -= 1


cdef uint32_t check_log(Worker* w, uint8_t* known) noexcept nogil:
    """Every record once; the ring is empty behind it. How many series they are of."""
    cdef uint64_t at = w.log.header.tail
    cdef const LogRecord* record
    cdef uint32_t place, n = 0
    while at < w.log.head:
        place = <uint32_t>(at & (LOG_BYTES - 1))
        record = <const LogRecord*>(w.log.ring + place)
        if record.length == LOG_SKIP:
            at += LOG_BYTES - place
            continue
        claim(record.length >= sizeof(LogRecord) and at + record.length <= w.log.head, b"log records are whole")
        check_record(record, known)
        take_away(w, record, &n)
        at += record.length
    w.log.header.tail = w.log.head
    return n


cdef void check_series(Worker* w, uint32_t n) noexcept nogil:
    """What the log took away must leave nothing, and there are no others. Then the table is as new."""
    cdef bint exact = not stage().quiet and not stage().forgets and n < SERIES
    cdef uint32_t i
    for i in range(n if exact else STATS_SLOTS):
        if not exact:
            series_seen[0] = &w.table.series[i]
        claim(series_seen[i if exact else 0].holders == 0, b"no series is held")
        claim(not exact or (series_seen[i].opened == 0 and series_seen[i].closed == 0), b"series add up to the log")
        memset(series_seen[i if exact else 0], 0, sizeof(Series))
    claim(not exact or w.table.taken == n, b"no series is of what was not logged")
    w.table.taken = 0


cdef void check_said(Worker* w) noexcept nogil:
    cdef Stage* s = stage()
    cdef uint8_t[8] known
    cdef uint32_t i
    memset(known, 0, sizeof(known))
    memset(told, 0, sizeof(told))
    check_series(w, check_log(w, known))
    for i in range(s.n_servers):
        if known[i] or (s.quiet and s.forgets):
            continue                            # checked, or nobody knows what it was
        if not s.servers[i].opaque:
            check_server(&s.servers[i])
        elif not s.quiet:
            claim(s.servers[i].n_heard == 0, b"a server that nobody was connected to gets no byte")
    for i in range(s.n_clients):
        if not s.quiet:
            claim(told[i].tcp <= 1 and (told[i].tcp == 0 or told[i].http == 0), b"a connection of TCP is logged once")
            claim(told[i].within <= 1 or told[i].tcp == 0, b"and once by the pod that it was joined to")
        if told[i].tcp > 0:
            claim(s.quiet or told[i].reached or s.clients[i].n_heard == 0, b"who reached no server gets nothing")
        elif told[i].http > 0 or (s.clients[i].dialled == 7001 and not (s.quiet and s.forgets)):
            check_client(&s.clients[i], i, &told[i])
