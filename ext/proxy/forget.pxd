"""Series of workloads and services that are gone for good: they stay until every scraper has seen their last values, then their slots
go to others. Indexes are never given out again during a keeper's life, so a table that only grew would fill with the dead.
"""
from ext.proxy.state cimport Worker
from ext.route.tables cimport Prepared

cdef enum:
    FORGET_AFTER_MS = 300000    # Prometheus scrapes each minute at the slowest; five of them
    FORGET_MAX = 1024           # what waits for that; above the oldest is forgotten at once

# Before a transaction is applied: remembers what it deletes.
cdef void forget_prepare(Worker* w, const Prepared* prepared) noexcept nogil
# Once a turn: what is due and did not come back.
cdef void forget_turn(Worker* w) noexcept nogil
