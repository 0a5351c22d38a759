"""See keys.pxd. A worker has at most 512 keys, looked for when a certificate comes: a list does."""
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy
from posix.unistd cimport close
from ext.core.protocol cimport IDENTITY_BYTES


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
        close(key.fd)
        free(key)


cdef Key* key_find(Worker* w, uint32_t id) noexcept nogil:
    cdef Key* key = w.keys
    while key != NULL and key.id != id:
        key = key.next
    return key
