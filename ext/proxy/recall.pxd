"""Revocation lists that came: every open tunnel's peer is looked up in them, in both directions, a bounded number a turn.

A tunnel whose peer is listed, or who signed for it, ends at once. Connections through it are reset: flag CERT_REVOKED, with the peer's
identity. Who comes later is asked in the handshake, by credentials that have the lists.
"""
from ext.proxy.state cimport Tunnel, Worker

cdef enum:
    RECALLS_A_TURN = 2      # few: for each, two signatures of a chain and a list's are checked

cdef void recall_open(Worker* w) noexcept nogil
# After an apply that brought lists.
cdef void recall_begin(Worker* w) noexcept nogil
# One that was shaking meanwhile and is open now. It may be dead afterwards.
cdef void recall_tunnel(Tunnel* t) noexcept nogil
