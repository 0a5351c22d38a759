"""See seccomp.pxd. A classic BPF program from a table of names; no library, since the table is all that one would be asked for.

A row is a call and, where arguments matter, the alternatives that are allowed: each a tuple of (argument, mask, value) that must all hold,
`argument & mask == value`. The kernel reads most of these arguments as 32 bits, and so do the masks; pointers are compared whole.

What these calls cost: a call without a rule is answered from the kernel's bitmap (5.11 and later) and runs no program, so whatever is made
for each chunk of bytes has no rule.
"""
import struct

from libc.errno cimport errno
from libc.stdint cimport uint64_t
from libc.string cimport memset

from ext.sys.syscalls import numbers

cdef extern from "<signal.h>" nogil:
    ctypedef struct sigset_t:
        pass
    ctypedef struct siginfo_t:
        int si_code
        int si_syscall
    struct action "sigaction":
        void (*sa_sigaction)(int number, siginfo_t* info, void* context) noexcept nogil
        sigset_t sa_mask
        int sa_flags
    int SIGSYS
    int SA_SIGINFO
    int SIG_UNBLOCK
    int sigfillset(sigset_t* mask)
    int sigemptyset(sigset_t* mask)
    int sigaddset(sigset_t* mask, int number)
    int sigprocmask(int how, const sigset_t* mask, sigset_t* before)
    int set_action "sigaction"(int number, const action* now, action* before)

cdef extern from "<unistd.h>" nogil:
    long syscall(long number, ...)

cdef extern from "<sys/syscall.h>" nogil:
    long SYS_seccomp

cdef extern from "<linux/seccomp.h>" nogil:
    unsigned int SECCOMP_SET_MODE_FILTER
    unsigned long SECCOMP_FILTER_FLAG_TSYNC
    unsigned long SECCOMP_FILTER_FLAG_SPEC_ALLOW

cdef extern from "<linux/filter.h>" nogil:
    struct sock_filter:
        pass
    struct sock_fprog:
        unsigned short len
        sock_filter* filter

cdef extern from "<dlfcn.h>" nogil:
    void* RTLD_DEFAULT
    void* dlsym(void* handle, const char* name)

cdef enum:
    SYS_SECCOMP = 1                 # si_code; asm-generic/siginfo.h, and not in every libc's

INT, POINTER = 0xffffffff, 0xffffffffffffffff

# Linux's numbers, the same on both machines.
SOL_SOCKET, SOL_IP, SOL_TCP, SOL_IPV6 = 1, 0, 6, 41
SO_ERROR, SO_LINGER, SO_ORIGINAL_DST, TCP_NODELAY, TCP_INFO = 4, 13, 80, 1, 11
PROT_READ, PROT_WRITE, MAP_PRIVATE, MAP_ANONYMOUS, MAP_NORESERVE, MREMAP_MAYMOVE, MADV_DONTNEED = 1, 2, 2, 0x20, 0x4000, 1, 4
F_SETPIPE_SZ, F_GETPIPE_SZ, O_NONBLOCK, O_CLOEXEC, SEEK_END = 1031, 1032, 0o4000, 0o2000000, 2
FUTEX_WAKE, FUTEX_PRIVATE = 1, 128

CALLS = (
    # --- the path of a byte: no rules
    ("epoll_wait", ()),             # x86_64
    ("epoll_pwait", (((4, POINTER, 0),),)),                     # aarch64 has no other; without a signal mask of its own
    ("recvfrom", ()),
    ("sendto", ()),
    ("sendmsg", ()),                # head and body in one; and to the keeper
    ("splice", ()),                 # bulk between two sockets, through a pipe
    ("accept4", ()),
    ("connect", ()),                # sockets are the keeper's, made in the pod's namespace
    ("bind", ()),                   # the client's address
    ("close", ()),
    ("epoll_ctl", ()),
    ("getsockname", ()),
    ("shutdown", ()),
    # --- a few times a connection
    ("getsockopt", (((1, INT, SOL_IP), (2, INT, SO_ORIGINAL_DST)), ((1, INT, SOL_IPV6), (2, INT, SO_ORIGINAL_DST)),
                    ((1, INT, SOL_SOCKET), (2, INT, SO_ERROR)), ((1, INT, SOL_TCP), (2, INT, TCP_INFO)))),
    ("setsockopt", (((1, INT, SOL_TCP), (2, INT, TCP_NODELAY)), ((1, INT, SOL_SOCKET), (2, INT, SO_LINGER)))),
    ("pipe2", (((1, INT, O_CLOEXEC | O_NONBLOCK),),)),
    ("fcntl", (((1, INT, F_SETPIPE_SZ),), ((1, INT, F_GETPIPE_SZ),))),
    # --- the keeper's word
    ("recvmsg", ()),                # with sockets, listeners, transactions
    ("lseek", (((2, INT, SEEK_END),),)),                        # a transaction's size
    # --- memory: nothing that can be executed, nothing shared, nothing put over what is there
    ("mmap", (((2, INT & ~(PROT_READ | PROT_WRITE), 0), (3, INT & ~(MAP_ANONYMOUS | MAP_NORESERVE), MAP_PRIVATE)),)),
    ("munmap", ()),
    ("mremap", (((3, INT, MREMAP_MAYMOVE),),)),                 # realloc of what is large
    ("brk", ()),
    ("madvise", (((2, INT, MADV_DONTNEED),),)),                 # malloc_trim
    # --- libc
    ("futex", (((1, INT & ~1, FUTEX_PRIVATE),),)),              # call_once of a regular expression: WAIT and WAKE, private
    # --- libcrypto
    ("getrandom", ()),              # seeds
    ("getpid", ()),                 # has the process forked since?
    ("clock_gettime", (((0, INT & ~1, 0),),)),                  # where the vDSO cannot: REALTIME and MONOTONIC
    ("exit_group", ()),
)

# ---- the program ---------------------------------------------------------------------------------------------------

ARCHES = {"x86_64": 0xc000003e, "aarch64": 0xc00000b7}          # linux/audit.h
X32 = 0x40000000                    # of the number, on x86_64: the calls of another table
INSTRUCTION = struct.Struct("<HBBI")
LOAD, AND, EQUAL, AT_LEAST, RETURN = 0x20, 0x54, 0x15, 0x35, 0x06       # linux/bpf_common.h: LD|W|ABS, ALU|AND|K, JMP|JEQ|K, JGE, RET|K
ALLOW, TRAP, KILL = 0x7fff0000, 0x00030000, 0x80000000
NUMBER, ARCH, ARGUMENTS = 0, 4, 16  # struct seccomp_data


def words(int argument, mask, value):
    """(offset, mask, value) of the halves that matter; both machines are little-endian."""
    for half in (0, 1):
        part = mask >> 32 * half & INT
        if part:
            yield ARGUMENTS + 8 * argument + 4 * half, part, value >> 32 * half & INT


def alternative(conditions) -> list:
    """Falls through to what follows when a condition does not hold."""
    tail = [(RETURN, 0, 0, ALLOW)]
    for condition in reversed(conditions):
        for offset, mask, value in reversed(list(words(*condition))):
            load = [(LOAD, 0, 0, offset)] + ([(AND, 0, 0, mask)] if mask != INT else [])
            tail = [*load, (EQUAL, 0, len(tail), value), *tail]
    return tail


def py_program(str machine) -> bytes:
    """Array of struct sock_filter. LookupError: no table for this machine."""
    try:
        arch, known = ARCHES[machine], numbers(machine)
    except KeyError:
        raise LookupError(f"there is no table of system calls for {machine}, only for {', '.join(ARCHES)}") from None
    code = [(LOAD, 0, 0, ARCH), (EQUAL, 1, 0, arch), (RETURN, 0, 0, KILL), (LOAD, 0, 0, NUMBER)]
    if machine == "x86_64":
        code += [(AT_LEAST, 0, 1, X32), (RETURN, 0, 0, KILL)]
    for name, rules in CALLS:
        if name in known:           # aarch64 has no epoll_wait
            block = [one for rule in rules for one in alternative(rule)] + [(RETURN, 0, 0, TRAP if rules else ALLOW)]
            code += [(EQUAL, 0, len(block), known[name]), *block]
    code.append((RETURN, 0, 0, TRAP))
    return b"".join(INSTRUCTION.pack(*one) for one in code)


# ---- in force --------------------------------------------------------------------------------------------------------

cdef Tell told


cdef void on_refused(int number, siginfo_t* info, void* context) noexcept nogil:
    """Makes no call, and does not outlive its return: see seccomp.pxd."""
    if info.si_code == SYS_SECCOMP:             # else somebody sent the signal, and dies of it who got it
        told.last[0] = <uint64_t>info.si_syscall
        told.calls[0] += 1


cdef int seccomp_install(const void* program, unsigned short instructions, const Tell* tell, const char** step) noexcept nogil:
    global told
    cdef action now
    cdef sigset_t mask
    cdef sock_fprog filter
    cdef long done
    told = tell[0]
    memset(&now, 0, sizeof(action))
    now.sa_sigaction = on_refused
    now.sa_flags = SA_SIGINFO
    sigfillset(&now.sa_mask)
    step[0] = b"sigaction(SIGSYS)"
    if set_action(SIGSYS, &now, NULL) != 0:
        return -errno
    sigemptyset(&mask)
    sigaddset(&mask, SIGSYS)
    step[0] = b"sigprocmask"
    if sigprocmask(SIG_UNBLOCK, &mask, NULL) != 0:
        return -errno
    filter.len = instructions
    filter.filter = <sock_filter*>program
    # SPEC_ALLOW: kernels before 5.16 would otherwise slow every load down for code that could read its neighbours by speculation; a
    # worker runs no code but ours
    step[0] = b"seccomp(SECCOMP_SET_MODE_FILTER)"
    done = syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC | SECCOMP_FILTER_FLAG_SPEC_ALLOW, &filter)
    return 0 if done == 0 else -errno if done < 0 else -1


cdef bint sanitizer_loaded() noexcept nogil:
    return (dlsym(RTLD_DEFAULT, b"__asan_init") != NULL or dlsym(RTLD_DEFAULT, b"__tsan_init") != NULL
            or dlsym(RTLD_DEFAULT, b"__ubsan_handle_type_mismatch_v1") != NULL
            or dlsym(RTLD_DEFAULT, b"__llvm_profile_runtime") != NULL)
