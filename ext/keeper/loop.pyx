"""The keeper's loop: level-triggered epoll and a few timers, one thread. It may hold the GIL: no user's byte passes here."""
import heapq
import select
import time

READ = select.EPOLLIN
WRITE = select.EPOLLOUT

cdef enum:
    EVENTS = 64             # per turn, so that one busy descriptor does not starve timers
    LONGEST_MS = 60000


cdef class Timer:
    """A call due later; `cancel` makes it none. Cancelled ones leave the heap when they are due."""
    cdef readonly double due
    cdef readonly object call

    def __init__(self, double due, call):
        self.due = due
        self.call = call

    def __lt__(self, Timer other):
        return self.due < other.due

    def cancel(self) -> None:
        self.call = None


class Loop:
    """`add` a descriptor with a handler(events); `later` calls once. `run` until `stop`."""

    def __init__(self):
        self._epoll = select.epoll()
        self._handlers = {}
        self._timers = []
        self._running = True

    def add(self, int fd, handler, int events=READ) -> None:
        self._epoll.register(fd, events)
        self._handlers[fd] = handler

    def modify(self, int fd, int events) -> None:
        self._epoll.modify(fd, events)

    def remove(self, int fd) -> None:
        """Before the descriptor is closed."""
        if self._handlers.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def later(self, double seconds, call) -> Timer:
        timer = Timer(time.monotonic() + seconds, call)
        heapq.heappush(self._timers, timer)
        return timer

    def stop(self) -> None:
        self._running = False

    def run(self) -> None:
        while self._running:
            self.turn()

    def turn(self) -> None:
        cdef double wait = LONGEST_MS / 1000.0
        if self._timers:
            wait = min(max(self._timers[0].due - time.monotonic(), 0.0), wait)
        for fd, events in self._epoll.poll(wait, EVENTS):
            handler = self._handlers.get(fd)
            if handler is not None:         # one before it in this turn may have closed it
                handler(events)
        while self._timers and self._timers[0].due <= time.monotonic():
            timer = heapq.heappop(self._timers)
            call = timer.call
            if call is not None:
                timer.cancel()
                call()

    def close(self) -> None:
        self._epoll.close()
