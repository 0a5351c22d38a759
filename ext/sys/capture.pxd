"""The sockets that make capture work: made with privilege inside a pod's namespace, used without it by a worker.

Every one is non-blocking and close-on-exec, and sends without delay. Those that connect carry SO_MARK, so that the capture rules let
their SYN pass. A listener has none: what it accepts would inherit the mark, and each packet of an answer would be looked up in
conntrack twice, marked in PREROUTING and routed again in OUTPUT.
"""
from libc.stdint cimport uint8_t, uint16_t, uint32_t

# A listener on the wildcard address: family 6 takes IPv4 as well. Its descriptor, or -errno with *step naming the call.
# -EADDRINUSE: somebody holds the port; -EAFNOSUPPORT or -EADDRNOTAVAIL for family 6: the namespace has no IPv6, ask
# again for 4.
cdef int capture_listen(uint8_t family, uint16_t port, int backlog, const char** step) noexcept nogil

# A socket that binds any address (also one that is not of this host) and connects: IP_TRANSPARENT, IP_FREEBIND, and
# IP_BIND_ADDRESS_NO_PORT, so that the port is chosen at connect, when the whole four-tuple is known. Or -errno, as
# above.
cdef int capture_socket(uint8_t family, uint32_t mark, const char** step) noexcept nogil
