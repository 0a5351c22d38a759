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


cdef int authority_read(const char* text, uint32_t n, Peer* out) noexcept nogil:
    cdef char[48] ip
    cdef uint32_t port = 0, i, size
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
    if n == 0 or n > 5 or text[0] == 48:
        return -1
    for i in range(n):
        if text[i] < 48 or text[i] > 57:
            return -1
        port = port * 10 + text[i] - 48
    if port > 65535 or inet_pton(AF_INET6 if six else AF_INET, ip, out.ip) != 1:
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
