"""What Python asks tables with, in the words of C, and C's values for Python."""
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.stdint cimport uint16_t, uint32_t
from ext.core.arena cimport block_give, block_take
from ext.core.text cimport Span
from ext.wire.edit cimport EDIT_REMOVE, HeaderOp
from ext.wire.http1 cimport Head
from ext.route cimport shapes, slots, tables

import ipaddress

OPS = {1: "remove", 2: "set", 3: "add"}


cdef Span span(bytes text):
    cdef Span out
    out.p = PyBytes_AS_STRING(text)
    out.n = <uint32_t>PyBytes_GET_SIZE(text)
    return out


cdef str text_of(Span text):
    return text.p[:text.n].decode("utf-8", "replace")


cdef str key_of(const shapes.Slot* slot):
    return slot.key[:slot.key_len].decode("utf-8", "replace")


cdef shapes.Address address_of(object ip):
    cdef shapes.Address out
    cdef bytes packed = ipaddress.ip_address(ip).packed
    if len(packed) == 4:
        tables.address_from_v4(&out, PyBytes_AS_STRING(packed))
    else:
        tables.address_from_v6(&out, PyBytes_AS_STRING(packed))
    return out


cdef str ip_of(const shapes.Address* address):
    return str(ipaddress.ip_address(<bytes>(<const char*>address.ip)[:4 if address.family == 4 else 16]))


cdef list edits_of(HeaderOp* ops, uint32_t n):
    out = []
    for i in range(n):
        name = text_of(ops[i].name)
        out.append((OPS[ops[i].op], name) if ops[i].op == EDIT_REMOVE else (OPS[ops[i].op], name, text_of(ops[i].value)))
    return out


cdef class Request:
    """A request head as the parser would give it: `headers` are pairs, `target` may have a query."""

    def __cinit__(self, target="/", authority="", method="GET", headers=()):
        cdef uint32_t i = 0
        cdef bytes raw
        self.head = <Head*>block_take(sizeof(Head))
        if self.head == NULL or len(headers) > 100:
            raise MemoryError
        raw = target.encode()
        self.keep = [raw]
        self.head.target = span(raw)
        cdef Py_ssize_t mark = raw.find(b"?")
        self.head.path = self.head.target
        if mark >= 0:
            self.head.path.n = <uint32_t>mark
            self.head.query.p = self.head.target.p + mark + 1
            self.head.query.n = <uint32_t>(len(raw) - mark - 1)
            self.head.has_query = 1
        self.head.authority = span(self.own(authority))
        self.head.method = span(self.own(method))
        for name, value in headers:
            self.head.headers[i].name = span(self.own(name))
            self.head.headers[i].value = span(self.own(value))
            i += 1
        self.head.n_headers = i

    cdef bytes own(self, text):
        raw = text.encode()
        self.keep.append(raw)
        return raw

    def __dealloc__(self):
        block_give(self.head)


cdef class Question:
    """A connection that policies are asked about."""

    def __cinit__(self, identity, source, destination, uint16_t port):
        self.source = address_of(source)
        self.destination = address_of(destination)
        self.asked.source = &self.source
        self.asked.destination = &self.destination
        self.asked.port = port
        if identity is not None:
            self.who = identity.encode()
            if slots.identity_split(span(self.who), &self.parts) < 0:
                raise ValueError(f"{identity!r} is not spiffe://<trust domain>/ns/<namespace>/sa/<service account>")
            self.asked.who = &self.parts
