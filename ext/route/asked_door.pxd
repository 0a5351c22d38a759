"""A Span points into the bytes that it was made of, which the caller keeps."""
from libc.stdint cimport uint16_t, uint32_t
from ext.core.text cimport Span
from ext.wire.edit cimport HeaderOp
from ext.wire.http1 cimport Head
from ext.route cimport policy, shapes


cdef Span span(bytes text)
cdef str text_of(Span text)
cdef str key_of(const shapes.Slot* slot)
cdef shapes.Address address_of(object ip)
cdef str ip_of(const shapes.Address* address)
cdef list edits_of(HeaderOp* ops, uint32_t n)


cdef class Request:
    cdef Head* head
    cdef list keep
    cdef bytes own(self, text)


cdef class Question:
    cdef policy.Asked asked
    cdef shapes.IdentityParts parts
    cdef shapes.Address source
    cdef shapes.Address destination
    cdef bytes who
