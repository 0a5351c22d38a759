"""See words.pxd."""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memchr, memcpy, memset
from ext.core.text cimport Span
from ext.proxy.state cimport Conn
from ext.route.shapes cimport Pod, Service
from ext.route.tables cimport pod_by_handle, service_by_index, tables_random

cdef extern from "<arpa/inet.h>" nogil:
    int AF_INET
    int AF_INET6
    const char* inet_ntop(int family, const void* address, char* out, unsigned int size)
    int inet_pton(int family, const char* text, void* out)

cdef extern from "<stdio.h>" nogil:
    int snprintf(char* out, size_t size, const char* how, ...)


cdef uint32_t authority_write(char* out, const Peer* peer) noexcept nogil:
    cdef char[48] ip
    cdef int n
    inet_ntop(AF_INET if peer.family == 4 else AF_INET6, peer.ip, ip, sizeof(ip))
    if peer.family == 4:
        n = snprintf(out, AUTHORITY_BYTES, b"%s:%u", <char*>ip, <uint32_t>peer.port)
    else:
        n = snprintf(out, AUTHORITY_BYTES, b"[%s]:%u", <char*>ip, <uint32_t>peer.port)
    return <uint32_t>n


cdef uint32_t port_read(const char* text, uint32_t n) noexcept nogil:
    """0: it is none."""
    cdef uint32_t port = 0, i
    if n == 0 or n > 5 or text[0] == 48:
        return 0
    for i in range(n):
        if text[i] < 48 or text[i] > 57:
            return 0
        port = port * 10 + text[i] - 48
    return port if port <= 65535 else 0


cdef int named_read(const char* text, uint32_t n, Span* name, uint16_t* port) noexcept nogil:
    cdef const char* colon = <const char*>memchr(text, 58, n) if n > 0 else NULL
    if colon == NULL or colon == text:
        return -1
    name.p = text
    name.n = <uint32_t>(colon - text)
    port[0] = <uint16_t>port_read(colon + 1, n - name.n - 1)
    return 0 if port[0] != 0 else -1


cdef inline char lower(char c) noexcept nogil:
    return c + 32 if 65 <= c <= 90 else c


cdef bint same_name(Span one, Span other) noexcept nogil:
    cdef uint32_t i
    if one.n != other.n:
        return False
    for i in range(one.n):
        if lower(one.p[i]) != lower(other.p[i]):
            return False
    return True


cdef Span forwarded_host(const char* text, uint32_t n) noexcept nogil:
    cdef Span found
    cdef Span name
    cdef Span wanted
    cdef uint32_t i = 0, start
    cdef bint quoted
    found.p = text
    found.n = 0
    wanted.p = b"host"
    wanted.n = 4
    while i < n:
        while i < n and (text[i] == 32 or text[i] == 59):       # between pairs: ; and spaces
            i += 1
        start = i
        while i < n and text[i] != 61 and text[i] != 59 and text[i] != 44:      # = ; ,
            i += 1
        if i == n or text[i] != 61:
            return found
        name.p = text + start
        name.n = i - start
        i += 1
        quoted = i < n and text[i] == 34
        i += quoted
        start = i
        while i < n and (text[i] != 34 if quoted else (text[i] != 59 and text[i] != 44 and text[i] != 32)):
            if text[i] == 92:
                return found            # no name has a backslash
            i += 1
        if same_name(name, wanted):
            found.p = text + start
            found.n = i - start if not quoted or i < n else 0
            return found
        i += quoted
        if i < n and text[i] == 44:
            return found                # the first element alone: the nearest proxy's
    return found


cdef int authority_read(const char* text, uint32_t n, Peer* out) noexcept nogil:
    cdef char[48] ip
    cdef uint32_t port, size
    cdef bint six = n > 0 and text[0] == 91         # [
    cdef const char* end
    memset(out, 0, sizeof(Peer))
    if six:
        text += 1
        n -= 1
    end = <const char*>memchr(text, 93 if six else 58, n) if n > 0 else NULL
    if end == NULL or end - text >= <int>sizeof(ip):
        return -1
    size = <uint32_t>(end - text)
    memcpy(ip, text, size)
    ip[size] = 0
    text += size + 1
    n -= size + 1
    if six:
        if n == 0 or text[0] != 58:
            return -1
        text += 1
        n -= 1
    port = port_read(text, n)
    if port == 0 or inet_pton(AF_INET6 if six else AF_INET, ip, out.ip) != 1:
        return -1
    out.family = 6 if six else 4
    out.port = <uint16_t>port
    return 0


cdef uint32_t forwarded_write(char* out, uint32_t size, const Conn* c) noexcept nogil:
    cdef char[AUTHORITY_BYTES] client
    cdef Service* service = service_by_index(c.w.tables, c.facts.service) if c.facts.service != 0 else NULL
    cdef int n
    authority_write(client, &c.client)
    if service != NULL:
        n = snprintf(out, size, b"for=\"%s\";host=%.*s", <char*>client, <int>service.hostname.n, service.hostname.p)
    else:
        n = snprintf(out, size, b"for=\"%s\"", <char*>client)
    return <uint32_t>n if 0 <= n < <int>size else 0


cdef Span behind(Span* rest) noexcept nogil:
    """Up to the next slash, which is taken too."""
    cdef const char* slash = <const char*>memchr(rest.p, 47, rest.n) if rest.n > 0 else NULL
    cdef Span part = rest[0]
    if slash != NULL:
        part.n = <uint32_t>(slash - rest.p)
        rest.p = slash + 1
        rest.n -= part.n + 1
    else:
        rest.n = 0
    return part


cdef uint32_t baggage_write(char* out, uint32_t size, const Conn* c) noexcept nogil:
    """From the workload's uid, `<cluster>//Pod/<namespace>/<name>` (istio.workload.Workload.uid)."""
    cdef const Pod* pod = pod_by_handle(c.w.tables, c.pod.handle)
    cdef Span rest, cluster, kind, namespace, name
    cdef int n
    if pod == NULL or pod.workload == NULL:
        return 0
    rest.p = pod.workload.key
    rest.n = pod.workload.key_len
    cluster = behind(&rest)
    behind(&rest)
    kind = behind(&rest)
    namespace = behind(&rest)
    name = rest
    if kind.n == 0 or namespace.n == 0 or name.n == 0:
        return 0
    n = snprintf(out, size, b"k8s.cluster.name=%.*s,k8s.namespace.name=%.*s,k8s.pod.name=%.*s", <int>cluster.n, cluster.p,
                 <int>namespace.n, namespace.p, <int>name.n, name.p)
    return <uint32_t>n if 0 <= n < <int>size else 0


cdef uint32_t trace_write(char* out, const Conn* c) noexcept nogil:
    cdef const char* hex = b"0123456789abcdef"
    cdef uint64_t[3] bits
    cdef uint8_t* byte = <uint8_t*>bits
    cdef int i, at = 3
    for i in range(3):
        bits[i] = tables_random(c.w.tables) | 1     # all zero is invalid (2.2.3)
    memcpy(out, b"00-", 3)
    for i in range(24):
        if i == 16:
            out[at] = 45
            at += 1
        out[at] = hex[byte[i] >> 4]
        out[at + 1] = hex[byte[i] & 15]
        at += 2
    memcpy(out + at, b"-00", 3)
    return at + 3
