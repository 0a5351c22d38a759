"""What capture does on this node: pods by state, how often and for how long somebody else's edits had undone it, and conntrack."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector


@dataclass(frozen=True, slots=True)
class CaptureFigures:
    """At one moment. `exposed_seconds` is an upper bound: from the last look that found all well to the repair."""

    pods: Mapping[str, int]  # by state
    methods: Mapping[tuple[str, str], int]  # captured pods by direction (egress, ingress) and method
    repairs: int
    exposed_seconds: float
    backend: str  # iptables, nftables; "" when it is not known


class CaptureCollector(Collector):
    """`read` is called at scrape time, from the thread that renders."""

    def __init__(self, read: Callable[[], CaptureFigures]) -> None:
        self._read = read

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        figures = self._read()
        pods = GaugeMetricFamily("narrows_capture_pods", "Pods of this node by state of capture", labels=("state",))
        for state, count in sorted(figures.pods.items()):
            pods.add_metric((state,), count)
        methods = GaugeMetricFamily("narrows_capture_methods", "Captured pods of this node by what captures their connections out (egress) "
                                    "and in (ingress)", labels=("direction", "method"))
        for way, count in sorted(figures.methods.items()):
            methods.add_metric(way, count)
        repairs = CounterMetricFamily("narrows_capture_repairs", "Pods whose rules or socket hooks somebody changed and we repaired")
        repairs.add_metric((), figures.repairs)
        exposed = CounterMetricFamily("narrows_capture_exposed_seconds", "Seconds, at most, that capture of a pod was "
                                      "not as planned before it was repaired")
        exposed.add_metric((), figures.exposed_seconds)
        backend = GaugeMetricFamily("narrows_capture_backend", "What redirects are written with", labels=("backend",))
        if figures.backend:
            backend.add_metric((figures.backend,), 1)
        return (pods, methods, repairs, exposed, backend)


@dataclass(frozen=True, slots=True)
class ConntrackFigures:
    """Of the kernel's tables of tracked connections: the fullest of captured pods and node, and sums since the agent's start."""

    entries: int
    limit: int
    dropped: int  # packets
    evicted: int  # entries


class ConntrackCollector(Collector):
    """`read` is called at scrape time, from the thread that renders."""

    def __init__(self, read: Callable[[], ConntrackFigures]) -> None:
        self._read = read

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        figures = self._read()
        entries = GaugeMetricFamily("narrows_conntrack_entries", "Tracked connections in the fullest table of captured pods and node")
        entries.add_metric((), figures.entries)
        limit = GaugeMetricFamily("narrows_conntrack_limit", "nf_conntrack_max, which counts for each namespace")
        limit.add_metric((), figures.limit)
        dropped = CounterMetricFamily("narrows_conntrack_dropped_packets", "Packets of new connections that the kernel dropped in captured "
                                      "pods and node, because no entry could be made: the table is full")
        dropped.add_metric((), figures.dropped)
        evicted = CounterMetricFamily("narrows_conntrack_evicted", "Tracked connections that the kernel gave up for new ones")
        evicted.add_metric((), figures.evicted)
        return (entries, limit, dropped, evicted)
