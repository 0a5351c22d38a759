"""See trust.pxd."""
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from ext.core.blob cimport take_count, take_u32, take_u64
from ext.route.reader cimport cut, read_text, refuse, refuse_number, refuse_text, take
from ext.route.shapes cimport IdentityParts
from ext.route.slots cimport identity_split

cdef enum:
    ROOTS_MAX = 32
    LISTS_MAX = 64
    CHAIN_MAX = 16
    CERTIFICATE_BYTES = 65536
    LIST_BYTES = 4194304        # a revocation list of some 100,000 certificates
    LEAST_DER = 6               # of a str: its length and an empty SEQUENCE


cdef bint is_der(Span der) noexcept nogil:
    """One SEQUENCE of definite length (X.690 8.1.3, 10.1) that ends where the bytes do."""
    cdef const uint8_t* b = <const uint8_t*>der.p
    cdef uint32_t i, n
    cdef uint64_t size = 0
    if der.n < 2 or b[0] != 0x30:
        return False
    if b[1] < 0x80:
        return der.n == <uint32_t>2 + b[1]
    n = b[1] & 0x7f
    if n == 0 or n > 4 or der.n < 2 + n or b[2] == 0:
        return False
    for i in range(n):
        size = size << 8 | b[2 + i]
    return size >= 0x80 and size + 2 + n == der.n


cdef int read_list(Reader* r, uint32_t* n, Span** out, uint32_t least, uint32_t most, uint32_t size) noexcept nogil:
    cdef uint32_t i, count = take_count(&r.c, LEAST_DER)
    cdef Span* items
    if r.c.bad:
        return cut(r)
    if count < least or count > most:
        return refuse_number(r, b"number of certificates or lists", count)
    items = <Span*>take(r, count, sizeof(Span))
    if items == NULL:
        return -1
    for i in range(count):
        if read_text(r, &items[i], False) < 0:
            return -1
        if items[i].n > size:
            return refuse_number(r, b"bytes of a certificate or list", items[i].n)
        if not is_der(items[i]):
            return refuse_number(r, b"not DER: item", i)
    out[0] = items
    n[0] = count
    return 0


cdef int read_trust(Reader* r, Trust* trust) noexcept nogil:
    r.names.versions += 1
    trust.version = r.names.versions
    if read_list(r, &trust.n_roots, &trust.roots, 1, ROOTS_MAX, CERTIFICATE_BYTES) < 0:
        return -1
    return read_list(r, &trust.n_lists, &trust.lists, 0, LISTS_MAX, LIST_BYTES)


cdef int read_certificate(Reader* r, Certificate* certificate, Span identity) noexcept nogil:
    cdef IdentityParts parts
    if identity_split(identity, &parts) < 0:
        return refuse_text(r, b"identity is not spiffe://<trust domain>/ns/<namespace>/sa/<service account>", identity)
    r.names.versions += 1
    certificate.version = r.names.versions
    certificate.key = take_u32(&r.c)
    certificate.not_before = take_u64(&r.c)
    certificate.not_after = take_u64(&r.c)
    if r.c.bad:
        return cut(r)
    if certificate.key == 0:
        return refuse(r, b"0 is no key's number")
    if certificate.not_after <= certificate.not_before:
        return refuse(r, b"it ends before it begins")
    return read_list(r, &certificate.n_chain, &certificate.chain, 1, CHAIN_MAX, CERTIFICATE_BYTES)
