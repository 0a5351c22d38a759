"""See policies.pxd."""
from libc.stdint cimport uint8_t, uint32_t
from libc.string cimport memchr, memcpy
from ext.core.arena cimport arena_free, arena_take
from ext.core.blob cimport take_count, take_u8
from ext.core.text cimport Span
from ext.route.reader cimport LEAST_ADDRESS, cut, no_memory, read_address, read_ports, read_text, refuse, refuse_number, take
from ext.route.shapes cimport (
    ACTION_DENY, MATCH_EXACT, MATCH_PREFIX, MATCH_PRESENT, MATCH_SUFFIX, SCOPE_WORKLOAD, Account, Accounts, Block, Blocks, PolicyClause,
    PolicyMatch, PolicyRule, TextMatch, TextMatches)
from ext.route.slots cimport scope_drop, scope_intern

cdef enum:
    LEAST_TEXT = 5          # bytes of a match on text: kind and an empty str
    LEAST_ACCOUNT = 8       # of two empty ones
    LEAST_MATCH = 48        # of twelve empty lists


cdef int read_texts(Reader* r, TextMatches* out) noexcept nogil:
    cdef uint32_t i
    cdef uint8_t kind
    out.n = take_count(&r.c, LEAST_TEXT)
    out.items = <TextMatch*>take(r, out.n, sizeof(TextMatch))
    if out.items == NULL:
        return -1
    for i in range(out.n):
        kind = out.items[i].kind = take_u8(&r.c)
        if r.c.bad:
            return cut(r)
        if kind != MATCH_EXACT and kind != MATCH_PREFIX and kind != MATCH_SUFFIX and kind != MATCH_PRESENT:
            return refuse_number(r, b"kind of a match on text", kind)
        if read_text(r, &out.items[i].value, False) < 0:
            return -1
    return 0


cdef int read_blocks(Reader* r, Blocks* out) noexcept nogil:
    cdef uint32_t i
    out.n = take_count(&r.c, LEAST_ADDRESS + 1)
    out.items = <Block*>take(r, out.n, sizeof(Block))
    if out.items == NULL:
        return -1
    for i in range(out.n):
        if read_address(r, &out.items[i].address) < 0:
            return -1
        out.items[i].bits = take_u8(&r.c)
        if out.items[i].bits > (32 if out.items[i].address.family == 4 else 128):
            return refuse_number(r, b"prefix length of a block", out.items[i].bits)
    return 0


cdef int read_accounts(Reader* r, Accounts* out) noexcept nogil:
    cdef uint32_t i
    out.n = take_count(&r.c, LEAST_ACCOUNT)
    out.items = <Account*>take(r, out.n, sizeof(Account))
    if out.items == NULL:
        return -1
    for i in range(out.n):
        if read_text(r, &out.items[i].namespace, False) < 0 or read_text(r, &out.items[i].account, False) < 0:
            return -1
    return 0


cdef int read_match(Reader* r, PolicyMatch* m) noexcept nogil:
    cdef int i
    cdef uint32_t all_ = 0
    # in the order of the blob: each kind of field, what must and what must not agree
    for i in range(2):
        if read_texts(r, &m.namespaces[i]) < 0:
            return -1
    for i in range(2):
        if read_texts(r, &m.principals[i]) < 0:
            return -1
    for i in range(2):
        if read_blocks(r, &m.sources[i]) < 0:
            return -1
    for i in range(2):
        if read_blocks(r, &m.destinations[i]) < 0:
            return -1
    for i in range(2):
        if read_ports(r, &m.ports[i]) < 0:
            return -1
    for i in range(2):
        if read_accounts(r, &m.accounts[i]) < 0:
            return -1
    for i in range(2):
        all_ |= (m.namespaces[i].n | m.principals[i].n | m.sources[i].n | m.destinations[i].n | m.ports[i].n | m.accounts[i].n)
    m.empty = all_ == 0
    return 0


cdef int read_rule(Reader* r, PolicyRule* rule) noexcept nogil:
    cdef uint32_t i, k
    cdef PolicyClause* clause
    rule.n = take_count(&r.c, 4)
    rule.clauses = <PolicyClause*>take(r, rule.n, sizeof(PolicyClause))
    if rule.clauses == NULL:
        return -1
    for i in range(rule.n):
        clause = &rule.clauses[i]
        clause.n = take_count(&r.c, LEAST_MATCH)
        clause.matches = <PolicyMatch*>take(r, clause.n, sizeof(PolicyMatch))
        if clause.matches == NULL:
            return -1
        for k in range(clause.n):
            if read_match(r, &clause.matches[k]) < 0:
                return -1
    return 0


cdef int read_namespace(Reader* r, Policy* policy, const Slot* slot) noexcept nogil:
    """Of the key, `namespace/name`, interned as `ns=<namespace>`: what a pod's scope is called."""
    cdef const char* slash = <const char*>memchr(slot.key, c'/', slot.key_len)
    cdef Span name
    cdef char* text
    cdef size_t n
    if slash == NULL or slash == slot.key or slash + 1 == slot.key + slot.key_len:
        return refuse(r, b"key is not `namespace/name`")
    n = <size_t>(slash - slot.key)
    text = <char*>arena_take(r.arena, n + 3)
    if text == NULL:
        return no_memory(r)
    memcpy(text, b"ns=", 3)
    memcpy(text + 3, slot.key, n)
    name.p = text
    name.n = <uint32_t>(n + 3)
    policy.namespace = scope_intern(r.names, name)
    return no_memory(r) if policy.namespace == NULL else 0


cdef int read_policy(Reader* r, Policy* policy, const Slot* slot) noexcept nogil:
    cdef uint32_t i
    policy.slot = slot
    policy.scope = take_u8(&r.c)
    policy.action = take_u8(&r.c)
    policy.dry_run = take_u8(&r.c)
    if r.c.bad:
        return cut(r)
    if policy.scope > SCOPE_WORKLOAD:
        return refuse_number(r, b"scope", policy.scope)
    if policy.action > ACTION_DENY:
        return refuse_number(r, b"action", policy.action)
    if policy.dry_run > 1:
        return refuse_number(r, b"dry run", policy.dry_run)
    if read_namespace(r, policy, slot) < 0:
        return -1
    policy.n_rules = take_count(&r.c, 4)
    policy.rules = <PolicyRule*>take(r, policy.n_rules, sizeof(PolicyRule))
    if policy.rules == NULL:
        return -1
    for i in range(policy.n_rules):
        if read_rule(r, &policy.rules[i]) < 0:
            return -1
    return 0


cdef void policy_free(Names* names, Policy* policy) noexcept nogil:
    if policy.namespace != NULL:
        scope_drop(names, policy.namespace)
    arena_free(&policy.arena)
