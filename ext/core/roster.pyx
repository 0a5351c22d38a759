"""The door to the tunnels that a worker lists in its statistics segment (shm.pxd: Roster); the worker's side is ext/proxy/roster."""
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy
from ext.core.shm cimport (HEADER_BYTES, ROSTER_PEER, ROSTER_ROWS, ROSTER_STATES, STATS_OVERFLOW, STATS_SLOTS, Roster, Series, TunnelRow,
                           nrw_fence_acquire, nrw_load, nrw_load_acquire, stats_segment)
from ext.core.view cimport View, py_address

cdef enum:
    TRIES = 1000                # a worker writes for some 100 us each second

STATES = ("connecting", "handshake", "open", "finishing")
if len(STATES) != ROSTER_STATES:
    raise ImportError("ext.core.roster: STATES do not match their enum")


cdef bint copy(const Roster* shared, Roster* out) noexcept nogil:
    """What was written as a whole; False: the worker died within, or writes each time."""
    cdef uint64_t before
    cdef int _
    for _ in range(TRIES):
        before = nrw_load_acquire(&shared.version)
        if before & 1 == 0:
            memcpy(out, shared, sizeof(Roster) - sizeof(shared.row))
            if out.rows > ROSTER_ROWS:
                out.rows = ROSTER_ROWS
            memcpy(out.row, shared.row, out.rows * sizeof(TunnelRow))
            nrw_fence_acquire()
            if nrw_load(&shared.version) == before:
                return True
    return False


def read_roster(memory) -> tuple:
    """(rows, how many tunnels there are): a dict for each tunnel that is listed, some second old. No rows where they cannot be read.

    What a worker writes is not trusted: numbers that say nothing are left out with their row.
    """
    cdef View view = View(memory, stats_segment(), False)
    cdef Roster* mine
    cdef TunnelRow* row
    cdef uint32_t i, total
    cdef bint good
    found = []
    mine = <Roster*>malloc(sizeof(Roster))
    try:
        if mine == NULL:
            raise MemoryError
        with nogil:
            good = copy(<const Roster*>(<char*>view.raw.buf + HEADER_BYTES + (STATS_SLOTS + STATS_OVERFLOW) * sizeof(Series)), mine)
        if not good:
            return [], 0
        for i in range(mine.rows):
            row = &mine.row[i]
            if row.state >= ROSTER_STATES or row.peer_n > ROSTER_PEER:
                continue
            found.append({"pod": row.pod, "direction": "inbound" if row.server else "outbound", "state": STATES[row.state],
                          "peer": (<bytes>row.peer[:row.peer_n]).decode("ascii", "replace"), "address": py_address(row.address),
                          "streams": row.streams, "streams_ever": row.streams_ever, "bytes": row.bytes, "opened_us": row.opened_us,
                          "until": row.until, "peer_until": row.peer_until})
        total = mine.total
        return found, total
    finally:
        free(mine)
