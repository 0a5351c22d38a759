"""See peer.pxd."""
from libc.stdint cimport uint32_t
from libc.string cimport memchr, memcmp, memcpy
from ext.tunnel.openssl cimport *
from ext.tunnel.tls cimport (IDENTITY_MAX, TLS_EXPIRED, TLS_FINE, TLS_NO_IDENTITY, TLS_NOT_YET, TLS_OTHER_IDENTITY, TLS_PURPOSE,
                             TLS_REVOKED, TLS_TRUST_DOMAIN, TLS_UNTRUSTED, Credentials, Fault, Tls)


cdef Fault read_identity(X509* certificate, char* out, uint32_t* n) noexcept nogil:
    """The one URI of the SAN (SPIFFE X509-SVID 2), or TLS_NO_IDENTITY; of several the first, for the text."""
    cdef GENERAL_NAMES* names = <GENERAL_NAMES*>X509_get_ext_d2i(certificate, NID_subject_alt_name, NULL, NULL)
    cdef const ASN1_STRING* text
    cdef Fault fault = TLS_FINE
    cdef int i, size, type = 0, found = 0
    n[0] = 0
    if names == NULL:
        return TLS_NO_IDENTITY
    for i in range(sk_GENERAL_NAME_num(names)):
        text = <const ASN1_STRING*>GENERAL_NAME_get0_value(sk_GENERAL_NAME_value(names, i), &type)
        if type != GEN_URI:
            continue
        found += 1
        if found > 1:
            continue
        size = ASN1_STRING_length(text)
        if size <= 0 or size > IDENTITY_MAX or not printable(ASN1_STRING_get0_data(text), size):
            fault = TLS_NO_IDENTITY
            continue
        memcpy(out, ASN1_STRING_get0_data(text), size)
        n[0] = <uint32_t>size
    GENERAL_NAMES_free(names)
    return fault if found == 1 else TLS_NO_IDENTITY


cdef bint printable(const unsigned char* text, int n) noexcept nogil:
    """It stands in log lines, metrics and headers: visible ASCII without quotes and backslash (a SPIFFE ID has less, SPIFFE-ID 2)."""
    cdef int i
    for i in range(n):
        if text[i] <= 32 or text[i] >= 127 or text[i] == 34 or text[i] == 92:
            return False
    return True


cdef uint32_t domain_of(const char* identity, uint32_t n) noexcept nogil:
    cdef const char* end
    if n <= SCHEME_BYTES or memcmp(identity, b"spiffe://", SCHEME_BYTES) != 0:
        return 0
    end = <const char*>memchr(identity + SCHEME_BYTES, 47, n - SCHEME_BYTES)        # /
    return 0 if end == NULL else <uint32_t>(end - identity) - SCHEME_BYTES


cdef int forgive(int ok, X509_STORE_CTX* context) noexcept nogil:
    """A certificate whose issuer publishes no list that is good now is not known to be revoked."""
    cdef int error
    if ok:
        return 1
    error = X509_STORE_CTX_get_error(context)
    if error == X509_V_ERR_UNABLE_TO_GET_CRL or error == X509_V_ERR_CRL_HAS_EXPIRED or error == X509_V_ERR_CRL_NOT_YET_VALID:
        X509_STORE_CTX_set_error(context, X509_V_OK)
        return 1
    return 0


cdef Fault fault_of(int error) noexcept nogil:
    if error == X509_V_ERR_CERT_HAS_EXPIRED:
        return TLS_EXPIRED
    if error == X509_V_ERR_CERT_NOT_YET_VALID:
        return TLS_NOT_YET
    if error == X509_V_ERR_CERT_REVOKED:
        return TLS_REVOKED
    if error == X509_V_ERR_INVALID_PURPOSE:
        return TLS_PURPOSE
    return TLS_UNTRUSTED


cdef Fault judge(Tls* tls, X509_STORE_CTX* context) noexcept nogil:
    """Chain, validity, purpose and revocation by libcrypto (RFC 5280 6), then who it is."""
    cdef const Credentials* us = tls.credentials
    cdef Fault named = read_identity(X509_STORE_CTX_get0_cert(context), tls.peer, &tls.peer_n)
    cdef uint32_t domain, i
    X509_STORE_CTX_set_verify_cb(context, forgive)
    if X509_verify_cert(context) != 1:
        tls.why = X509_STORE_CTX_get_error(context)
        return fault_of(tls.why)
    if named != TLS_FINE:
        return named
    domain = domain_of(tls.peer, tls.peer_n)
    if domain == 0:
        return TLS_NO_IDENTITY
    if tls.server:
        if domain != us.domain_n or memcmp(tls.peer + us.domain_at, us.identity + us.domain_at, domain) != 0:
            return TLS_TRUST_DOMAIN
        return TLS_FINE
    for i in range(tls.n_expected):
        if tls.expected[i].n == tls.peer_n and memcmp(tls.expected[i].p, tls.peer, tls.peer_n) == 0:
            return TLS_FINE
    return TLS_OTHER_IDENTITY


cdef int believe(X509_STORE_CTX* context, void* unused) noexcept nogil:
    cdef SSL* ssl = <SSL*>X509_STORE_CTX_get_ex_data(context, SSL_get_ex_data_X509_STORE_CTX_idx())
    cdef Tls* tls = <Tls*>SSL_get_app_data(ssl)
    tls.fault = judge(tls, context)
    if tls.fault == TLS_FINE:
        return 1
    if tls.why == 0:
        X509_STORE_CTX_set_error(context, X509_V_ERR_APPLICATION_VERIFICATION)
    return 0
