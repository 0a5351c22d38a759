"""Datagrams from the worker to the keeper. Nothing blocks: what the socket does not take now waits here (64 KiB)."""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from ext.proxy.state cimport Worker

cdef enum:
    OUTBOX_BYTES = 65536
    OUTBOX_SPARE = 4096     # kept for APPLIED, FAILED, READY and DRAINED: a MISS or NEED_SOCKETS that finds no room is asked again

# 0, or -1: no room; it was not sent and will not be.
cdef int send_message(Worker* w, uint16_t kind, uint32_t sequence, const char* payload, uint32_t size) noexcept nogil
cdef int send_need_sockets(Worker* w, uint32_t handle, uint8_t family, uint32_t n) noexcept nogil
cdef int send_miss(Worker* w, const char* key, uint32_t size) noexcept nogil
cdef void send_ready(Worker* w, uint64_t transaction) noexcept nogil
cdef void send_applied(Worker* w, uint32_t sequence, uint64_t transaction) noexcept nogil
cdef void send_failed(Worker* w, uint32_t sequence, uint64_t transaction, const char* text) noexcept nogil
cdef void send_drained(Worker* w, uint32_t sequence) noexcept nogil
cdef void outbox_flush(Worker* w) noexcept nogil
