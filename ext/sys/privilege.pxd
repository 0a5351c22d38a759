"""What a process gives up for good before it reads a byte of the network (capabilities(7), prctl(2))."""

# uid and gid changed, no groups, every capability set empty (bounding and ambient too), no_new_privs, no dumps, no core
# files; then read back. 0, or -errno with *step naming the call; the caller must end then: it may have lost a part. A
# process that is not root keeps its uid and gid, since there is nothing to change to, and loses the rest.
cdef int privilege_drop(unsigned int uid, unsigned int gid, const char** step) noexcept nogil
