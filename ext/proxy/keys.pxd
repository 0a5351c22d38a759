"""Who a pod proves to be: private keys that the keeper gave this worker, joined with certificates and roots of the tables.

A key is a descriptor, mapped only while credentials are made of it. They are made when a connection first asks for them, and again
when its certificate or the roots and lists of its trust domain were replaced: a commit costs nothing, and connections that are open keep
those that they began with. Where new ones cannot be made, the last good ones serve until they expire.
"""
from libc.stdint cimport uint32_t
from ext.core.text cimport Span
from ext.proxy.state cimport Key, Worker
from ext.route.shapes cimport Identity
from ext.tunnel.tls cimport Credentials

cdef enum Lack:             # why there are no credentials
    LACK_NONE = 0
    LACK_CERTIFICATE        # not signed yet, or the identity has gone: more may come with the next commit
    LACK_TRUST              # no root is known for its trust domain: likewise
    LACK_KEY                # the keeper did not give it: likewise
    LACK_EXPIRED
    LACK_BROKEN             # libssl refuses key, certificate, roots or lists; it says why

# Takes `fd` over, unless it gives False: out of memory, or nothing that can be a key. One that is there already stays.
cdef bint key_put(Worker* w, uint32_t id, Span identity, int fd) noexcept nogil
cdef void key_forget(Worker* w, uint32_t id) noexcept nogil
# NULL: not ours.
cdef Key* key_find(Worker* w, uint32_t id) noexcept nogil

# Valid now; borrowed until the next commit or message of the keeper (credentials_hold). NULL: `lack` says why, and `error`
# (TLS_ERROR_BYTES) has libssl's words for LACK_BROKEN.
cdef Credentials* credentials_of(Worker* w, const Identity* identity, Lack* lack, char* error) noexcept nogil
# It is signed, or told, within moments when nothing is wrong: worth waiting for.
cdef inline bint may_come(Lack lack) noexcept nogil:
    return lack == LACK_CERTIFICATE or lack == LACK_TRUST

# For an operator.
cdef const char* lack_text(Lack lack) noexcept nogil
