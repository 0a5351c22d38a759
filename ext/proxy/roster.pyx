"""See roster.pxd. A seqlock with one writer: readers look again when the version moved (ext/core/roster)."""
from libc.stdint cimport uint8_t, uint32_t
from libc.string cimport memcpy, memset
from ext.core.ring cimport LogAddress
from ext.core.shm cimport (ROSTER_CONNECTING, ROSTER_FINISHING, ROSTER_HANDSHAKE, ROSTER_OPEN, ROSTER_PEER, ROSTER_ROWS, Roster, TunnelRow,
                           nrw_fence_release, nrw_store, nrw_store_release)
from ext.core.text cimport Span
from ext.proxy.state cimport T_CONNECTING, T_OPEN, Captured, Tunnel
from ext.tunnel.tls cimport tls_peer_until


cdef void describe(Tunnel* t, TunnelRow* row) noexcept nogil:
    cdef LogAddress* address = <LogAddress*>row.address
    cdef Span peer
    memset(row, 0, sizeof(TunnelRow))
    row.opened_us = t.opened_us
    row.bytes = t.session.moved
    row.streams_ever = t.session.opened
    row.until = t.session.tls.credentials.not_after
    row.pod = t.pod.handle
    row.streams = t.session.streams
    row.server = t.server
    if t.state == T_OPEN:
        if t.peer_until == 0:
            t.peer_until = tls_peer_until(&t.session.tls)
        row.state = <uint8_t>(ROSTER_FINISHING if t.finishing else ROSTER_OPEN)
        row.peer_until = t.peer_until
    else:
        row.state = <uint8_t>(ROSTER_CONNECTING if t.state == T_CONNECTING else ROSTER_HANDSHAKE)
    if t.state == T_OPEN or t.wanted == NULL:
        peer.p = t.session.tls.peer
        peer.n = t.session.tls.peer_n
    else:
        peer = t.wanted.name
    row.peer_n = <unsigned short>(peer.n if peer.n < ROSTER_PEER else ROSTER_PEER)
    memcpy(row.peer, peer.p, row.peer_n)
    address.family = t.remote.family
    address.port = t.remote.port
    memcpy(address.ip, t.remote.ip, 16)


cdef void roster_write(Worker* w) noexcept nogil:
    cdef Roster* roster = w.table.roster
    cdef Captured* pod = w.first_pod
    cdef Tunnel* t
    cdef uint32_t n = 0
    if w.n_tunnels == 0 and roster.total == 0:
        return
    nrw_store(&roster.version, roster.version + 1)
    nrw_fence_release()
    while pod != NULL and n < ROSTER_ROWS:
        t = pod.first_tunnel
        while t != NULL and n < ROSTER_ROWS:
            if t.state <= T_OPEN and t.session.tls.credentials != NULL:
                describe(t, &roster.row[n])
                n += 1
            t = t.next
        pod = pod.next
    roster.rows = n
    roster.total = w.n_tunnels
    nrw_store_release(&roster.version, roster.version + 1)
