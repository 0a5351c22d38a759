"""Prometheus metrics under istiod's names, where the meaning is the same."""
from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from controlplane.app.plane import Plane
from controlplane.ca.service import REFUSALS, CertificateService
from controlplane.model.problems import Severity
from controlplane.model.routing import DestinationRule, VirtualService
from controlplane.sources.cluster import Cluster
from controlplane.translate.names import SHORT, TypeUrl

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class _Figures(Collector):
    def __init__(self, plane: Plane, version: str, authority: CertificateService | None) -> None:
        self._plane = plane
        self._version = version
        self._authority = authority

    def collect(self) -> Iterator[Metric]:
        plane, counts = self._plane, self._plane.hub.counts
        yield _gauge("pilot_info", "The control plane.", {"version": self._version}, 1)
        yield _gauge("istiod_uptime_seconds", "Seconds since the control plane started.", {}, time.time() - plane.started)
        yield _gauge("pilot_xds", "Clients that are connected.", {"version": self._version}, len(plane.hub))
        yield _gauge("pilot_services", "Services in force.", {}, sum(1 for _ in plane.mesh.services()))
        objects = list(plane.mesh.objects())
        yield _gauge("pilot_virt_services", "VirtualServices in force.", {},
                     sum(isinstance(one, VirtualService) for one in objects))
        yield _gauge("narrows_destination_rules", "DestinationRules in force.", {},
                     sum(isinstance(one, DestinationRule) for one in objects))
        yield _gauge("narrows_pods", "Pods in force.", {}, sum(1 for _ in plane.mesh.pods()))
        yield _gauge("narrows_config_generation", "Changes of the configuration that were applied.", {}, plane.generation)
        problems = Metric("narrows_config_problems", "Problems of the configuration.", "gauge")
        for severity in Severity:
            count = sum(problem.severity is severity for problem in plane.problems())
            problems.add_sample(problems.name, {"severity": str(severity)}, count)
        yield problems
        if plane.leads is not None:
            yield _gauge("narrows_leader", "Whether this replica holds the Lease; in sum 1 over all.", {}, plane.leads())
        if plane.cluster is not None:
            yield from _of_cluster(plane.cluster)
        # istiod's counters have no _total; prometheus_client would add it to a counter, so their type is left open
        pushes = Metric("pilot_xds_pushes", "Responses sent to clients, by type.", "unknown")
        for type_url in TypeUrl:
            pushes.add_sample("pilot_xds_pushes", {"type": SHORT[type_url]}, counts.pushes[type_url])
        yield pushes
        rejects = Metric("pilot_total_xds_rejects", "Responses that clients rejected, by type.", "unknown")
        for type_url in TypeUrl:
            rejects.add_sample("pilot_total_xds_rejects", {"type": SHORT[type_url]}, counts.rejects[type_url])
        yield rejects
        if self._authority is not None:
            yield from _of_authority(self._authority)


def _of_cluster(cluster: Cluster) -> Iterator[Metric]:
    stale = Metric("narrows_kubernetes_stale_seconds", "Since when a kind is not followed; 0 while it is.", "gauge")
    held = Metric("narrows_kubernetes_objects", "Objects of the API server that are known, by kind.", "gauge")
    lists = Metric("narrows_kubernetes_lists", "How often a kind was listed as a whole.", "unknown")
    failures = Metric("narrows_kubernetes_failures", "Lists and watches that were refused or got no answer.", "unknown")
    now = time.monotonic()
    for kind, state in cluster.states():
        stale.add_sample(stale.name, {"kind": kind}, 0.0 if state.stale_since is None else now - state.stale_since)
        held.add_sample(held.name, {"kind": kind}, state.objects)
        lists.add_sample(lists.name, {"kind": kind}, state.lists)
        failures.add_sample(failures.name, {"kind": kind}, state.failures)
    yield from (stale, held, lists, failures)


def _of_authority(service: CertificateService) -> Iterator[Metric]:
    """Under the names of Istio's citadel; what it does not tell apart is in narrows_ca_refusals."""
    counts, material = service.counts, service.authority.material
    refused = counts.refused
    for name, about, value in (
            ("csr_count", "Certificate requests that came.", counts.requests),
            ("success_cert_issuance_count", "Certificates that were issued.", counts.issued),
            # Istio counts a caller who may not impersonate here too
            ("authentication_failure_count", "Requests refused for who asks, or for whom.",
             refused["token"] + refused["impersonation"]),
            ("csr_parsing_err_count", "Requests refused for what they hold.", refused["request"]),
            ("csr_sign_err_count", "Requests that were in order and could not be signed.", refused["expired"] + refused["audit"]),
            ("id_extraction_err_count", "Requests that name nobody who can be.", refused["identity"])):
        found = Metric(f"citadel_server_{name}", about, "unknown")
        found.add_sample(found.name, {}, value)
        yield found
    yield _gauge("citadel_server_root_cert_expiry_timestamp", "When the root that signs ends (s since 1970).", {},
                 material.roots[0].not_valid_after_utc.timestamp())
    yield _gauge("citadel_server_cert_chain_expiry_timestamp", "When the first certificate on the way to the root ends (s since 1970).", {},
                 material.not_after.timestamp())
    reasons = Metric("narrows_ca_refusals", "Requests refused, by reason.", "unknown")
    for reason in REFUSALS:
        reasons.add_sample(reasons.name, {"reason": reason}, refused[reason])
    yield reasons
    yield _gauge("narrows_ca_roots", "Roots that are trusted.", {}, len(material.roots))
    yield _gauge("narrows_ca_problem", "1 while the files of the authority cannot be used.", {}, bool(service.authority.problem))


def _gauge(name: str, about: str, labels: dict[str, str], value: float) -> Metric:
    found = GaugeMetricFamily(name, about, labels=list(labels))
    found.add_metric(list(labels.values()), value)
    return found


class Metrics:
    """`text` is what a scrape gets."""

    def __init__(self, plane: Plane, version: str, authority: CertificateService | None = None) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Figures(plane, version, authority))
        convergence = Histogram("pilot_proxy_convergence_time", "Seconds from a change to its last byte written to a client.",
                                registry=self._registry, buckets=(.001, .005, .01, .05, .1, .5, 1, 3, 5, 10, 20, 30))
        plane.on_converged = convergence.observe

    def text(self) -> bytes:
        return bytes(generate_latest(self._registry))
