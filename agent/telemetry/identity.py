"""Certificates of this node's identities, for whoever has to know before one ends."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector


@dataclass(frozen=True, slots=True)
class CertificateFigures:
    """At one moment. `expirations`: identity -> s since 1970."""

    expirations: Mapping[str, int]
    requests: int
    failures: int


class CertificateCollector(Collector):
    """`read` is called at scrape time, from the thread that renders."""

    def __init__(self, read: Callable[[], CertificateFigures]) -> None:
        self._read = read

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        figures = self._read()
        ends = GaugeMetricFamily("narrows_certificate_expiration_timestamp_seconds", "When the certificate in force ends, by identity",
                                 labels=("identity",))
        for identity, end in sorted(figures.expirations.items()):
            ends.add_metric((identity,), end)
        requests = CounterMetricFamily("narrows_certificate_requests", "Certificates that the authority was asked for")
        requests.add_metric((), figures.requests)
        failures = CounterMetricFamily("narrows_certificate_request_failures", "Attempts to get a certificate that failed")
        failures.add_metric((), figures.failures)
        return (ends, requests, failures)
