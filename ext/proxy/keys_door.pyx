"""For tests: keys and credentials of a worker without a process around it. Nothing in the mesh imports it."""
from libc.stdint cimport uint32_t
from libc.stdlib cimport calloc, free
from cpython.bytes cimport PyBytes_AS_STRING
from ext.core.text cimport Span
from ext.proxy.keys cimport LACK_NONE, Lack, credentials_of, key_forget, key_put, lack_text
from ext.proxy.state cimport Worker
from ext.route.shapes cimport Identity
from ext.route.slots cimport identity_drop, identity_intern
from ext.route.tables cimport ERROR_BYTES, Prepared, tables_apply, tables_free, tables_new, tables_prepare
from ext.tunnel.tls cimport TLS_ERROR_BYTES, Credentials, credentials_hold, credentials_release, tls_open

if tls_open() != 0:
    raise ImportError("libssl cannot be set up")


cdef Span span(bytes text):
    cdef Span made
    made.p = PyBytes_AS_STRING(text)
    made.n = <uint32_t>len(text)
    return made


cdef class Held:
    """Credentials as a connection holds them."""
    cdef Credentials* credentials

    def __dealloc__(self):
        credentials_release(self.credentials)

    @property
    def facts(self):
        """(identity, not before, not after, references)"""
        return ((<bytes>self.credentials.identity[:self.credentials.identity_n]).decode(), self.credentials.not_before,
                self.credentials.not_after, self.credentials.refs)


cdef class Keys:
    cdef Worker* w

    def __cinit__(self):
        self.w = <Worker*>calloc(1, sizeof(Worker))
        self.w.tables = tables_new(1)

    def __dealloc__(self):
        while self.w.keys != NULL:
            key_forget(self.w, self.w.keys.id)
        tables_free(self.w.tables)
        free(self.w)

    def load(self, bytes transaction):
        cdef char[ERROR_BYTES] error
        cdef Prepared* prepared = tables_prepare(self.w.tables, transaction, len(transaction), error)
        if prepared == NULL:
            raise ValueError((<bytes>error).decode())
        tables_apply(self.w.tables, prepared)

    def put(self, uint32_t id, bytes identity, int fd):
        """Whether the descriptor was taken over."""
        return key_put(self.w, id, span(identity), fd)

    def forget(self, uint32_t id):
        key_forget(self.w, id)

    def of(self, bytes identity):
        """Held; or why not, as text."""
        cdef char[TLS_ERROR_BYTES] error
        cdef Lack lack = LACK_NONE
        cdef Identity* one = identity_intern(&self.w.tables.names, span(identity))
        cdef Credentials* found = credentials_of(self.w, one, &lack, error)
        cdef Held held
        identity_drop(&self.w.tables.names, one)
        if found == NULL:
            return (<bytes>lack_text(lack)).decode() + (": " + (<bytes>error).decode() if error[0] else "")
        held = Held()
        held.credentials = credentials_hold(found)
        return held
