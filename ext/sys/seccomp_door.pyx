"""Python's door to seccomp, for tests: a process of theirs under exactly the filter of a worker."""
from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.stdint cimport uint64_t
from libc.string cimport memset
from ext.sys.privilege cimport privilege_drop
from ext.sys.seccomp cimport Tell, sanitizer_loaded, seccomp_install

import os

from ext.sys.seccomp import INSTRUCTION, py_program


def sanitized() -> bool:
    return sanitizer_loaded()


def confine(memory, unsigned int uid) -> None:
    """As a worker does it, for good: everything given up, then the filter. `memory`: two u64 (calls refused, the last of them), shared
    with whoever looks at them afterwards; never released. OSError names the step."""
    cdef Py_buffer raw
    cdef Tell tell
    cdef const char* step = NULL
    cdef int error
    cdef bytes program = py_program(os.uname().machine)
    PyObject_GetBuffer(memory, &raw, PyBUF_WRITABLE)
    if raw.len < 16:
        PyBuffer_Release(&raw)
        raise ValueError(f"{raw.len} bytes for two numbers of 8")
    memset(&tell, 0, sizeof(Tell))
    tell.calls = <uint64_t*>raw.buf
    tell.last = <uint64_t*>raw.buf + 1
    error = privilege_drop(uid, uid, &step)
    if error == 0:
        error = seccomp_install(PyBytes_AS_STRING(program), <unsigned short>(PyBytes_GET_SIZE(program) // INSTRUCTION.size), &tell, &step)
    if error != 0:
        raise OSError(-error, f"{step.decode()}: {os.strerror(-error)}")
