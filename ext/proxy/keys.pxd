"""Private keys that the keeper gave this worker: descriptors, mapped only for as long as credentials are made of them."""
from libc.stdint cimport uint32_t
from ext.core.text cimport Span
from ext.proxy.state cimport Key, Worker

# Takes `fd` over, unless it gives False: out of memory, or nothing that can be a key. One that is there already stays.
cdef bint key_put(Worker* w, uint32_t id, Span identity, int fd) noexcept nogil
cdef void key_forget(Worker* w, uint32_t id) noexcept nogil
# NULL: not ours.
cdef Key* key_find(Worker* w, uint32_t id) noexcept nogil
