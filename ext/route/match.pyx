from libc.string cimport memchr, memcmp, memcpy
from libc.stdint cimport uint64_t
from ext.wire.http1 cimport HEAD_MAX_BYTES, Header
from ext.route.index cimport Walk, walk_next, walk_start
from ext.route.shapes cimport (
    MATCH_CONTAINS, MATCH_EXACT, MATCH_PATH_PREFIX, MATCH_PREFIX, MATCH_PRESENT, MATCH_REGEX, MATCH_SUFFIX,
    SPECIAL_AUTHORITY, SPECIAL_METHOD, SPECIAL_NONE, SPECIAL_SCHEME, Domain, NamedMatch, ValueMatch, host_without_port)

cdef extern from "string.h" nogil:
    void* memmem(const void* data, size_t size, const void* part, size_t part_size)

cdef extern from "ext/route/re2_shim.h" nogil:
    bint narrows_re2_match(const void* program, const char* data, size_t size)

# Several values of one header are matched as one, joined by commas (RFC 9110 5.2, and Envoy). One thread per process; they
# all come from one head, whose size is bounded.
cdef char[HEAD_MAX_BYTES] joined


# ---- texts -------------------------------------------------------------------------------------------------


cdef inline char lower(char ch) noexcept nogil:
    return ch + 32 if c'A' <= ch <= c'Z' else ch


cdef bint same(const char* a, const char* b, size_t size, bint ignore_case) noexcept nogil:
    # with ignore_case, b is lower case already
    cdef size_t i
    if not ignore_case:
        return memcmp(a, b, size) == 0
    for i in range(size):
        if lower(a[i]) != b[i]:
            return False
    return True


cdef bint contains(Span text, Span part, bint ignore_case) noexcept nogil:
    cdef size_t i
    if part.n > text.n:
        return False
    if not ignore_case:
        return memmem(text.p, text.n, part.p, part.n) != NULL
    for i in range(text.n - part.n + 1):
        if same(text.p + i, part.p, part.n, True):
            return True
    return False


cdef bint value_matches(const ValueMatch* m, Span text) noexcept nogil:
    # without `invert`
    cdef Span value = m.value
    if m.kind == MATCH_EXACT:
        return text.n == value.n and same(text.p, value.p, value.n, m.ignore_case)
    if m.kind == MATCH_PREFIX:
        return text.n >= value.n and same(text.p, value.p, value.n, m.ignore_case)
    if m.kind == MATCH_PATH_PREFIX:
        return (text.n >= value.n and same(text.p, value.p, value.n, m.ignore_case)
                and (text.n == value.n or text.p[value.n] == c'/'))
    if m.kind == MATCH_SUFFIX:
        return text.n >= value.n and same(text.p + (text.n - value.n), value.p, value.n, m.ignore_case)
    if m.kind == MATCH_CONTAINS:
        return contains(text, value, m.ignore_case)
    if m.kind == MATCH_REGEX:
        return narrows_re2_match(m.regex, text.p, text.n)
    return True     # PRESENT


cdef bint found_matches(const ValueMatch* m, bint found, Span text) noexcept nogil:
    # Envoy (HeaderMatcher): what is missing matches only an inverted PRESENT, whatever else is inverted, unless it is to
    # be taken for the empty string
    if not found:
        if m.kind == MATCH_PRESENT:
            return m.invert
        if not m.missing_is_empty:
            return False
    return value_matches(m, text) != m.invert


# ---- headers and query -------------------------------------------------------------------------------------


cdef bint name_is(Span name, Span wanted) noexcept nogil:
    return name.n == wanted.n and same(name.p, wanted.p, wanted.n, True)


cdef bint header_value(const Head* head, Span name, Span* out) noexcept nogil:
    cdef uint32_t i
    cdef uint32_t size = 0
    cdef const Header* h
    cdef bint found = False
    for i in range(head.n_headers):
        h = &head.headers[i]
        if not name_is(h.name, name):
            continue
        if not found:
            found = True
            out[0] = h.value
            continue
        if out.p != joined:
            size = out.n
            memcpy(joined, out.p, size)
            out.p = joined
        if size + 1 + <uint64_t>h.value.n > HEAD_MAX_BYTES:
            break               # cannot be: the head itself is not larger
        joined[size] = c','
        memcpy(&joined[size + 1], h.value.p, h.value.n)
        size += 1 + h.value.n
        out.n = size
    return found


cdef bint header_matches(const NamedMatch* m, const Head* head) noexcept nogil:
    cdef Span value
    cdef bint found = True
    value.p = b""
    value.n = 0
    if m.special == SPECIAL_NONE:
        found = header_value(head, m.name, &value)
    elif m.special == SPECIAL_METHOD:
        value = head.method
    elif m.special == SPECIAL_AUTHORITY:
        value = head.authority
        found = value.n > 0
    elif m.special == SPECIAL_SCHEME:
        value.p = b"http"
        value.n = 4
    else:
        value = head.path
        if head.has_query and head.query.p == head.path.p + head.path.n + 1:
            value.n += 1 + head.query.n
    return found_matches(&m.match, found, value)


cdef bint query_matches(const NamedMatch* m, Span query) noexcept nogil:
    # The first parameter of that name decides; nothing is decoded (Envoy does neither). Names are case-sensitive.
    cdef const char* at = query.p
    cdef const char* end = query.p + query.n
    cdef const char* stop
    cdef const char* equals
    cdef Span value
    value.p = b""
    value.n = 0
    if query.n == 0:
        return found_matches(&m.match, False, value)
    while at <= end:
        stop = <const char*>memchr(at, c'&', <size_t>(end - at)) if at < end else NULL
        if stop == NULL:
            stop = end
        equals = <const char*>memchr(at, c'=', <size_t>(stop - at)) if at < stop else NULL
        if equals == NULL:
            equals = stop
        if <size_t>(equals - at) == m.name.n and memcmp(at, m.name.p, m.name.n) == 0:
            if equals < stop:
                value.p = equals + 1
                value.n = <uint32_t>(stop - equals - 1)
            return found_matches(&m.match, True, value)
        at = stop + 1
    return found_matches(&m.match, False, value)


cdef bint route_matches(const Route* route, const Head* head) noexcept nogil:
    cdef uint32_t i
    if value_matches(&route.path, head.path) == route.path.invert:
        return False
    for i in range(route.n_headers):
        if not header_matches(&route.headers[i], head):
            return False
    for i in range(route.n_query):
        if not query_matches(&route.query[i], head.query):
            return False
    return True


# ---- hosts and routes --------------------------------------------------------------------------------------


cdef int compare_domain(const Domain* domain, Span host) noexcept nogil:
    # the order in which they were sorted: longest first, then by text
    cdef uint32_t i
    cdef int difference
    if domain.text.n != host.n:
        return -1 if domain.text.n > host.n else 1
    for i in range(host.n):
        difference = <int><unsigned char>domain.text.p[i] - <int><unsigned char>lower(host.p[i])
        if difference != 0:
            return difference
    return 0


cdef VirtualHost* host_find(const Destination* d, Span authority) noexcept nogil:
    cdef Span host = host_without_port(authority)
    cdef uint32_t low = 0, high = d.n_exact, middle, i
    cdef int difference
    cdef Span text
    while low < high:
        middle = low + (high - low) // 2
        difference = compare_domain(&d.exact[middle], host)
        if difference == 0:
            return &d.hosts[d.exact[middle].host]
        if difference < 0:
            low = middle + 1
        else:
            high = middle
    # a star stands for at least one character
    for i in range(d.n_suffix):
        text = d.suffix[i].text
        if host.n > text.n and same(host.p + (host.n - text.n), text.p, text.n, True):
            return &d.hosts[d.suffix[i].host]
    for i in range(d.n_prefix):
        text = d.prefix[i].text
        if host.n > text.n and same(host.p, text.p, text.n, True):
            return &d.hosts[d.prefix[i].host]
    return d.any


cdef Route* route_find(const Destination* destination, const Head* head) noexcept nogil:
    cdef VirtualHost* host = host_find(destination, head.authority)
    cdef Walk walk
    cdef uint32_t i
    if host == NULL:
        return NULL
    if host.index == NULL:
        for i in range(host.n_routes):
            if route_matches(&host.routes[i], head):
                return &host.routes[i]
        return NULL
    walk_start(&walk, host.index, head.path, host.n_routes)
    while True:
        i = walk_next(&walk)
        if i == walk.best:
            return &host.routes[i] if i < host.n_routes else NULL
        if route_matches(&host.routes[i], head):
            walk.best = i


cdef Weighted* pick(Weighted* clusters, uint32_t n, uint64_t total, uint32_t random) noexcept nogil:
    cdef uint64_t point = (<uint64_t>random * total) >> 32
    cdef uint32_t i
    for i in range(n - 1):
        if point < clusters[i].weight:
            return &clusters[i]
        point -= clusters[i].weight
    return &clusters[n - 1]


cdef Weighted* route_pick(const Route* route, uint32_t random) noexcept nogil:
    return pick(route.clusters, route.n_clusters, route.total_weight, random)


cdef Weighted* tcp_pick(const Destination* destination, uint32_t random) noexcept nogil:
    if not destination.has_tcp:
        return NULL
    return pick(destination.tcp, destination.n_tcp, destination.total_tcp, random)


# ---- header edits ------------------------------------------------------------------------------------------


cdef uint32_t request_edits(const Route* route, const Weighted* weighted, HeaderOp* out) noexcept nogil:
    memcpy(out, weighted.request, weighted.n_request * sizeof(HeaderOp))
    memcpy(out + weighted.n_request, route.request, route.n_request * sizeof(HeaderOp))
    return weighted.n_request + route.n_request


cdef uint32_t response_edits(const Route* route, const Weighted* weighted, HeaderOp* out) noexcept nogil:
    memcpy(out, weighted.response, weighted.n_response * sizeof(HeaderOp))
    memcpy(out + weighted.n_response, route.response, route.n_response * sizeof(HeaderOp))
    return weighted.n_response + route.n_response
