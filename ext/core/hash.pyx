from libc.string cimport memcpy
from ext.core.arena cimport block_give, block_take

cdef enum:
    FIRST_HEADS = 16

# Eight tables: eight bytes a step ("slicing-by-8"), 2 KiB each, filled when the module is loaded.
cdef uint32_t[8][256] crc_table


cdef void fill_crc_table() noexcept nogil:
    cdef uint32_t value
    cdef int i, k, _
    for i in range(256):
        value = <uint32_t>i
        for _ in range(8):
            value = (value >> 1) ^ (<uint32_t>0xedb88320 if value & 1 else 0)
        crc_table[0][i] = value
    for i in range(256):
        for k in range(1, 8):
            value = crc_table[k - 1][i]
            crc_table[k][i] = (value >> 8) ^ crc_table[0][value & 0xff]


fill_crc_table()


cdef uint32_t crc32(uint32_t crc, const void* data, size_t size) noexcept nogil:
    cdef const uint8_t* at = <const uint8_t*>data
    cdef uint64_t word
    crc = ~crc
    while size >= 8:
        memcpy(&word, at, 8)
        word ^= crc
        crc = (crc_table[7][word & 0xff] ^ crc_table[6][(word >> 8) & 0xff]
               ^ crc_table[5][(word >> 16) & 0xff] ^ crc_table[4][(word >> 24) & 0xff]
               ^ crc_table[3][(word >> 32) & 0xff] ^ crc_table[2][(word >> 40) & 0xff]
               ^ crc_table[1][(word >> 48) & 0xff] ^ crc_table[0][word >> 56])
        at += 8
        size -= 8
    while size > 0:
        crc = (crc >> 8) ^ crc_table[0][(crc ^ at[0]) & 0xff]
        at += 1
        size -= 1
    return ~crc


cdef uint32_t hash_bytes(const void* data, size_t size, uint32_t seed) noexcept nogil:
    # multiply and fold, eight bytes a step
    cdef const uint8_t* at = <const uint8_t*>data
    cdef uint64_t state = (<uint64_t>seed << 32) ^ <uint64_t>size ^ <uint64_t>0x2545f4914f6cdd1d
    cdef uint64_t word
    while size >= 8:
        memcpy(&word, at, 8)
        state = (state ^ word) * <uint64_t>0x9e3779b97f4a7c15
        state ^= state >> 32
        at += 8
        size -= 8
    word = 0
    memcpy(&word, at, size)
    state = (state ^ word) * <uint64_t>0x9e3779b97f4a7c15
    return <uint32_t>(state >> 32) ^ <uint32_t>state


cdef int buckets_init(Buckets* table) noexcept nogil:
    table.heads = <Node**>block_take(FIRST_HEADS * sizeof(Node*))
    table.mask = FIRST_HEADS - 1
    table.count = 0
    return 0 if table.heads != NULL else -1


cdef void buckets_free(Buckets* table) noexcept nogil:
    block_give(table.heads)
    table.heads = NULL


cdef int buckets_reserve(Buckets* table, uint32_t more) noexcept nogil:
    cdef uint64_t wanted = <uint64_t>table.count + more
    cdef uint64_t size = <uint64_t>table.mask + 1
    cdef Buckets bigger
    cdef Node* node
    cdef Node* after
    cdef uint32_t i
    if wanted <= size:
        return 0
    while size < wanted:
        size *= 2
    if size > <uint64_t>1 << 31:
        return -1
    bigger.heads = <Node**>block_take(size * sizeof(Node*))
    if bigger.heads == NULL:
        return -1
    bigger.mask = <uint32_t>(size - 1)
    bigger.count = 0
    for i in range(table.mask + 1):
        # reversed first, so that the newest of equal keys stays the first
        after = NULL
        while table.heads[i] != NULL:
            node = table.heads[i]
            table.heads[i] = node.chain
            node.chain = after
            after = node
        while after != NULL:
            node = after
            after = node.chain
            buckets_insert(&bigger, node)
    block_give(table.heads)
    table[0] = bigger
    return 0


cdef void buckets_insert(Buckets* table, Node* node) noexcept nogil:
    cdef Node** head = &table.heads[node.hash & table.mask]
    node.chain = head[0]
    head[0] = node
    table.count += 1


cdef void buckets_remove(Buckets* table, Node* node) noexcept nogil:
    cdef Node** at = &table.heads[node.hash & table.mask]
    while at[0] != NULL:
        if at[0] == node:
            at[0] = node.chain
            node.chain = NULL
            table.count -= 1
            return
        at = &at[0].chain
