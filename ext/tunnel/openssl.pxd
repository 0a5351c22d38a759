"""What of libssl and libcrypto is used. OpenSSL 3.0 and later; see its manual pages (section 3ssl, 3) for each."""
from libc.stdint cimport uint32_t, uint64_t

cdef extern from "<time.h>" nogil:
    struct tm:
        pass
    ctypedef long time_t
    time_t timegm(tm* parts)

cdef extern from "<openssl/crypto.h>" nogil:
    uint64_t OPENSSL_INIT_NO_LOAD_CONFIG
    uint64_t OPENSSL_INIT_NO_ATEXIT
    int CRYPTO_set_mem_functions(void* (*take)(size_t, const char*, int) noexcept nogil,
                                 void* (*change)(void*, size_t, const char*, int) noexcept nogil,
                                 void (*give)(void*, const char*, int) noexcept nogil)
    int OPENSSL_init_crypto(uint64_t options, const void* settings)

cdef extern from "<openssl/err.h>" nogil:
    void ERR_clear_error()
    unsigned long ERR_peek_last_error()
    const char* ERR_reason_error_string(unsigned long error)
    int ERR_GET_LIB(unsigned long error)
    int ERR_GET_REASON(unsigned long error)
    int ERR_LIB_SSL

cdef extern from "<openssl/sslerr.h>" nogil:
    int SSL_AD_REASON_OFFSET
    int SSL_R_PEER_DID_NOT_RETURN_A_CERTIFICATE
    int SSL_R_UNSUPPORTED_PROTOCOL
    int SSL_R_WRONG_VERSION_NUMBER
    int SSL_R_UNKNOWN_PROTOCOL
    int SSL_R_HTTP_REQUEST
    int SSL_R_NO_APPLICATION_PROTOCOL
    int SSL_R_TLSV1_ALERT_PROTOCOL_VERSION

cdef extern from "<openssl/evp.h>" nogil:
    ctypedef struct EVP_PKEY:
        pass
    void EVP_PKEY_free(EVP_PKEY* key)
    EVP_PKEY* d2i_AutoPrivateKey(EVP_PKEY** key, const unsigned char** at, long size)

cdef extern from "<openssl/bio.h>" nogil:
    ctypedef struct BIO:
        pass
    ctypedef struct BIO_METHOD:
        pass
    int BIO_TYPE_SOURCE_SINK
    int BIO_CTRL_FLUSH
    int BIO_get_new_index()
    BIO_METHOD* BIO_meth_new(int type, const char* name)
    int BIO_meth_set_read(BIO_METHOD* method, int (*read)(BIO*, char*, int) noexcept nogil)
    int BIO_meth_set_write(BIO_METHOD* method, int (*write)(BIO*, const char*, int) noexcept nogil)
    int BIO_meth_set_ctrl(BIO_METHOD* method, long (*ctrl)(BIO*, int, long, void*) noexcept nogil)
    BIO* BIO_new(const BIO_METHOD* method)
    void BIO_free(BIO* bio)
    void BIO_set_data(BIO* bio, void* data)
    void* BIO_get_data(BIO* bio)
    void BIO_set_init(BIO* bio, int on)
    void BIO_clear_retry_flags(BIO* bio)
    void BIO_set_retry_read(BIO* bio)
    void BIO_set_retry_write(BIO* bio)

cdef extern from "<openssl/asn1.h>" nogil:
    ctypedef struct ASN1_STRING:
        pass
    ctypedef ASN1_STRING ASN1_IA5STRING
    ctypedef struct ASN1_TIME:
        pass
    const unsigned char* ASN1_STRING_get0_data(const ASN1_STRING* text)
    int ASN1_STRING_length(const ASN1_STRING* text)
    int ASN1_TIME_to_tm(const ASN1_TIME* when, tm* parts)

cdef extern from "<openssl/x509.h>" nogil:
    ctypedef struct X509:
        pass
    ctypedef struct X509_CRL:
        pass
    ctypedef struct X509_STORE:
        pass
    ctypedef struct X509_STORE_CTX:
        pass
    void X509_free(X509* certificate)
    void X509_CRL_free(X509_CRL* crl)
    X509* d2i_X509(X509** certificate, const unsigned char** at, long size)
    X509_CRL* d2i_X509_CRL(X509_CRL** crl, const unsigned char** at, long size)
    void* X509_get_ext_d2i(const X509* certificate, int nid, int* critical, int* at)
    const ASN1_TIME* X509_get0_notBefore(const X509* certificate)
    const ASN1_TIME* X509_get0_notAfter(const X509* certificate)

cdef extern from "<openssl/x509_vfy.h>" nogil:
    int X509_V_OK
    int X509_V_ERR_UNABLE_TO_GET_CRL
    int X509_V_ERR_CRL_HAS_EXPIRED
    int X509_V_ERR_CRL_NOT_YET_VALID
    int X509_V_ERR_CERT_HAS_EXPIRED
    int X509_V_ERR_CERT_NOT_YET_VALID
    int X509_V_ERR_CERT_REVOKED
    int X509_V_ERR_INVALID_PURPOSE
    int X509_V_ERR_APPLICATION_VERIFICATION
    unsigned long X509_V_FLAG_CRL_CHECK
    unsigned long X509_V_FLAG_CRL_CHECK_ALL
    X509_STORE* X509_STORE_new()
    void X509_STORE_free(X509_STORE* store)
    int X509_STORE_add_cert(X509_STORE* store, X509* certificate)
    int X509_STORE_add_crl(X509_STORE* store, X509_CRL* crl)
    int X509_STORE_set_flags(X509_STORE* store, unsigned long flags)
    ctypedef struct X509_CHAIN "STACK_OF(X509)":
        pass
    X509_STORE_CTX* X509_STORE_CTX_new()
    void X509_STORE_CTX_free(X509_STORE_CTX* context)
    int X509_STORE_CTX_init(X509_STORE_CTX* context, X509_STORE* store, X509* certificate, X509_CHAIN* others)
    int X509_STORE_CTX_set_default(X509_STORE_CTX* context, const char* name)
    int X509_verify_cert(X509_STORE_CTX* context)
    X509* X509_STORE_CTX_get0_cert(X509_STORE_CTX* context)
    int X509_STORE_CTX_get_error(X509_STORE_CTX* context)
    void X509_STORE_CTX_set_error(X509_STORE_CTX* context, int error)
    void* X509_STORE_CTX_get_ex_data(X509_STORE_CTX* context, int index)
    void X509_STORE_CTX_set_verify_cb(X509_STORE_CTX* context, int (*look)(int, X509_STORE_CTX*) noexcept nogil)
    const char* X509_verify_cert_error_string(long error)

cdef extern from "<openssl/x509v3.h>" nogil:
    int NID_subject_alt_name
    int GEN_URI
    ctypedef struct GENERAL_NAME:
        int type
    ctypedef struct GENERAL_NAMES:
        pass
    void GENERAL_NAMES_free(GENERAL_NAMES* names)
    int sk_GENERAL_NAME_num(const GENERAL_NAMES* names)
    GENERAL_NAME* sk_GENERAL_NAME_value(const GENERAL_NAMES* names, int at)
    void* GENERAL_NAME_get0_value(const GENERAL_NAME* name, int* type)

cdef extern from "<openssl/ssl.h>" nogil:
    ctypedef struct SSL:
        pass
    ctypedef struct SSL_CTX:
        pass
    ctypedef struct SSL_METHOD:
        pass
    uint64_t OPENSSL_INIT_LOAD_SSL_STRINGS
    int TLS1_3_VERSION
    int SSL_VERIFY_PEER
    int SSL_VERIFY_FAIL_IF_NO_PEER_CERT
    long SSL_SESS_CACHE_OFF
    uint64_t SSL_OP_NO_TICKET
    uint64_t SSL_OP_NO_COMPRESSION
    uint64_t SSL_OP_CIPHER_SERVER_PREFERENCE
    uint64_t SSL_OP_NO_RENEGOTIATION
    long SSL_MODE_NO_AUTO_CHAIN
    long SSL_MODE_RELEASE_BUFFERS
    int SSL_ERROR_WANT_READ
    int SSL_ERROR_WANT_WRITE
    int SSL_ERROR_ZERO_RETURN
    int SSL_TLSEXT_ERR_OK
    int SSL_TLSEXT_ERR_ALERT_FATAL
    int OPENSSL_NPN_NEGOTIATED
    int OPENSSL_init_ssl(uint64_t options, const void* settings)
    const SSL_METHOD* TLS_method()
    SSL_CTX* SSL_CTX_new(const SSL_METHOD* method)
    void SSL_CTX_free(SSL_CTX* context)
    int SSL_CTX_set_min_proto_version(SSL_CTX* context, int version)
    int SSL_CTX_set_max_proto_version(SSL_CTX* context, int version)
    int SSL_CTX_set_ciphersuites(SSL_CTX* context, const char* suites)
    int SSL_CTX_set1_groups_list(SSL_CTX* context, const char* groups)
    int SSL_CTX_set1_sigalgs_list(SSL_CTX* context, const char* algorithms)
    uint64_t SSL_CTX_set_options(SSL_CTX* context, uint64_t options)
    long SSL_CTX_set_mode(SSL_CTX* context, long mode)
    long SSL_CTX_set_session_cache_mode(SSL_CTX* context, long mode)
    int SSL_CTX_set_num_tickets(SSL_CTX* context, size_t n)
    int SSL_CTX_set_alpn_protos(SSL_CTX* context, const unsigned char* protocols, unsigned int size)
    void SSL_CTX_set_alpn_select_cb(SSL_CTX* context, int (*select)(SSL*, const unsigned char**, unsigned char*, const unsigned char*,
                                    unsigned int, void*) noexcept nogil, void* owner)
    void SSL_CTX_set_verify(SSL_CTX* context, int mode, void* look)
    void SSL_CTX_set_verify_depth(SSL_CTX* context, int depth)
    void SSL_CTX_set_cert_verify_callback(SSL_CTX* context, int (*verify)(X509_STORE_CTX*, void*) noexcept nogil, void* owner)
    void SSL_CTX_set_cert_store(SSL_CTX* context, X509_STORE* store)
    X509_STORE* SSL_CTX_get_cert_store(const SSL_CTX* context)
    X509* SSL_get0_peer_certificate(const SSL* ssl)
    X509_CHAIN* SSL_get_peer_cert_chain(const SSL* ssl)
    int SSL_CTX_use_certificate(SSL_CTX* context, X509* certificate)
    int SSL_CTX_use_PrivateKey(SSL_CTX* context, EVP_PKEY* key)
    int SSL_CTX_check_private_key(const SSL_CTX* context)
    int SSL_CTX_add1_chain_cert(SSL_CTX* context, X509* certificate)
    SSL* SSL_new(SSL_CTX* context)
    void SSL_free(SSL* ssl)
    void SSL_set_bio(SSL* ssl, BIO* source, BIO* sink)
    void SSL_set_accept_state(SSL* ssl)
    void SSL_set_connect_state(SSL* ssl)
    int SSL_set_app_data(SSL* ssl, void* owner)
    void* SSL_get_app_data(SSL* ssl)
    int SSL_do_handshake(SSL* ssl)
    int SSL_read(SSL* ssl, void* data, int size)
    int SSL_write(SSL* ssl, const void* data, int size)
    int SSL_shutdown(SSL* ssl)
    int SSL_get_error(const SSL* ssl, int result)
    void SSL_get0_alpn_selected(const SSL* ssl, const unsigned char** protocol, unsigned int* size)
    int SSL_get_ex_data_X509_STORE_CTX_idx()
