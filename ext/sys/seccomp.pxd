"""The system calls that a worker may make once it runs, and no other (seccomp(2)); the table is in seccomp.pyx.

Whoever makes another dies of SIGSYS. Which one it was is told on the way: the kernel calls a handler of ours, which writes two words and
returns; to return is itself a call that is not on the list (rt_sigreturn), made while SIGSYS is blocked, and for that the kernel kills. So
the handler cannot be survived, and it needs no call of its own. Calls of another architecture (int 0x80, x32) are killed without a word.
"""
from libc.stdint cimport uint64_t

cdef enum Confinement:
    CONFINED_NOT_YET = 0
    CONFINED = 1
    CONFINED_OFF = 2            # the operator said so
    CONFINED_SANITIZER = 3      # a sanitizer's or profiler's runtime is loaded, which needs many more

cdef struct Tell:               # where a refused call is told; must stay mapped. Written once, then the process is dead
    uint64_t* calls             # raised by one
    uint64_t* last              # the number of the call

# For good, for every thread of the process, which must have no_new_privs. 0, or -errno with *step naming the call: -ENOSYS or -EINVAL
# from a kernel without seccomp filters. `program` is py_program's.
cdef int seccomp_install(const void* program, unsigned short instructions, const Tell* tell, const char** step) noexcept nogil
# Whether the runtime of AddressSanitizer, ThreadSanitizer, UBSan's standalone runtime or LLVM's profiler is in this process.
cdef bint sanitizer_loaded() noexcept nogil
