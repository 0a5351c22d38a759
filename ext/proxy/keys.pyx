"""See keys.pxd. A worker has at most 512 keys, looked through when a tunnel is made: a list does."""
from libc.stdint cimport uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp, memcpy, strcpy
from posix.time cimport CLOCK_REALTIME, clock_gettime, timespec
from posix.unistd cimport SEEK_END, close, lseek
from ext.core.protocol cimport IDENTITY_BYTES, KIND_CERTIFICATE, KIND_TRUST
from ext.route.shapes cimport Certificate, Slot, Trust
from ext.route.tables cimport slot_by_key
from ext.tunnel.tls cimport credentials_new, credentials_release

cdef extern from "<sys/mman.h>" nogil:
    int PROT_READ
    int MAP_PRIVATE
    void* MAP_FAILED
    void* mmap(void* at, size_t size, int protection, int flags, int fd, long offset)
    int munmap(void* at, size_t size)

cdef enum:
    KEY_BYTES_MOST = 4096


# ---- keys ----------------------------------------------------------------------------------------------------------------------------

cdef bint key_put(Worker* w, uint32_t id, Span identity, int fd) noexcept nogil:
    cdef Key* key
    if id == 0 or identity.n == 0 or identity.n > IDENTITY_BYTES or key_find(w, id) != NULL:
        return False
    key = <Key*>calloc(1, sizeof(Key))
    if key == NULL:
        return False
    key.id = id
    key.identity_len = identity.n
    memcpy(key.identity, identity.p, identity.n)
    key.fd = fd
    key.next = w.keys
    w.keys = key
    return True


cdef void key_forget(Worker* w, uint32_t id) noexcept nogil:
    cdef Key** at = &w.keys
    cdef Key* key
    while at[0] != NULL and at[0].id != id:
        at = &at[0].next
    key = at[0]
    if key != NULL:
        at[0] = key.next
        credentials_release(key.credentials)
        close(key.fd)
        free(key)


cdef Key* key_find(Worker* w, uint32_t id) noexcept nogil:
    cdef Key* key = w.keys
    while key != NULL and key.id != id:
        key = key.next
    return key


# ---- credentials -------------------------------------------------------------------------------------------------------------------

cdef uint64_t now_s() noexcept nogil:
    """Of the calendar: what certificates are written in."""
    cdef timespec now
    clock_gettime(CLOCK_REALTIME, &now)
    return <uint64_t>now.tv_sec


cdef bint is_of(const Key* key, const Identity* identity) noexcept nogil:
    return key.identity_len == identity.name.n and memcmp(key.identity, identity.name.p, identity.name.n) == 0


cdef void make(Key* key, const Identity* identity, const Certificate* certificate, const Trust* trust, char* error) noexcept nogil:
    """New ones take the old ones' place; when they cannot be made the old ones stay, and nobody tries again with the same."""
    cdef Credentials* made
    cdef Span secret
    cdef void* at
    cdef long size = lseek(key.fd, 0, SEEK_END)
    key.certificate = certificate.version
    key.trust = trust.version
    if size <= 0 or size > KEY_BYTES_MOST:
        strcpy(error, b"the private key cannot be read")
        return
    at = mmap(NULL, size, PROT_READ, MAP_PRIVATE, key.fd, 0)
    if at == MAP_FAILED:
        strcpy(error, b"the private key cannot be mapped")
        return
    secret.p = <const char*>at
    secret.n = <uint32_t>size
    made = credentials_new(&secret, certificate.chain, certificate.n_chain, trust.roots, trust.n_roots, trust.lists, trust.n_lists,
                           &identity.parts.domain, error)
    munmap(at, size)
    if made != NULL and (made.identity_n != identity.name.n or memcmp(made.identity, identity.name.p, identity.name.n) != 0):
        credentials_release(made)
        made = NULL
        strcpy(error, b"the certificate is for another identity")
    if made != NULL:
        credentials_release(key.credentials)
        key.credentials = made


cdef Credentials* credentials_of(Worker* w, const Identity* identity, Lack* lack, char* error) noexcept nogil:
    cdef Slot* slot = slot_by_key(w.tables, KIND_CERTIFICATE, identity.name)
    cdef Certificate* certificate = <Certificate*>slot.current if slot != NULL else NULL
    cdef Trust* trust
    cdef Key* key
    cdef uint64_t now = now_s()
    error[0] = 0
    slot = slot_by_key(w.tables, KIND_TRUST, identity.parts.domain)
    trust = <Trust*>slot.current if slot != NULL else NULL
    if certificate == NULL or trust == NULL:
        lack[0] = LACK_CERTIFICATE if certificate == NULL else LACK_TRUST
        return NULL
    lack[0] = LACK_KEY
    key = key_find(w, certificate.key)
    if key != NULL and is_of(key, identity):
        if key.certificate != certificate.version or key.trust != trust.version:
            make(key, identity, certificate, trust, error)
        lack[0] = LACK_BROKEN if key.credentials == NULL else LACK_EXPIRED
        if key.credentials != NULL and now < key.credentials.not_after:
            lack[0] = LACK_NONE
            return key.credentials
    key = w.keys                    # the last good ones
    while key != NULL:
        if key.credentials != NULL and now < key.credentials.not_after and is_of(key, identity):
            lack[0] = LACK_NONE
            return key.credentials
        key = key.next
    return NULL


cdef const char* lack_text(Lack lack) noexcept nogil:
    if lack == LACK_CERTIFICATE:
        return b"no certificate was signed for its identity (yet)"
    if lack == LACK_TRUST:
        return b"no root of its trust domain is known (yet)"
    if lack == LACK_KEY:
        return b"the keeper gave no private key for its identity"
    if lack == LACK_EXPIRED:
        return b"the certificate of its identity has expired"
    if lack == LACK_BROKEN:
        return b"key, certificate and roots do not fit each other"
    return b""
