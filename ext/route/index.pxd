"""Which of a host's many routes can match a path at all, found in one walk over the path.

Routes whose path is an exact text, a prefix or an expression that begins with plain text are grouped by that text, and groups are
found by the hash of each beginning of the path; all others (expressions like `.*x` or `/a|/b`, ignored case, inverted, very long
texts) are asked one by one. The first route that matches wins, as without an index: a group, too, is asked in the order of the
routes, and none behind the best so far.

Expressions are not put into one RE2::Set: its automaton has no bound on what a path may cost (tests/bench/README.md, Growth).

A request's cost is the path's length plus the routes that share its beginnings, not the number of routes
(`python -m tests.bench.routes`: 10 to 10,000). How many expressions these may have, of the path, of headers and of the query, is
bounded: a worker serves nobody else while it asks them.
"""
from ext.route.reader cimport Reader
from ext.route.shapes cimport RouteIndex, VirtualHost
from ext.core.text cimport Span
from libc.stdint cimport uint32_t

cdef enum:
    INDEX_FROM = 8          # fewer routes are asked in turn: the walk would cost more
    INDEX_LONGEST = 1023    # bytes of a text that is grouped
    IN_TURN_MAX = 100       # expressions that one request may be asked of; twin: IN_TURN_BOUND of controlplane/sources/expressions.py

# Sets host.index, or leaves it NULL (few routes). -1: refused; out of memory, or more than IN_TURN_MAX expressions for one request.
cdef int index_build(Reader* r, VirtualHost* host) noexcept nogil

# The routes that may match, in order within a group. Whoever finds that one does sets `best` to it.
cdef struct Walk:
    const RouteIndex* index
    Span path
    uint32_t best           # only routes before this one are asked
    uint32_t length         # of the beginning that was looked at
    uint32_t hash
    uint32_t at             # next route of the present group + 1, 0 none
    bint others             # the last group is under way

cdef void walk_start(Walk* walk, const RouteIndex* index, Span path, uint32_t n_routes) noexcept nogil
cdef uint32_t walk_next(Walk* walk) noexcept nogil      # index of a route, or `best` when there is none left
