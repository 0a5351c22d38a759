"""See account.pxd."""
from libc.errno cimport EADDRNOTAVAIL, ECONNREFUSED, ECONNRESET, EHOSTUNREACH, ENETUNREACH, ETIMEDOUT
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdio cimport snprintf
from libc.string cimport memchr, memcpy, memset, strlen
from ext.core.loop cimport Source, clock_ns
from ext.core.protocol cimport INDEX_PASSTHROUGH, LISTEN_INBOUND
from ext.core.ring cimport (LEG_NODE, LEG_SOCKET, LEG_TUNNEL, TEXT_AUTHORITY, TEXT_CLUSTER, TEXT_COUNT, TEXT_FAILURE, TEXT_FORWARDED_FOR,
                            TEXT_METHOD, TEXT_PATH, TEXT_REQUEST_ID, TEXT_ROUTE, TEXT_USER_AGENT, LogAddress, LogLeg, LogLegs, LogRecord,
                            log_append)
from ext.core.shm cimport (REPORTER_DESTINATION, REPORTER_SOURCE, SERIES_GRPC, SERIES_HTTP, SERIES_TCP, Series, SeriesKey, bump,
                           series_drop, series_hold, series_request, stats_series)
from ext.core.slab cimport slab_give, slab_take
from ext.core.text cimport Span
from ext.proxy.state cimport JUDGED_DENIED, JUDGED_NOTHING, TEXT_BYTES, Conn, Facts, Near, Texts, Tunnel
from ext.route.tables cimport tables_random
from ext.sys.stream cimport Peer
from ext.sys.tcpinfo cimport TcpFigures, tcp_figures
from ext.wire.http1 cimport (H_USER_AGENT, H_X_FORWARDED_FOR, H_X_REQUEST_ID, Head, head_value)

cdef enum:
    NO_GRPC_STATUS = 0xff
    JUDGED_BYTES = 640              # a policy's namespace and name have at most 253 characters each


# ---- series -----------------------------------------------------------------------------------------------------------

cdef Series* series_of(Conn* c, uint8_t flag) noexcept nogil:
    cdef SeriesKey key
    memset(&key, 0, sizeof(SeriesKey))
    key.source = c.facts.source
    key.destination = c.facts.destination
    key.service = c.facts.service
    key.code = c.facts.code
    key.reporter = REPORTER_DESTINATION if c.kind == LISTEN_INBOUND else REPORTER_SOURCE
    key.protocol = c.facts.protocol
    key.flag = flag
    key.grpc_status = NO_GRPC_STATUS
    key.security = c.secure
    return stats_series(&c.w.table, &key)


cdef void account_begin_tcp(Conn* c) noexcept nogil:
    if c.facts.open:
        return
    c.facts.open = 1
    c.facts.protocol = SERIES_TCP
    c.facts.code = 0
    c.series = series_of(c, 0)
    series_hold(c.series)
    bump(&c.series.opened, 1)


cdef void account_bytes(Conn* c) noexcept nogil:
    if c.series == NULL:
        return
    bump(&c.series.sent, c.facts.received - c.facts.told_received)
    bump(&c.series.received, c.facts.sent - c.facts.told_sent)
    c.facts.told_received = c.facts.received
    c.facts.told_sent = c.facts.sent


cdef void account_begin_http(Conn* c) noexcept nogil:
    cdef Facts* facts = &c.facts
    if facts.open:
        return
    facts.open = 1
    facts.protocol = SERIES_GRPC if c.x.grpc else SERIES_HTTP
    facts.version_minor = c.x.version_minor
    facts.code = 0
    facts.first_byte_ns = 0
    facts.failure = 0
    facts.received = facts.sent = facts.request_bytes = facts.response_bytes = 0


cdef void account_end(Conn* c, uint8_t flag, uint16_t details) noexcept nogil:
    cdef Series* series
    cdef uint64_t took_us
    if not c.facts.open:
        return
    c.facts.open = 0
    c.facts.flag = flag
    c.facts.details = details
    took_us = (clock_ns() - c.facts.start_ns) // 1000
    if c.facts.protocol == SERIES_TCP:
        account_bytes(c)
        series = series_of(c, flag)     # opened and bytes went to the series without a flag
        bump(&series.closed, 1)
        if flag != 0 and not c.up_reached:
            bump(&series.failed, 1)
        series_drop(&c.w.table, c.series)
        c.series = NULL
    else:
        series_request(series_of(c, flag), took_us, c.facts.request_bytes, c.facts.response_bytes)
    if c.w.tables.settings.access_log and not c.unlogged:
        write_log(c, took_us)
    if c.texts != NULL:
        slab_give(&c.w.texts, c.texts)
        c.texts = NULL


# ---- log ----------------------------------------------------------------------------------------------------------------

cdef void put_address(uint8_t* at, const Peer* peer) noexcept nogil:
    cdef LogAddress* out = <LogAddress*>at
    out.family = peer.family
    out.port = peer.port
    memcpy(out.ip, peer.ip, 16)


cdef void add_text(Texts* texts, int which, Span span) noexcept nogil:
    cdef uint32_t n = span.n
    if n > <uint32_t>(TEXT_BYTES - texts.used):
        n = TEXT_BYTES - texts.used
    if n > 1024:
        n = 1024
    texts.at[which] = texts.used
    texts.n[which] = <uint16_t>n
    if n > 0:                           # an absent field has no address
        memcpy(texts.data + texts.used, span.p, n)
    texts.used += <uint16_t>n


cdef void account_text(Conn* c, const Head* head) noexcept nogil:
    cdef Span id
    if not c.w.tables.settings.access_log:
        return
    if c.texts == NULL:
        c.texts = <Texts*>slab_take(&c.w.texts)
        if c.texts == NULL:
            return
    # the short ones first: a long path is what gets cut
    add_text(c.texts, TEXT_METHOD, head.method)
    id = head_value(head, H_X_REQUEST_ID)
    if id.n == 0:
        account_id(c)
        id.p = c.x.request_id
        id.n = sizeof(c.x.request_id)
    add_text(c.texts, TEXT_REQUEST_ID, id)
    add_text(c.texts, TEXT_AUTHORITY, head.authority)
    add_text(c.texts, TEXT_USER_AGENT, head_value(head, H_USER_AGENT))
    add_text(c.texts, TEXT_FORWARDED_FOR, head_value(head, H_X_FORWARDED_FOR))
    add_text(c.texts, TEXT_PATH, head.target)


cdef void account_failure(Conn* c, Span why) noexcept nogil:
    if not c.w.tables.settings.access_log:
        return
    if c.texts == NULL:
        c.texts = <Texts*>slab_take(&c.w.texts)
    if c.texts != NULL:
        add_text(c.texts, TEXT_FAILURE, why)


cdef void write_log(Conn* c, uint64_t took_us) noexcept nogil:
    cdef LogRecord record
    cdef LogLegs legs
    cdef Span[10] texts
    cdef char[64] inbound
    cdef char[JUDGED_BYTES] judged
    cdef int i
    memset(&record, 0, sizeof(LogRecord))
    memset(texts, 0, sizeof(texts))
    record.reporter = REPORTER_DESTINATION if c.kind == LISTEN_INBOUND else REPORTER_SOURCE
    record.protocol = c.facts.protocol
    record.flag = c.facts.flag
    record.version_minor = c.facts.version_minor
    record.start_us = c.facts.start_us
    record.duration_us = took_us
    if c.facts.first_byte_ns > c.facts.start_ns:
        record.upstream_us = (c.facts.first_byte_ns - c.facts.start_ns) // 1000
    record.received = c.facts.received
    record.sent = c.facts.sent
    record.source = c.facts.source
    record.destination = c.facts.destination
    record.service = c.facts.service
    record.code = c.facts.code
    record.details = c.facts.details
    put_address(record.addresses, &c.client)
    put_address(record.addresses + 19, &c.target)
    if c.up != NULL:
        put_address(record.addresses + 38, &c.up.remote)
        put_address(record.addresses + 57, &c.up.local)
    elif c.goal.family != 0:
        put_address(record.addresses + 38, &c.goal)
    if c.texts != NULL:
        for i in range(TEXT_COUNT):
            texts[i].p = c.texts.data + c.texts.at[i]
            texts[i].n = c.texts.n[i]
    if c.route != NULL:
        texts[<int>TEXT_ROUTE] = c.route.name
    if c.cluster != NULL:
        texts[<int>TEXT_CLUSTER] = c.cluster.name
    elif c.facts.service == INDEX_PASSTHROUGH:
        texts[<int>TEXT_CLUSTER].p = b"PassthroughCluster"
        texts[<int>TEXT_CLUSTER].n = 18
    elif c.kind == LISTEN_INBOUND:
        texts[<int>TEXT_CLUSTER].p = inbound
        texts[<int>TEXT_CLUSTER].n = inbound_name(inbound, c.target.port)
    if c.facts.failure != 0 and texts[<int>TEXT_FAILURE].n == 0:
        failure_text(&texts[<int>TEXT_FAILURE], -c.facts.failure)
    elif c.judged != JUDGED_NOTHING:
        texts[<int>TEXT_FAILURE].p = judged
        texts[<int>TEXT_FAILURE].n = judged_text(judged, c)
    if c.w.tables.settings.access_log_tcp:
        memset(&legs, 0, sizeof(LogLegs))
        measure(&legs.downstream, &c.source, c.tunnel, c.near)
        if c.up != NULL:
            measure(&legs.upstream, &c.up.source, c.up.tunnel, c.up.near)
    log_append(&c.w.log, &c.w.table, &record, texts, &legs if c.w.tables.settings.access_log_tcp else NULL)


cdef void measure(LogLeg* leg, const Source* source, const Tunnel* tunnel, const Near* near) noexcept nogil:
    """Of a stream its tunnel's connection is asked: that is the path its bytes take. One that ended already has nothing to say."""
    cdef TcpFigures figures
    cdef int fd = source.fd if tunnel == NULL else tunnel.source.fd
    if near != NULL:
        leg.kind = LEG_NODE
        return
    leg.kind = <uint8_t>(LEG_SOCKET if tunnel == NULL else LEG_TUNNEL)
    if fd < 0 or tcp_figures(fd, &figures) != 0:
        return
    leg.rtt_us = figures.rtt_us
    leg.min_rtt_us = figures.min_rtt_us
    leg.retransmits = figures.retransmits


cdef void failure_text(Span* out, int error) noexcept nogil:
    """As Envoy writes it. A connect that nobody answered in time has no text: its details say so."""
    if error == ECONNREFUSED:
        out.p = b"delayed_connect_error:_Connection_refused"
    elif error == ECONNRESET:
        out.p = b"delayed_connect_error:_Connection_reset_by_peer"
    elif error == EHOSTUNREACH:
        out.p = b"delayed_connect_error:_No_route_to_host"
    elif error == ENETUNREACH:
        out.p = b"delayed_connect_error:_Network_is_unreachable"
    elif error == EADDRNOTAVAIL:
        out.p = b"immediate_connect_error:_Cannot_assign_requested_address"
    elif error != ETIMEDOUT:
        out.p = b"delayed_connect_error"
    else:
        return
    out.n = <uint32_t>strlen(out.p)


cdef uint32_t judged_text(char* out, const Conn* c) noexcept nogil:
    """As Envoy's RBAC filter and Istio's names of policies have it; `rbac_dry_run_` is ours."""
    cdef const char* what = b"rbac_access_denied" if c.judged == JUDGED_DENIED else b"rbac_dry_run_access_denied"
    cdef const char* slash = <const char*>memchr(c.judge.key, c'/', c.judge.key_len) if c.judge != NULL else NULL
    cdef int n
    if slash == NULL:
        n = snprintf(out, JUDGED_BYTES, b"%s_matched_policy[none]", what)
    else:
        n = snprintf(out, JUDGED_BYTES, b"%s_matched_policy[ns[%.*s]-policy[%s]-rule[%u]]", what, <int>(slash - c.judge.key), c.judge.key,
                     slash + 1, c.judge_rule)
    return <uint32_t>n if n < JUDGED_BYTES else JUDGED_BYTES - 1


cdef uint32_t inbound_name(char* out, uint16_t port) noexcept nogil:
    """`inbound|PORT||`, as Istio names it."""
    cdef char[5] digits
    cdef uint32_t n = 8
    cdef int i = 0
    memcpy(out, b"inbound|", 8)
    while port > 0 or i == 0:
        digits[i] = <char>(48 + port % 10)
        port //= 10
        i += 1
    while i > 0:
        i -= 1
        out[n] = digits[i]
        n += 1
    out[n] = out[n + 1] = 124           # |
    return n + 2


cdef void account_id(Conn* c) noexcept nogil:
    cdef const char* hex = b"0123456789abcdef"
    cdef uint64_t[2] bits
    cdef uint8_t* byte = <uint8_t*>bits
    cdef int i, at = 0
    if c.x.has_id:
        return
    c.x.has_id = 1
    bits[0] = tables_random(c.w.tables)
    bits[1] = tables_random(c.w.tables)
    byte[6] = (byte[6] & 0x0f) | 0x40
    byte[8] = (byte[8] & 0x3f) | 0x80
    for i in range(16):
        if i == 4 or i == 6 or i == 8 or i == 10:
            c.x.request_id[at] = 45     # -
            at += 1
        c.x.request_id[at] = hex[byte[i] >> 4]
        c.x.request_id[at + 1] = hex[byte[i] & 15]
        at += 2
