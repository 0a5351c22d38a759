"""See index.pxd."""
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdio cimport snprintf
from libc.string cimport memchr, memcmp
from ext.core.text cimport Span
from ext.route.reader cimport REASON_BYTES, Reader, take
from ext.route.shapes cimport (
    MATCH_EXACT, MATCH_PATH_PREFIX, MATCH_PREFIX, MATCH_REGEX, Route, RouteGroup, RouteIndex, ValueMatch, VirtualHost)

cdef enum:
    FNV_BASIS = 0x811c9dc5
    FNV_PRIME = 0x01000193


cdef inline uint32_t step(uint32_t hash, char ch) noexcept nogil:
    # FNV-1a: the hash of each beginning is on the way to the hash of the whole
    return (hash ^ <uint8_t>ch) * <uint32_t>FNV_PRIME


cdef inline uint32_t bucket(const RouteIndex* index, uint32_t hash) noexcept nogil:
    return (hash ^ (hash >> 16)) & index.mask


cdef RouteGroup* group_find(const RouteIndex* index, uint32_t hash, const char* text, uint32_t size) noexcept nogil:
    cdef uint32_t at = index.heads[bucket(index, hash)]
    cdef RouteGroup* group
    while at != 0:
        group = &index.groups[at - 1]
        if group.hash == hash and group.text.n == size and memcmp(group.text.p, text, size) == 0:
            return group
        at = group.chain
    return NULL


cdef inline bint is_mark(char ch) noexcept nogil:
    # ASCII that is neither a letter, a digit, `_` nor a blank: behind a backslash it stands for itself
    return 32 < ch < 127 and not (c'a' <= ch <= c'z' or c'A' <= ch <= c'Z' or c'0' <= ch <= c'9' or ch == c'_')


cdef bint one_branch(const char* p, const char* end) noexcept nogil:
    """Whether every `|` is in parentheses or a class. What is not plain to see (quotes, classes in a class) is answered with no."""
    cdef int depth = 0
    cdef bint inside = False            # of a class
    if memchr(p, c'|', <size_t>(end - p)) == NULL:
        return True
    while p < end:
        if p[0] == c'\\':
            if end - p < 2 or p[1] == c'Q':
                return False
            p += 1
        elif p[0] == c'[':
            if inside:
                return False
            inside = True
            if end - p > 1 and p[1] == c'^':
                p += 1
            if end - p > 1 and p[1] == c']':
                p += 1                  # the first one of a class is a member
        elif inside:
            inside = p[0] != c']'
        elif p[0] == c'(':
            depth += 1
        elif p[0] == c')':
            depth -= 1
        elif p[0] == c'|' and depth <= 0:
            return False
        p += 1
    return True


cdef int beginning(Reader* r, Span pattern, Span* out) noexcept nogil:
    """What every text begins with that the whole of an expression matches; empty where that is not plain to see. 0, or -1: no memory."""
    cdef const char* p = pattern.p
    cdef const char* end = pattern.p + pattern.n
    cdef uint32_t n = 0
    cdef char* text = <char*>take(r, pattern.n, 1)
    if text == NULL:
        return -1
    if p < end and p[0] == c'^':
        p += 1                          # the whole is matched: nothing new
    while p < end and n < INDEX_LONGEST:
        if p[0] == c'\\' and end - p > 1 and is_mark(p[1]):
            p += 1
        elif not 32 < p[0] < 127 or memchr(b"\\^$.[]|()*+?{}", p[0], 14) != NULL:
            break
        text[n] = p[0]
        n += 1
        p += 1
    if n > 0 and p < end and p[0] != c'.' and p[0] != c'[' and not (p[0] == c'(' and end - p > 1 and p[1] != c'?'):
        n -= 1                          # it may be repeated no times, also behind what is nothing by itself: a*, a(?i)*, a\E*
    out.p = text
    out.n = n if one_branch(p, end) else 0
    return 0


cdef int group_text(Reader* r, const ValueMatch* path, Span* out) noexcept nogil:
    """What a path must begin with to match: 1, 0 (it is asked whatever the path), -1: no memory."""
    if path.invert or path.ignore_case:
        return 0
    if path.kind == MATCH_REGEX:
        return -1 if beginning(r, path.value, out) < 0 else out.n > 0
    out[0] = path.value
    return path.kind in (MATCH_EXACT, MATCH_PREFIX, MATCH_PATH_PREFIX) and path.value.n <= INDEX_LONGEST


cdef void append(RouteIndex* index, uint32_t* first, uint32_t* last, uint32_t route) noexcept nogil:
    if last[0] == 0:
        first[0] = route + 1
    else:
        index.next[last[0] - 1] = route + 1
    last[0] = route + 1


cdef uint32_t expressions(const Route* route) noexcept nogil:
    cdef uint32_t i, n = route.path.kind == MATCH_REGEX
    for i in range(route.n_headers):
        n += route.headers[i].match.kind == MATCH_REGEX
    for i in range(route.n_query):
        n += route.query[i].match.kind == MATCH_REGEX
    return n


cdef int check_in_turn(Reader* r, const VirtualHost* host) noexcept nogil:
    """Refuses a host of which one request may have to ask more than IN_TURN_MAX expressions. The worst path of a group is its very text:
    it has the beginnings of all that are shorter, and is the only one that an exact match with that text lets through to its headers."""
    cdef const RouteIndex* index = host.index
    cdef const RouteGroup* group
    cdef uint32_t* shared = <uint32_t*>take(r, index.n_groups, sizeof(uint32_t))
    cdef uint32_t i, n, at, hash, many, others = 0, worst
    if shared == NULL:
        return -1
    at = index.first_other
    while at != 0:
        others += expressions(&host.routes[at - 1])
        at = index.next[at - 1]
    for i in range(index.n_groups):
        at = index.groups[i].first
        while at != 0:
            if host.routes[at - 1].path.kind != MATCH_EXACT:
                shared[i] += expressions(&host.routes[at - 1])
            at = index.next[at - 1]
    worst = others
    for i in range(index.n_groups):
        many = others
        at = index.groups[i].first
        while at != 0:
            if host.routes[at - 1].path.kind == MATCH_EXACT:
                many += expressions(&host.routes[at - 1])
            at = index.next[at - 1]
        hash = <uint32_t>FNV_BASIS
        for n in range(index.groups[i].text.n + 1):
            if index.lengths[n >> 6] >> (n & 63) & 1:
                group = group_find(index, hash, index.groups[i].text.p, n)
                if group != NULL:
                    many += shared[group - index.groups]
            if n < index.groups[i].text.n:
                hash = step(hash, index.groups[i].text.p[n])
        if many > worst:
            worst = many
    if worst <= IN_TURN_MAX:
        return 0
    if r.reason[0] == 0:
        snprintf(r.reason, REASON_BYTES,
                 b"virtual host %.*s: one request may be tried on %u regular expressions (path, headers, query) in turn, at most %d; "
                 b"let the paths of their routes begin with plain text of their own",
                 <int>(host.name.n if host.name.n < 80 else 80), host.name.p, worst, <int>IN_TURN_MAX)
    return -1


cdef int index_build(Reader* r, VirtualHost* host) noexcept nogil:
    cdef RouteIndex* index
    cdef RouteGroup* group
    cdef Span text
    cdef uint32_t i, k, hash, heads = 1, last_other = 0
    cdef uint64_t many = 0
    cdef int grouped
    for i in range(host.n_routes):
        many += expressions(&host.routes[i])
    if host.n_routes < INDEX_FROM and many <= IN_TURN_MAX:
        return 0
    while heads < host.n_routes:
        heads *= 2
    index = <RouteIndex*>take(r, 1, sizeof(RouteIndex))
    if index == NULL:
        return -1
    index.mask = heads - 1
    index.heads = <uint32_t*>take(r, heads, sizeof(uint32_t))
    index.groups = <RouteGroup*>take(r, host.n_routes, sizeof(RouteGroup))
    index.next = <uint32_t*>take(r, host.n_routes, sizeof(uint32_t))
    if index.heads == NULL or index.groups == NULL or index.next == NULL:
        return -1
    for i in range(host.n_routes):
        grouped = group_text(r, &host.routes[i].path, &text)
        if grouped < 0:
            return -1
        if not grouped:
            append(index, &index.first_other, &last_other, i)
            continue
        hash = <uint32_t>FNV_BASIS
        for k in range(text.n):
            hash = step(hash, text.p[k])
        group = group_find(index, hash, text.p, text.n)
        if group == NULL:
            group = &index.groups[index.n_groups]
            index.n_groups += 1
            group.text = text
            group.hash = hash
            group.chain = index.heads[bucket(index, hash)]
            index.heads[bucket(index, hash)] = index.n_groups
            index.lengths[text.n >> 6] |= <uint64_t>1 << (text.n & 63)
            if text.n > index.longest:
                index.longest = text.n
        append(index, &group.first, &group.last, i)
    host.index = index
    return check_in_turn(r, host) if many > IN_TURN_MAX else 0


cdef void walk_start(Walk* walk, const RouteIndex* index, Span path, uint32_t n_routes) noexcept nogil:
    walk.index = index
    walk.path = path
    walk.best = n_routes
    walk.length = 0
    walk.hash = <uint32_t>FNV_BASIS
    walk.at = 0
    walk.others = False


cdef uint32_t walk_next(Walk* walk) noexcept nogil:
    cdef const RouteIndex* index = walk.index
    cdef const RouteGroup* group
    cdef uint32_t route, n
    while True:
        if walk.at != 0:
            route = walk.at - 1
            if route < walk.best:
                walk.at = index.next[route]
                return route
            walk.at = 0                 # the rest of a group comes later still
        if walk.others:
            return walk.best
        while walk.at == 0 and walk.length <= walk.path.n and walk.length <= index.longest:
            n = walk.length
            if index.lengths[n >> 6] >> (n & 63) & 1:
                group = group_find(index, walk.hash, walk.path.p, n)
                if group != NULL:
                    walk.at = group.first
            if n < walk.path.n:
                walk.hash = step(walk.hash, walk.path.p[n])
            walk.length += 1
        if walk.at == 0:
            walk.others = True
            walk.at = index.first_other
