"""One application connection in a tunnel, as its user sees it: like a socket, with the same results and the same edges.

`source.readable` falls at -EAGAIN or at a read that got less than it had room for, and rises (with a wake) when bytes come; `writable`
falls at -EAGAIN; `hung` says that the peer's end was received, `failed` that it is broken. Results are bytes, 0 at the end, -errno:
-EAGAIN, and behind the bytes that came before it -ECONNRESET (reset, or the tunnel ended) or -ENOMEM (the pod had no buffer for more).
"""
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t
from ext.core.buffer cimport Buffer, Buffers
from ext.core.loop cimport Source
from ext.core.text cimport Span
from ext.tunnel.shapes cimport Pad, Session, Stream

# A client's CONNECT; the texts may be empty, and are copied. NULL: no memory, or the session takes no more.
cdef Stream* hbone_open(Session* session, Source* source, Buffers* pool, const Span* authority, const Span* forwarded, const Span* baggage,
                        const Span* trace) noexcept nogil
# A server takes a CONNECT on, to be answered later. NULL: no memory (it was refused).
cdef Stream* hbone_accept(Session* session, int32_t id, bint ended, Source* source, Buffers* pool) noexcept nogil
# Or does not: with this status, and no Stream.
cdef void hbone_refuse(Session* session, int32_t id, uint16_t status) noexcept nogil
# 200 (bytes may be sent from now on), or another status, which ends it.
cdef void hbone_answer(Stream* stream, uint16_t status, const Span* baggage) noexcept nogil

cdef int64_t hbone_read(Stream* stream, void* data, size_t size) noexcept nogil
cdef int64_t hbone_write(Stream* stream, const void* data, size_t size) noexcept nogil
# The same without a copy where it can be: buffers of the stream's pool change hands. `take` gives a buffer with the bytes for one without
# memory; `give` takes some or all of the bytes, with or without the buffer. It leaves no copy where FRAME_HEAD bytes before them are free.
cdef int64_t hbone_take(Stream* stream, Buffer* b) noexcept nogil
cdef int64_t hbone_give(Stream* stream, Buffer* b) noexcept nogil
cdef void hbone_shut(Stream* stream) noexcept nogil             # our end, behind what was written
# Reset: behind what was written, as far as the peer's windows have room for it now; what they have not is dropped.
cdef void hbone_abort(Stream* stream) noexcept nogil
# Its user is gone: an end is sent behind what was written. The pointer is not to be used again.
cdef void hbone_drop(Stream* stream, Pad* pad) noexcept nogil

# ---- for session alone
cdef uint32_t stream_out(Stream* stream, char** data) noexcept nogil            # what is not sent yet
cdef void stream_sent(Stream* stream, uint32_t n) noexcept nogil
cdef int stream_received(Stream* stream, const uint8_t* data, uint32_t size) noexcept nogil      # 0, or -1: no memory for it
cdef void stream_ended(Stream* stream) noexcept nogil
cdef void stream_answered(Stream* stream, uint16_t status) noexcept nogil
cdef void stream_broken(Stream* stream, uint32_t code, int error) noexcept nogil    # HTTP/2 has ended it, well or not
cdef bint stream_stale(Stream* stream) noexcept nogil           # of one that was let go: it has had its time
