"""See tls.pxd.

libssl's error queue is a thread's: what one connection left there would be taken for the next one's, so it is cleared before each call.
"""
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcmp, memcpy, memset
from ext.core.text cimport Span
from ext.tunnel.openssl cimport *
from ext.tunnel.peer cimport SCHEME_BYTES, believe, domain_of, forgive, read_identity

cdef extern from "<stdio.h>" nogil:
    int snprintf(char* out, size_t size, const char* how, ...)

cdef enum:
    DEPTH = 8                   # intermediate certificates in a chain at most

    SLOTS = 64                  # buffers that are in use at one time: some more than tunnels that are served at once
    SLOT_LEAST = 16000
    SLOT_BYTES = 17408          # a record, its growth and alignment

cdef char* slot_memory
cdef char* slots[64]
cdef uint32_t n_slots
cdef BIO_METHOD* buffers        # a BIO over Tls.given and Tls.sink
cdef unsigned char* ALPN = b"\x02h2"


# ---- bytes in and out -----------------------------------------------------------------------------------------------------------

cdef int take(BIO* bio, char* out, int size) noexcept nogil:
    cdef Tls* tls = <Tls*>BIO_get_data(bio)
    cdef uint32_t n = <uint32_t>size if size > 0 else 0
    BIO_clear_retry_flags(bio)
    if n > tls.given.n:
        n = tls.given.n
    if n == 0:
        BIO_set_retry_read(bio)
        return -1
    memcpy(out, tls.given.p, n)
    tls.given.p += n
    tls.given.n -= n
    return <int>n


cdef int put(BIO* bio, const char* data, int size) noexcept nogil:
    cdef Tls* tls = <Tls*>BIO_get_data(bio)
    cdef Sink* sink = tls.sink
    BIO_clear_retry_flags(bio)
    if size <= 0:
        return 0
    if sink == NULL or sink.size - sink.n < <uint32_t>size:
        BIO_set_retry_write(bio)
        return -1
    memcpy(sink.data + sink.n, data, size)
    sink.n += <uint32_t>size
    return size


cdef long control(BIO* bio, int what, long number, void* more) noexcept nogil:
    return 1 if what == BIO_CTRL_FLUSH else 0


# ---- buffers of records -------------------------------------------------------------------------------------------------------

cdef void* slot_take(size_t size, const char* file, int line) noexcept nogil:
    global n_slots
    if SLOT_LEAST < size <= SLOT_BYTES and n_slots > 0:
        n_slots -= 1
        return slots[n_slots]
    return malloc(size)


cdef void slot_give(void* at, const char* file, int line) noexcept nogil:
    global n_slots
    if slot_memory <= <char*>at < slot_memory + SLOTS * SLOT_BYTES:
        slots[n_slots] = <char*>at
        n_slots += 1
    else:
        free(at)


cdef void* slot_change(void* at, size_t size, const char* file, int line) noexcept nogil:
    cdef void* made
    if at == NULL or not slot_memory <= <char*>at < slot_memory + SLOTS * SLOT_BYTES:
        return realloc(at, size)
    made = malloc(size)
    if made != NULL:
        memcpy(made, at, size if size < SLOT_BYTES else SLOT_BYTES)
        slot_give(at, file, line)
    return made


cdef void tls_keep_buffers() noexcept nogil:
    global slot_memory, n_slots
    cdef uint32_t i
    if slot_memory != NULL:
        return
    slot_memory = <char*>malloc(SLOTS * SLOT_BYTES)     # touched as it is used, the same few first
    if slot_memory == NULL or CRYPTO_set_mem_functions(slot_take, slot_change, slot_give) != 1:
        return
    for i in range(SLOTS):
        slots[SLOTS - 1 - i] = slot_memory + i * SLOT_BYTES
    n_slots = SLOTS


cdef int tls_open() noexcept nogil:
    global buffers
    cdef SSL_CTX* warm
    if buffers != NULL:
        return 0
    OPENSSL_init_crypto(OPENSSL_INIT_NO_LOAD_CONFIG | OPENSSL_INIT_NO_ATEXIT, NULL)
    if OPENSSL_init_ssl(OPENSSL_INIT_NO_LOAD_CONFIG | OPENSSL_INIT_LOAD_SSL_STRINGS, NULL) != 1:
        return -1
    warm = new_context()                # fetches every algorithm, and seeds the generator of random numbers
    if warm == NULL:
        return -1
    SSL_CTX_free(warm)
    buffers = BIO_meth_new(BIO_get_new_index() | BIO_TYPE_SOURCE_SINK, b"narrows tunnel")
    if buffers == NULL or BIO_meth_set_read(buffers, take) != 1 or BIO_meth_set_write(buffers, put) != 1 \
            or BIO_meth_set_ctrl(buffers, control) != 1:
        return -1
    return 0


# ---- credentials ----------------------------------------------------------------------------------------------------------------------

cdef int select_h2(SSL* ssl, const unsigned char** out, unsigned char* n, const unsigned char* offered, unsigned int size,
                   void* unused) noexcept nogil:
    """RFC 7301 3.2: no common protocol is the fatal alert no_application_protocol."""
    cdef unsigned int at = 0, step
    cdef Tls* tls = <Tls*>SSL_get_app_data(ssl)
    while at < size:
        step = offered[at] + 1
        if at + step <= size and step == 3 and memcmp(offered + at, ALPN, 3) == 0:
            out[0] = offered + at + 1
            n[0] = 2
            return SSL_TLSEXT_ERR_OK
        at += step
    tls.fault = TLS_ALPN
    return SSL_TLSEXT_ERR_ALERT_FATAL


cdef SSL_CTX* new_context() noexcept nogil:
    """One for both sides. One group and few signature algorithms: each more costs in every handshake. RSA: keys of Istio's agents."""
    cdef SSL_CTX* context = SSL_CTX_new(TLS_method())
    if context == NULL:
        return NULL
    SSL_CTX_set_options(context, SSL_OP_NO_TICKET | SSL_OP_NO_COMPRESSION | SSL_OP_NO_RENEGOTIATION | SSL_OP_CIPHER_SERVER_PREFERENCE)
    # send the chain that we were given, do not look for it in each handshake; an idle connection has no buffers (34 KiB)
    SSL_CTX_set_mode(context, SSL_MODE_NO_AUTO_CHAIN | SSL_MODE_RELEASE_BUFFERS)
    SSL_CTX_set_session_cache_mode(context, SSL_SESS_CACHE_OFF)
    SSL_CTX_set_verify(context, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, NULL)
    SSL_CTX_set_verify_depth(context, DEPTH)
    SSL_CTX_set_cert_verify_callback(context, believe, NULL)
    SSL_CTX_set_alpn_select_cb(context, select_h2, NULL)
    if SSL_CTX_set_num_tickets(context, 0) != 1 or SSL_CTX_set_min_proto_version(context, TLS1_3_VERSION) != 1 \
            or SSL_CTX_set_max_proto_version(context, TLS1_3_VERSION) != 1 \
            or SSL_CTX_set_ciphersuites(context, b"TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384") != 1 \
            or SSL_CTX_set1_groups_list(context, b"X25519") != 1 \
            or SSL_CTX_set1_sigalgs_list(context, b"ecdsa_secp256r1_sha256:rsa_pss_rsae_sha256") != 1 \
            or SSL_CTX_set_alpn_protos(context, ALPN, 3) != 0:
        SSL_CTX_free(context)
        return NULL
    return context


cdef X509* read_certificate(const Span* der) noexcept nogil:
    cdef const unsigned char* at = <const unsigned char*>der.p
    cdef X509* made = d2i_X509(NULL, &at, der.n)
    if made != NULL and at != <const unsigned char*>der.p + der.n:
        X509_free(made)
        return NULL
    return made


cdef X509_STORE* new_store(const Span* roots, uint32_t n_roots, const Span* crls, uint32_t n_crls, char* error) noexcept nogil:
    cdef X509_STORE* store = X509_STORE_new()
    cdef X509* root
    cdef X509_CRL* crl
    cdef const unsigned char* at
    cdef uint32_t i
    cdef bint good = store != NULL
    for i in range(n_roots if good else 0):
        root = read_certificate(&roots[i])
        good = root != NULL and X509_STORE_add_cert(store, root) == 1
        X509_free(root)
        if not good:
            snprintf(error, TLS_ERROR_BYTES, b"root %u of the trust domain is not a certificate (DER)", i)
            break
    for i in range(n_crls if good else 0):
        at = <const unsigned char*>crls[i].p
        crl = d2i_X509_CRL(NULL, &at, crls[i].n)
        good = crl != NULL and X509_STORE_add_crl(store, crl) == 1
        X509_CRL_free(crl)
        if not good:
            snprintf(error, TLS_ERROR_BYTES, b"revocation list %u of the trust domain is not one (DER)", i)
            break
    if good and n_crls > 0:
        good = X509_STORE_set_flags(store, X509_V_FLAG_CRL_CHECK | X509_V_FLAG_CRL_CHECK_ALL) == 1
    if not good:
        X509_STORE_free(store)
        return NULL
    return store


cdef bint set_key(SSL_CTX* context, const Span* der, char* error) noexcept nogil:
    cdef const unsigned char* at = <const unsigned char*>der.p
    cdef EVP_PKEY* key = d2i_AutoPrivateKey(NULL, &at, der.n)
    cdef bint good = key != NULL and SSL_CTX_use_PrivateKey(context, key) == 1
    EVP_PKEY_free(key)
    if not good:
        snprintf(error, TLS_ERROR_BYTES, b"the key cannot be read (DER, PKCS#8 or SEC 1), or is not the certificate's")
    return good


cdef bint set_chain(Credentials* made, const Span* chain, uint32_t n_chain, char* error) noexcept nogil:
    cdef X509* certificate
    cdef tm parts
    cdef uint32_t i
    cdef bint good
    for i in range(n_chain):
        certificate = read_certificate(&chain[i])
        if certificate == NULL:
            snprintf(error, TLS_ERROR_BYTES, b"certificate %u of the chain cannot be read (DER)", i)
            return False
        if i > 0:
            good = SSL_CTX_add1_chain_cert(made.context, certificate) == 1
        else:
            good = SSL_CTX_use_certificate(made.context, certificate) == 1 \
                and ASN1_TIME_to_tm(X509_get0_notBefore(certificate), &parts) == 1
            if good:
                made.not_before = <uint64_t>timegm(&parts)
                good = ASN1_TIME_to_tm(X509_get0_notAfter(certificate), &parts) == 1
                made.not_after = <uint64_t>timegm(&parts) if good else 0
            if good and read_identity(certificate, made.identity, &made.identity_n) != TLS_FINE:
                X509_free(certificate)
                snprintf(error, TLS_ERROR_BYTES, b"our certificate must have exactly one URI in its SAN, of at most %d bytes", IDENTITY_MAX)
                return False
        X509_free(certificate)
        if not good:
            snprintf(error, TLS_ERROR_BYTES, b"certificate %u of the chain is not usable", i)
            return False
    return True


cdef Credentials* credentials_new(const Span* key, const Span* chain, uint32_t n_chain, const Span* roots, uint32_t n_roots,
                                  const Span* crls, uint32_t n_crls, const Span* trust_domain, char* error) noexcept nogil:
    cdef Credentials* made
    cdef X509_STORE* store
    error[0] = 0
    ERR_clear_error()
    if n_chain == 0 or n_roots == 0:
        snprintf(error, TLS_ERROR_BYTES, b"a certificate and a root are needed; there are %u and %u", n_chain, n_roots)
        return NULL
    made = <Credentials*>calloc(1, sizeof(Credentials))
    if made == NULL:
        snprintf(error, TLS_ERROR_BYTES, b"no memory")
        return NULL
    made.refs = 1
    made.context = new_context()
    if made.context == NULL:
        snprintf(error, TLS_ERROR_BYTES, b"libssl cannot be set up: no memory, or it lacks X25519 or AES-GCM")
        credentials_release(made)
        return NULL
    store = new_store(roots, n_roots, crls, n_crls, error)
    if store == NULL:
        if error[0] == 0:
            snprintf(error, TLS_ERROR_BYTES, b"no memory")
        credentials_release(made)
        return NULL
    SSL_CTX_set_cert_store(made.context, store)         # takes it over
    if not set_chain(made, chain, n_chain, error) or not set_key(made.context, key, error):
        credentials_release(made)
        return NULL
    made.domain_at = SCHEME_BYTES
    made.domain_n = domain_of(made.identity, made.identity_n)
    if made.domain_n == 0 or made.domain_n != trust_domain.n or \
            memcmp(made.identity + made.domain_at, trust_domain.p, trust_domain.n) != 0:
        snprintf(error, TLS_ERROR_BYTES, b"our certificate says %.*s, which is not of the trust domain %.*s", <int>made.identity_n,
                 made.identity, <int>trust_domain.n, trust_domain.p)
        credentials_release(made)
        return NULL
    return made


cdef void credentials_release(Credentials* credentials) noexcept nogil:
    if credentials == NULL:
        return
    credentials.refs -= 1
    if credentials.refs == 0:
        SSL_CTX_free(credentials.context)
        free(credentials)


# ---- a connection ------------------------------------------------------------------------------------------------------------------------

cdef int tls_init(Tls* tls, Credentials* credentials, bint server, const Span* expected, uint32_t n_expected) noexcept nogil:
    cdef BIO* bio
    memset(tls, 0, sizeof(Tls))
    ERR_clear_error()
    tls.ssl = SSL_new(credentials.context)
    if tls.ssl == NULL:
        return -1
    bio = BIO_new(buffers)
    if bio == NULL or SSL_set_app_data(tls.ssl, tls) != 1:
        BIO_free(bio)
        SSL_free(tls.ssl)
        tls.ssl = NULL
        return -1
    BIO_set_data(bio, tls)
    BIO_set_init(bio, 1)
    SSL_set_bio(tls.ssl, bio, bio)      # takes it over, once for both directions
    if server:
        SSL_set_accept_state(tls.ssl)
    else:
        SSL_set_connect_state(tls.ssl)
    tls.credentials = credentials_hold(credentials)
    tls.server = server
    tls.expected = expected
    tls.n_expected = n_expected
    return 0


cdef void tls_free(Tls* tls) noexcept nogil:
    if tls.ssl == NULL:
        return
    SSL_free(tls.ssl)
    tls.ssl = NULL
    credentials_release(tls.credentials)
    tls.credentials = NULL


cdef void fail(Tls* tls, Fault otherwise) noexcept nogil:
    """`fault` of what libssl says, unless one of our own callbacks has said it."""
    cdef int reason
    if tls.fault != TLS_FINE:
        return
    tls.error = ERR_peek_last_error()
    tls.fault = otherwise
    if tls.error == 0 or ERR_GET_LIB(tls.error) != ERR_LIB_SSL:
        return
    reason = ERR_GET_REASON(tls.error)
    if reason == SSL_R_PEER_DID_NOT_RETURN_A_CERTIFICATE:
        tls.fault = TLS_NO_CERTIFICATE
    elif reason == SSL_R_NO_APPLICATION_PROTOCOL or reason == SSL_AD_REASON_OFFSET + 120:     # RFC 7301 3.2
        tls.fault = TLS_ALPN
    elif reason == SSL_R_UNSUPPORTED_PROTOCOL or reason == SSL_R_WRONG_VERSION_NUMBER or reason == SSL_R_UNKNOWN_PROTOCOL \
            or reason == SSL_R_HTTP_REQUEST or reason == SSL_R_TLSV1_ALERT_PROTOCOL_VERSION:
        tls.fault = TLS_VERSION
    elif reason >= SSL_AD_REASON_OFFSET:
        tls.fault = TLS_ALERT


cdef int tls_handshake(Tls* tls) noexcept nogil:
    cdef const unsigned char* protocol = NULL
    cdef unsigned int n = 0
    cdef int result, error
    if tls.fault != TLS_FINE:
        return -1
    ERR_clear_error()
    result = SSL_do_handshake(tls.ssl)
    if result != 1:
        error = SSL_get_error(tls.ssl, result)
        if error == SSL_ERROR_WANT_READ or error == SSL_ERROR_WANT_WRITE:
            return 0
        fail(tls, TLS_CLOSED if error == SSL_ERROR_ZERO_RETURN else TLS_BROKEN)
        return -1
    SSL_get0_alpn_selected(tls.ssl, &protocol, &n)
    if n != 2 or memcmp(protocol, b"h2", 2) != 0:
        tls.fault = TLS_ALPN
        return -1
    tls.done = 1
    tls.expected = NULL
    tls.n_expected = 0
    return 1


cdef int64_t tls_read(Tls* tls, char* data, uint32_t size) noexcept nogil:
    cdef int n, error
    if tls.fault != TLS_FINE:
        return -1
    if tls.ended:
        return 0
    ERR_clear_error()
    n = SSL_read(tls.ssl, data, <int>size)
    if n > 0:
        return n
    error = SSL_get_error(tls.ssl, n)
    if error == SSL_ERROR_ZERO_RETURN:
        tls.ended = 1
        return 0
    if error == SSL_ERROR_WANT_READ or error == SSL_ERROR_WANT_WRITE:
        return 0
    fail(tls, TLS_BROKEN)
    return -1


cdef int tls_write(Tls* tls, const char* data, uint32_t size) noexcept nogil:
    if tls.fault != TLS_FINE:
        return -1
    ERR_clear_error()
    if SSL_write(tls.ssl, data, <int>size) == <int>size:
        return 0
    fail(tls, TLS_BROKEN)
    return -1


cdef void tls_end(Tls* tls) noexcept nogil:
    if tls.ssl != NULL and tls.done and tls.fault == TLS_FINE:
        ERR_clear_error()
        SSL_shutdown(tls.ssl)


cdef bint tls_revoked(Tls* tls, const Credentials* credentials) noexcept nogil:
    cdef X509_STORE_CTX* context
    cdef X509* peer = SSL_get0_peer_certificate(tls.ssl) if tls.ssl != NULL else NULL
    cdef int error = X509_V_OK
    if peer == NULL:
        return False
    ERR_clear_error()
    context = X509_STORE_CTX_new()
    if context != NULL \
            and X509_STORE_CTX_init(context, SSL_CTX_get_cert_store(credentials.context), peer, SSL_get_peer_cert_chain(tls.ssl)) == 1:
        X509_STORE_CTX_set_default(context, b"ssl_client" if tls.server else b"ssl_server")
        X509_STORE_CTX_set_verify_cb(context, forgive)
        if X509_verify_cert(context) != 1:              # it looks for revocation before it looks at times
            error = X509_STORE_CTX_get_error(context)
    X509_STORE_CTX_free(context)
    ERR_clear_error()
    if error != X509_V_ERR_CERT_REVOKED:
        return False
    tls.why = error
    tls.fault = TLS_REVOKED
    return True


cdef uint64_t tls_peer_until(const Tls* tls) noexcept nogil:
    cdef X509* peer = SSL_get0_peer_certificate(tls.ssl) if tls.ssl != NULL else NULL
    cdef tm parts
    return <uint64_t>timegm(&parts) if peer != NULL and ASN1_TIME_to_tm(X509_get0_notAfter(peer), &parts) == 1 else 0


cdef const char* cause(uint8_t fault, bint server) noexcept nogil:
    if fault == TLS_NO_CERTIFICATE:
        return b"the peer showed no certificate"
    if fault == TLS_UNTRUSTED:
        return b"its certificate does not chain to a root of our trust domain"
    if fault == TLS_EXPIRED:
        return b"its certificate has expired"
    if fault == TLS_NOT_YET:
        return b"its certificate is not valid yet; compare the clocks"
    if fault == TLS_REVOKED:
        return b"its certificate is revoked"
    if fault == TLS_PURPOSE:
        return b"its certificate's extended key usage is not for a client" if server \
            else b"its certificate's extended key usage is not for a server"
    if fault == TLS_NO_IDENTITY:
        return b"its certificate must have exactly one URI in its SAN, spiffe://..."
    if fault == TLS_TRUST_DOMAIN:
        return b"it is of another trust domain than ours"
    if fault == TLS_OTHER_IDENTITY:
        return b"it is not the identity that the destination must have"
    if fault == TLS_VERSION:
        return b"the peer does not speak TLS 1.3"
    if fault == TLS_ALPN:
        return b"the peer does not speak h2 (ALPN)"
    if fault == TLS_ALERT:
        return b"the peer refused us"
    if fault == TLS_CLOSED:
        return b"the peer ended the connection during the handshake"
    if fault == TLS_NO_MEMORY:
        return b"no memory"
    return b"the peer broke the protocol"


cdef uint32_t tls_text(const Tls* tls, char* out, uint32_t size) noexcept nogil:
    cdef const char* more = NULL
    cdef const char* between = b""
    cdef const char* before = b""
    cdef const char* behind = b""
    cdef int n
    if tls.fault == TLS_FINE:
        out[0] = 0
        return 0
    if tls.peer_n > 0:
        between = b": "
    if tls.why != 0:
        more = X509_verify_cert_error_string(tls.why)
    elif tls.error != 0:
        more = ERR_reason_error_string(tls.error)
    if more != NULL:
        before = b" ("
        behind = b")"
    else:
        more = b""
    n = snprintf(out, size, b"%.*s%s%s%s%s%s", <int>tls.peer_n, tls.peer, between, cause(tls.fault, tls.server), before, more, behind)
    return <uint32_t>n if 0 <= n < <int>size else size - 1
