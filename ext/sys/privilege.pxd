"""Giving up every privilege, for good, and checking that it is gone."""

# 0, or minus the number of the step that failed (names: PRIVILEGE_STEPS in privilege.pyx), errno still set.
cdef int privilege_drop(unsigned int uid, unsigned int gid) noexcept nogil
