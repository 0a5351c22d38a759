"""HTTP/1.1 read by the letter (RFC 9112), and nothing forgiven: what a worker writes must read well. It shares no line with ext/wire."""
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memchr, memcmp

cdef enum Read:
    READ_WHOLE = 1
    READ_PART = 0               # it may become a message
    READ_WRONG = -1

cdef struct Message:
    size_t head
    size_t size                 # head and body
    uint64_t length             # Content-Length
    uint16_t status
    uint8_t has_length
    uint8_t chunked
    uint8_t hosts
    uint8_t minor               # of a request: HTTP/1.0 or 1.1
    uint8_t to_end              # of a response: until the connection ends
    uint8_t asks_tunnel         # of a request: CONNECT, or Upgrade
    uint8_t tunnel              # of a response: what follows is opaque
    uint32_t tag                # x-tag, as `tag_of` has it; 0: none

cdef inline bint token(char c) noexcept nogil:
    return c > 32 and c < 127 and memchr(b"\"(),/:;<=>?@[\\]{}", c, 17) == NULL

cdef inline char lower(char c) noexcept nogil:
    return <char>(c + 32) if 65 <= c <= 90 else c

cdef inline bint named(const char* name, size_t n, const char* want, size_t n_want) noexcept nogil:
    cdef size_t i
    if n != n_want:
        return False
    for i in range(n):
        if lower(name[i]) != want[i]:
            return False
    return True

# Eight hexadecimal digits, or 0.
cdef inline uint32_t tag_of(const char* p, size_t n) noexcept nogil:
    cdef uint32_t value = 0
    cdef size_t i
    if n != 8:
        return 0
    for i in range(8):
        if 48 <= p[i] <= 57:
            value = value * 16 + <uint32_t>(p[i] - 48)
        elif 97 <= p[i] <= 102:
            value = value * 16 + <uint32_t>(p[i] - 87)
        else:
            return 0
    return value

# Where the line that starts at `at` ends (its CR), or -1: not yet, -2: a bare CR, LF, or a NUL.
cdef inline int64_t line_end(const char* p, size_t size, size_t at) noexcept nogil:
    while at < size:
        if p[at] == 13:
            if at + 1 == size:
                return -1
            return <int64_t>at if p[at + 1] == 10 else -2
        if p[at] == 10 or p[at] == 0:
            return -2
        at += 1
    return -1

cdef inline int read_number(const char* p, size_t n, uint64_t* out) noexcept nogil:
    cdef size_t i
    out[0] = 0
    if n == 0 or n > 18:
        return -1
    for i in range(n):
        if not 48 <= p[i] <= 57:
            return -1
        out[0] = out[0] * 10 + <uint64_t>(p[i] - 48)
    return 0

cdef inline int read_field(const char* p, size_t n, Message* m) noexcept nogil:
    cdef size_t name = 0, at, end = n
    while name < n and token(p[name]):
        name += 1
    if name == 0 or name == n or p[name] != 58:     # :
        return READ_WRONG
    at = name + 1
    while at < end and (p[at] == 32 or p[at] == 9):
        at += 1
    while end > at and (p[end - 1] == 32 or p[end - 1] == 9):
        end -= 1
    if named(p, name, b"content-length", 14):
        if m.has_length or read_number(p + at, end - at, &m.length) != 0:
            return READ_WRONG
        m.has_length = 1
    elif named(p, name, b"transfer-encoding", 17):
        if m.chunked or not named(p + at, end - at, b"chunked", 7):
            return READ_WRONG
        m.chunked = 1
    elif named(p, name, b"host", 4):
        m.hosts += 1
    elif named(p, name, b"upgrade", 7):
        m.asks_tunnel = 1
    elif named(p, name, b"x-tag", 5):
        m.tag = tag_of(p + at, end - at)
    return READ_WHOLE

cdef inline int read_start(const char* p, size_t n, bint response, Message* m) noexcept nogil:
    cdef size_t at = 0, target
    cdef uint64_t status = 0
    if response:
        if n < 13 or memcmp(p, b"HTTP/1.1 ", 9) != 0 or read_number(p + 9, 3, &status) != 0 or p[12] != 32 or status < 100:
            return READ_WRONG
        m.status = <uint16_t>status
        return READ_WHOLE
    while at < n and token(p[at]):
        at += 1
    if at == 0 or at == n or p[at] != 32:
        return READ_WRONG
    m.asks_tunnel = at == 7 and memcmp(p, b"CONNECT", 7) == 0
    target = at + 1
    at = target
    while at < n and p[at] != 32:
        at += 1
    if at == target or n - at != 9 or memcmp(p + at, b" HTTP/1.", 8) != 0 or not (p[at + 8] == 48 or p[at + 8] == 49):
        return READ_WRONG
    m.minor = <uint8_t>(p[at + 8] - 48)
    return READ_WHOLE

cdef inline int read_head(const char* p, size_t size, bint response, Message* m) noexcept nogil:
    cdef size_t at = 0
    cdef int64_t end
    cdef bint first = True
    m.head = m.size = m.length = 0
    m.status = m.has_length = m.chunked = m.hosts = m.minor = m.to_end = m.asks_tunnel = m.tunnel = 0
    m.tag = 0
    while True:
        end = line_end(p, size, at)
        if end < 0:
            return READ_PART if end == -1 else READ_WRONG
        if <size_t>end == at and not first:
            break
        if (read_start(p, end, response, m) if first else read_field(p + at, end - at, m)) < 0:
            return READ_WRONG
        first = False
        at = end + 2
    m.head = m.size = at + 2
    if m.chunked and (m.has_length or (not response and m.minor == 0)):
        return READ_WRONG
    if response:
        return READ_WHOLE
    return READ_WHOLE if m.hosts == 1 or (m.minor == 0 and m.hosts == 0) else READ_WRONG

cdef inline int read_chunks(const char* p, size_t size, size_t at, size_t* after) noexcept nogil:
    cdef int64_t end
    cdef uint64_t n
    cdef size_t digits
    while True:
        end = line_end(p, size, at)
        if end < 0:
            return READ_PART if end == -1 else READ_WRONG
        n = digits = 0
        while at < <size_t>end and (48 <= p[at] <= 57 or 97 <= lower(p[at]) <= 102):
            n = n * 16 + <uint64_t>(p[at] - 48 if p[at] <= 57 else lower(p[at]) - 87)
            digits += 1
            at += 1
        if digits == 0 or digits > 16 or (at < <size_t>end and p[at] != 59 and p[at] != 32 and p[at] != 9):
            return READ_WRONG
        at = end + 2
        if n == 0:
            break
        if n > size or at + n + 2 > size:
            return READ_PART
        if memcmp(p + at + n, b"\r\n", 2) != 0:
            return READ_WRONG
        at += n + 2
    while True:                                 # trailers
        end = line_end(p, size, at)
        if end < 0:
            return READ_PART if end == -1 else READ_WRONG
        if <size_t>end == at:
            after[0] = at + 2
            return READ_WHOLE
        if memchr(p + at, 58, end - at) == NULL or not token(p[at]):
            return READ_WRONG
        at = end + 2

# The message that starts at p. `bare`: a response that has no body, whatever it says (to HEAD).
cdef inline int read_message(const char* p, size_t size, bint response, bint bare, bint connect, Message* m) noexcept nogil:
    cdef int done = read_head(p, size, response, m)
    if done != READ_WHOLE:
        return done
    if response and (m.status == 101 or (connect and 200 <= m.status < 300)):
        m.tunnel = 1
        return READ_WHOLE
    if bare or (response and (m.status < 200 or m.status == 204 or m.status == 304)):
        return READ_WHOLE
    if m.chunked:
        return read_chunks(p, size, m.head, &m.size)
    if m.has_length:
        m.size = m.head + m.length
        return READ_WHOLE if m.size <= size else READ_PART
    if response:
        m.to_end = 1
        m.size = size
        return READ_PART
    return READ_WHOLE
