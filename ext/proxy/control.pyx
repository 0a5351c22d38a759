"""See control.pxd. One COMMIT at a time: the keeper sends the next when this one is answered; reading pauses until then."""
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset, strcpy
from posix.unistd cimport close
from ext.core.loop cimport Source, loop_add, loop_again, source_close
from ext.core.protocol cimport (MSG_COMMIT, MSG_DRAIN, MSG_KEY, MSG_KEY_FORGET, MSG_POD_ATTACH, MSG_POD_DETACH, MSG_POD_GO, MSG_SOCKETS,
                                PROTOCOL_VERSION)
from ext.core.shm cimport DETAIL_DRAIN, FLAG_DT
from ext.core.text cimport Span
from ext.core.timer cimport Timer, timer_clear, timer_init, timer_set
from ext.proxy.accept cimport accept_shed, pod_attach, pod_detach
from ext.proxy.budget cimport budget_apply
from ext.proxy.conn cimport conn_end, pod_resume
from ext.proxy.forget cimport forget_prepare
from ext.proxy.held cimport held_wake
from ext.proxy.keys cimport key_forget, key_put
from ext.proxy.outbox cimport outbox_flush, send_applied, send_drained, send_failed, send_ready
from ext.proxy.permit cimport permit_review
from ext.proxy.recall cimport recall_begin
from ext.proxy.state cimport C_HTTP, X_IDLE, Captured, Conn, Worker, pod_find
from ext.proxy.stock cimport stock_fill
from ext.proxy.tunnel cimport tunnels_retire
from ext.proxy.upstream cimport pool_close
from ext.route.tables cimport ERROR_BYTES, Prepared, tables_apply, tables_prepare
from ext.sys.stream cimport MSG_DONTWAIT, iovec, msghdr

cdef enum:
    MESSAGE_BYTES = 4096        # the largest to a worker: POD_ATTACH with a list of four
    DESCRIPTORS_MAX = 253       # SCM_MAX_FD
    MESSAGES_A_TURN = 32
    ORPHAN_DRAIN_MS = 5000      # the keeper is gone: open connections may end within this time

cdef extern from "<sys/socket.h>" nogil:
    struct cmsghdr:
        size_t cmsg_len
        int cmsg_level
        int cmsg_type
    int SOL_SOCKET
    int SCM_RIGHTS
    int MSG_CMSG_CLOEXEC
    cmsghdr* CMSG_FIRSTHDR(msghdr* message)
    cmsghdr* CMSG_NXTHDR(msghdr* message, cmsghdr* at)
    unsigned char* CMSG_DATA(cmsghdr* at)
    size_t CMSG_LEN(size_t n)
    ssize_t recvmsg(int fd, msghdr* message, int flags)

cdef extern from "<sys/mman.h>" nogil:
    int PROT_READ
    int MAP_PRIVATE
    void* MAP_FAILED
    void* mmap(void* at, size_t size, int protection, int flags, int fd, long offset)
    int munmap(void* at, size_t size)

cdef extern from "<unistd.h>" nogil:
    int SEEK_END
    long lseek(int fd, long offset, int whence)


cdef int64_t receive(int fd, char* data, size_t size, int* fds, uint32_t* n) noexcept nogil:
    """One datagram and its descriptors: its size, 0 at the end, or -errno."""
    cdef char[1040] space           # CMSG_SPACE(253 * 4)
    cdef msghdr message
    cdef iovec piece
    cdef cmsghdr* at
    cdef ssize_t got
    cdef size_t count
    memset(&message, 0, sizeof(msghdr))
    piece.iov_base = data
    piece.iov_len = size
    message.msg_iov = &piece
    message.msg_iovlen = 1
    message.msg_control = space
    message.msg_controllen = sizeof(space)
    n[0] = 0
    got = recvmsg(fd, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC)
    if got < 0:
        return -errno
    at = CMSG_FIRSTHDR(&message)
    while at != NULL:
        if at.cmsg_level == SOL_SOCKET and at.cmsg_type == SCM_RIGHTS:
            count = (at.cmsg_len - CMSG_LEN(0)) // sizeof(int)
            if n[0] + count <= DESCRIPTORS_MAX:
                memcpy(fds + n[0], CMSG_DATA(at), count * sizeof(int))
                n[0] += <uint32_t>count
        at = CMSG_NXTHDR(&message, at)
    return got


cdef void on_event(Source* source, uint32_t events) noexcept nogil:
    cdef Worker* w = <Worker*>source.owner
    cdef char[4096] data
    cdef int[253] fds
    cdef uint32_t n, i
    cdef int64_t size
    cdef int _turn
    outbox_flush(w)
    for _turn in range(MESSAGES_A_TURN):
        if not source.readable or w.pending_fd >= 0:
            return
        size = receive(source.fd, data, sizeof(data), fds, &n)
        if size == -EINTR:
            continue
        if size == -EAGAIN:
            source.readable = 0
            return
        if size <= 0:
            orphaned(w)
            return
        if not handle(w, data, <uint32_t>size, fds, n):
            for i in range(n):
                close(fds[i])
    loop_again(&w.loop, source)


cdef void lost(Worker* w, uint32_t sequence) noexcept nogil:
    """A process without a free descriptor gets the message alone (MSG_CTRUNC, unix(7)). Transaction 0: the next try may be luckier."""
    accept_shed(w)
    send_failed(w, sequence, 0, b"no descriptor came with it: the worker has none free (its limit of open files)")


cdef bint handle(Worker* w, const char* data, uint32_t size, const int* fds, uint32_t n) noexcept nogil:
    """True: the descriptors are taken care of. What is malformed or unknown is passed over: a newer keeper may say more."""
    cdef uint16_t kind, version
    cdef uint32_t sequence, handle_, count, milliseconds = ORPHAN_DRAIN_MS
    cdef uint8_t family
    cdef Captured* pod
    cdef Span identity
    if size < 8:
        return False
    memcpy(&kind, data, 2)
    memcpy(&version, data + 2, 2)
    memcpy(&sequence, data + 4, 4)
    data += 8
    size -= 8
    if version != PROTOCOL_VERSION:
        return False
    if (kind == MSG_COMMIT or kind == MSG_KEY) and n != 1:
        lost(w, sequence)
        return False
    if kind == MSG_COMMIT:
        w.pending_fd = fds[0]
        w.pending_sequence = sequence
        return True
    if kind == MSG_DRAIN:
        if size >= 4:
            memcpy(&milliseconds, data, 4)
        w.drain_sequence = sequence
        control_drain(w, milliseconds)
        return False
    if size < 4:
        return False
    memcpy(&handle_, data, 4)
    if kind == MSG_KEY and size >= 8:
        memcpy(&identity.n, data + 4, 4)
        identity.p = data + 8
        return identity.n == size - 8 and key_put(w, handle_, identity, fds[0])
    if kind == MSG_KEY_FORGET:
        key_forget(w, handle_)
        return False
    if kind == MSG_POD_ATTACH and size >= 8:
        memcpy(&count, data + 4, 4)
        if count != n:
            lost(w, sequence)
        if count != n or size < 8 + count:
            return False
        pod_attach(w, handle_, <const uint8_t*>data + 8, fds, n)
        return True
    pod = pod_find(w, handle_)
    if pod == NULL:
        return False
    if kind == MSG_POD_DETACH:
        end_idle(pod, True)
        pod_detach(pod)
        return False
    if kind == MSG_POD_GO:
        tunnels_retire(pod)
        end_idle(pod, True)
        pool_close(pod)
        return False
    if kind == MSG_SOCKETS and size >= 5:
        family = <uint8_t>data[4]
        if family != 4 and family != 6:
            return False
        stock_fill(pod, family, fds, n)
        return True
    return False


cdef void control_apply(Worker* w) noexcept nogil:
    cdef char[ERROR_BYTES] error
    cdef void* data
    cdef Prepared* prepared = NULL
    cdef Captured* pod
    cdef uint64_t transaction = 0, judgement, recalls
    cdef int fd = w.pending_fd
    cdef int64_t size = lseek(fd, 0, SEEK_END)      # fstat is one that takes a path in this libc, which seccomp cannot look at
    error[0] = 0
    if size <= 0:
        strcpy(error, b"the transaction's memfd is empty or cannot be read")
    else:
        data = mmap(NULL, size, PROT_READ, MAP_PRIVATE, fd, 0)
        if data == MAP_FAILED:
            strcpy(error, b"the transaction's memfd cannot be mapped")
        else:
            if size >= 16:
                memcpy(&transaction, <char*>data + 8, 8)
            prepared = tables_prepare(w.tables, <const char*>data, size, error)
            munmap(data, size)
    close(fd)
    w.pending_fd = -1
    if prepared == NULL:
        send_failed(w, w.pending_sequence, transaction, error)
    else:
        forget_prepare(w, prepared)
        judgement = w.tables.judgement
        recalls = w.tables.recalls
        tables_apply(w.tables, prepared)
        if w.tables.judgement != judgement:
            permit_review(w)
        if w.tables.recalls != recalls:
            recall_begin(w)
        budget_apply(w)
        pod = w.first_pod
        while pod != NULL:              # the bound of connections may have been raised
            pod_resume(pod)
            pod = pod.next
        send_applied(w, w.pending_sequence, transaction)
        if not w.ready:
            w.ready = 1
            send_ready(w, transaction)
        held_wake(w)
    loop_again(&w.loop, &w.control)     # what came behind it


# ---- the end ---------------------------------------------------------------------------------------------------------------------

cdef void end_idle(Captured* pod, bint joined) noexcept nogil:
    """Connections of HTTP between two requests. `joined`: those in memory alone, which nobody outside sees that this pod has."""
    cdef Conn* c = pod.first_conn
    cdef Conn* after
    while c != NULL:
        after = c.next
        if c.state == C_HTTP and c.x.state == X_IDLE and (not joined or (c.near != NULL and not c.source.readable)):
            conn_end(c, 0, 0, False)
        c = after


cdef void control_drain(Worker* w, unsigned int milliseconds) noexcept nogil:
    cdef Captured* pod = w.first_pod
    cdef Captured* after
    w.draining = 1
    while pod != NULL:
        after = pod.next
        pod_detach(pod)
        pod = after
    pod = w.first_pod
    while pod != NULL:
        after = pod.next
        end_idle(pod, False)
        pod = after
    timer_set(&w.loop.timers, &w.drain_timer, w.loop.now_ns + <uint64_t>milliseconds * 1000000)
    control_check_drained(w)


cdef void control_check_drained(Worker* w) noexcept nogil:
    if w.draining and w.n_conns == 0 and w.n_tunnels == 0 and not w.stop:
        finish(w)


cdef void on_drain_over(Timer* timer) noexcept nogil:
    cdef Worker* w = <Worker*>timer.owner
    cdef Captured* pod = w.first_pod
    cdef Captured* after
    while pod != NULL:
        after = pod.next
        while pod.first_conn != NULL:
            conn_end(pod.first_conn, FLAG_DT, DETAIL_DRAIN, True)
        pod = after
    finish(w)


cdef void finish(Worker* w) noexcept nogil:
    timer_clear(&w.loop.timers, &w.drain_timer)
    w.stop = 1
    if not w.orphaned:
        send_drained(w, w.drain_sequence)


cdef void orphaned(Worker* w) noexcept nogil:
    """The keeper is gone: nobody can make sockets, and the next keeper needs the ports. Finish what is open, then end."""
    w.orphaned = 1
    source_close(&w.loop, &w.control)
    control_drain(w, ORPHAN_DRAIN_MS)


cdef int control_open(Worker* w, int fd) noexcept nogil:
    w.control.fd = fd
    w.control.owner = w
    w.control.ready = on_event
    w.control.shared = 1
    w.pending_fd = -1
    timer_init(&w.drain_timer, on_drain_over, w)
    return loop_add(&w.loop, &w.control)
