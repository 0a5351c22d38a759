"""Loads and stores in an order, for readers in Python of memory that somebody writes meanwhile: what Python's own do not promise on
machines with weak memory order. C11's acquire and release, on aligned 64-bit words of the machine's byte order.
"""
from libc.stdint cimport uint64_t
from ext.core.shm cimport nrw_fence_acquire, nrw_load_acquire, nrw_store_release
from ext.core.view cimport View


cdef uint64_t* py_word(View view, size_t at) except NULL:
    if at % sizeof(uint64_t) != 0 or at + sizeof(uint64_t) > <size_t>view.raw.len:
        raise ValueError(f"no 64-bit word begins at byte {at} of {view.raw.len}")
    return <uint64_t*>(<char*>view.raw.buf + at)


def load_acquire(memory, size_t at):
    """The word at this byte. What its writer wrote before it stored the word (with release) is seen by whatever is read afterwards."""
    cdef View view = View(memory, 0, False)
    return nrw_load_acquire(py_word(view, at))


def store_release(memory, size_t at, uint64_t value):
    """Whatever was read or written before has happened for who loads the word with acquire. BufferError: the memory is read-only."""
    cdef View view = View(memory, 0, True)
    nrw_store_release(py_word(view, at), value)


def fence_acquire():
    """What was loaded before, by whatever means, stays before what is loaded afterwards."""
    nrw_fence_acquire()
