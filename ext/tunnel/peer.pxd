"""Who the other side of a tunnel says it is, and whether to believe it."""
from libc.stdint cimport uint32_t
from ext.tunnel.openssl cimport X509, X509_STORE_CTX
from ext.tunnel.tls cimport Fault

cdef enum:
    SCHEME_BYTES = 9            # spiffe://

# The one URI of a certificate's SAN into `out` (IDENTITY_MAX), or TLS_NO_IDENTITY.
cdef Fault read_identity(X509* certificate, char* out, uint32_t* n) noexcept nogil
# Length of the trust domain behind `spiffe://`; 0: it is no SPIFFE ID.
cdef uint32_t domain_of(const char* identity, uint32_t n) noexcept nogil
# libcrypto's callback for one thing that it does not like about a chain.
cdef int forgive(int ok, X509_STORE_CTX* context) noexcept nogil
# libssl's callback for a whole chain: what is wrong goes into `fault` and `why` of its Tls.
cdef int believe(X509_STORE_CTX* context, void* unused) noexcept nogil
