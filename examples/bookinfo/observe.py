"""Reading what the mesh counted: sums, shares and quantiles from Prometheus' text format."""
from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from prometheus_client.parser import text_string_to_metric_families

REQUESTS = "istio_requests_total"
BUCKETS = "istio_request_duration_milliseconds_bucket"
Labels = Mapping[str, str]


@dataclass(slots=True)
class Call:
    """Requests of one workload to one other, as one side reported them. Durations in milliseconds."""

    requests: float = 0
    buckets: dict[float, float] = field(default_factory=lambda: collections.defaultdict(float))  # upper bound: cumulative

    def quantile(self, share: float) -> float | None:
        """The duration that `share` of the requests did not exceed, interpolated within its bucket; None without any."""
        bounds = sorted(self.buckets)
        if not bounds or self.buckets[bounds[-1]] <= 0:
            return None
        rank, below, lower = share * self.buckets[bounds[-1]], 0.0, 0.0
        for bound in bounds:
            count = self.buckets[bound]
            if count >= rank:
                if bound == float("inf"):
                    return lower
                return lower + (bound - lower) * ((rank - below) / (count - below) if count > below else 1)
            below, lower = count, bound
        return lower


Key = tuple[str, str, str]  # reporter, source workload, destination workload


class Parties(NamedTuple):
    """Labels of Istio's metrics. A principal is what a certificate said in a handshake, else `unknown`."""

    source_workload: str
    destination_workload: str
    source_principal: str
    destination_principal: str
    connection_security_policy: str


class Snapshot:
    """Every sample of every node at one moment."""

    def __init__(self, pages: Iterable[str]) -> None:
        self.values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = collections.defaultdict(float)
        for page in pages:
            for family in text_string_to_metric_families(page):
                for sample in family.samples:
                    self.values[sample.name, tuple(sorted(sample.labels.items()))] += sample.value

    def since(self, before: Snapshot) -> Iterator[tuple[str, Labels, float]]:
        """What grew since an earlier moment: name, labels, by how much."""
        for (name, labels), value in self.values.items():
            grown = value - before.values.get((name, labels), 0.0)
            if grown:
                yield name, dict(labels), grown

    def calls(self, before: Snapshot) -> dict[Key, Call]:
        """Who called whom since an earlier moment."""
        found: dict[Key, Call] = collections.defaultdict(Call)
        for name, labels, grown in self.since(before):
            if name not in (REQUESTS, BUCKETS):
                continue
            call = found[labels["reporter"], labels["source_workload"], labels["destination_workload"]]
            if name == REQUESTS:
                call.requests += grown
            else:
                call.buckets[float(labels["le"])] += grown
        return {key: call for key, call in found.items() if call.requests}

    def identities(self, before: Snapshot) -> dict[Parties, float]:
        """Requests since an earlier moment, as the destinations counted them, by who was at the ends of the connection."""
        found: dict[Parties, float] = collections.defaultdict(float)
        for name, labels, grown in self.since(before):
            if name == REQUESTS and labels["reporter"] == "destination":
                found[Parties(*(labels[key] for key in Parties._fields))] += grown
        return dict(found)

    def versions(self, before: Snapshot, service: str, reporter: str, wanted: Callable[[Labels], bool]) -> dict[str, int]:
        """How many requests each version of a service got since an earlier moment."""
        found: dict[str, int] = collections.defaultdict(int)
        for name, labels, grown in self.since(before):
            if (name, labels.get("reporter"), labels.get("destination_service_name")) == (REQUESTS, reporter, service) \
                    and wanted(labels):
                found[labels["destination_version"]] += round(grown)
        return dict(found)
