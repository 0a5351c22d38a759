"""Private keys: made here, given to workers as descriptors, and to nobody else. The agent gets certificate requests.

A key is a memfd that holds PKCS#8 (DER), sealed, kept out of swap and core dumps. There is no other copy of it in this process: what
OpenSSL made it in is cleansed. Numbers of keys are random, so that a certificate for a key of an earlier keeper meets none of ours.
"""
import os

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint64_t
from libc.string cimport memcpy
from ext.core.protocol cimport IDENTITIES, IDENTITY_BYTES, KEYS_EACH
from ext.sys.memory cimport memory_pin, memory_sealed, memory_unmap

from ext.keeper.log import log

cdef extern from "<openssl/crypto.h>":
    uint64_t OPENSSL_INIT_NO_LOAD_CONFIG
    uint64_t OPENSSL_INIT_NO_ATEXIT
    int OPENSSL_init_crypto(uint64_t options, const void* settings)
    void OPENSSL_cleanse(void* at, size_t size)
    void OPENSSL_free(void* at)

cdef extern from "<openssl/bn.h>":
    ctypedef struct BIGNUM:
        pass
    int BN_bn2binpad(const BIGNUM* number, unsigned char* to, int size)
    void BN_clear_free(BIGNUM* number)

cdef extern from "<openssl/evp.h>":
    ctypedef struct EVP_PKEY:
        pass
    ctypedef struct EVP_MD:
        pass
    EVP_PKEY* EVP_PKEY_Q_keygen(void* context, const char* properties, const char* kind, ...)
    int EVP_PKEY_get_bn_param(const EVP_PKEY* key, const char* name, BIGNUM** out)
    int EVP_PKEY_get_octet_string_param(const EVP_PKEY* key, const char* name, unsigned char* to, size_t most, size_t* size)
    void EVP_PKEY_free(EVP_PKEY* key)
    const EVP_MD* EVP_sha256()

cdef extern from "<openssl/core_names.h>":
    const char* OSSL_PKEY_PARAM_PRIV_KEY
    const char* OSSL_PKEY_PARAM_PUB_KEY

cdef extern from "<openssl/asn1.h>":
    ctypedef struct ASN1_IA5STRING:
        pass
    ASN1_IA5STRING* ASN1_IA5STRING_new()
    int ASN1_STRING_set(ASN1_IA5STRING* to, const void* data, int size)

cdef extern from "<openssl/x509v3.h>":
    ctypedef struct X509_REQ:
        pass
    ctypedef struct X509_EXTENSION:
        pass
    ctypedef struct X509_EXTENSIONS "STACK_OF(X509_EXTENSION)":
        pass
    ctypedef struct GENERAL_NAME:
        pass
    ctypedef struct GENERAL_NAMES:
        pass
    int GEN_URI
    int NID_subject_alt_name
    GENERAL_NAME* GENERAL_NAME_new()
    void GENERAL_NAME_set0_value(GENERAL_NAME* name, int kind, void* value)
    GENERAL_NAMES* GENERAL_NAMES_new()
    void GENERAL_NAMES_free(GENERAL_NAMES* names)
    int sk_GENERAL_NAME_push(GENERAL_NAMES* names, GENERAL_NAME* name)
    X509_EXTENSION* X509V3_EXT_i2d(int nid, int critical, void* value)
    void X509_EXTENSION_free(X509_EXTENSION* extension)
    X509_EXTENSIONS* sk_X509_EXTENSION_new_null()
    int sk_X509_EXTENSION_push(X509_EXTENSIONS* extensions, X509_EXTENSION* extension)
    void sk_X509_EXTENSION_free(X509_EXTENSIONS* extensions)
    X509_REQ* X509_REQ_new()
    void X509_REQ_free(X509_REQ* request)
    int X509_REQ_set_version(X509_REQ* request, long version)
    int X509_REQ_set_pubkey(X509_REQ* request, EVP_PKEY* key)
    int X509_REQ_add_extensions(X509_REQ* request, const X509_EXTENSIONS* extensions)
    int X509_REQ_sign(X509_REQ* request, EVP_PKEY* key, const EVP_MD* digest)
    int i2d_X509_REQ(const X509_REQ* request, unsigned char** out)

cdef extern from "<openssl/err.h>":
    unsigned long ERR_get_error()
    void ERR_error_string_n(unsigned long error, char* to, size_t size)

cdef enum:
    SCALAR_BYTES = 32
    POINT_BYTES = 65            # uncompressed: 04, x, y
    HEAD_BYTES = 36
    MIDDLE_BYTES = 5
    KEY_BYTES = 138             # HEAD, scalar, MIDDLE, point

# PKCS#8 of a P-256 key around its two numbers (RFC 5208, RFC 5915). By hand, because OpenSSL's encoder leaves a copy in freed memory.
cdef const unsigned char* HEAD = (
    b"\x30\x81\x87\x02\x01\x00\x30\x13\x06\x07\x2a\x86\x48\xce\x3d\x02\x01\x06\x08\x2a\x86\x48\xce\x3d\x03\x01\x07\x04\x6d"
    b"\x30\x6b\x02\x01\x01\x04\x20")
cdef const unsigned char* MIDDLE = b"\xa1\x44\x03\x42\x00"


class KeyRefused(Exception):
    """A key that is not made; the text says why."""


class CryptoFailed(OSError):
    """OpenSSL could not; the text is its own."""


cdef class Key:
    """One private key. Owns `fd` and the mapping that keeps it out of swap."""
    cdef readonly object id
    cdef readonly str identity
    cdef readonly int fd
    cdef void* _pinned

    def __cinit__(self, key_id, str identity, int fd):
        cdef bint locked = False
        self.id, self.identity, self.fd = key_id, identity, fd
        self._pinned = memory_pin(fd, KEY_BYTES, &locked)
        if not locked:
            log("warning", "a private key cannot be locked in memory: with swap it may come to a disk; raise the limit of locked memory",
                identity=identity)

    def close(self) -> None:
        """The bytes go when the last worker lets go of its descriptor."""
        if self._pinned != NULL:
            memory_unmap(self._pinned, KEY_BYTES)
            self._pinned = NULL
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Keys:
    """Every key of this keeper."""

    def __init__(self):
        self._keys = {}         # id -> Key

    def make(self, str identity) -> tuple:
        """(Key, certificate request). Raises KeyRefused, CryptoFailed."""
        check_identity(identity)
        there = {key.identity for key in self._keys.values()}
        if identity not in there and len(there) >= IDENTITIES:
            raise KeyRefused(f"{<int>IDENTITIES} identities have keys already; forget those that no pod has any more")
        if len(self.of(identity)) >= KEYS_EACH:
            raise KeyRefused(f"{identity} has {<int>KEYS_EACH} keys already; forget the one that is not in use")
        fd, request = generate(identity.encode())
        key_id = 0
        while key_id == 0 or key_id in self._keys:
            key_id = int.from_bytes(os.urandom(4), "little")
        key = self._keys[key_id] = Key(key_id, identity, fd)
        return key, request

    def forget(self, key_id) -> bool:
        """Whether there was one."""
        key = self._keys.pop(key_id, None)
        if key is not None:
            key.close()
        return key is not None

    def of(self, str identity) -> list:
        return [key for key in self._keys.values() if key.identity == identity]

    def all(self) -> list:
        return list(self._keys.values())

    def close(self) -> None:
        for key_id in list(self._keys):
            self.forget(key_id)


# ---- identities ------------------------------------------------------------------------------------------------

LOWER = frozenset("abcdefghijklmnopqrstuvwxyz0123456789")
DOMAIN = LOWER | {"-", ".", "_"}                # of a trust domain: SPIFFE-ID, 2.1
NAME = LOWER | {"-", "."}                       # of a Kubernetes name: RFC 1123


def check_identity(str identity) -> None:
    """`spiffe://<trust domain>/ns/<namespace>/sa/<service account>`, or KeyRefused."""
    parts = identity.split("/")
    if len(identity) > IDENTITY_BYTES:
        raise KeyRefused(f"an identity of {len(identity)} characters; at most {<int>IDENTITY_BYTES}")
    if (len(parts) != 7 or parts[0] != "spiffe:" or parts[1] or parts[3] != "ns" or parts[5] != "sa"
            or not DOMAIN.issuperset(parts[2]) or not all(part and NAME.issuperset(part) for part in (parts[4], parts[6]))
            or not parts[2]):
        raise KeyRefused(f"{identity!r} is no identity: spiffe://<trust domain>/ns/<namespace>/sa/<service account>, in lower case")


# ---- OpenSSL ---------------------------------------------------------------------------------------------------

def start() -> None:
    """Once, before anything else of OpenSSL: no configuration file, which could load a provider of somebody's into this process."""
    if OPENSSL_init_crypto(OPENSSL_INIT_NO_LOAD_CONFIG | OPENSSL_INIT_NO_ATEXIT, NULL) != 1:
        raise CryptoFailed(0, "OpenSSL does not start")


def failed(str what) -> CryptoFailed:
    cdef char[256] said
    ERR_error_string_n(ERR_get_error(), said, sizeof(said))
    return CryptoFailed(0, f"{what}: {said.decode(errors='replace')}")


def generate(bytes identity) -> tuple:
    """A new P-256 key: (its memfd, certificate request). The caller owns the descriptor."""
    cdef EVP_PKEY* key = EVP_PKEY_Q_keygen(NULL, NULL, b"EC", <const char*>b"P-256")
    cdef int fd = -1
    if key == NULL:
        raise failed("a key cannot be made")
    try:
        request = request_of(key, identity)
        fd = sealed(key)
    finally:
        EVP_PKEY_free(key)
    return fd, request


cdef int sealed(EVP_PKEY* key) except -1:
    """Its PKCS#8 in a sealed memfd, and nowhere else."""
    cdef unsigned char[KEY_BYTES] der
    cdef BIGNUM* scalar = NULL
    cdef size_t size = 0
    cdef int fd
    memcpy(der, HEAD, HEAD_BYTES)
    memcpy(der + HEAD_BYTES + SCALAR_BYTES, MIDDLE, MIDDLE_BYTES)
    try:
        if (EVP_PKEY_get_bn_param(key, OSSL_PKEY_PARAM_PRIV_KEY, &scalar) != 1
                or BN_bn2binpad(scalar, der + HEAD_BYTES, SCALAR_BYTES) != SCALAR_BYTES
                or EVP_PKEY_get_octet_string_param(key, OSSL_PKEY_PARAM_PUB_KEY, der + KEY_BYTES - POINT_BYTES, POINT_BYTES, &size) != 1
                or size != POINT_BYTES or der[KEY_BYTES - POINT_BYTES] != 4):
            raise failed("a key cannot be written down")
        fd = memory_sealed(b"narrows-key", der, KEY_BYTES)
    finally:
        BN_clear_free(scalar)
        OPENSSL_cleanse(der, KEY_BYTES)
    if fd < 0:
        raise OSError(-fd, f"memory for a key: {os.strerror(-fd)}")
    return fd


cdef bytes request_of(EVP_PKEY* key, bytes identity):
    """PKCS#10 (RFC 2986): empty subject, one critical subjectAltName with one URI, ECDSA with SHA-256."""
    cdef X509_REQ* request = X509_REQ_new()
    cdef X509_EXTENSIONS* extensions = sk_X509_EXTENSION_new_null()
    cdef X509_EXTENSION* extension = alternative_name(identity)
    cdef unsigned char* der = NULL
    cdef int size = -1
    if request != NULL and extensions != NULL and extension != NULL and sk_X509_EXTENSION_push(extensions, extension) > 0:
        if (X509_REQ_set_version(request, 0) == 1 and X509_REQ_set_pubkey(request, key) == 1
                and X509_REQ_add_extensions(request, extensions) == 1 and X509_REQ_sign(request, key, EVP_sha256()) > 0):
            size = i2d_X509_REQ(request, &der)
    X509_EXTENSION_free(extension)
    sk_X509_EXTENSION_free(extensions)
    X509_REQ_free(request)
    if size <= 0:
        raise failed("a certificate request cannot be made")
    try:
        return PyBytes_FromStringAndSize(<char*>der, size)
    finally:
        OPENSSL_free(der)


cdef X509_EXTENSION* alternative_name(bytes identity) except? NULL:
    cdef GENERAL_NAMES* names = GENERAL_NAMES_new()
    cdef GENERAL_NAME* name = GENERAL_NAME_new()
    cdef ASN1_IA5STRING* uri = ASN1_IA5STRING_new()
    cdef X509_EXTENSION* made = NULL
    if names != NULL and name != NULL and uri != NULL and ASN1_STRING_set(uri, PyBytes_AS_STRING(identity), <int>len(identity)) == 1:
        GENERAL_NAME_set0_value(name, GEN_URI, uri)
        if sk_GENERAL_NAME_push(names, name) > 0:
            made = X509V3_EXT_i2d(NID_subject_alt_name, 1, names)
    GENERAL_NAMES_free(names)
    return made


start()
