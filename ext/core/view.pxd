"""What the doors to shared memory have in common: a buffer that is held, and an address as people write it."""
from libc.stdint cimport uint8_t

cdef class View:
    cdef Py_buffer raw
    cdef bint held

# Of a packed LogAddress (ring.pxd): `10.0.0.1:80`, `[fd00::1]:80`, or "" for none.
cdef str py_address(const uint8_t* raw)
