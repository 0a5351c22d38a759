"""DNS questions of captured pods, by Istio's names where it has them (ztunnel's)."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector


@dataclass(frozen=True, slots=True)
class DnsFigures:
    """At one moment, of the node. `buckets`: (upper bound in seconds, how many up to it beyond the bound before)."""

    pods: int
    requests: Mapping[str, int]  # by protocol
    mesh: int
    cached: int
    upstream: int
    failures: Mapping[str, int]  # by reason
    dropped: Mapping[str, int]  # by reason
    buckets: tuple[tuple[float, int], ...]
    slower: int
    seconds: float
    waiting: int
    cache_bytes: int


class DnsCollector(Collector):
    """`read` is called at scrape time, from the thread that renders."""

    def __init__(self, read: Callable[[], DnsFigures]) -> None:
        self._read = read

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        figures = self._read()
        requests = CounterMetricFamily("istio_dns_requests", "Questions of captured pods", labels=("request_protocol",))
        for protocol, count in figures.requests.items():
            requests.add_metric((protocol,), count)
        failures = CounterMetricFamily("istio_dns_upstream_failures", "Questions that a pod's resolver did not answer", labels=("reason",))
        for reason, count in figures.failures.items():
            failures.add_metric((reason,), count)
        dropped = CounterMetricFamily("narrows_dns_dropped", "Datagrams and connections that got no answer of ours", labels=("reason",))
        for reason, count in figures.dropped.items():
            dropped.add_metric((reason,), count)
        buckets, so_far = [], 0
        for bound, count in figures.buckets:
            so_far += count
            buckets.append((str(bound), so_far))
        duration = HistogramMetricFamily("istio_dns_upstream_request_duration_seconds", "Of answered questions to pods' resolvers, by UDP")
        duration.add_metric((), [*buckets, ("+Inf", so_far + figures.slower)], figures.seconds)
        return (requests, failures, dropped, duration,
                _counter("istio_dns_upstream_requests", "Questions sent to pods' resolvers", figures.upstream),
                _counter("narrows_dns_mesh_answers", "Questions answered by what the mesh knows", figures.mesh),
                _counter("narrows_dns_cache_hits", "Questions answered from the cache", figures.cached),
                GaugeMetricFamily("narrows_dns_pods", "Pods whose DNS is served", value=figures.pods),
                GaugeMetricFamily("narrows_dns_waiting", "Questions on their way to pods' resolvers", value=figures.waiting),
                GaugeMetricFamily("narrows_dns_cache_bytes", "Bytes of cached answers", value=figures.cache_bytes))


def _counter(name: str, words: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(name, words, value=value)
