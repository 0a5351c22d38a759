"""See privilege.pxd."""
from libc.stdint cimport uint32_t
from libc.string cimport memset

cdef extern from "<unistd.h>" nogil:
    int setresuid(unsigned int r, unsigned int e, unsigned int s)
    int setresgid(unsigned int r, unsigned int e, unsigned int s)
    unsigned int geteuid()
    long syscall(long number, ...)

cdef extern from "<grp.h>" nogil:
    int setgroups(size_t n, const unsigned int* groups)

cdef extern from "<sys/syscall.h>" nogil:
    enum:
        SYS_capset
        SYS_capget

cdef extern from "<sys/prctl.h>" nogil:
    int prctl(int option, unsigned long a, unsigned long b, unsigned long c, unsigned long d)
    enum:
        PR_SET_NO_NEW_PRIVS
        PR_SET_DUMPABLE
        PR_CAPBSET_DROP
        PR_CAP_AMBIENT
        PR_CAP_AMBIENT_CLEAR_ALL
        PR_SET_KEEPCAPS

cdef extern from "<sys/resource.h>" nogil:
    enum:
        RLIMIT_CORE
    struct rlimit:
        unsigned long rlim_cur
        unsigned long rlim_max
    int setrlimit(int resource, const rlimit* limit)

cdef struct CapHeader:
    uint32_t version
    int pid

cdef struct CapData:
    uint32_t effective
    uint32_t permitted
    uint32_t inheritable

cdef enum:
    CAPABILITY_VERSION_3 = 0x20080522
    CAPABILITIES = 64               # more than any kernel has: dropping an unknown one fails, and that ends the loop

PRIVILEGE_STEPS = ("", "empty the bounding set", "clear ambient capabilities", "leave all groups", "change the group", "change the user",
                   "clear all capabilities", "set no_new_privs", "forbid dumps", "forbid core files", "verify that nothing is left")


cdef int privilege_drop(unsigned int uid, unsigned int gid) noexcept nogil:
    cdef CapHeader header
    cdef CapData data[2]
    cdef rlimit none
    cdef int capability = 0
    if uid == 0 or gid == 0:
        return -5
    while capability < CAPABILITIES and prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) == 0:
        capability += 1
    if capability == 0:
        return -1
    if prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) != 0:
        return -2
    if setgroups(0, NULL) != 0:
        return -3
    if setresgid(gid, gid, gid) != 0:
        return -4
    if setresuid(uid, uid, uid) != 0:
        return -5
    memset(&header, 0, sizeof(header))
    memset(data, 0, sizeof(data))
    header.version = CAPABILITY_VERSION_3
    if syscall(SYS_capset, &header, data) != 0:
        return -6
    if prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        return -7
    if prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        return -8
    none.rlim_cur = 0
    none.rlim_max = 0
    if setrlimit(RLIMIT_CORE, &none) != 0:
        return -9
    memset(data, 0xff, sizeof(data))
    header.version = CAPABILITY_VERSION_3
    if syscall(SYS_capget, &header, data) != 0 or geteuid() != uid or setresuid(0, 0, 0) == 0:
        return -10
    if data[0].effective | data[1].effective | data[0].permitted | data[1].permitted | data[0].inheritable \
            | data[1].inheritable:
        return -10
    return 0
