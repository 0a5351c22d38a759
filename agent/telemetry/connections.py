"""Histograms of what the kernel told of TCP connections that ended: round trips, retransmitted segments, duration, bytes.

By who called whom, at most `pairs` of them: those that come later are counted under labels that all say `other`. Names follow Istio's:
`reporter` is source for the side that connected, and bytes are named from the server's side.
"""
from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from agent.model.telemetry import TCP_STATES, EndedConnection
from agent.model.workload import Service, Workload
from agent.telemetry.labels import UNKNOWN

LABELS = ("reporter", "source_workload", "source_workload_namespace", "destination_workload", "destination_workload_namespace",
          "destination_service", "connection_security_policy")
OTHER = ("other",) * len(LABELS)
INBOUND_PORT, TUNNEL_PORT = 15006, 15008
REMEMBERED = 8192  # peers whose labels are kept; strangers from the internet may be any number

NEVER = 0xFFFFFFFF  # least round trip of a connection without one
RTT_BOUNDS = (50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 1_000_000)  # us
RETRANSMIT_BOUNDS = (0, 1, 2, 5, 10, 50, 250)  # segments
DURATION_BOUNDS = tuple(10**exponent for exponent in range(6, 13))  # ns: 1 ms to 1,000 s
BYTE_BOUNDS = tuple(4**exponent for exponent in range(5, 16, 2))  # 1 KiB to 1 GiB

# How a connection ended, by the state before CLOSED. Of one that was half closed already a reset looks like an end.
_ENDS = {"syn_sent": "failed", "syn_recv": "failed", "established": "reset", "close_wait": "reset", "fin_wait1": "reset"}
ENDS = ("closed", "reset", "failed")
_END = tuple(ENDS.index(_ENDS.get(TCP_STATES.get(state, ""), "closed")) for state in range(16))


class Peers(Protocol):
    """Who is behind what the kernel tells. None: not of the mesh, or not known (any more)."""

    def here(self, cookie: int) -> Workload | None:
        """The pod of this node whose network namespace has this cookie."""

    def at(self, address: bytes) -> Workload | None:
        """16 bytes, IPv4 mapped."""

    def service(self, address: bytes) -> Service | None:
        """Whose virtual address this is."""


class Histogram:
    """Counts between bounds (inclusive above), with the values' sum. `scale`: what a value is divided by when it is shown."""

    __slots__ = ("bounds", "counts", "scale", "total")

    def __init__(self, bounds: Sequence[int], scale: float = 1) -> None:
        self.bounds = bounds
        self.scale = scale
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0

    def add(self, value: int) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def shown(self) -> tuple[list[tuple[str, float]], float]:
        """(cumulative buckets, sum)."""
        names = [*(f"{bound / self.scale:g}" if self.scale != 1 else str(bound) for bound in self.bounds), "+Inf"]
        return list(zip(names, accumulate(self.counts), strict=True)), self.total / self.scale


class Pair:
    """What was counted of one set of labels."""

    __slots__ = ("duration", "ends", "min_rtt", "received", "retransmits", "rtt", "sent")

    def __init__(self) -> None:
        self.rtt, self.min_rtt = Histogram(RTT_BOUNDS, 1e6), Histogram(RTT_BOUNDS, 1e6)
        self.retransmits, self.duration = Histogram(RETRANSMIT_BOUNDS), Histogram(DURATION_BOUNDS, 1e9)
        self.sent, self.received = Histogram(BYTE_BOUNDS), Histogram(BYTE_BOUNDS)
        self.ends = [0] * len(ENDS)


# Attribute of Pair -> metric and help.
FAMILIES = {
    "rtt": ("narrows_tcp_rtt_seconds", "Smoothed round trip when the connection ended"),
    "min_rtt": ("narrows_tcp_min_rtt_seconds", "Least round trip that the connection saw"),
    "retransmits": ("narrows_tcp_retransmits", "Segments sent again, by connection and this side"),
    "duration": ("narrows_tcp_duration_seconds", "From the SYN (reporter source) or the end of the handshake to the end"),
    "sent": ("narrows_tcp_sent_bytes", "Bytes from server to client, by connection, as they are on the wire"),
    "received": ("narrows_tcp_received_bytes", "Bytes from client to server, by connection, as they are on the wire"),
}


class Connections(Collector):
    """`add` is called by the event loop, `collect` by the thread that renders. `counted`: (records written, lost) of the ring."""

    def __init__(self, peers: Peers, pairs: int, counted: Callable[[], tuple[int, int]]) -> None:
        self._peers = peers
        self._limit = pairs
        self._counted = counted
        self._pairs: dict[tuple[str, ...], Pair] = {}
        self._other: Pair | None = None
        self._known: dict[tuple[int, bytes, int, int], Pair] = {}  # (cookie, remote, the server's port, accepted)

    def add(self, records: Iterable[EndedConnection]) -> None:
        """Costs 1.2 us a record (README of tests/bench has the flood)."""
        known = self._known
        for (netns, duration, sent, received, _, local_port, remote, remote_port, rtt, min_rtt, retransmits, accepted,
             before) in records:
            key = (netns, remote, local_port if accepted else remote_port, accepted)
            pair = known.get(key) or self._pair(key)
            pair.ends[_END[before & 15]] += 1
            if rtt:
                pair.rtt.add(rtt)
            if min_rtt != NEVER:
                pair.min_rtt.add(min_rtt)
            pair.retransmits.add(retransmits)
            pair.duration.add(duration)
            pair.sent.add(sent if accepted else received)
            pair.received.add(received if accepted else sent)

    def forget(self) -> None:
        """Names behind addresses may have changed. What was counted stays."""
        self._known.clear()

    def _pair(self, key: tuple[int, bytes, int, int]) -> Pair:
        at = self._labels(*key)
        pair = self._pairs.get(at)
        if pair is None and len(self._pairs) < self._limit:
            pair = self._pairs[at] = Pair()
        elif pair is None:
            pair = self._other = self._other or Pair()
        if len(self._known) >= REMEMBERED:
            self._known.clear()
        self._known[key] = pair
        return pair

    def _labels(self, cookie: int, remote: bytes, port: int, accepted: int) -> tuple[str, ...]:
        here, there = self._peers.here(cookie), self._peers.at(remote)
        source, destination = (there, here) if accepted else (here, there)
        service = None if accepted else self._peers.service(remote)
        return ("destination" if accepted else "source", *_named(source), *_named(destination),
                service.hostname if service is not None else _served(destination, port),
                "mutual_tls" if port == TUNNEL_PORT else UNKNOWN)

    def describe(self) -> Iterable[Metric]:
        """Nothing: a registry would otherwise collect at registration."""
        return []

    def collect(self) -> Iterable[Metric]:
        rows = list(self._pairs.items())
        if self._other is not None:
            rows.append((OTHER, self._other))
        for attribute, (name, text) in FAMILIES.items():
            family = HistogramMetricFamily(name, text, labels=LABELS)
            for at, pair in rows:
                buckets, total = getattr(pair, attribute).shown()
                family.add_metric(at, buckets, total)
            yield family
        ended = CounterMetricFamily("narrows_tcp_connections_ended", "Connections that ended, by how: failed never stood",
                                    labels=(*LABELS, "how"))
        for at, pair in rows:
            for how, count in zip(ENDS, pair.ends, strict=True):
                if count:
                    ended.add_metric((*at, how), count)
        written, lost = self._counted()
        records = CounterMetricFamily("narrows_tcp_records", "Connections that the kernel told of, and those lost because nobody read in "
                                      "time", labels=("result",))
        records.add_metric(("told",), written)
        records.add_metric(("lost",), lost)
        used = GaugeMetricFamily("narrows_tcp_pairs", "Sets of labels in use, of at most --observe-pairs")
        used.add_metric((), len(self._pairs))
        yield from (ended, records, used)


def _named(workload: Workload | None) -> tuple[str, str]:
    return (workload.workload_name or UNKNOWN, workload.namespace or UNKNOWN) if workload is not None else (UNKNOWN, UNKNOWN)


def _served(workload: Workload | None, port: int) -> str:
    """The service that a workload serves on this port; unknown when there is none, or several. On ports of the proxy it may be any."""
    if workload is None:
        return UNKNOWN
    keys = {one.service for one in workload.ports if port in (one.target_port, TUNNEL_PORT, INBOUND_PORT)}
    return keys.pop().partition("/")[2] if len(keys) == 1 else UNKNOWN
