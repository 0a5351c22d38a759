"""What BPF programs, ext/ and the agent share: bpf/narrows.h, whose sizes the compiler asserts here as it does for the kernel's side."""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from "bpf/narrows.h" nogil:
    enum:
        NARROWS_LAYOUT
        NARROWS_OUTBOUND_PORT
        NARROWS_INBOUND_PORT
        NARROWS_HBONE_PORT
        NARROWS_MARK
        NARROWS_MARK_MASK
        NARROWS_MARK_LOCAL
        NARROWS_PROBE4
        NARROWS_PROBE6_0
        NARROWS_PROBE6_1
        NARROWS_PROBE6_2
        NARROWS_PROBE6_3
        NARROWS_HAS_IP4
        NARROWS_HAS_IP6
        NARROWS_ONLY_INCLUDED
        NARROWS_REDIRECTED
        NARROWS_ACCEPT_KEPT
        NARROWS_REFLECT4_KEPT
        NARROWS_REFLECT6_KEPT
        NARROWS_NETNS_BITS
    const char* NARROWS_NETNS_HERE
    struct narrows_pod:
        uint32_t ip4
        uint32_t flags
        uint32_t ip6[4]
    struct narrows_inside:
        uint32_t ip4
        uint32_t flags
        uint32_t ip6[4]
        uint32_t turn
    struct narrows_end:
        uint32_t ip[4]
        uint32_t port
    struct narrows_source:
        uint64_t netns
        narrows_end end
    struct narrows_port:
        uint64_t netns
        uint64_t port
    struct narrows_range:
        uint32_t bits
        uint32_t netns[2]
        uint32_t ip[4]
    struct narrows_connection:
        uint64_t netns
        uint64_t duration
        uint64_t sent
        uint64_t received
        narrows_end local
        narrows_end remote
        uint32_t rtt
        uint32_t min_rtt
        uint32_t retransmits
        uint8_t accepted
        uint8_t before
        uint16_t zero
    struct narrows_tally:
        uint64_t written
        uint64_t lost
