"""What the data path counted and logged, as plain values; indexes stand for workloads and services."""
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

PASSTHROUGH = 0xFFFFFFFF  # service index of traffic to addresses that the mesh does not know
UNKNOWN = 0

REPORTERS = {1: "source", 2: "destination"}
PROTOCOLS = {1: "tcp", 2: "http", 3: "grpc"}


@dataclass(frozen=True, slots=True)
class SeriesKey:
    """Who to whom, and how it ended (ext/core/shm.pxd SeriesKey)."""

    reporter: str  # source | destination
    protocol: str  # tcp | http | grpc
    source: int  # workload index
    destination: int  # workload index
    service: int  # service index
    code: int  # HTTP status; 0 for TCP and for a client that left
    flag: str  # Envoy's response flag, "-" for none
    grpc_status: int | None
    mutual_tls: bool


@dataclass(slots=True)
class SeriesValues:
    """Counts of one series. Bytes are as the client sees them: sent = client to server, received = server to client."""

    opened: int
    closed: int
    failed: int
    sent: int
    received: int
    duration_us: int
    duration: list[int]  # per bucket, not cumulative
    request_bytes: list[int]
    response_bytes: list[int]

    def copy(self) -> SeriesValues:
        return replace(self, duration=[*self.duration], request_bytes=[*self.request_bytes],
                       response_bytes=[*self.response_bytes])

    def add(self, other: SeriesValues) -> None:
        self.opened += other.opened
        self.closed += other.closed
        self.failed += other.failed
        self.sent += other.sent
        self.received += other.received
        self.duration_us += other.duration_us
        for mine, theirs in (
            (self.duration, other.duration),
            (self.request_bytes, other.request_bytes),
            (self.response_bytes, other.response_bytes),
        ):
            for at, count in enumerate(theirs):
                mine[at] += count


@dataclass(frozen=True, slots=True)
class TunnelRow:
    """One HBONE tunnel of a worker, as of some second ago."""

    pod: int  # handle of the local pod
    direction: str  # outbound: we dialled it; inbound: it was accepted on 15008
    state: str  # connecting, handshake, open, finishing (takes no more connections)
    peer: str  # its identity; of a dialled one before the handshake's end the one that it must prove
    address: str  # ip:port that was dialled, or of who came
    streams: int  # connections that it carries
    streams_ever: int
    bytes: int  # of its connections, both ways, ever
    opened_us: int  # CLOCK_REALTIME
    until: int  # s since 1970: the end of our certificate
    peer_until: int  # and of the peer's; 0: not known yet


class Leg(NamedTuple):
    """What the kernel had measured of the TCP connection on one side when a record was written."""

    kind: str | None  # socket: of its own; tunnel: that of the tunnel that carries it; node: none, the pods are joined; None: no connection
    rtt_us: int  # smoothed; 0: never measured
    min_rtt_us: int  # 0: never measured
    retransmits: int  # segments since that TCP connection began, also for others that it carried


@dataclass(frozen=True, slots=True)
class AccessRecord:
    """One finished connection (TCP) or request (HTTP). Addresses are `ip:port`, `[ip]:port`, or "" when there is none."""

    reporter: str
    protocol: str
    flag: str
    version_minor: int
    start_us: int  # CLOCK_REALTIME
    duration_us: int
    upstream_us: int  # until the first byte of the response; 0: none came
    received: int  # bytes from the downstream
    sent: int  # bytes to the downstream
    source: int
    destination: int
    service: int
    code: int
    details: str
    downstream_remote: str
    downstream_local: str
    upstream_remote: str
    upstream_local: str
    method: str = ""
    path: str = ""
    authority: str = ""
    user_agent: str = ""
    request_id: str = ""
    forwarded_for: str = ""
    route: str = ""
    cluster: str = ""
    sni: str = ""
    failure: str = ""
    downstream_leg: Leg | None = None  # None: not asked for, or a worker that cannot tell
    upstream_leg: Leg | None = None


class EndedConnection(NamedTuple):
    """What the kernel knew of a TCP connection when it ended (bpf/narrows.h `narrows_connection`, in this order; a plain tuple, since
    there may be 20,000 a second). Addresses are 16 bytes, IPv4 as ::ffff:a.b.c.d."""

    netns: int  # cookie
    duration: int  # ns
    sent: int  # bytes that the remote acknowledged
    received: int
    local: bytes
    local_port: int
    remote: bytes
    remote_port: int
    rtt: int  # us, smoothed; 0: never measured
    min_rtt: int  # us; 0xFFFFFFFF: never measured
    retransmits: int  # segments
    accepted: int  # 1: the remote connected
    before: int  # state before CLOSED, by TCP_STATES


TCP_STATES = {1: "established", 2: "syn_sent", 3: "syn_recv", 4: "fin_wait1", 5: "fin_wait2", 6: "time_wait", 7: "close", 8: "close_wait",
              9: "last_ack", 10: "listen", 11: "closing"}  # the kernel's numbers (linux/bpf.h BPF_TCP_*)
