"""Pipes through which bulk bytes pass from socket to socket without being copied (splice), shared by a worker's connections.

    pipe_take ── empty ──> held while bytes lie in it ── pipe_give ──> idle, or closed when bytes are left

Bounded in number, and so in descriptors and in pipe pages, which the kernel counts per user (fs.pipe-user-pages-soft, 16,384 by
default for an unprivileged one: 4 workers' worth). Beyond that bound a new pipe has two pages and may not grow: it is closed
again, and none is asked for during REFUSED_NS. Who gets no pipe reads and writes.
Whoever takes one counts its size as a pod's memory (ext/proxy/conn, bulk_pipe): a pipe of ours that is empty and idle has no pages.
"""
from libc.stdint cimport uint32_t, uint64_t

cdef enum:
    PIPES = 64                  # of a worker; a pipe is held for long only before a slow reader
    PIPE_BYTES = 262144         # asked for: 64 pages
    PIPE_LEAST = 65536          # less is not worth it
    REFUSED_NS = 1000000000

cdef struct Pipe:
    Pipe* next                  # idle ones, closed ones
    int into
    int out
    uint32_t held               # bytes
    uint32_t size               # it may hold

cdef struct Pipes:
    Pipe[64] all
    Pipe* idle                  # open, empty
    Pipe* closed
    uint32_t n_open
    uint64_t refused_ns         # when the kernel last refused one

cdef void pipes_init(Pipes* pipes) noexcept nogil
# NULL: the bound is reached, or the kernel refused.
cdef Pipe* pipe_take(Pipes* pipes, uint64_t now_ns) noexcept nogil
# Back, for whoever comes next; with bytes in it, it is closed.
cdef void pipe_give(Pipes* pipes, Pipe* pipe) noexcept nogil
# Closes the idle ones: descriptors ran out, or a pod went.
cdef void pipes_shed(Pipes* pipes) noexcept nogil
