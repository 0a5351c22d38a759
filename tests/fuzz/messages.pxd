"""Claims about a parsed head that several harnesses make."""
from libc.stdint cimport uint32_t
from libc.string cimport memcmp
from ext.core.text cimport Span
from ext.wire.http1 cimport Head

cdef inline bint same_text(Span a, Span b) noexcept nogil:
    return a.n == b.n and (a.n == 0 or memcmp(a.p, b.p, a.n) == 0)

cdef inline bint inside(Span s, const char* data, size_t size) noexcept nogil:
    return s.n == 0 or (s.p >= data and s.p + s.n <= data + size)

# The same facts, wherever the bytes lie.
cdef inline bint same_head(const Head* a, const Head* b) noexcept nogil:
    cdef uint32_t i
    if (a.size != b.size or a.n_headers != b.n_headers or a.status != b.status or a.method_id != b.method_id
            or a.version_minor != b.version_minor or a.framing != b.framing or a.keep_alive != b.keep_alive
            or a.expect_continue != b.expect_continue or a.upgrade != b.upgrade or a.has_query != b.has_query
            or a.has_length != b.has_length or a.chunked != b.chunked or a.te_trailers != b.te_trailers
            or a.content_length != b.content_length):
        return False
    if not (same_text(a.method, b.method) and same_text(a.target, b.target) and same_text(a.path, b.path)
            and same_text(a.query, b.query) and same_text(a.authority, b.authority) and same_text(a.reason, b.reason)
            and same_text(a.content_type, b.content_type)):
        return False
    for i in range(a.n_headers):
        if (a.headers[i].id != b.headers[i].id or a.headers[i].hop != b.headers[i].hop
                or not same_text(a.headers[i].name, b.headers[i].name) or not same_text(a.headers[i].value, b.headers[i].value)
                or not same_text(a.headers[i].line, b.headers[i].line)):
            return False
    return True
