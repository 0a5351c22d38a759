"""One epoll loop of one thread.

A turn:  epoll_wait -> `ready` of each source -> the `again` list -> due timers -> the graves are emptied

Sources are edge-triggered and registered once, for everything: the flags below remember what the kernel said until a call
returned EAGAIN, so the path of a byte has no epoll_ctl. Listeners are level-triggered (`loop_listen`). A source that stopped for
fairness, not for want of bytes, puts itself on the `again` list: no edge would come.

Events of a batch may name what an earlier event of the same batch closed: `fd` is -1 then and the event is skipped; the memory
stays until the turn's end (`loop_bury`).
"""
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from ext.core.slab cimport Slab
from ext.core.timer cimport Timers

cdef enum:
    EVENTS = 256            # per epoll_wait
    TURN_MAX_MS = 500       # the heartbeat is written each turn

ctypedef void (*Ready)(Source* source, uint32_t events) noexcept nogil

cdef struct Source:
    int fd                  # -1: closed
    uint8_t readable        # a read may give something (until EAGAIN)
    uint8_t writable
    uint8_t hung            # RDHUP or HUP was seen: a short read does not mean drained
    uint8_t failed          # ERR was seen
    uint8_t queued          # on the `again` list
    uint8_t shared          # another process may still hold the same description: close(2) alone would leave it in epoll
    Ready ready
    void* owner
    Source* again

cdef struct Grave:          # embedded in whatever is buried
    Grave* next
    Slab* slab
    void* item

cdef struct Loop:
    int epoll
    uint64_t now_ns         # CLOCK_MONOTONIC, as of this turn
    uint64_t turns
    Timers timers
    Source* again_first
    Source* again_last
    Grave* graves

cdef uint64_t clock_ns() noexcept nogil         # CLOCK_MONOTONIC
cdef uint64_t wall_us() noexcept nogil          # CLOCK_REALTIME

cdef int loop_open(Loop* loop) noexcept nogil                       # 0 or -errno
cdef void loop_close(Loop* loop) noexcept nogil
cdef int loop_add(Loop* loop, Source* source) noexcept nogil        # edge-triggered, all events; 0 or -errno
cdef int loop_listen(Loop* loop, Source* source, int on) noexcept nogil   # level-triggered, reading; on=0 pauses
cdef void loop_again(Loop* loop, Source* source) noexcept nogil
cdef void source_close(Loop* loop, Source* source) noexcept nogil    # out of epoll, off the list, closed; twice does nothing
cdef void loop_bury(Loop* loop, Grave* grave, Slab* slab, void* item) noexcept nogil
cdef void loop_turn(Loop* loop) noexcept nogil
