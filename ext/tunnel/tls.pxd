"""TLS 1.3 of a tunnel, on buffers: bytes in, bytes out. No descriptor; the clock is asked only by libcrypto, for a certificate's validity.

    Credentials     who we are and whom we believe: one identity's key and chain, the roots and revocation lists of its trust domain.
                    Counted: a new CERTIFICATE or TRUST makes new ones, connections that are open keep theirs.
    Tls             one connection: tls_init, then tls_handshake as bytes come until it says 1, then tls_read and tls_write; tls_free

Exactly: TLS 1.3, TLS_AES_128_GCM_SHA256 or TLS_AES_256_GCM_SHA384, X25519, ALPN `h2`, certificates on both sides, no SNI, no tickets,
no resumption. A peer's certificate must chain to a root of ours, be valid now, be for its side (extended key usage, where it has any),
not be in a revocation list, and name one URI in its SAN. Unknown revocation is believed, as ztunnel does. Then: a server wants the
client's trust domain to be its own, a client wants one of the identities that it expects.

Whoever calls tells each time where bytes come from (`given`, all of which is taken) and where they go (`sink`). Since what lies
decrypted inside libssl is no event of a descriptor, tls_read is called until it says 0.
"""
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from ext.core.text cimport Span
from ext.tunnel.openssl cimport SSL, SSL_CTX

cdef enum:
    IDENTITY_MAX = 512          # bytes of a SPIFFE ID here; SPIFFE allows 2,048 (SPIFFE-ID 2.3), Kubernetes' names make at most some 380
    TLS_ERROR_BYTES = 512       # of a text, with its NUL
    TLS_RECORD = 16384          # plain bytes of one record at most (RFC 8446 5.1)
    TLS_GROWTH = 320            # and how much longer it is encrypted, at most (RFC 8446 5.2)

cdef enum Fault:                # why there is no tunnel; texts: tls_text
    TLS_FINE = 0
    TLS_NO_MEMORY
    TLS_NO_CERTIFICATE          # the peer showed none
    TLS_UNTRUSTED               # its chain ends at no root of ours, or is broken
    TLS_EXPIRED
    TLS_NOT_YET
    TLS_REVOKED
    TLS_PURPOSE                 # extended key usage is for something else
    TLS_NO_IDENTITY             # no URI in the SAN, more than one, or none that can be an identity
    TLS_TRUST_DOMAIN            # the client's is not ours
    TLS_OTHER_IDENTITY          # the server is none of those that were expected
    TLS_VERSION                 # TLS 1.3 is not spoken, or no TLS at all
    TLS_ALPN                    # not h2
    TLS_ALERT                   # the peer refused us
    TLS_CLOSED                  # it ended within the handshake
    TLS_BROKEN                  # it broke the protocol
    TLS_FAULTS

cdef struct Sink:               # encrypted bytes on their way out
    char* data
    uint32_t n
    uint32_t size

cdef struct Credentials:
    uint32_t refs
    SSL_CTX* context            # of both sides
    uint64_t not_before         # s since 1970, of our certificate
    uint64_t not_after
    uint32_t identity_n
    uint32_t domain_at          # the trust domain's place in `identity`
    uint32_t domain_n
    char identity[512]          # the SAN of our certificate

cdef struct Tls:
    SSL* ssl                    # NULL: not begun, or freed
    Credentials* credentials    # held
    Span given
    Sink* sink
    const Span* expected        # of a client: identities, any of them; kept by the caller until the handshake is over
    uint32_t n_expected
    uint8_t server
    uint8_t done                # the handshake is over
    uint8_t ended               # the peer said so (close_notify)
    uint8_t fault               # Fault
    int why                     # X509_V_ERR_..., for the text; 0: none
    unsigned long error         # of libssl's queue, likewise
    uint32_t peer_n
    char peer[512]              # the peer's identity, also of one that was refused; not NUL-terminated

# Once, before seccomp: libssl loads what it needs, reads no file (no openssl.cnf), and asks no file later. 0, or -1.
cdef int tls_open() noexcept nogil

# Before tls_open, in a process of one thread that has not used OpenSSL yet: the buffers of records, which a connection has only while
# bytes pass, come from a list instead of the allocator. Does nothing elsewhere.
cdef void tls_keep_buffers() noexcept nogil

# From DER: `key` (PKCS#8 or SEC 1), `chain` (leaf first), `roots` (one at least), `crls` (or none). The leaf's SAN has exactly one URI,
# spiffe://<trust domain>/...; trust_domain must be that one. NULL: `error` (TLS_ERROR_BYTES) says what is wrong. Nothing of the
# arguments is kept.
cdef Credentials* credentials_new(const Span* key, const Span* chain, uint32_t n_chain, const Span* roots, uint32_t n_roots,
                                  const Span* crls, uint32_t n_crls, const Span* trust_domain, char* error) noexcept nogil
cdef void credentials_release(Credentials* credentials) noexcept nogil      # NULL does nothing

cdef inline Credentials* credentials_hold(Credentials* credentials) noexcept nogil:
    credentials.refs += 1
    return credentials

# Holds the credentials. `expected` only for a client. 0, or -1: no memory.
cdef int tls_init(Tls* tls, Credentials* credentials, bint server, const Span* expected, uint32_t n_expected) noexcept nogil
cdef void tls_free(Tls* tls) noexcept nogil             # twice does nothing

# 1: done, `peer` is known and believed. 0: more bytes are needed. -1: `fault`. What is in `sink` is to be sent in each case.
cdef int tls_handshake(Tls* tls) noexcept nogil
# Plain bytes; 0: none until more come, or `ended`; -1: `fault`.
cdef int64_t tls_read(Tls* tls, char* data, uint32_t size) noexcept nogil
# All of it, at most TLS_RECORD bytes, for which `sink` must have TLS_RECORD + TLS_GROWTH left. 0, or -1: `fault`.
cdef int tls_write(Tls* tls, const char* data, uint32_t size) noexcept nogil
# close_notify into `sink`.
cdef void tls_end(Tls* tls) noexcept nogil
# Whether a revocation list of newer credentials names the peer of a connection that is open, or who signed for it. That its certificate has
# expired, or its root is no longer among ours, is no reason to end it: a root is replaced without a connection that fails. `fault` is set.
cdef bint tls_revoked(Tls* tls, const Credentials* credentials) noexcept nogil
# When the peer's certificate ends, s since 1970; 0: not known.
cdef uint64_t tls_peer_until(const Tls* tls) noexcept nogil
# Why: for an operator, with the peer's identity where it is known. Its length; NUL-terminated, cut at `size`.
cdef uint32_t tls_text(const Tls* tls, char* out, uint32_t size) noexcept nogil
