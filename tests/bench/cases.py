"""What is measured: a case loads one proxy for a while and says how much work was done and what it cost.

The figure of most cases is CPU per unit of work: CPU of the proxy's processes over the whole run of the load generator, its
connects included, by what the load generator counted. Lower is better in every case.
"""
from __future__ import annotations

import resource
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.bench.proxies import HOST, Proxy
from tests.bench.tools import ECHO_PORT, HTTP_PORT, SOURCE_PORT, Held, load, load_beside, shake
from tests.bench.topology import BenchError, check_congestion, core_ns, cpu_ns, family, softirqd_ns

# Connections held: 10,000, or what our worker takes from one pod where a process may open few files: a pod alone gets half of the
# descriptors, and a connection counts for two (ext/proxy/budget.pxd).
IDLE = min(10_000, (resource.getrlimit(resource.RLIMIT_NOFILE)[1] - 512) // 4 // 100 * 100)
RATE = 3_000  # requests/s of the open loop
TUNNEL_RATE = 1_500
GIB = 1 << 30
ALL = ("direct", "envoy", "haproxy", "nginx", "narrows")
TCP = ("direct", "envoy", "haproxy", "narrows")  # nginx is an HTTP proxy here


@dataclass(frozen=True)
class Sample:
    """One turn of one proxy. `figure` is in the case's unit; None for `direct` where it costs no proxy anything."""

    figure: float | None
    rate: float  # units of work per second
    more: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """`targets`: ours / peer, at most; "better" is the better of HAProxy and nginx, "" means the figure itself."""

    name: str
    title: str
    unit: str
    mode: str
    port: int
    measure: Callable[[Proxy, float], Sample]
    targets: dict[str, float]
    proxies: tuple[str, ...] = ALL
    rounds: int = 5
    seconds: float = 2.0
    fresh: bool = False  # a new proxy for each turn
    pair: bool = False  # two proxies with mutual TLS between them (pairs.py)


def request(path: str, *headers: str) -> str:
    """What a usual client says, with some of the headers that a browser or library adds."""
    lines = [f"GET {path} HTTP/1.1", f"Host: {HOST}:{HTTP_PORT}", "User-Agent: narrows-bench/1", "Accept: */*", *headers]
    return "\r\n".join(lines) + "\r\n\r\n"


def charged(per: float, **what: Any) -> Callable[[Proxy, float], Sample]:
    """The proxy's CPU for each `per` of work."""
    def measure(proxy: Proxy, seconds: float) -> Sample:
        pids = proxy.pids()
        cpu, soft, core = cpu_ns(pids), softirqd_ns(), core_ns()
        found = load(proxy.site, proxy.port, seconds, **what)
        cpu, soft, core = cpu_ns(pids) - cpu, softirqd_ns() - soft, core_ns() - core
        if found["work"] <= 0:
            raise BenchError(f"{proxy.name}: no work was done")
        more = {key: value for key, value in found.items() if key.endswith("_us")}
        more |= {name: ns / 1e9 / found["seconds"]
                 for name, ns in (("busy", cpu), ("ksoftirqd", soft), ("others", max(0, core - cpu - soft)))}
        return Sample(cpu / 1e9 / found["work"] * per if pids else None, found["work"] / found["seconds"], more)

    return measure


def late(rate: int) -> Callable[[Proxy, float], Sample]:
    """p99 of an open loop, in us; for `direct` too."""
    def measure(proxy: Proxy, seconds: float) -> Sample:
        one = charged(100_000, do="exchange", connections=64, rate=rate, request=request("/1k"))(proxy, seconds)
        more = {key: value for key, value in one.more.items() if key != "p99_us"}
        if one.figure is not None:
            more["cpu_s_per_100k"] = one.figure
        return Sample(one.more["p99_us"], one.rate, more)

    return measure


def idle(many: int) -> Callable[[Proxy, float], Sample]:
    """KiB of resident memory for each of `many` connections that had one answer each and wait.

    The proxy is new; it is warmed up first, so that code read in and pools of 64 connections are not counted as theirs.
    """
    def measure(proxy: Proxy, seconds: float) -> Sample:
        del seconds
        worker = proxy.worker()
        before = resident([worker]) / (1 << 20)
        load(proxy.site, proxy.port, 0.5, do="exchange", connections=64, request=request("/1k"))
        check_congestion(proxy.site.netns)
        empty = resident(proxy.pids())
        held = Held(proxy.site, proxy.port, many, request("/1k"))
        try:
            grown = resident(proxy.pids()) - empty
        finally:
            held.close()
        return Sample(grown / 1024 / many, 0, {"worker_idle_mib": before, "worker_full_mib": (empty + grown) / (1 << 20)})

    return measure


def beside(proxy: Proxy, seconds: float) -> Sample:
    """How much longer the p99 of 1 KiB requests is while the same pods download something: 1,000/s, open loop; a ratio."""
    def small() -> dict[str, float]:
        return load(proxy.site, HTTP_PORT, seconds, do="exchange", connections=16, rate=1_000, request=request("/1k"))

    alone = small()
    with load_beside(proxy.site, SOURCE_PORT, do="bulk", streams=1):
        under = small()
    return Sample(under["p99_us"] / alone["p99_us"], under["work"] / under["seconds"],
                  {"alone_p99_us": alone["p99_us"], "beside_p99_us": under["p99_us"]})


def handshakes(proxy: Proxy, seconds: float) -> Sample:
    """CPU of the destination for one full handshake with both certificates, in ms."""
    pids = family(proxy.other)
    cpu = cpu_ns(pids)
    made = shake(proxy.site, proxy.home, seconds)
    return Sample((cpu_ns(pids) - cpu) / 1e6 / made, made / seconds, {})


def resident(pids: list[int]) -> int:
    """Bytes of user space (VmRSS)."""
    total = 0
    for pid in pids:
        line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
        total += int(line.split()[1]) * 1024
    return total


REQUESTS, GIBS = "CPU s per 100,000 requests", "CPU s per GiB"
TRIPS, CONNECTS = "CPU s per 100,000 round trips", "CPU s per 100,000 connections"
_WORD = "0123456789abcdef" * 4  # 64 bytes
CASES = {case.name: case for case in (
    Case("http1k", "HTTP/1.1 keep-alive, 1 KiB, 64 connections", REQUESTS, "http", HTTP_PORT,
         charged(100_000, do="exchange", connections=64, request=request("/1k")), {"envoy": 0.40, "better": 0.95}),
    Case("http64k", "HTTP/1.1, 64 KiB responses, 64 connections", REQUESTS, "http", HTTP_PORT,
         charged(100_000, do="exchange", connections=64, request=request("/64k")), {"envoy": 0.90, "nginx": 1.0}),
    Case("connect", "HTTP/1.1, one request per connection, 64 at a time", REQUESTS, "http", HTTP_PORT,
         charged(100_000, do="exchange", connections=64, request=request("/1k", "Connection: close"), after=1),
         {"envoy": 0.50, "nginx": 1.1}),
    Case("bulk1", "TCP bulk, 1 stream", GIBS, "tcp", SOURCE_PORT,
         charged(GIB, do="bulk", streams=1), {"envoy": 0.60, "haproxy": 0.85}, TCP),
    Case("bulk8", "TCP bulk, 8 streams", GIBS, "tcp", SOURCE_PORT,
         charged(GIB, do="bulk", streams=8), {"envoy": 0.60, "haproxy": 0.85}, TCP),
    Case("pingpong", "TCP ping-pong, 64 bytes, 64 connections", TRIPS, "tcp", ECHO_PORT,
         charged(100_000, do="exchange", connections=64, request=_WORD, fixed=64), {"envoy": 0.75, "haproxy": 1.0}, TCP),
    Case("tcpconnect", "TCP connect, 64 bytes each way, close; 64 at a time", CONNECTS, "tcp", ECHO_PORT,
         charged(100_000, do="exchange", connections=64, request=_WORD, fixed=64, after=2), {}, TCP),
    Case("p99", f"p99 at {RATE:,} requests/s, open loop, 1 KiB, 64 connections", "us", "http", HTTP_PORT,
         late(RATE), {"haproxy": 1.0}, rounds=7, seconds=4.0),
    Case("idle", f"idle kept-alive HTTP/1.1 connection, {IDLE:,} held", "KiB per connection", "http", HTTP_PORT,
         idle(IDLE), {"": 1.0}, proxies=ALL[1:], fresh=True),
    Case("tunnel1k", "HTTP/1.1 1 KiB through mutual TLS, 64 connections, layer 4 at both ends (HAProxy: 7)", REQUESTS, "tunnel", HTTP_PORT,
         charged(100_000, do="exchange", connections=64, request=request("/1k")), {"haproxy-h2": 0.75, "envoy-hbone": 0.80},
         ("envoy-hbone", "haproxy-h2", "narrows"), pair=True),
    Case("tunnel1k7", "HTTP/1.1 1 KiB through mutual TLS, 64 connections, layer 7 at the source", REQUESTS, "tunnel-http", HTTP_PORT,
         charged(100_000, do="exchange", connections=64, request=request("/1k")), {"envoy-mtls": 0.30, "haproxy-h2": 1.1},
         ("envoy-mtls", "haproxy-h2", "haproxy-h1", "narrows"), pair=True),
    Case("tunnelbulk1", "TCP bulk through mutual TLS, 1 stream", GIBS, "tunnel", SOURCE_PORT,
         charged(GIB, do="bulk", streams=1), {"envoy-hbone": 0.77}, ("envoy-hbone", "narrows"), pair=True),
    Case("tunnelbulk8", "TCP bulk through mutual TLS, 8 streams", GIBS, "tunnel", SOURCE_PORT,
         charged(GIB, do="bulk", streams=8), {"envoy-hbone": 0.77}, ("envoy-hbone", "narrows"), pair=True),
    Case("tunnelconnect", "connect, one request, close through warm tunnels, 64 at a time", CONNECTS, "tunnel", HTTP_PORT,
         charged(100_000, do="exchange", connections=64, request=request("/1k", "Connection: close"), after=1),
         {"envoy-hbone": 0.60}, ("envoy-hbone", "narrows"), pair=True),
    Case("tunnelp99", f"p99 at {TUNNEL_RATE:,} requests/s, open loop, 1 KiB, 64 connections, through mutual TLS", "us", "tunnel", HTTP_PORT,
         late(TUNNEL_RATE), {"envoy-hbone": 1.0}, ("envoy-hbone", "haproxy-h2", "narrows"), rounds=7, seconds=4.0, pair=True),
    Case("tunnelbeside", "p99 of 1 KiB requests beside a bulk download of the same pods, to theirs alone", "ratio", "tunnel-both",
         HTTP_PORT, beside, {"": 2.0}, ("narrows",), pair=True),
    Case("tunnelidle", "idle captured connection through mutual TLS, 4,800 held, both proxies", "KiB per connection", "tunnel", HTTP_PORT,
         idle(4_800), {"": 4.0}, ("envoy-hbone", "haproxy-h2", "narrows"), fresh=True, pair=True),
    Case("handshake", "full TLS 1.3 handshake with both certificates, the server's CPU", "ms", "tunnel", HTTP_PORT,
         handshakes, {"": 0.9}, ("envoy-hbone", "narrows"), pair=True),
)}
