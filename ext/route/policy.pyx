"""See policy.pxd."""
from libc.stdint cimport uint8_t, uint16_t, uint32_t
from libc.string cimport memcmp, memset
from ext.core.text cimport Span
from ext.route.shapes cimport (
    ACTION_ALLOW, ACTION_DENY, MATCH_EXACT, MATCH_PREFIX, MATCH_SUFFIX, Accounts, Block, Blocks, Ports, TextMatch, TextMatches)


# ---- one value against a list ------------------------------------------------------------------------------


cdef bint text_agrees(const TextMatch* match, Span text) noexcept nogil:
    cdef uint32_t n = match.value.n
    if match.kind == MATCH_EXACT:
        return text.n == n and memcmp(text.p, match.value.p, n) == 0
    if match.kind == MATCH_PREFIX:
        return text.n >= n and memcmp(text.p, match.value.p, n) == 0
    if match.kind == MATCH_SUFFIX:
        return text.n >= n and memcmp(text.p + text.n - n, match.value.p, n) == 0
    return text.n > 0           # presence


cdef bint in_texts(const TextMatches* list_, Span text) noexcept nogil:
    cdef uint32_t i
    for i in range(list_.n):
        if text_agrees(&list_.items[i], text):
            return True
    return False


cdef bint in_block(const Block* block, const Address* address) noexcept nogil:
    cdef uint32_t whole = block.bits >> 3
    cdef uint32_t rest = block.bits & 7
    if block.address.family != address.family or memcmp(block.address.ip, address.ip, whole) != 0:
        return False
    return rest == 0 or ((block.address.ip[whole] ^ address.ip[whole]) >> (8 - rest)) == 0


cdef bint in_blocks(const Blocks* list_, const Address* address) noexcept nogil:
    cdef uint32_t i
    for i in range(list_.n):
        if in_block(&list_.items[i], address):
            return True
    return False


cdef bint in_ports(const Ports* list_, uint16_t port) noexcept nogil:
    cdef uint32_t i
    for i in range(list_.n):
        if list_.items[i] == port:
            return True
    return False


cdef bint same(Span a, Span b) noexcept nogil:
    return a.n == b.n and memcmp(a.p, b.p, a.n) == 0


cdef bint in_accounts(const Accounts* list_, const IdentityParts* who) noexcept nogil:
    cdef uint32_t i
    for i in range(list_.n):
        if who != NULL and same(list_.items[i].namespace, who.namespace) and same(list_.items[i].account, who.account):
            return True
    return False


# ---- matches, clauses, rules -------------------------------------------------------------------------------


cdef uint8_t match_differs(const PolicyMatch* match, const Asked* asked) noexcept nogil:
    cdef Span nothing
    cdef Span namespace
    nothing.p = b""
    nothing.n = 0
    if match.empty:
        return SAYS_NOTHING
    # who has no identity is in no namespace, and is compared as the empty text; no principal agrees with them, not even as text
    namespace = asked.who.namespace if asked.who != NULL else nothing
    if match.namespaces[0].n > 0 and not in_texts(&match.namespaces[0], namespace):
        return NAMESPACES
    if match.namespaces[1].n > 0 and in_texts(&match.namespaces[1], namespace):
        return NOT_NAMESPACES
    if match.principals[0].n > 0 and (asked.who == NULL or not in_texts(&match.principals[0], asked.who.principal)):
        return PRINCIPALS
    if match.principals[1].n > 0 and asked.who != NULL and in_texts(&match.principals[1], asked.who.principal):
        return NOT_PRINCIPALS
    if match.sources[0].n > 0 and not in_blocks(&match.sources[0], asked.source):
        return SOURCES
    if match.sources[1].n > 0 and in_blocks(&match.sources[1], asked.source):
        return NOT_SOURCES
    if match.destinations[0].n > 0 and not in_blocks(&match.destinations[0], asked.destination):
        return DESTINATIONS
    if match.destinations[1].n > 0 and in_blocks(&match.destinations[1], asked.destination):
        return NOT_DESTINATIONS
    if match.ports[0].n > 0 and not in_ports(&match.ports[0], asked.port):
        return PORTS
    if match.ports[1].n > 0 and in_ports(&match.ports[1], asked.port):
        return NOT_PORTS
    if match.accounts[0].n > 0 and not in_accounts(&match.accounts[0], asked.who):
        return ACCOUNTS
    if match.accounts[1].n > 0 and in_accounts(&match.accounts[1], asked.who):
        return NOT_ACCOUNTS
    return AGREES


cdef bint clause_agrees(const PolicyClause* clause, const Asked* asked) noexcept nogil:
    cdef uint32_t i
    for i in range(clause.n):
        if match_differs(&clause.matches[i], asked) == AGREES:
            return True
    return clause.n == 0


cdef bint rule_matches(const PolicyRule* rule, const Asked* asked) noexcept nogil:
    cdef uint32_t i
    for i in range(rule.n):
        if not clause_agrees(&rule.clauses[i], asked):
            return False
    return True


cdef int policy_matches(const Policy* policy, const Asked* asked) noexcept nogil:
    cdef uint32_t i
    for i in range(policy.n_rules):
        if rule_matches(&policy.rules[i], asked):
            return <int>i
    return -1


# ---- which policies ----------------------------------------------------------------------------------------


cdef void walk_start(Walk* walk, const Tables* t, const Workload* workload, const Scope* scope) noexcept nogil:
    memset(walk, 0, sizeof(Walk))
    walk.tables = t
    walk.workload = workload
    walk.scope = scope
    walk.at = t.names.policies


cdef const Policy* walk_next(Walk* walk) noexcept nogil:
    cdef const Policy* found
    if walk.stage == 0:
        found = walk.at
        if found != NULL:
            walk.at = found.next
            return found
        walk.stage = 1
        walk.at = walk.scope.policies if walk.scope != NULL else NULL
    if walk.stage == 1:
        found = walk.at
        if found != NULL:
            walk.at = found.next
            return found
        walk.stage = 2
    while walk.i < walk.workload.n_policies:
        found = <const Policy*>walk.workload.policies[walk.i].current
        walk.i += 1
        if found != NULL:
            return found
    return NULL


# ---- the verdict -------------------------------------------------------------------------------------------


cdef void policy_decide(const Tables* t, const Workload* workload, const Scope* scope, const Asked* asked, Verdict* out) noexcept nogil:
    cdef Walk walk
    cdef const Policy* policy
    cdef const Policy* denies = NULL        # [in force]
    cdef const Policy* allows = NULL
    cdef const Policy* dry_denies = NULL    # [only for trial]
    cdef uint32_t n_allow = 0, n_dry_allow = 0
    cdef bint dry_allows = False
    cdef int rule
    memset(out, 0, sizeof(Verdict))
    walk_start(&walk, t, workload, scope)
    policy = walk_next(&walk)
    while policy != NULL:
        if policy.action == ACTION_ALLOW:
            if policy.dry_run:
                n_dry_allow += 1
            else:
                n_allow += 1
        rule = -1
        # what one policy of a kind decided no other changes
        if policy.action == ACTION_DENY:
            if policy.dry_run and dry_denies == NULL:
                rule = policy_matches(policy, asked)
                if rule >= 0:
                    dry_denies = policy
                    out.would_rule = <uint32_t>rule
            elif not policy.dry_run:
                rule = policy_matches(policy, asked)
                if rule >= 0:
                    denies = policy
                    out.rule = <uint32_t>rule
                    break
        elif policy.dry_run:
            dry_allows = dry_allows or policy_matches(policy, asked) >= 0
        elif allows == NULL:
            rule = policy_matches(policy, asked)
            if rule >= 0:
                allows = policy
                out.rule = <uint32_t>rule
        policy = walk_next(&walk)
    if denies != NULL:
        out.by = denies.slot
        return
    if allows != NULL or n_allow == 0:
        out.allowed = 1
        out.by = allows.slot if allows != NULL else NULL
    if dry_denies != NULL:
        out.would_by = dry_denies.slot
    elif allows != NULL or dry_allows or n_allow + n_dry_allow == 0:
        out.would = 1
