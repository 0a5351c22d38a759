"""See slab.pxd."""
from libc.stdlib cimport free, malloc
from libc.string cimport memset


cdef void* slab_take(Slab* slab) noexcept nogil:
    cdef FreeItem* item = slab.items
    if item != NULL:
        slab.items = item.next
        slab.n_free -= 1
    else:
        item = <FreeItem*>malloc(slab.size)
        if item == NULL:
            return NULL
    memset(item, 0, slab.size)
    slab.live += 1
    return item


cdef void slab_give(Slab* slab, void* item) noexcept nogil:
    cdef FreeItem* block = <FreeItem*>item
    slab.live -= 1
    if slab.n_free >= SLAB_KEEP:
        free(item)
        return
    block.next = slab.items
    slab.items = block
    slab.n_free += 1


cdef void slab_free(Slab* slab) noexcept nogil:
    cdef FreeItem* block
    while slab.items != NULL:
        block = slab.items
        slab.items = block.next
        free(block)
    slab.n_free = 0
