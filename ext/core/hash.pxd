"""Checksums of blobs, hashes of keys, and the one hash table that everything is looked up in."""
from libc.stdint cimport uint8_t, uint32_t, uint64_t

# CRC-32 as zlib's (reflected 0x04c11db7); start with 0, feed the result of the previous piece.
cdef uint32_t crc32(uint32_t crc, const void* data, size_t size) noexcept nogil

# For our own tables only: keys come from the control plane, never from the network, so nothing is seeded against floods.
cdef uint32_t hash_bytes(const void* data, size_t size, uint32_t seed) noexcept nogil

cdef inline uint32_t hash_u32(uint32_t value) noexcept nogil:
    # Fibonacci hashing; the high half is the better one
    return <uint32_t>((<uint64_t>value * <uint64_t>0x9e3779b97f4a7c15) >> 32)

cdef inline uint32_t hash_pair(uint32_t first, uint32_t second) noexcept nogil:
    return hash_u32(first ^ (second * <uint32_t>0x85ebca6b + <uint32_t>0x27d4eb2f))

# Intrusive chains: a Node is the first member of what is kept, so that inserting cannot fail.
cdef struct Node:
    Node* chain
    uint32_t hash

cdef struct Buckets:
    Node** heads
    uint32_t mask                   # number of heads - 1 (a power of two)
    uint32_t count

cdef int buckets_init(Buckets* table) noexcept nogil                        # -1: out of memory
cdef void buckets_free(Buckets* table) noexcept nogil                       # the nodes are the caller's
# Grow for `more` nodes, so that chains stay short. -1: out of memory, and the table is as before.
cdef int buckets_reserve(Buckets* table, uint32_t more) noexcept nogil
cdef void buckets_insert(Buckets* table, Node* node) noexcept nogil         # node.hash is set; newest first in its chain
cdef void buckets_remove(Buckets* table, Node* node) noexcept nogil

# Walk from here along `chain`, comparing hash and key.
cdef inline Node* buckets_first(const Buckets* table, uint32_t hash) noexcept nogil:
    return table.heads[hash & table.mask]
