"""A small mesh as model values and as transactions, and what tables say about it as plain values."""
from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address, ip_network
from typing import Any

from agent.dataplane import blobs
from agent.model.identity import Certificate, Trust
from agent.model.policy import Action, Match, Policy, Scope
from agent.model.routing import (
    Balancer,
    Cluster,
    Destination,
    Endpoint,
    HeaderEdit,
    MatchKind,
    NamedMatch,
    Route,
    RouteMatch,
    StringMatch,
    VirtualHost,
    WeightedCluster,
)
from agent.model.settings import ProxySettings
from agent.model.workload import Protocol, Service, ServicePort, Tunnel, Workload, WorkloadPort

HOST = "reviews.default.svc.cluster.local"
VIP, VIP6 = "10.96.0.1", "fd00:10:96::1"
V1, V2 = f"outbound|9080|v1|{HOST}", f"outbound|9080|v2|{HOST}"
SCOPE = "ns=default"
POD = 7  # handle

SERVICE = Service(
    "default", HOST, "reviews", (ip_address(VIP), ip_address(VIP6)),
    (ServicePort(9080, 9080, Protocol.HTTP), ServicePort(6379, 0, Protocol.TCP)),
)
WORKLOAD = Workload(
    uid="Kubernetes//Pod/default/reviews-v1-0", name="reviews-v1-0", namespace="default",
    addresses=(ip_address("10.244.1.5"), ip_address("fd00:10:244:1::5")), node="n1", service_account="reviews",
    trust_domain="cluster.local", workload_name="reviews-v1", workload_type="deployment", canonical_name="reviews",
    canonical_revision="v1", cluster_id="Kubernetes", healthy=True,
    ports=(WorkloadPort(SERVICE.key, 9080, 9080, Protocol.HTTP),), tunnel=Tunnel.HBONE,
    policies=("default/only-productpage", "istio-system/istio_converted_static_strict"),
)
POLICY = Policy(
    "default", "only-productpage", Scope.WORKLOAD, Action.DENY,
    (
        (
            (Match(principals=(StringMatch(MatchKind.EXACT, "cluster.local/ns/default/sa/productpage"),
                               StringMatch(MatchKind.SUFFIX, "/sa/admin")),
                   not_principals=(StringMatch(MatchKind.PRESENT, ""),), namespaces=(StringMatch(MatchKind.PREFIX, "de"),),
                   not_namespaces=(StringMatch(MatchKind.EXACT, "kube-system"),)), Match()),
            (Match(sources=(ip_network("10.244.0.0/16"), ip_network("fd00:10:244::/48")), not_sources=(ip_network("10.244.9.0/24"),),
                   destinations=(ip_network("10.244.1.5/32"),), not_destinations=(ip_network("::/0"),), ports=(9080, 65535),
                   not_ports=(15008,), service_accounts=(("default", "productpage"),), not_service_accounts=(("x", "y"), ("x", "z"))),),
            (),
        ),
        (),
    ),
    dry_run=True,
)
DESTINATION = Destination(
    SCOPE, f"{HOST}:9080",
    http=(
        VirtualHost(
            "reviews", (HOST, f"{HOST}:9080", "reviews", "*.reviews.example", "reviews.*", "*"),
            (
                Route(
                    "jason",
                    RouteMatch(
                        StringMatch(MatchKind.PATH_SEPARATED_PREFIX, "/reviews"),
                        (
                            NamedMatch("end-user", StringMatch(MatchKind.REGEX, "jas.n")),
                            NamedMatch("x-debug", StringMatch(MatchKind.EXACT, "on", True, True), missing_is_empty=True),
                        ),
                        (NamedMatch("page", StringMatch(MatchKind.PRESENT, "")),),
                    ),
                    (WeightedCluster(V2, 1),),
                    timeout_ms=1500,
                ),
                Route(
                    "main", RouteMatch(StringMatch(MatchKind.PREFIX, "/")),
                    (
                        WeightedCluster(V1, 90, response=HeaderEdit(add=(("x-version", "v1"),))),
                        WeightedCluster(V2, 10, HeaderEdit(set=(("x-canary", "yes"),))),
                    ),
                    request=HeaderEdit(remove=("x-secret",), set=(("x-route", "main"),), add=(("via", "narrows"),)),
                ),
            ),
        ),
    ),
    tcp=(WeightedCluster(V1, 1),),
)
CLUSTER = Cluster(
    SCOPE, V1, SERVICE.key, Balancer.LEAST_REQUEST, 10_000,
    (Endpoint(ip_address("10.244.1.5"), 9080), Endpoint(ip_address("fd00:10:244:2::6"), 9080, 3, False)),
)


TRUST = Trust("cluster.local", (bytes.fromhex("3003020101"), bytes.fromhex("308180") + bytes(128)), (bytes.fromhex("3000"),))
CERTIFICATE = Certificate(WORKLOAD.identity, 0xDEADBEEF, 1_700_000_000, 1_700_086_400,
                          (bytes.fromhex("3003020102"), bytes.fromhex("30820100") + bytes(256)))


def index_of(_service: str) -> int:
    return 11


PUTS = {
    "settings": blobs.put_settings(ProxySettings(access_log=False, hold_bytes=4096)),
    "workload": blobs.put_workload(21, WORKLOAD, index_of),
    "service": blobs.put_service(11, SERVICE),
    "destination": blobs.put_destination(DESTINATION),
    "unknown_destination": blobs.put_unknown_destination(SCOPE, f"{HOST}:6379"),
    "cluster": blobs.put_cluster(CLUSTER, index_of),
    "policy": blobs.put_policy(POLICY),
    "pod": blobs.put_pod("4b0c", POD, WORKLOAD.uid, SCOPE, WORKLOAD.addresses, WORKLOAD.identity, (9091,)),
    "trust": blobs.put_trust(TRUST),
    "certificate": blobs.put_certificate(CERTIFICATE),
    "resource": blobs.put_resource("type.googleapis.com/istio.workload.Address", "default/" + HOST, "v17", b"\x0a\x00"),
    "note": blobs.put_note("index/workload", b"\x15\0\0\0"),
}


def transaction(*entries: blobs.Entry, txn_id: int = 1) -> bytes:
    return blobs.encode_transaction(txn_id, entries)


def everything() -> bytes:
    return transaction(*PUTS.values())


def with_endpoints(*endpoints: Endpoint, balancer: Balancer = Balancer.ROUND_ROBIN, name: str = V1) -> blobs.Put:
    return blobs.put_cluster(replace(CLUSTER, name=name, balancer=balancer, endpoints=endpoints), index_of)


def with_routes(*routes: Route, domains: tuple[str, ...] = ("*",)) -> blobs.Put:
    return blobs.put_destination(replace(DESTINATION, http=(VirtualHost("all", domains, routes),), tcp=None))


def dump(tables: Any) -> dict[str, Any]:
    """What the tables answer about the small mesh: equal dumps mean that nobody could tell them apart."""
    from ext.route import asked_door

    answers: dict[str, Any] = {
        "counts": tables.counts, "settings": tables.settings, "service": tables.service_by_index(11),
        "workload": tables.workload_by_index(21), "pod": tables.pod(POD), "generation": tables.generation,
    }
    for ip in (VIP, VIP6, "10.244.1.5", "fd00:10:244:1::5", "10.0.0.99"):
        answers[ip] = (tables.service_at(ip, 9080), tables.service_at(ip, 6379), tables.workload_by_address(ip))
    for key in (CLUSTER.key, f"{SCOPE}|{V2}"):
        try:
            answers[key] = tables.cluster(key)
        except LookupError:
            answers[key] = None
    try:
        answers["tcp"] = tables.tcp(POD, VIP, 9080)
        for port in (9080, 6379):
            answers[f"destination {port}"] = tables.destination(POD, VIP, port)
        for target, headers in (("/", ()), ("/reviews/1?page=2", (("End-User", "jason"),))):
            answers[f"route {target}"] = tables.route(POD, VIP, 9080, asked_door.Request(target, HOST, headers=headers))
    except LookupError as error:
        answers["lookup"] = str(error)
    return answers
