"""See outbox.pxd. Datagrams lie one behind the other, each behind its length (u32)."""
from libc.errno cimport EAGAIN, EINTR
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memmove, strlen
from ext.core.protocol cimport (MSG_APPLIED, MSG_DRAINED, MSG_FAILED, MSG_MISS, MSG_NEED_SOCKETS, MSG_READY,
                                PROTOCOL_VERSION)
from ext.sys.stream cimport stream_write


cdef int send_message(Worker* w, uint16_t kind, uint32_t sequence, const char* payload, uint32_t size) noexcept nogil:
    cdef uint16_t version = PROTOCOL_VERSION
    cdef uint32_t length = 8 + size
    cdef uint32_t spare = OUTBOX_SPARE if kind == MSG_MISS or kind == MSG_NEED_SOCKETS else 0
    cdef char* at
    if w.outbox.start > 0 and w.outbox.end + 4 + length > w.outbox.size:
        memmove(w.outbox.data, w.outbox.data + w.outbox.start, w.outbox.end - w.outbox.start)
        w.outbox.end -= w.outbox.start
        w.outbox.start = 0
    if w.outbox.end + 4 + length + spare > w.outbox.size:
        return -1
    at = w.outbox.data + w.outbox.end
    memcpy(at, &length, 4)
    memcpy(at + 4, &kind, 2)
    memcpy(at + 6, &version, 2)
    memcpy(at + 8, &sequence, 4)
    if size > 0:
        memcpy(at + 12, payload, size)
    w.outbox.end += 4 + length
    outbox_flush(w)
    return 0


cdef void outbox_flush(Worker* w) noexcept nogil:
    cdef uint32_t length
    cdef int64_t n
    while w.outbox.start < w.outbox.end and w.control.fd >= 0:
        memcpy(&length, w.outbox.data + w.outbox.start, 4)
        n = stream_write(w.control.fd, w.outbox.data + w.outbox.start + 4, length)
        if n == -EINTR:
            continue
        if n == -EAGAIN:
            return                      # an edge comes when the keeper has read
        w.outbox.start += 4 + length    # sent, or the keeper is gone and the control socket's end says so
    w.outbox.start = w.outbox.end = 0


cdef int send_need_sockets(Worker* w, uint32_t handle, uint8_t family, uint32_t n) noexcept nogil:
    cdef char[7] payload
    cdef uint16_t count = <uint16_t>n
    memcpy(payload, &handle, 4)
    payload[4] = <char>family
    memcpy(payload + 5, &count, 2)
    return send_message(w, MSG_NEED_SOCKETS, 0, payload, 7)


cdef int send_miss(Worker* w, const char* key, uint32_t size) noexcept nogil:
    cdef char[1028] payload
    if size > 1024:
        return -1
    memcpy(payload, &size, 4)
    memcpy(payload + 4, key, size)
    w.stats.misses += 1
    return send_message(w, MSG_MISS, 0, payload, 4 + size)


cdef void send_applied(Worker* w, uint32_t sequence, uint64_t transaction) noexcept nogil:
    send_message(w, MSG_APPLIED, sequence, <const char*>&transaction, 8)


cdef void send_ready(Worker* w, uint64_t transaction) noexcept nogil:
    send_message(w, MSG_READY, 0, <const char*>&transaction, 8)


cdef void send_failed(Worker* w, uint32_t sequence, uint64_t transaction, const char* text) noexcept nogil:
    cdef char[1036] payload
    cdef uint32_t n = <uint32_t>strlen(text)
    if n > 1024:
        n = 1024
    memcpy(payload, &transaction, 8)
    memcpy(payload + 8, &n, 4)
    memcpy(payload + 12, text, n)
    send_message(w, MSG_FAILED, sequence, payload, 12 + n)


cdef void send_drained(Worker* w, uint32_t sequence) noexcept nogil:
    send_message(w, MSG_DRAINED, sequence, NULL, 0)
