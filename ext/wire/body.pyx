"""See body.pxd."""
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from ext.wire.chars cimport CH_HEX, CH_TOKEN, CHARS, CR, HTAB, LF, SP, ZERO, lower
from ext.wire.http1 cimport F_CHUNKED, F_LENGTH, F_NONE


cdef void body_start(Body* body, const Head* head) noexcept nogil:
    body.framing = head.framing
    body.state = B_DATA
    body.digits = body.last = 0
    body.trailer_bytes = body.name_hash = 0
    body.left = body.payload = 0
    if head.framing == F_NONE:
        body.state = B_DONE
    elif head.framing == F_LENGTH:
        body.left = head.content_length
        if body.left == 0:
            body.state = B_DONE
    elif head.framing == F_CHUNKED:
        body.state = B_SIZE


cdef inline uint32_t hash_byte(uint32_t h, uint8_t c) noexcept nogil:
    return (h ^ c) * <uint32_t>16777619         # FNV-1a


cdef inline uint32_t hash_text(const char* p, uint32_t n) noexcept nogil:
    cdef uint32_t h = <uint32_t>2166136261
    cdef uint32_t i
    for i in range(n):
        h = hash_byte(h, <uint8_t>p[i])
    return h


cdef int forbidden_trailer(uint32_t h) noexcept nogil:
    """Fields that frame or route (RFC 9110 6.5.1). Told by hash: a name that collides is refused too, which harms nobody."""
    return (h == hash_text(b"content-length", 14) or h == hash_text(b"transfer-encoding", 17) or h == hash_text(b"host", 4)
            or h == hash_text(b"connection", 10) or h == hash_text(b"upgrade", 7) or h == hash_text(b"te", 2)
            or h == hash_text(b"trailer", 7) or h == hash_text(b"keep-alive", 10) or h == hash_text(b"proxy-connection", 16))


cdef int64_t chunk_feed(Body* body, const uint8_t* p, size_t size) noexcept nogil:
    """Bytes taken, up to the message's end; -1: malformed."""
    cdef size_t i = 0
    cdef uint8_t c
    cdef uint64_t run
    while i < size and body.state != B_DONE:
        if body.state == B_DATA:
            run = size - i
            if run > body.left:
                run = body.left
            body.left -= run
            body.payload += run
            i += run
            if body.left == 0:
                body.state = B_DATA_CR
            continue
        c = p[i]
        i += 1
        if body.state == B_SIZE:
            if CHARS[c] & CH_HEX:
                body.digits += 1
                if body.digits > CHUNK_SIZE_DIGITS or body.left >> 59:      # stays below 2^63
                    return -1
                body.left = body.left * 16 + (c - ZERO if c <= b'9' else (c | 32) - 87)
            elif c == CR and body.digits:
                body.state = B_SIZE_LF
            else:
                return -1
        elif body.state == B_SIZE_LF:
            if c != LF:
                return -1
            body.digits = 0
            if body.left:
                body.state = B_DATA
            else:
                body.last = 1
                body.state = B_LINE
        elif body.state == B_DATA_CR:
            if c != CR:
                return -1
            body.state = B_DATA_LF
        elif body.state == B_DATA_LF:
            if c != LF:
                return -1
            body.state = B_SIZE
        elif body.state == B_END_LF:
            if c != LF:
                return -1
            body.state = B_DONE
        else:
            body.trailer_bytes += 1
            if body.trailer_bytes > TRAILER_MAX_BYTES or not trailer_byte(body, c):
                return -1
    return i


cdef inline int trailer_byte(Body* body, uint8_t c) noexcept nogil:
    """0: malformed."""
    if body.state == B_LINE:
        if c == CR:
            body.state = B_END_LF
            return 1
        if not CHARS[c] & CH_TOKEN:
            return 0
        body.name_hash = hash_byte(<uint32_t>2166136261, lower(c))
        body.state = B_NAME
    elif body.state == B_NAME:
        if c == b':':
            body.state = B_VALUE
            return not forbidden_trailer(body.name_hash)
        if not CHARS[c] & CH_TOKEN:
            return 0
        body.name_hash = hash_byte(body.name_hash, lower(c))
    elif body.state == B_VALUE:
        if c == CR:
            body.state = B_VALUE_LF
        elif c != HTAB and (c < SP or c == 127):
            return 0
    else:
        body.state = B_LINE
        return c == LF
    return 1


cdef int64_t body_feed(Body* body, const char* data, size_t size, uint8_t* done) noexcept nogil:
    cdef int64_t taken = 0
    done[0] = 0
    if body.state == B_BAD:
        return -1
    if body.state != B_DONE:
        if body.framing == F_CHUNKED:
            taken = chunk_feed(body, <const uint8_t*>data, size)
            if taken < 0:
                body.state = B_BAD
                return -1
        elif body.framing == F_LENGTH:
            taken = size if size < body.left else body.left
            body.left -= taken
            body.payload += taken
            if body.left == 0:
                body.state = B_DONE
        else:
            taken = size
            body.payload += size
    if body.state == B_DONE:
        done[0] = 1
    return taken
