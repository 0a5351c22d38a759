"""See packet.pxd."""
from libc.errno cimport EINTR, EINVAL, EMSGSIZE, errno
from libc.stdint cimport int64_t, uint32_t
from libc.string cimport memcpy, memset
from posix.unistd cimport close
from ext.sys.stream cimport MSG_DONTWAIT, MSG_NOSIGNAL, SOL_SOCKET, iovec, msghdr, sendmsg

cdef extern from "<errno.h>" nogil:
    int ETOOMANYREFS

cdef extern from "<sys/socket.h>" nogil:
    struct cmsghdr:
        size_t cmsg_len
        int cmsg_level
        int cmsg_type
    int SCM_RIGHTS
    int MSG_CMSG_CLOEXEC
    int MSG_TRUNC
    int MSG_CTRUNC
    cmsghdr* CMSG_FIRSTHDR(msghdr* message)
    cmsghdr* CMSG_NXTHDR(msghdr* message, cmsghdr* at)
    unsigned char* CMSG_DATA(cmsghdr* at)
    size_t CMSG_LEN(size_t n)
    size_t CMSG_SPACE(size_t n)
    ssize_t recvmsg(int fd, msghdr* message, int flags)

cdef enum:
    CONTROL_BYTES = 1040            # CMSG_SPACE(253 * sizeof(int))

cdef union Control:                 # aligned as a cmsghdr must be
    size_t align
    char[CONTROL_BYTES] space


cdef int64_t packet_receive(int fd, void* data, size_t size, int* fds, uint32_t room, uint32_t* n) noexcept nogil:
    cdef Control control
    cdef msghdr message
    cdef iovec piece
    cdef cmsghdr* at
    cdef ssize_t got
    cdef int64_t problem = 0
    cdef size_t count, i
    cdef int one
    n[0] = 0
    if room > PACKET_DESCRIPTORS_MAX:
        room = PACKET_DESCRIPTORS_MAX
    memset(&message, 0, sizeof(msghdr))
    piece.iov_base = data
    piece.iov_len = size
    message.msg_iov = &piece
    message.msg_iovlen = 1
    # The kernel closes what finds no space. It rounds the space up, so the count is checked below too.
    message.msg_control = control.space
    message.msg_controllen = CMSG_SPACE(room * sizeof(int)) if room > 0 else 0
    while True:
        got = recvmsg(fd, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC)
        if got >= 0:
            break
        if errno != EINTR:
            return -errno
    if message.msg_flags & MSG_CTRUNC:
        problem = -ETOOMANYREFS
    at = CMSG_FIRSTHDR(&message)
    while at != NULL:
        if at.cmsg_level == SOL_SOCKET and at.cmsg_type == SCM_RIGHTS:
            count = (at.cmsg_len - CMSG_LEN(0)) // sizeof(int)
            for i in range(count):
                memcpy(&one, CMSG_DATA(at) + i * sizeof(int), sizeof(int))
                if n[0] < room:
                    fds[n[0]] = one
                    n[0] += 1
                else:
                    close(one)
                    problem = -ETOOMANYREFS
        at = CMSG_NXTHDR(&message, at)
    if message.msg_flags & MSG_TRUNC:
        problem = -EMSGSIZE
    if problem != 0:
        for i in range(n[0]):
            close(fds[i])
        n[0] = 0
        return problem
    return got


cdef int64_t packet_send(int fd, const void* data, size_t size, const int* fds, uint32_t n) noexcept nogil:
    cdef Control control
    cdef msghdr message
    cdef iovec piece
    cdef cmsghdr* at
    cdef ssize_t sent
    if n > PACKET_DESCRIPTORS_MAX:
        return -EINVAL
    memset(&message, 0, sizeof(msghdr))
    piece.iov_base = <void*>data
    piece.iov_len = size
    message.msg_iov = &piece
    message.msg_iovlen = 1
    if n > 0:
        memset(&control, 0, sizeof(Control))
        message.msg_control = control.space
        message.msg_controllen = CMSG_SPACE(n * sizeof(int))
        at = CMSG_FIRSTHDR(&message)
        at.cmsg_level = SOL_SOCKET
        at.cmsg_type = SCM_RIGHTS
        at.cmsg_len = CMSG_LEN(n * sizeof(int))
        memcpy(CMSG_DATA(at), fds, n * sizeof(int))
    while True:
        sent = sendmsg(fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL)
        if sent >= 0:
            return sent
        if errno != EINTR:
            return -errno
