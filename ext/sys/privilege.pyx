"""See privilege.pxd. The order matters: groups and the bounding set need what setresuid takes away."""
from libc.errno cimport EPERM, errno
from libc.stdint cimport uint32_t
from libc.string cimport memset

cdef extern from "<sys/prctl.h>" nogil:
    int PR_SET_DUMPABLE
    int PR_GET_DUMPABLE
    int PR_SET_NO_NEW_PRIVS
    int PR_GET_NO_NEW_PRIVS
    int PR_CAPBSET_DROP
    int PR_CAPBSET_READ
    int PR_CAP_AMBIENT
    int PR_CAP_AMBIENT_CLEAR_ALL
    int PR_CAP_AMBIENT_IS_SET
    int prctl(int option, unsigned long a, unsigned long b, unsigned long c, unsigned long d)

cdef extern from "<sys/resource.h>" nogil:
    struct rlimit:
        unsigned long rlim_cur
        unsigned long rlim_max
    int RLIMIT_CORE
    int setrlimit(int what, const rlimit* limit)
    int getrlimit(int what, rlimit* limit)

cdef extern from "<grp.h>" nogil:
    int setgroups(size_t n, const unsigned int* groups)

cdef extern from "<unistd.h>" nogil:
    unsigned int geteuid()
    int getgroups(int size, unsigned int* groups)
    int getresuid(unsigned int* real, unsigned int* effective, unsigned int* saved)
    int getresgid(unsigned int* real, unsigned int* effective, unsigned int* saved)
    int setresuid(unsigned int real, unsigned int effective, unsigned int saved)
    int setresgid(unsigned int real, unsigned int effective, unsigned int saved)
    long syscall(long number, ...)

cdef extern from "<sys/syscall.h>" nogil:
    long SYS_capget
    long SYS_capset

cdef extern from "<linux/capability.h>" nogil:
    uint32_t _LINUX_CAPABILITY_VERSION_3
    struct header "__user_cap_header_struct":
        uint32_t version
        int pid
    struct sets "__user_cap_data_struct":
        uint32_t effective
        uint32_t permitted
        uint32_t inheritable

cdef enum:
    CAPABILITIES = 64               # the kernel has 41; a number it does not know reads as -EINVAL


cdef int privilege_drop(unsigned int uid, unsigned int gid, const char** step) noexcept nogil:
    cdef header head
    cdef sets[2] none
    cdef rlimit core
    cdef unsigned long cap
    cdef bint root = geteuid() == 0
    core.rlim_cur = core.rlim_max = 0
    step[0] = b"setrlimit(RLIMIT_CORE)"
    if setrlimit(RLIMIT_CORE, &core) != 0:
        return -errno
    step[0] = b"prctl(PR_CAP_AMBIENT_CLEAR_ALL)"
    if prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) != 0:
        return -errno
    if root:
        step[0] = b"the uid or gid to change to, which must not be root's,"
        if uid == 0 or gid == 0:
            return -EPERM
        for cap in range(CAPABILITIES):
            step[0] = b"prctl(PR_CAPBSET_DROP)"
            if prctl(PR_CAPBSET_READ, cap, 0, 0, 0) == 1 and prctl(PR_CAPBSET_DROP, cap, 0, 0, 0) != 0:
                return -errno
        step[0] = b"setgroups"
        if setgroups(0, NULL) != 0:
            return -errno
        step[0] = b"setresgid"
        if setresgid(gid, gid, gid) != 0:
            return -errno
        step[0] = b"setresuid"
        if setresuid(uid, uid, uid) != 0:
            return -errno
    memset(&head, 0, sizeof(header))
    memset(none, 0, sizeof(none))
    head.version = _LINUX_CAPABILITY_VERSION_3
    step[0] = b"capset"
    if syscall(SYS_capset, &head, none) != 0:
        return -errno
    step[0] = b"prctl(PR_SET_NO_NEW_PRIVS)"
    if prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        return -errno
    step[0] = b"prctl(PR_SET_DUMPABLE)"
    if prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        return -errno
    return verify(root, uid, gid, step)


cdef int verify(bint root, unsigned int uid, unsigned int gid, const char** step) noexcept nogil:
    """What was set is read back: a security module or an old kernel may answer 0 and do less."""
    cdef header head
    cdef sets[2] now
    cdef rlimit core
    cdef unsigned int real, effective, saved
    cdef unsigned long cap
    cdef int i
    step[0] = b"the check of RLIMIT_CORE"
    if getrlimit(RLIMIT_CORE, &core) != 0 or core.rlim_cur != 0 or core.rlim_max != 0:
        return -EPERM
    if root:
        step[0] = b"the check of uid"
        if getresuid(&real, &effective, &saved) != 0 or real != uid or effective != uid or saved != uid:
            return -EPERM
        step[0] = b"the check of gid"
        if getresgid(&real, &effective, &saved) != 0 or real != gid or effective != gid or saved != gid:
            return -EPERM
        step[0] = b"the check of groups"
        if getgroups(0, NULL) != 0:
            return -EPERM
        for cap in range(CAPABILITIES):
            step[0] = b"the check of the bounding set"
            if prctl(PR_CAPBSET_READ, cap, 0, 0, 0) == 1:
                return -EPERM
    for cap in range(CAPABILITIES):
        step[0] = b"the check of the ambient set"
        if prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_IS_SET, cap, 0, 0) == 1:
            return -EPERM
    memset(&head, 0, sizeof(header))
    memset(now, 0xff, sizeof(now))
    head.version = _LINUX_CAPABILITY_VERSION_3
    step[0] = b"the check of capabilities"
    if syscall(SYS_capget, &head, now) != 0:
        return -errno
    for i in range(2):
        if now[i].effective or now[i].permitted or now[i].inheritable:
            return -EPERM
    step[0] = b"the check of no_new_privs and dumps"
    if prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) != 1 or prctl(PR_GET_DUMPABLE, 0, 0, 0, 0) != 0:
        return -EPERM
    return 0
