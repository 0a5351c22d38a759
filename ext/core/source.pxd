"""Reading, writing and ending a Source, whether a socket or something else carries it.

A Source with a descriptor costs what the system call costs, and one comparison. One with a Carrier has no descriptor (`fd` is CARRIED
while it is open): its Carrier does what the kernel would, with the same results (bytes, 0 at the end, -errno) and the same edges, and
wakes it by loop_again.
"""
from libc.errno cimport EAGAIN, errno
from libc.stdint cimport int64_t
from ext.core.loop cimport Source
from ext.sys.stream cimport (MSG_DONTWAIT, MSG_PEEK, SHUT_WR, recv, shutdown, stream_abort, stream_error, stream_read, stream_write,
                             stream_write2)

cdef inline int64_t source_read(Source* source, void* data, size_t size) noexcept nogil:
    if source.carrier == NULL:
        return stream_read(source.fd, data, size)
    return source.carrier.read(source, data, size)

cdef inline int64_t source_write(Source* source, const void* data, size_t size) noexcept nogil:
    if source.carrier == NULL:
        return stream_write(source.fd, data, size)
    return source.carrier.write(source, data, size)

# Two pieces at once, see stream_write2.
cdef inline int64_t source_write2(Source* source, const void* a, size_t na, const void* b, size_t nb, bint last) noexcept nogil:
    cdef int64_t n = 0, m
    if source.carrier == NULL:
        return stream_write2(source.fd, a, na, b, nb, last)
    if na > 0:
        n = source.carrier.write(source, a, na)
        if n < <int64_t>na or nb == 0:
            return n
    m = source.carrier.write(source, b, nb)
    return n + m if m >= 0 else m if n == 0 else n

# The writing side ends, behind what was written.
cdef inline void source_shut(Source* source) noexcept nogil:
    if source.carrier == NULL:
        shutdown(source.fd, SHUT_WR)
    else:
        source.carrier.shut(source)

# The next source_close says reset instead of an end.
cdef inline void source_abort(Source* source) noexcept nogil:
    if source.carrier == NULL:
        stream_abort(source.fd)
    elif source.fd >= 0:
        source.carrier.abort(source)

# Of one that was being connected: 0 or -errno.
cdef inline int source_error(Source* source) noexcept nogil:
    if source.carrier == NULL:
        return stream_error(source.fd)
    return source.carrier.error(source)

# Open, and not a byte to read: asked of the kernel, since its event may not have been seen yet.
cdef inline bint source_silent(Source* source) noexcept nogil:
    cdef char byte
    if source.carrier == NULL:
        return recv(source.fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT) < 0 and errno == EAGAIN
    return source.carrier.silent(source)
