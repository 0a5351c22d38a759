"""What a scrape shows: Istio's names and labels, merged over workers, in both exposition formats."""
from __future__ import annotations

import gzip
from ipaddress import ip_address

from aiohttp.test_utils import TestClient, TestServer
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as text
from prometheus_client.registry import CollectorRegistry

from agent.model.telemetry import PASSTHROUGH, SeriesKey, SeriesValues
from agent.model.workload import Protocol, Service, ServicePort, Workload
from agent.telemetry.collector import DataPathCollector, cumulative
from agent.telemetry.server import metrics_app, readiness_app
from ext.core import ring, shm, shm_door

BOUNDS = (0.5, 1.0, 5.0)
SIZES = (1.0, 10.0, 100.0)


def workload(name: str) -> Workload:
    return Workload(
        uid=f"Kubernetes//Pod/default/{name}-1", name=f"{name}-1", namespace="default", addresses=(ip_address("10.0.0.1"),),
        node="n1", service_account="sa", trust_domain="cluster.local", workload_name=name, workload_type="deployment",
        canonical_name=name, canonical_revision="v1", cluster_id="Kubernetes", healthy=True, ports=())


class Names:
    def workload(self, index: int) -> Workload | None:
        return {1: workload("productpage"), 2: workload("reviews")}.get(index)

    def service(self, index: int) -> Service | None:
        if index != 7:
            return None
        port = ServicePort(9080, 9080, Protocol.HTTP)
        return Service("default", "reviews.default.svc.cluster.local", "reviews", (), (port,))


def key(**changes: object) -> SeriesKey:
    fields: dict[str, object] = {"reporter": "source", "protocol": "http", "source": 1, "destination": 2, "service": 7,
                                 "code": 200, "flag": "-", "grpc_status": None, "mutual_tls": False}
    return SeriesKey(**{**fields, **changes})  # type: ignore[arg-type]


def counts(n: int = 1) -> SeriesValues:
    return SeriesValues(opened=n, closed=n, failed=0, sent=50 * n, received=500 * n, duration_us=700 * n, duration=[0, n, 0, 0],
                        request_bytes=[0, 0, n, 0], response_bytes=[0, 0, 0, n])


HEADER = dict.fromkeys(shm.HEADER_FIELDS, 3)


def registry(*series: tuple[SeriesKey, SeriesValues]) -> CollectorRegistry:
    made = CollectorRegistry()
    made.register(DataPathCollector(lambda: series, lambda: {0: HEADER, 1: HEADER}, Names(), BOUNDS, SIZES))
    return made


async def scrape(made: CollectorRegistry, **headers: str) -> str:
    async with TestClient(TestServer(metrics_app(made)), auto_decompress=False) as client:
        answer = await client.get("/stats/prometheus", headers=headers)
        body = await answer.read()
        return (gzip.decompress(body) if answer.headers.get("Content-Encoding") == "gzip" else body).decode()


async def test_a_request_shows_istios_labels() -> None:
    made = registry((key(), counts(3)))
    labels = {
        "reporter": "source", "source_workload": "productpage", "source_canonical_service": "productpage",
        "source_canonical_revision": "v1", "source_workload_namespace": "default", "source_principal": "unknown",
        "source_app": "productpage", "source_version": "v1", "source_cluster": "Kubernetes", "source_region": "unknown",
        "source_zone": "unknown", "destination_service": "reviews.default.svc.cluster.local",
        "destination_service_name": "reviews", "destination_service_namespace": "default", "destination_workload": "reviews",
        "destination_canonical_service": "reviews", "destination_canonical_revision": "v1",
        "destination_workload_namespace": "default", "destination_principal": "unknown", "destination_app": "reviews",
        "destination_version": "v1", "destination_cluster": "Kubernetes", "destination_region": "unknown",
        "destination_zone": "unknown", "request_protocol": "http", "response_flags": "-",
        "connection_security_policy": "unknown", "response_code": "200", "grpc_response_status": "",
    }
    samples = [s for family in text(await scrape(made)) for s in family.samples if s.name == "istio_requests_total"]
    assert [(s.labels, s.value) for s in samples] == [(labels, 3)]


async def test_the_series_of_two_workers_are_one() -> None:
    made = registry((key(), counts(3)), (key(), counts(4)))
    for parse, headers in ((text, {}), (openmetrics, {"Accept": "application/openmetrics-text; version=1.0.0"})):
        families = list(parse(await scrape(made, **headers)))
        samples = {s.name + s.labels.get("le", ""): s.value for family in families for s in family.samples}
        assert samples["istio_requests_total"] == 7
        assert samples["istio_request_duration_milliseconds_count"] == 7
        assert samples["istio_request_duration_milliseconds_sum"] == 4.9
        assert not any("_created" in name for name in samples)


async def test_a_scrape_names_the_build_beside_istios_components() -> None:
    samples = [s for family in text(await scrape(registry())) for s in family.samples if s.name == "istio_build"]
    assert [(s.labels["component"], s.value) for s in samples] == [("narrows", 1)]
    assert samples[0].labels["tag"]


async def test_what_shared_memory_gives_fits_the_families() -> None:
    """The bounds and dictionaries of the door to shared memory, through to text that a scraper reads."""
    stats, log = bytearray(shm.stats_bytes()), bytearray(ring.log_bytes())
    shm.format_stats(stats)
    ring.format_log(log)
    writer = shm_door.Writer(stats, log)
    writer.request((1, 2, 7, 200, 1, 2, 0), 1_500, 0, 100_000)
    writer.tcp((1, 2, 7, 0, 2, 1, 0), 10, 20)
    found = [(SeriesKey(**name), SeriesValues(**values)) for name, values in shm.read_series(stats)]
    made = CollectorRegistry()
    made.register(DataPathCollector(lambda: found, lambda: {0: shm.read_header(stats)}, Names(), shm.DURATION_BOUNDS_MS,
                                    shm.SIZE_BOUNDS_BYTES))
    samples = {(s.name, s.labels.get("le")): s.value for family in text(await scrape(made)) for s in family.samples}
    assert samples["istio_request_duration_milliseconds_bucket", "1"] == 0
    assert samples["istio_request_duration_milliseconds_bucket", "5"] == 1
    assert samples["istio_request_bytes_bucket", "0.5"] == 1
    assert samples["istio_response_bytes_bucket", "60000"] == 0
    assert samples["istio_response_bytes_bucket", "+Inf"] == 1
    assert samples["istio_tcp_sent_bytes_total", None] == 20
    assert samples["istio_tcp_received_bytes_total", None] == 10


async def test_a_scrape_says_what_is_used_of_each_bound_and_why_work_was_refused() -> None:
    found = {(s.name, s.labels["worker"], s.labels.get("resource") or s.labels.get("reason") or s.labels.get("what")): s.value
             for family in text(await scrape(registry())) for s in family.samples if "worker" in s.labels}
    for resource in ("descriptors", "buffered_bytes", "held_connections", "pod_connections", "pod_buffered_bytes"):
        assert found["narrows_worker_budget_used", "0", resource] == found["narrows_worker_budget_limit", "0", resource] == 3
    assert found["narrows_worker_refused_total", "1", "memory"] == 3
    assert found["narrows_worker_shed_total", "1", "stalled"] == 3


async def test_a_scrape_may_be_compressed() -> None:
    assert "istio_requests_total" in await scrape(registry((key(), counts())), **{"Accept-Encoding": "gzip"})


def test_buckets_are_cumulative_and_end_at_infinity() -> None:
    assert cumulative([1, 2, 0, 4], BOUNDS) == [("0.5", 1), ("1", 3), ("5", 3), ("+Inf", 7)]


async def test_sent_bytes_of_tcp_are_those_of_the_server_for_both_reporters() -> None:
    made = registry((key(protocol="tcp", code=0), counts()), (key(protocol="tcp", code=0, reporter="destination"), counts()))
    samples = [s for family in text(await scrape(made)) for s in family.samples]
    for side in ("source", "destination"):
        by_name = {s.name: s.value for s in samples if s.labels.get("reporter") == side}
        assert by_name["istio_tcp_sent_bytes_total"] == 500
        assert by_name["istio_tcp_received_bytes_total"] == 50
    assert {s.labels["connection_security_policy"] for s in samples if s.labels.get("reporter") == "destination"} == {"none"}


async def test_what_left_the_mesh_is_named_passthrough() -> None:
    made = registry((key(protocol="tcp", code=0, service=PASSTHROUGH, destination=0), counts()))
    sample = next(s for family in text(await scrape(made)) for s in family.samples if s.name == "istio_tcp_sent_bytes_total")
    assert sample.labels["destination_service_name"] == "PassthroughCluster"
    assert sample.labels["destination_workload"] == "unknown"


async def test_readiness_says_what_it_waits_for() -> None:
    reason = ["the keeper does not answer"]
    async with TestClient(TestServer(readiness_app(lambda: reason[0]))) as client:
        answer = await client.get("/healthz/ready")
        assert (answer.status, await answer.text()) == (503, "the keeper does not answer\n")
        reason[0] = ""
        assert (await client.get("/healthz/ready")).status == 200
