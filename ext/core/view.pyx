"""See view.pxd."""
import socket

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport uint8_t, uint16_t
from libc.string cimport memcpy


cdef class View:
    """A buffer held while its memory is looked at. ValueError: too small. BufferError: read-only where writing is meant."""

    def __cinit__(self, memory, size_t least, bint write):
        PyObject_GetBuffer(memory, &self.raw, PyBUF_WRITABLE if write else PyBUF_SIMPLE)
        self.held = True
        if <size_t>self.raw.len < least:
            raise ValueError(f"shared memory of {self.raw.len} bytes, {least} are needed: is it the right segment, and whole?")

    def __dealloc__(self):
        if self.held:
            PyBuffer_Release(&self.raw)


cdef str py_address(const uint8_t* raw):
    cdef uint8_t family = raw[0]
    cdef uint16_t port
    memcpy(&port, raw + 1, 2)
    if family == 4:
        return f"{socket.inet_ntop(socket.AF_INET, raw[3:7])}:{port}"
    if family == 6:
        return f"[{socket.inet_ntop(socket.AF_INET6, raw[3:19])}]:{port}"
    return ""
