"""For tests: turns, timers, buffers and slabs, driven from Python."""
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset
from posix.unistd cimport dup
from ext.core.buffer cimport (BUFFER_LARGE, BUFFER_SMALL, Buffer, Buffers, buffer_compact, buffer_consume, buffer_drop,
                              buffer_reserve, buffer_room, buffer_used, buffers_free)
from ext.core.loop cimport (SLICE_NS, Flow, Loop, Source, clock_ns, flow_forget, loop_again, loop_close, loop_open, loop_turn,
                            source_close)
from ext.core.slab cimport Slab, slab_free, slab_give, slab_take
from ext.core.timer cimport Timer, Timers, timer_clear, timer_due, timer_init, timer_set

SLICE_US = SLICE_NS // 1000

cdef enum:
    SERVED_MAX = 100000

cdef struct Task:                   # a source that works for so long each time it is served
    Source source
    Flow* flow
    uint64_t work_ns
    uint32_t left                   # times that it queues itself again
    uint32_t number
    Served* served

cdef struct Served:
    Loop* loop
    uint32_t n
    uint32_t[SERVED_MAX] tasks


cdef void work(Source* source, uint32_t events) noexcept nogil:
    cdef Task* task = <Task*>source
    cdef Served* served = task.served
    cdef uint64_t end = clock_ns() + task.work_ns
    while clock_ns() < end:
        pass
    if served.n < SERVED_MAX:
        served.tasks[served.n] = task.number
        served.n += 1
    if task.left > 0:
        task.left -= 1
        loop_again(served.loop, source)


cdef class Turns:
    """A real loop with `flows` flows; tasks are queued by hand, as if the kernel had named them."""
    cdef Loop loop
    cdef Flow* flows
    cdef Served* served
    cdef list tasks

    def __cinit__(self, uint32_t flows):
        if loop_open(&self.loop) != 0:
            raise OSError
        self.flows = <Flow*>calloc(flows, sizeof(Flow))
        self.served = <Served*>calloc(1, sizeof(Served))
        if self.flows == NULL or self.served == NULL:
            raise MemoryError
        self.served.loop = &self.loop
        self.tasks = []

    def __dealloc__(self):
        loop_close(&self.loop)
        for at in self.tasks:
            free(<void*><size_t>at)
        free(self.flows)
        free(self.served)

    def add(self, uint32_t flow, uint64_t work_us, uint32_t times) -> int:
        """The number of a task that is now ready, and will be `times` times."""
        cdef Task* task = <Task*>calloc(1, sizeof(Task))
        task.source.fd = dup(self.loop.epoll)
        task.source.ready = work
        task.source.flow = &self.flows[flow]
        task.work_ns = work_us * 1000
        task.left = times - 1
        task.number = len(self.tasks)
        task.served = self.served
        self.tasks.append(<size_t>task)
        loop_again(&self.loop, &task.source)
        return task.number

    def close(self, uint32_t task) -> None:
        source_close(&self.loop, &(<Task*><size_t>self.tasks[task]).source)

    def forget(self, uint32_t flow) -> None:
        flow_forget(&self.loop, &self.flows[flow])

    def turn(self) -> list:
        """One turn: the tasks that were served in it, in order. Only while something is ready, or it waits."""
        cdef uint32_t before = self.served.n
        loop_turn(&self.loop)
        return [self.served.tasks[i] for i in range(before, self.served.n)]

    @property
    def waiting(self) -> bool:
        return self.loop.fresh.first != NULL or self.loop.busy.first != NULL

    def cut(self, uint32_t flow) -> int:
        return self.flows[flow].cut


SMALL, LARGE = BUFFER_SMALL, BUFFER_LARGE


cdef class Heap:
    """`n` timers by number."""
    cdef Timers timers
    cdef Timer* all
    cdef uint32_t n

    def __cinit__(self, uint32_t n):
        self.all = <Timer*>calloc(n, sizeof(Timer))
        if self.all == NULL:
            raise MemoryError
        self.n = n
        memset(&self.timers, 0, sizeof(Timers))
        for i in range(n):
            timer_init(&self.all[i], NULL, NULL)

    def __dealloc__(self):
        free(self.all)

    def set(self, uint32_t at, uint64_t due) -> None:
        assert at < self.n
        timer_set(&self.timers, &self.all[at], due)

    def clear(self, uint32_t at) -> None:
        assert at < self.n
        timer_clear(&self.timers, &self.all[at])

    def due(self, uint64_t now):
        """Number of the earliest whose time has come, or None."""
        cdef Timer* found = timer_due(&self.timers, now)
        return None if found == NULL else found - self.all

    @property
    def armed(self) -> int:
        return self.timers.armed


cdef class Bytes:
    """One buffer over a pool of its own, bounded by `limit`."""
    cdef Buffers pool
    cdef Buffer buffer

    def __cinit__(self, uint64_t limit):
        memset(&self.pool, 0, sizeof(Buffers))
        memset(&self.buffer, 0, sizeof(Buffer))
        self.pool.limit = limit

    def __dealloc__(self):
        buffer_drop(&self.pool, &self.buffer)
        buffers_free(&self.pool)

    def reserve(self, uint32_t size) -> bool:
        return buffer_reserve(&self.pool, &self.buffer, size) == 0

    def put(self, bytes data) -> int:
        """Appends what fits; how many bytes that were."""
        cdef uint32_t n = min(len(data), buffer_room(&self.buffer))
        memcpy(self.buffer.data + self.buffer.end, <const char*>data, n)
        self.buffer.end += n
        return n

    def consume(self, uint32_t n) -> None:
        assert n <= buffer_used(&self.buffer)
        buffer_consume(&self.pool, &self.buffer, n)

    def compact(self) -> None:
        buffer_compact(&self.buffer)

    def value(self) -> bytes:
        return self.buffer.data[self.buffer.start:self.buffer.end] if self.buffer.data != NULL else b""

    @property
    def taken(self) -> int:
        return self.pool.taken

    @property
    def size(self) -> int:
        return self.buffer.size

    @property
    def room(self) -> int:
        return buffer_room(&self.buffer)


cdef class Items:
    """A slab of items of `size` bytes."""
    cdef Slab slab
    cdef list out

    def __cinit__(self, uint32_t size):
        memset(&self.slab, 0, sizeof(Slab))
        self.slab.size = size
        self.out = []

    def __dealloc__(self):
        slab_free(&self.slab)

    def take(self) -> bool:
        """Takes one, dirties it; True: it came zeroed."""
        cdef char* item = <char*>slab_take(&self.slab)
        cdef uint32_t i
        clean = True
        for i in range(self.slab.size):
            clean = clean and item[i] == 0
            item[i] = 1
        self.out.append(<size_t>item)
        return clean

    def give(self) -> None:
        slab_give(&self.slab, <void*><size_t>self.out.pop())

    @property
    def live(self) -> int:
        return self.slab.live

    @property
    def kept(self) -> int:
        return self.slab.n_free
