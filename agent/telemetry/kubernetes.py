"""How well Kubernetes' API server is followed, by kind; named as the control plane names the same."""
from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from prometheus_client.core import GaugeMetricFamily, Metric, UnknownMetricFamily
from prometheus_client.registry import Collector


class KindFigures(NamedTuple):
    kind: str
    stale_seconds: float
    objects: int
    lists: int
    failures: int


class KubernetesCollector(Collector):
    """`read` is called at scrape time, from the thread that renders. Nothing is told where pods come from files."""

    def __init__(self, read: Callable[[], list[KindFigures]]) -> None:
        self._read = read

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        if not (figures := self._read()):
            return ()
        stale = GaugeMetricFamily("narrows_kubernetes_stale_seconds", "Since when a kind is not followed; 0 while it is", labels=("kind",))
        held = GaugeMetricFamily("narrows_kubernetes_objects", "Objects of the API server that are known, by kind", labels=("kind",))
        lists = UnknownMetricFamily("narrows_kubernetes_lists", "How often a kind was listed as a whole", labels=("kind",))
        failures = UnknownMetricFamily("narrows_kubernetes_failures", "Lists and watches that were refused or got no answer",
                                       labels=("kind",))
        for one in figures:
            for family, value in ((stale, one.stale_seconds), (held, one.objects), (lists, one.lists), (failures, one.failures)):
                family.add_metric((one.kind,), value)
        return (stale, held, lists, failures)
