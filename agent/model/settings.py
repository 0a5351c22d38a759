"""What holds for every connection on a node, whoever made it: bounds, timeouts, and whether to log."""
from __future__ import annotations

from dataclasses import dataclass

MINUTE_MS = 60_000
HOUR_MS = 60 * MINUTE_MS
MEBIBYTE = 1_048_576


@dataclass(frozen=True, slots=True)
class ProxySettings:
    """Settings of the workers. The order of the fields is the order in the blob: append only, never reorder.

    Envoy's defaults are quoted from its v3 API reference, Istio's from its mesh configuration reference.
    """

    # a node proxy that logs nothing cannot be debugged afterwards; ztunnel logs each connection too
    access_log: bool = True

    # sniffing: a server-first protocol (MySQL, SMTP) says nothing until it is dialled: dial after a moment of silence
    detect_dial_ms: int = 50
    # and stop waiting for a protocol to show itself: Istio's protocolDetectionTimeout as long as it had one (5 s)
    detect_timeout_ms: int = 5_000

    # a connection waits for configuration that was asked for: bounded in time, bytes of each and their number
    hold_timeout_ms: int = 5_000
    # what came before its configuration; by default its one buffer, which is the least that a head of the largest size needs
    hold_bytes: int = 65_536
    # per worker; of them a pod gets as many as are still free: dialling what is not there costs only the one who does
    hold_connections: int = 1_024

    # slow heads: nginx' client_header_timeout (Envoy has none unless asked)
    request_head_timeout_ms: int = MINUTE_MS
    # keep-alive connection of a client without a request: Envoy's common_http_protocol_options.idle_timeout
    http_idle_timeout_ms: int = HOUR_MS
    # silence within a request. Envoy has 5 min; Istio switches it off for event streams; bounded like TCP's here
    stream_idle_timeout_ms: int = HOUR_MS
    # Envoy's tcp_proxy idle_timeout, Istio's connectionPool.tcp.idleTimeout
    tcp_idle_timeout_ms: int = HOUR_MS
    # Istio's connectTimeout, and ztunnel's; a cluster has its own
    connect_timeout_ms: int = 10_000

    # Envoy's max_request_headers_kb
    head_bytes: int = 61_440
    # per direction of a connection: above a cluster's bandwidth-delay product, and it bounds a worker's memory
    buffer_bytes: int = 65_536
    # one pod must not use up the worker's descriptors; what others open to it and what it opens may each have three quarters.
    # Above, an idle kept-alive connection ends for a new one; else new ones wait for hold_timeout_ms, then they are reset (UO)
    connections_per_pod: int = 16_384
    # idle upstream connections per source pod and endpoint; above the least recently used are closed
    pool_idle_per_endpoint: int = 32
    # shorter than nginx' keepalive_timeout of 75 s, so that the pool closes before most servers do
    pool_idle_timeout_ms: int = MINUTE_MS

    # Bytes in all buffers of a worker, and what the pipes in use may hold: with the descriptors' kernel memory beside it, it stays
    # below a 1 GiB container.
    buffered_bytes_per_worker: int = 512 * MEBIBYTE
    # And in those of one pod, which also gets no more than is still free: 2,048 of its connections can be stopped by slow readers,
    # or 8,192 requests wait for their answers. Above it stops reading, then stalled connections end (OM)
    buffered_bytes_per_pod: int = 128 * MEBIBYTE
    # Descriptors of a worker for its pods; 0: what the process may open, less 512. A pod gets as many as are still free
    descriptors_per_worker: int = 0
    # silence within a request's body, which the server waits for: Envoy's stream_idle_timeout. nginx' client_body_timeout is 1 min
    request_body_timeout_ms: int = 5 * MINUTE_MS

    # a tunnel is asked so often whether its peer is there, and ends after so long without the answer: ztunnel's 10 s and 20 s
    tunnel_ping_ms: int = 10_000
    tunnel_pong_ms: int = 20_000
    # a tunnel that we dialled ends after so long without a stream: ztunnel's pool keeps it as long
    tunnel_idle_ms: int = 5 * MINUTE_MS
    # Pods of one node are connected inside the destination's namespace, without a tunnel. True: as to any other node, for a network whose
    # own policies (Kubernetes NetworkPolicy) have to see that traffic
    same_node_tunnel: bool = False
    # Of a pod: tunnels that were dialled before anything needed them and were not used yet. 0: none is. A cold endpoint's first request
    # waits for a handshake (two round trips and 2 ms of CPU at both ends); 8 are as many requests ahead of a service's turns
    early_tunnels: int = 8
    # Log records also say what the kernel measured of the connection on each side: one getsockopt a side and record, so only where a log
    # shows it
    access_log_tcp: bool = False
