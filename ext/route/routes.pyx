from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdio cimport snprintf
from libc.stdlib cimport qsort
from libc.string cimport memchr, memcmp
from ext.core.arena cimport arena_free, blocks_note
from ext.core.blob cimport Cursor, take_count, take_str, take_u8, take_u32
from ext.core.protocol cimport KIND_CLUSTER
from ext.core.text cimport Span
from ext.wire.edit cimport EDIT_ADD, EDIT_REMOVE, EDIT_SET, HeaderOp
from ext.route.index cimport index_build
from ext.route.reader cimport (
    REASON_BYTES, cut, is_token, no_memory, read_text, refuse, refuse_number, refuse_text, take, text_is)
from ext.route.shapes cimport (
    EDITS_MAX, MATCH_EXACT, MATCH_PATH_PREFIX, MATCH_PREFIX, MATCH_REGEX, SPECIAL_AUTHORITY, SPECIAL_METHOD,
    SPECIAL_NONE, SPECIAL_PATH, SPECIAL_SCHEME, Domain, NamedMatch, Regex, Route, ValueMatch, VirtualHost, Weighted,
    host_without_port)
from ext.route.slots cimport slot_drop, slot_intern_pair

cdef extern from "ext/route/re2_shim.h" nogil:
    void* narrows_re2_compile(const char* pattern, size_t size, char* error, size_t error_size)
    void narrows_re2_free(void* program)

cdef enum:
    FLAG_IGNORE_CASE = 1
    FLAG_INVERT = 2
    FLAG_MISSING_IS_EMPTY = 4
    FLAG_HTTP = 1
    FLAG_TCP = 2
    # least bytes of an item: what a count is held against before anything is allocated
    LEAST_EDITS = 12
    LEAST_MATCH = 6
    LEAST_NAMED = 4 + LEAST_MATCH
    LEAST_WEIGHTED = 8 + 2 * LEAST_EDITS
    LEAST_ROUTE = 4 + LEAST_MATCH + 8 + 4 + 2 * LEAST_EDITS + 4
    LEAST_HOST = 12


# ---- routes ------------------------------------------------------------------------------------------------


cdef bint frames_message(Span name) noexcept nogil:
    # lower case; a route must not change what delimits a message or speaks to one hop only
    return (text_is(name, b"connection", 10) or text_is(name, b"content-length", 14)
            or text_is(name, b"transfer-encoding", 17) or text_is(name, b"upgrade", 7) or text_is(name, b"te", 2)
            or text_is(name, b"trailer", 7) or text_is(name, b"keep-alive", 10)
            or text_is(name, b"proxy-connection", 16))


cdef int read_edit(Reader* r, HeaderOp* out, uint8_t op, bint request) noexcept nogil:
    cdef uint32_t i
    cdef bint host
    out.op = op
    if read_text(r, &out.name, True) < 0:
        return -1
    if not is_token(out.name):
        return refuse_text(r, b"not a header name", out.name)
    if frames_message(out.name):
        return refuse_text(r, b"a route may not change header", out.name)
    host = text_is(out.name, b"host", 4)
    if host and (op != EDIT_SET or not request):
        return refuse_text(r, b"only a request's host can be changed, and only be set", out.name)
    if op == EDIT_REMOVE:
        return 0
    if read_text(r, &out.value, False) < 0:
        return -1
    for i in range(out.value.n):
        if (<uint8_t>out.value.p[i] < 0x20 and out.value.p[i] != c'\t') or out.value.p[i] == 0x7f:
            return refuse_text(r, b"control character in the value of header", out.name)
    while out.value.n > 0 and (out.value.p[0] == c' ' or out.value.p[0] == c'\t'):
        out.value.p += 1
        out.value.n -= 1
    while out.value.n > 0 and (out.value.p[out.value.n - 1] == c' ' or out.value.p[out.value.n - 1] == c'\t'):
        out.value.n -= 1
    if host and (out.value.n == 0 or memchr(out.value.p, c' ', out.value.n) != NULL):
        return refuse_text(r, b"not a host", out.value)
    return 0


cdef int read_edits(Reader* r, uint32_t* n, HeaderOp** out, bint request) noexcept nogil:
    # three lists: removes, sets, adds; read twice, since the array wants the sum first
    cdef Cursor start = r.c
    cdef uint32_t[3] counts
    cdef uint32_t k, _, total = 0
    cdef HeaderOp* ops
    for k in range(3):
        counts[k] = take_count(&r.c, 4 if k == 0 else 8)
        for _ in range(counts[k]):
            take_str(&r.c)
            if k > 0:
                take_str(&r.c)
            if r.c.bad:
                return cut(r)
        total += counts[k]
        if r.c.bad:
            return cut(r)
        if total > EDITS_MAX:
            return refuse_number(r, b"header edits of one direction", total)
    r.c = start
    ops = <HeaderOp*>take(r, total, sizeof(HeaderOp))
    if ops == NULL:
        return -1
    out[0] = ops
    n[0] = total
    total = 0
    for k in range(3):
        take_count(&r.c, 4)
        for _ in range(counts[k]):
            if read_edit(r, &ops[total], EDIT_REMOVE if k == 0 else EDIT_SET if k == 1 else EDIT_ADD, request) < 0:
                return -1
            total += 1
    return 0


cdef int read_regex(Reader* r, ValueMatch* out) noexcept nogil:
    cdef char[120] why
    cdef Regex* regex = <Regex*>take(r, 1, sizeof(Regex))
    if regex == NULL:
        return -1
    why[0] = 0
    regex.program = narrows_re2_compile(out.value.p, out.value.n, why, sizeof(why))
    if regex.program == NULL:
        if r.reason[0] == 0:
            snprintf(r.reason, REASON_BYTES, b"regular expression %.*s: %s",
                     <int>(out.value.n if out.value.n < 80 else 80), out.value.p, why)
        return -1
    blocks_note(1)
    regex.next = r.destination.regexes
    r.destination.regexes = regex
    out.regex = regex.program
    return 0


cdef int read_match(Reader* r, ValueMatch* out) noexcept nogil:
    cdef uint8_t flags
    out.kind = take_u8(&r.c)
    flags = take_u8(&r.c)
    out.ignore_case = flags & FLAG_IGNORE_CASE and out.kind != MATCH_REGEX      # as Envoy: a regex says so itself
    out.invert = (flags & FLAG_INVERT) != 0
    out.missing_is_empty = (flags & FLAG_MISSING_IS_EMPTY) != 0
    if read_text(r, &out.value, out.ignore_case) < 0:
        return -1
    if out.kind < MATCH_EXACT or out.kind > MATCH_PATH_PREFIX or flags > 7:
        return refuse_number(r, b"kind or flags of a match", out.kind + 256 * flags)
    if out.kind == MATCH_PATH_PREFIX and out.value.n > 0 and out.value.p[out.value.n - 1] == c'/':
        out.value.n -= 1            # /a/ means /a (Gateway API, PathPrefix)
    return read_regex(r, out) if out.kind == MATCH_REGEX else 0


cdef int read_named(Reader* r, NamedMatch* out, bint header) noexcept nogil:
    if read_text(r, &out.name, header) < 0 or read_match(r, &out.match) < 0:
        return -1
    if out.match.kind == MATCH_PATH_PREFIX:
        return refuse_text(r, b"a path match on", out.name)
    if not header:
        return 0
    if text_is(out.name, b":method", 7):
        out.special = SPECIAL_METHOD
    elif text_is(out.name, b":authority", 10) or text_is(out.name, b"host", 4):
        out.special = SPECIAL_AUTHORITY
    elif text_is(out.name, b":scheme", 7):
        out.special = SPECIAL_SCHEME
    elif text_is(out.name, b":path", 5):
        out.special = SPECIAL_PATH
    elif is_token(out.name):
        out.special = SPECIAL_NONE
    else:
        return refuse_text(r, b"not a header name", out.name)
    return 0


cdef int read_weighted(Reader* r, uint32_t* n, Weighted** out, uint64_t* total) noexcept nogil:
    cdef uint32_t i, count = take_count(&r.c, LEAST_WEIGHTED)
    cdef Weighted* clusters
    cdef Span name
    if r.c.bad:
        return cut(r)
    clusters = <Weighted*>take(r, count, sizeof(Weighted))
    if clusters == NULL:
        return -1
    out[0] = clusters
    n[0] = count
    for i in range(count):
        name = take_str(&r.c)
        clusters[i].weight = take_u32(&r.c)
        if r.c.bad:
            return cut(r)
        if name.n == 0 or r.scope.n + 1 + <uint64_t>name.n > 0xffff:
            return refuse_text(r, b"name of a cluster", name)
        total[0] += clusters[i].weight
        clusters[i].slot = slot_intern_pair(r.names, KIND_CLUSTER, r.scope, name)
        if clusters[i].slot == NULL:
            return no_memory(r)
        if (read_edits(r, &clusters[i].n_request, &clusters[i].request, True) < 0
                or read_edits(r, &clusters[i].n_response, &clusters[i].response, False) < 0):
            return -1
    if total[0] == 0 or total[0] >> 32 != 0:
        return refuse_number(r, b"weights of the clusters add up to", total[0])
    return 0


cdef int read_route(Reader* r, Route* out) noexcept nogil:
    cdef uint32_t i
    if read_text(r, &out.name, False) < 0 or read_match(r, &out.path) < 0:
        return -1
    if out.path.kind not in (MATCH_EXACT, MATCH_PREFIX, MATCH_REGEX, MATCH_PATH_PREFIX):
        return refuse_text(r, b"kind of the path match of route", out.name)
    out.n_headers = take_count(&r.c, LEAST_NAMED)
    out.headers = <NamedMatch*>take(r, out.n_headers, sizeof(NamedMatch))
    if out.headers == NULL:
        return -1
    for i in range(out.n_headers):
        if read_named(r, &out.headers[i], True) < 0:
            return -1
    out.n_query = take_count(&r.c, LEAST_NAMED)
    out.query = <NamedMatch*>take(r, out.n_query, sizeof(NamedMatch))
    if out.query == NULL:
        return -1
    for i in range(out.n_query):
        if read_named(r, &out.query[i], False) < 0:
            return -1
    out.timeout_ms = take_u32(&r.c)
    if read_edits(r, &out.n_request, &out.request, True) < 0 or read_edits(r, &out.n_response, &out.response, False) < 0:
        return -1
    if read_weighted(r, &out.n_clusters, &out.clusters, &out.total_weight) < 0:
        return -1
    for i in range(out.n_clusters):
        if (out.n_request + out.clusters[i].n_request > EDITS_MAX
                or out.n_response + out.clusters[i].n_response > EDITS_MAX):
            return refuse_text(r, b"too many header edits of one direction in route", out.name)
    return 0


# ---- virtual hosts -----------------------------------------------------------------------------------------

cdef struct DomainNode:
    DomainNode* next
    Domain domain
    uint8_t kind                # 0 exact, 1 suffix, 2 prefix


cdef int by_length(const void* a, const void* b) noexcept nogil:
    # longest first, then by text
    cdef const Domain* x = <const Domain*>a
    cdef const Domain* y = <const Domain*>b
    if x.text.n != y.text.n:
        return -1 if x.text.n > y.text.n else 1
    return memcmp(x.text.p, y.text.p, x.text.n)


cdef int read_domain(Reader* r, uint32_t host, DomainNode** list) noexcept nogil:
    cdef DomainNode* node = <DomainNode*>take(r, 1, sizeof(DomainNode))
    cdef Span* text
    if node == NULL:
        return -1
    text = &node.domain.text
    node.domain.host = host
    if read_text(r, text, True) < 0:
        return -1
    if text_is(text[0], b"*", 1):
        if r.destination.any != NULL and r.destination.any != &r.destination.hosts[host]:
            return refuse(r, b"domain * in two virtual hosts")
        r.destination.any = &r.destination.hosts[host]
        return 0
    text[0] = host_without_port(text[0])
    if text.n > 0 and text.p[0] == c'*':
        node.kind = 1
        text.p += 1
        text.n -= 1
    elif text.n > 0 and text.p[text.n - 1] == c'*':
        node.kind = 2
        text.n -= 1
    if text.n == 0 or memchr(text.p, c'*', text.n) != NULL:
        return refuse_text(r, b"domain that is no name, *suffix, prefix* or *", text[0])
    node.next = list[0]
    list[0] = node
    return 0


cdef int sort_domains(Reader* r, DomainNode* list, uint8_t kind, uint32_t* n, Domain** out) noexcept nogil:
    cdef DomainNode* node = list
    cdef uint32_t i, count = 0
    cdef Domain* domains
    while node != NULL:
        count += node.kind == kind
        node = node.next
    domains = <Domain*>take(r, count, sizeof(Domain))
    if domains == NULL:
        return -1
    count = 0
    node = list
    while node != NULL:
        if node.kind == kind:
            domains[count] = node.domain
            count += 1
        node = node.next
    qsort(domains, count, sizeof(Domain), by_length)
    for i in range(1, count):
        if by_length(&domains[i - 1], &domains[i]) == 0 and domains[i - 1].host != domains[i].host:
            return refuse_text(r, b"domain in two virtual hosts", domains[i].text)
    n[0] = count
    out[0] = domains
    return 0


cdef int read_destination(Reader* r, Destination* d) noexcept nogil:
    cdef uint8_t flags = take_u8(&r.c)
    cdef uint32_t i, k, n, _
    cdef DomainNode* domains = NULL
    cdef VirtualHost* host
    if flags > (FLAG_HTTP | FLAG_TCP):
        return refuse_number(r, b"flags", flags)
    d.has_http = flags & FLAG_HTTP != 0
    d.has_tcp = flags & FLAG_TCP != 0
    if d.has_http:
        n = take_count(&r.c, LEAST_HOST)
        d.hosts = <VirtualHost*>take(r, n, sizeof(VirtualHost))
        if d.hosts == NULL:
            return -1
        d.n_hosts = n
        for i in range(n):
            host = &d.hosts[i]
            if read_text(r, &host.name, False) < 0:
                return -1
            for _ in range(take_count(&r.c, 4)):
                if read_domain(r, i, &domains) < 0:
                    return -1
            k = take_count(&r.c, LEAST_ROUTE)
            host.routes = <Route*>take(r, k, sizeof(Route))
            if host.routes == NULL:
                return -1
            host.n_routes = k
            for k in range(host.n_routes):
                if read_route(r, &host.routes[k]) < 0:
                    return -1
            if index_build(r, host) < 0:
                return -1
        if (sort_domains(r, domains, 0, &d.n_exact, &d.exact) < 0
                or sort_domains(r, domains, 1, &d.n_suffix, &d.suffix) < 0
                or sort_domains(r, domains, 2, &d.n_prefix, &d.prefix) < 0):
            return -1
    if d.has_tcp:
        return read_weighted(r, &d.n_tcp, &d.tcp, &d.total_tcp)
    return 0


# ---- the end of one -----------------------------------------------------------------------------------------


cdef void weighted_drop(Names* names, uint32_t n, Weighted* clusters) noexcept nogil:
    cdef uint32_t i
    for i in range(n):
        if clusters[i].slot != NULL:
            slot_drop(names, clusters[i].slot)


cdef void destination_free(Names* names, Destination* d) noexcept nogil:
    cdef uint32_t i, k
    cdef Regex* regex = d.regexes
    for i in range(d.n_hosts):
        for k in range(d.hosts[i].n_routes):
            weighted_drop(names, d.hosts[i].routes[k].n_clusters, d.hosts[i].routes[k].clusters)
    weighted_drop(names, d.n_tcp, d.tcp)
    while regex != NULL:
        narrows_re2_free(regex.program)
        blocks_note(-1)
        regex = regex.next
    arena_free(&d.arena)
