"""What a script of connections.pyx plays on: a real worker that takes a turn when it is told to, its keeper, clients and servers.

All of it is one thread in one network namespace (world.py). Sockets, capture, epoll, pipes and descriptors over the control socket are
the kernel's; only the clock is ours (ext/core/loop), so that an hour costs nothing and the same script gives the same.
"""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from ext.proxy.state cimport Worker
from ext.sys.stream cimport Peer

cdef enum:
    SIDES = 8                   # clients of a script; as many servers' connections
    MOST = 524288               # bytes that one side says
    TURNS = 30000               # of the worker until it rests, for one operation

cdef struct Side:               # one end of a connection that is ours
    int fd                      # -1: not open
    uint8_t was                 # there was one
    uint8_t shut                # we ended our side
    uint8_t reset               # we broke it
    uint8_t ended               # the worker ended its side
    uint8_t broken              # or broke it
    uint8_t refused             # which we were told when we said something
    uint8_t closed              # we closed it, whatever still came
    uint8_t opaque              # of a server: what comes is no HTTP
    uint8_t denied              # of a client: policies in force let nobody in when it came, and have said so since
    uint8_t inner               # of a client: it dialled the other pod
    uint16_t port               # of a client its own, of a server the worker's
    uint16_t dialled            # of a client: where to
    Peer here                   # of a server: its own address, and the worker's: ports alone are used for several at a time
    Peer there
    uint32_t n_said
    uint32_t n_heard
    char* said
    char* heard

cdef struct Stage:
    Worker* w
    int keeper                  # our end of the control socket, -1: the keeper is gone
    int tick                    # of the clock
    uint64_t transaction
    uint8_t withholds           # sockets
    uint8_t two                 # the second pod is attached
    uint8_t quiet               # the log is, or was, off
    uint8_t forgets             # series of the dead were forgotten
    uint8_t changed             # a transaction was committed
    uint8_t disturbed           # so a connection may end with a reset
    uint8_t denies              # what was committed last lets nobody in
    uint8_t settled_denies      # and it is in force
    uint8_t joined              # nothing was said by which the second pod could not be reached in memory
    uint32_t scripts            # of this worker
    uint32_t wanted[3]          # sockets, by pod
    uint64_t turns
    uint32_t n_clients
    uint32_t n_servers
    Side clients[8]
    Side servers[8]

cdef enum:
    OTHER_POD = 0x0202090a      # 10.9.2.2, as it lies in memory

cdef Stage* stage() noexcept nogil
cdef const int* stage_origins() noexcept nogil  # the listeners behind everything: of requests, of opaque bytes
cdef void stage_open() noexcept nogil           # a worker with the first transaction and the first pod
# True: the worker is good for another script. False: all its memory was freed.
cdef bint stage_close() noexcept nogil

cdef void attaches(uint32_t pod) noexcept nogil
cdef void detaches(uint32_t pod) noexcept nogil
cdef void drains(uint32_t milliseconds) noexcept nogil
cdef void commits(uint8_t which) noexcept nogil
cdef void calms(uint8_t which) noexcept nogil   # the commit was the first word
cdef void gives(uint32_t pod, uint32_t n) noexcept nogil
cdef void keeper_goes() noexcept nogil

cdef void ticks(uint32_t ns) noexcept nogil     # by so much the clock moves with each look at it
cdef bint turn() noexcept nogil                 # False: the worker rests, or has ended
cdef void settle() noexcept nogil               # turns until it rests
cdef void wait(uint64_t milliseconds) noexcept nogil
