"""See pipes.pxd."""
from libc.stdint cimport uint64_t
from libc.string cimport memset
from posix.unistd cimport close

cdef extern from "<fcntl.h>" nogil:
    int O_CLOEXEC
    int O_NONBLOCK
    int F_SETPIPE_SZ
    int F_GETPIPE_SZ
    int fcntl(int fd, int command, ...)

cdef extern from "<unistd.h>" nogil:
    int pipe2(int* ends, int flags)


cdef void pipes_init(Pipes* pipes) noexcept nogil:
    cdef int i
    memset(pipes, 0, sizeof(Pipes))
    for i in range(PIPES):
        pipes.all[i].next = pipes.closed
        pipes.closed = &pipes.all[i]


cdef Pipe* pipe_take(Pipes* pipes, uint64_t now_ns) noexcept nogil:
    cdef Pipe* pipe = pipes.idle
    cdef int[2] ends
    cdef int size
    if pipe != NULL:
        pipes.idle = pipe.next
        return pipe
    pipe = pipes.closed
    if pipe == NULL or (pipes.refused_ns != 0 and now_ns - pipes.refused_ns < REFUSED_NS):
        return NULL
    if pipe2(ends, O_CLOEXEC | O_NONBLOCK) != 0:
        pipes.refused_ns = now_ns
        return NULL
    size = fcntl(ends[1], F_SETPIPE_SZ, PIPE_BYTES)
    if size < PIPE_LEAST:
        size = fcntl(ends[1], F_GETPIPE_SZ)
    if size < PIPE_LEAST:
        close(ends[0])
        close(ends[1])
        pipes.refused_ns = now_ns
        return NULL
    pipes.closed = pipe.next
    pipe.out = ends[0]
    pipe.into = ends[1]
    pipe.held = 0
    pipe.size = <uint32_t>size
    pipes.n_open += 1
    return pipe


cdef void pipe_close(Pipes* pipes, Pipe* pipe) noexcept nogil:
    close(pipe.out)
    close(pipe.into)
    pipe.next = pipes.closed
    pipes.closed = pipe
    pipes.n_open -= 1


cdef void pipe_give(Pipes* pipes, Pipe* pipe) noexcept nogil:
    if pipe.held > 0:
        pipe_close(pipes, pipe)
        return
    pipe.next = pipes.idle
    pipes.idle = pipe


cdef void pipes_shed(Pipes* pipes) noexcept nogil:
    cdef Pipe* pipe
    while pipes.idle != NULL:
        pipe = pipes.idle
        pipes.idle = pipe.next
        pipe_close(pipes, pipe)
