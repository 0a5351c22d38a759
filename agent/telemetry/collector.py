"""Prometheus families from what the workers counted in shared memory.

A custom collector of prometheus_client: nothing is counted twice and the data path knows nothing of Prometheus. Series of all
workers with the same labels are added up, so that a scrape shows one series per pair however the pods are spread.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from agent.model.telemetry import SeriesKey, SeriesValues
from agent.telemetry import labels
from agent.telemetry.labels import Names

Series = Iterable[tuple[SeriesKey, SeriesValues]]
Header = Mapping[str, int]

# Gauges and counters of a worker's statistics header -> help. The rest of the header is not for operators.
WORKER_GAUGES = {
    "downstream_open": "Connections of clients that are open",
    "upstream_open": "Connections to servers that are open",
    "upstream_idle": "Pooled connections to servers without a request",
    "held": "Connections that wait for configuration",
    "buffered_bytes": "Bytes in buffers",
    "sockets_ready": "Sockets prefetched from the keeper",
    "waiting_memory": "Connections not read until their pod gives buffers back",
    "tunnels_open": "HBONE tunnels, dialled and accepted, from their socket on",
}
WORKER_COUNTERS = {
    "accepted": "Connections accepted",
    "overflow_series": "Updates that went to the overflow series because the table was full",
    "dropped_records": "Access log records dropped because the ring was full",
    "misses": "Destinations asked for because they were not known yet",
    "parse_errors": "Messages refused as malformed",
    "accept_errors": "Accepts that failed (descriptors or memory)",
    "loop_turns": "Turns of the event loop",
    "turns_cut": "Times that a pod had more to do than its turn of the event loop",
    "tunnels_opened": "HBONE tunnels whose handshake ended well",
    "tunnels_failed": "HBONE tunnels whose connection or handshake did not, on either side",
    "tunnels_revoked": "Open HBONE tunnels that ended because a revocation list names their peer",
    "tunnels_silent": "Open HBONE tunnels whose peer did not answer a PING in time",
    "tunnels_idle": "Dialled HBONE tunnels that ended because nobody used them",
    "tunnels_early": "HBONE tunnels dialled before anything needed them",
    "tunnels_early_used": "HBONE tunnels dialled before anything needed them that carried a connection then",
    "tunnels_waited": "Connections that waited for the handshake of their HBONE tunnel",
    "refused_calls": "Workers killed for a system call that they may not make",
}
# What pods share or are bounded in: resource -> (header field of its use, of its limit). `pod_`: of the pod that has the most.
BUDGETS = {
    "descriptors": ("descriptors", "descriptors_limit"),
    "buffered_bytes": ("buffered_bytes", "buffered_limit"),
    "held_connections": ("held", "held_limit"),
    "pod_connections": ("pod_connections", "pod_connections_limit"),
    "pod_buffered_bytes": ("pod_buffered", "pod_buffered_limit"),
}
REFUSED = ("connections", "descriptors", "memory", "held", "head_timeout", "body_timeout", "head_size")
SHED = ("idle", "stalled", "replay", "sockets")


CONFINED = 1  # of the header's `confinement` (ext/sys/seccomp.pxd)


def cumulative(counts: Sequence[int], bounds: Sequence[float]) -> list[tuple[str, float]]:
    """Per-bucket counts -> Prometheus buckets; the last count is that above the last bound."""
    total = 0
    out: list[tuple[str, float]] = []
    for bound, count in zip((*map(_text, bounds), "+Inf"), counts, strict=True):
        total += count
        out.append((bound, total))
    return out


def _text(bound: float) -> str:
    return str(int(bound)) if bound == int(bound) else str(bound)


class DataPathCollector(Collector):
    """`series` and `headers` read shared memory at scrape time; `names` tells who stands behind an index.

    `duration_bounds_ms` and `size_bounds` are the upper bounds of all buckets but the last.
    """

    def __init__(
        self,
        series: Callable[[], Series],
        headers: Callable[[], Mapping[int, Header]],
        names: Names,
        duration_bounds_ms: Sequence[float],
        size_bounds: Sequence[float],
    ) -> None:
        self._series = series
        self._headers = headers
        self._names = names
        self._durations = duration_bounds_ms
        self._sizes = size_bounds

    def describe(self) -> Iterable[Metric]:
        """Nothing: families depend on what was counted, and a registry would otherwise collect at registration."""
        return []

    def collect(self) -> Iterable[Metric]:
        merged: dict[tuple[str, ...], tuple[SeriesKey, SeriesValues]] = {}
        for key, counts in self._series():
            at = labels.values(key, self._names)
            if at in merged:
                merged[at][1].add(counts)
            else:
                merged[at] = (key, counts.copy())
        yield from self._http([(at, counts) for at, (key, counts) in merged.items() if key.protocol != "tcp"])
        yield from self._tcp([(at, counts) for at, (key, counts) in merged.items() if key.protocol == "tcp"])
        yield from self._workers()
        # the labels of Istio's own component versions, so that its dashboards list us beside them
        build = GaugeMetricFamily("istio_build", "Version of this build", labels=("component", "tag"))
        build.add_metric(("narrows", metadata.version("narrows")), 1)
        yield build

    def _http(self, rows: list[tuple[tuple[str, ...], SeriesValues]]) -> Iterable[Metric]:
        requests = CounterMetricFamily("istio_requests", "Requests that ended", labels=labels.HTTP)
        duration = HistogramMetricFamily("istio_request_duration_milliseconds", "From the request's first byte to the "
                                         "response's last", labels=labels.HTTP)
        request = HistogramMetricFamily("istio_request_bytes", "Bytes of requests, heads included", labels=labels.HTTP)
        response = HistogramMetricFamily("istio_response_bytes", "Bytes of responses, heads included", labels=labels.HTTP)
        for at, counts in rows:
            requests.add_metric(at, counts.closed)
            duration.add_metric(at, cumulative(counts.duration, self._durations), counts.duration_us / 1000)
            request.add_metric(at, cumulative(counts.request_bytes, self._sizes), counts.sent)
            response.add_metric(at, cumulative(counts.response_bytes, self._sizes), counts.received)
        return (requests, duration, request, response)

    def _tcp(self, rows: list[tuple[tuple[str, ...], SeriesValues]]) -> Iterable[Metric]:
        # Istio names both from the server's side, for either reporter: `sent` are the response's bytes.
        sent = CounterMetricFamily("istio_tcp_sent_bytes", "Bytes from server to client", labels=labels.TCP)
        received = CounterMetricFamily("istio_tcp_received_bytes", "Bytes from client to server", labels=labels.TCP)
        opened = CounterMetricFamily("istio_tcp_connections_opened", "Connections opened", labels=labels.TCP)
        closed = CounterMetricFamily("istio_tcp_connections_closed", "Connections closed", labels=labels.TCP)
        failed = CounterMetricFamily("istio_tcp_connections_failed", "Connections that reached no server",
                                     labels=labels.TCP)
        for at, counts in rows:
            sent.add_metric(at, counts.received)
            received.add_metric(at, counts.sent)
            opened.add_metric(at, counts.opened)
            closed.add_metric(at, counts.closed)
            if counts.failed:
                failed.add_metric(at, counts.failed)
        return (sent, received, opened, closed, failed)

    def _workers(self) -> Iterable[Metric]:
        headers = self._headers()
        families: list[Any] = []
        for name, text in WORKER_GAUGES.items():
            gauge = GaugeMetricFamily(f"narrows_worker_{name}", text, labels=("worker",))
            families.append((gauge, name))
        for name, text in WORKER_COUNTERS.items():
            families.append((CounterMetricFamily(f"narrows_worker_{name}", text, labels=("worker",)), name))
        confined = GaugeMetricFamily("narrows_worker_seccomp", "1: under its filter of system calls; 0: not", labels=("worker",))
        for index, header in sorted(headers.items()):
            confined.add_metric((str(index),), float(header["confinement"] == CONFINED))
        for family, name in families:
            for index, header in sorted(headers.items()):
                family.add_metric((str(index),), header[name])
        judged = CounterMetricFamily("narrows_worker_policy", "Inbound connections that policies denied when they came, cut when policies "
                                     "changed, or would deny if those on trial were in force", labels=("worker", "verdict"))
        for index, header in sorted(headers.items()):
            for verdict in ("denied", "cut", "dry_denied"):
                judged.add_metric((str(index), verdict), header[f"policy_{verdict}"])
        return [*(family for family, _ in families), confined, judged, *self._budgets(headers)]

    @staticmethod
    def _budgets(headers: Mapping[int, Header]) -> Iterable[Metric]:
        used = GaugeMetricFamily("narrows_worker_budget_used", "What is held of a bounded resource", labels=("worker", "resource"))
        limit = GaugeMetricFamily("narrows_worker_budget_limit", "And its bound", labels=("worker", "resource"))
        refused = CounterMetricFamily("narrows_worker_refused", "Work refused because a bound was reached", labels=("worker", "reason"))
        shed = CounterMetricFamily("narrows_worker_shed", "What was ended or let go to make room", labels=("worker", "what"))
        for index, header in sorted(headers.items()):
            for resource, (use, bound) in BUDGETS.items():
                used.add_metric((str(index), resource), header[use])
                limit.add_metric((str(index), resource), header[bound])
            for reason in REFUSED:
                refused.add_metric((str(index), reason), header[f"refused_{reason}"])
            for what in SHED:
                shed.add_metric((str(index), what), header[f"shed_{what}"])
        return (used, limit, refused, shed)
