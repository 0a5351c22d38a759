"""One epoll loop of one thread.

A turn:  epoll_wait -> each source behind the others of its flow -> flows in turn, a slice each -> due timers -> the graves are emptied

Sources are edge-triggered and registered once, for everything: the flags below remember what the kernel said until a call
returned EAGAIN, so the path of a byte has no epoll_ctl. Listeners are level-triggered (`loop_listen`). A source that stopped for
fairness, not for want of bytes, queues itself again (`loop_again`): no edge would come.

A Flow is whose work it is (a pod). However many sources of it are ready, it gets SLICE_NS, then the others; whoever had nothing to
do before comes first (as in FQ-CoDel, RFC 8290), and after each slice the kernel is asked who else is ready. So one pod waits for
another's slice, not for its 5,000 connections. Sources without a flow (the keeper's socket) are served as they are seen.

The clock is read once in CLOCK_EACH sources and wherever one event can be long (`loop_over`), so this costs a queue's push and pop
per event. Deadlines too are served for a slice a turn.

Events of a batch may name what an earlier event of the same batch closed: `fd` is -1 then and the event is skipped; the memory
stays until the turn's end (`loop_bury`).
"""
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from ext.core.buffer cimport Buffer
from ext.core.slab cimport Slab
from ext.core.timer cimport Timers

cdef enum:
    EVENTS = 256            # per epoll_wait
    POLLS = 8               # in a row while they fill: a pod with 2,000 ready sockets does not hide who is behind them
    TURN_MAX_MS = 500       # the heartbeat is written each turn
    SLICE_NS = 100000       # some ten exchanges; two of them (request, response) stay below what a request takes alone
    CLOCK_EACH = 2          # sources, some 10 us; reading it takes 0.03
    FRESH_RUN = 4           # flows that had nothing to do before, then one of those that are never done

    CARRIED = 0x7fffffff    # a descriptor that no process can have (sysctl fs.nr_open)

ctypedef void (*Ready)(Source* source, uint32_t events) noexcept nogil

cdef struct Carrier:
    int64_t (*read)(Source* source, void* data, size_t size) noexcept nogil
    int64_t (*write)(Source* source, const void* data, size_t size) noexcept nogil
    int64_t (*take)(Source* source, Buffer* b) noexcept nogil       # reads and writes in which a buffer changes hands, so that nothing
    int64_t (*give)(Source* source, Buffer* b) noexcept nogil       # is copied; see hbone_take
    void (*shut)(Source* source) noexcept nogil
    void (*abort)(Source* source) noexcept nogil
    void (*close)(Source* source) noexcept nogil
    int (*error)(Source* source) noexcept nogil
    bint (*silent)(Source* source) noexcept nogil

cdef struct Source:
    int fd                  # -1: closed; CARRIED: not a socket
    uint8_t readable        # a read may give something (until EAGAIN)
    uint8_t writable
    uint8_t hung            # RDHUP or HUP was seen: a short read does not mean drained
    uint8_t failed          # ERR was seen
    uint8_t queued          # waits for its flow's turn
    uint8_t shared          # another process may still hold the same description: close(2) alone would leave it in epoll
    uint32_t events         # that came while it waits
    Ready ready
    void* owner
    const Carrier* carrier  # NULL: the kernel; see ext/core/source.pxd
    void* stream            # the carrier's own
    Flow* flow              # NULL: served as it is seen
    Source* after           # in the flow's queue
    Source* before

cdef enum FlowPlace:
    FLOW_IDLE = 0
    FLOW_FRESH
    FLOW_BUSY

cdef struct Flow:           # start with all zero; embedded in whose it is
    Source* first
    Source* last
    Flow* next
    uint8_t place
    uint64_t cut            # slices that were over before its work was

cdef struct Flows:
    Flow* first
    Flow* last

cdef struct Grave:          # embedded in whatever is buried
    Grave* next
    Slab* slab
    void* item

cdef struct Loop:
    int epoll
    uint64_t now_ns         # CLOCK_MONOTONIC, as of this turn
    uint64_t turns
    Timers timers
    Flow own                # of sources without one that go on next turn
    Flows fresh
    Flows busy
    Flow* running
    uint32_t picks
    uint32_t unclocked      # sources since the clock was read
    uint64_t clock_ns       # when that was
    uint64_t slice_end_ns
    Grave* graves

cdef uint64_t clock_ns() noexcept nogil         # CLOCK_MONOTONIC
# Of a fuzzing build alone: time stands at `now_ns` and moves by `tick_ns` with each look, so that a script of events decides what is late.
cdef void clock_by_hand(uint64_t now_ns, uint64_t tick_ns) noexcept nogil
cdef uint64_t wall_us() noexcept nogil          # CLOCK_REALTIME

cdef int loop_open(Loop* loop) noexcept nogil                       # 0 or -errno
cdef void loop_close(Loop* loop) noexcept nogil
cdef int loop_add(Loop* loop, Source* source) noexcept nogil        # edge-triggered, all events; 0 or -errno
cdef int loop_listen(Loop* loop, Source* source, int on) noexcept nogil   # level-triggered, reading; on=0 pauses
cdef void loop_again(Loop* loop, Source* source) noexcept nogil
# Inside `ready`, before another round of one that may have many: true when the others are to be served first.
cdef bint loop_over(Loop* loop) noexcept nogil
# Before a flow's memory goes; none of its sources is open.
cdef void flow_forget(Loop* loop, Flow* flow) noexcept nogil
cdef void source_close(Loop* loop, Source* source) noexcept nogil    # out of epoll and its flow's queue, closed; twice does nothing
cdef void loop_bury(Loop* loop, Grave* grave, Slab* slab, void* item) noexcept nogil
cdef void loop_turn(Loop* loop) noexcept nogil
