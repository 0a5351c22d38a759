"""May this connection be? DENY before ALLOW, with the semantics of Istio's layer 4 (docs/policy.md has them as a table).

    policy   matches if any rule does; one without rules never does
    rule     if all its clauses agree; one without clauses always does
    clause   if any match agrees; one without matches always does
    match    if every kind of field agrees: one of what must (if anything must), none of what must not; one that says nothing never does

No allocation, no clock, no search but through what is applicable: policies for all, those of the destination's namespace, those that
the destination's workload names (what it names and nobody knows is passed over, as ztunnel does while it is on its way).
"""
from libc.stdint cimport uint8_t, uint16_t, uint32_t
from ext.route.shapes cimport Address, IdentityParts, Policy, PolicyClause, PolicyMatch, PolicyRule, Scope, Slot, Workload
from ext.route.tables cimport Tables

cdef struct Asked:
    const IdentityParts* who        # NULL: nobody proved who they are
    const Address* source
    const Address* destination
    uint16_t port                   # of the destination, the one that is listened on

cdef enum Field:                    # what of a match does not agree
    AGREES = 0
    NAMESPACES
    NOT_NAMESPACES
    PRINCIPALS
    NOT_PRINCIPALS
    SOURCES
    NOT_SOURCES
    DESTINATIONS
    NOT_DESTINATIONS
    PORTS
    NOT_PORTS
    ACCOUNTS
    NOT_ACCOUNTS
    SAYS_NOTHING

cdef struct Verdict:
    uint8_t allowed
    uint8_t would                   # the same if dry-run policies were in force
    uint32_t rule                   # that matched, of `by`
    uint32_t would_rule
    const Slot* by                  # the policy whose match decided; NULL: none applies (allowed), or none that allows matched (denied)
    const Slot* would_by            # the dry-run policy that makes `would` differ; NULL: none that allows matched

cdef struct Walk:                   # over the policies that apply: walk_start, then walk_next until NULL
    const Tables* tables
    const Workload* workload
    const Policy* at
    uint32_t i
    uint8_t stage
    const Scope* scope

cdef void walk_start(Walk* walk, const Tables* t, const Workload* workload, const Scope* scope) noexcept nogil
cdef const Policy* walk_next(Walk* walk) noexcept nogil

cdef uint8_t match_differs(const PolicyMatch* match, const Asked* asked) noexcept nogil      # Field
cdef bint clause_agrees(const PolicyClause* clause, const Asked* asked) noexcept nogil
cdef bint rule_matches(const PolicyRule* rule, const Asked* asked) noexcept nogil
# The first rule that matches, or -1.
cdef int policy_matches(const Policy* policy, const Asked* asked) noexcept nogil

# `scope` is the destination's namespace, `ns=<namespace>`.
cdef void policy_decide(const Tables* t, const Workload* workload, const Scope* scope, const Asked* asked, Verdict* out) noexcept nogil
