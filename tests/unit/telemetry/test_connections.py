"""Histograms of ended connections: who is named, which way bytes go, what is bounded."""
from __future__ import annotations

from ipaddress import IPv6Address, ip_address

from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import CollectorRegistry

from agent.model.telemetry import EndedConnection
from agent.model.workload import Protocol, Service, ServicePort, Workload, WorkloadPort
from agent.telemetry.connections import Connections

HERE, THERE, STRANGER = (ip_address(text) for text in ("::ffff:10.0.0.1", "::ffff:10.0.0.2", "2001:db8::1"))
VIP = ip_address("::ffff:10.96.0.9")
CLIENT = {"reporter": "source", "source_workload": "shop", "source_workload_namespace": "default"}


def workload(name: str, *services: str) -> Workload:
    return Workload(
        uid=f"Kubernetes//Pod/default/{name}-1", name=f"{name}-1", namespace="default", addresses=(), node="n1", service_account="sa",
        trust_domain="cluster.local", workload_name=name, workload_type="deployment", canonical_name=name, canonical_revision="v1",
        cluster_id="Kubernetes", healthy=True, ports=tuple(WorkloadPort(f"default/{one}", 80, 8080, Protocol.TCP) for one in services))


class Peers:
    def __init__(self, *services: str) -> None:
        self.cart = workload("cart", *services)

    def here(self, cookie: int) -> Workload | None:
        return {1: workload("shop"), 2: self.cart}.get(cookie)

    def at(self, address: bytes) -> Workload | None:
        return {HERE.packed: workload("shop"), THERE.packed: self.cart}.get(address)

    def service(self, address: bytes) -> Service | None:
        return Service("default", "vip.example", "vip", (), (ServicePort(80, 8080, Protocol.TCP),)) if address == VIP.packed else None


def ended(**changes: object) -> EndedConnection:
    """From the shop to the cart: 1,000 bytes there, 5,000 back."""
    assert isinstance(HERE, IPv6Address)
    found = EndedConnection(netns=1, duration=2_000_000_000, sent=1000, received=5000, local=HERE.packed, local_port=40_000,
                            remote=THERE.packed, remote_port=8080, rtt=300, min_rtt=100, retransmits=2, accepted=0, before=5)
    return found._replace(**changes)


def shown(connections: Connections, name: str, **labels: str) -> float:
    registry = CollectorRegistry()
    registry.register(connections)
    return sum(sample.value for family in text_string_to_metric_families(generate_latest(registry).decode()) for sample in family.samples
               if sample.name == name and all(sample.labels[key] == value for key, value in labels.items()))


def test_a_connection_is_counted_under_who_called_whom_in_the_buckets_of_its_figures() -> None:
    connections = Connections(Peers("cart.default.svc"), 10, lambda: (1, 0))
    connections.add([ended()])
    pair = {**CLIENT, "destination_workload": "cart", "destination_workload_namespace": "default",
            "destination_service": "cart.default.svc", "connection_security_policy": "unknown"}
    for name, below, at, total in (("rtt_seconds", "0.00025", "0.0005", 0.0003), ("min_rtt_seconds", "5e-05", "0.0001", 0.0001),
                                   ("retransmits", "1", "2", 2), ("duration_seconds", "1", "10", 2), ("received_bytes", "", "1024", 1000),
                                   ("sent_bytes", "1024", "16384", 5000)):
        assert shown(connections, f"narrows_tcp_{name}_sum", **pair) == total
        assert shown(connections, f"narrows_tcp_{name}_bucket", **pair, le=at) == 1, name
        assert shown(connections, f"narrows_tcp_{name}_bucket", **pair, le=below) == 0, name
        assert shown(connections, f"narrows_tcp_{name}_count", **pair) == 1
    assert shown(connections, "narrows_tcp_connections_ended_total", **pair, how="closed") == 1


def test_who_accepted_is_the_destination_and_bytes_are_named_from_the_servers_side() -> None:
    connections = Connections(Peers("cart.default.svc"), 10, lambda: (1, 0))
    connections.add([ended(netns=2, local_port=15008, remote=HERE.packed, remote_port=40_000, accepted=1, sent=5000, received=1000)])
    pair = {"reporter": "destination", "source_workload": "shop", "destination_workload": "cart", "destination_service": "cart.default.svc",
            "connection_security_policy": "mutual_tls"}
    assert shown(connections, "narrows_tcp_received_bytes_sum", **pair) == 1000
    assert shown(connections, "narrows_tcp_sent_bytes_sum", **pair) == 5000


def test_what_is_not_known_is_called_so() -> None:
    connections = Connections(Peers("cart.default.svc", "basket.default.svc"), 10, lambda: (1, 0))
    connections.add([ended(), ended(remote=VIP.packed), ended(remote=STRANGER.packed), ended(netns=9)])
    count = "narrows_tcp_rtt_seconds_count"
    assert shown(connections, count, **CLIENT, destination_workload="cart", destination_service="unknown") == 1  # it serves two there
    assert shown(connections, count, **CLIENT, destination_workload="unknown", destination_service="vip.example") == 1
    assert shown(connections, count, **CLIENT, destination_workload="unknown", destination_service="unknown") == 1
    assert shown(connections, count, source_workload="unknown", destination_workload="cart") == 1


def test_a_connection_that_never_stood_has_no_round_trip() -> None:
    connections = Connections(Peers(), 10, lambda: (1, 0))
    connections.add([ended(rtt=0, min_rtt=0xFFFFFFFF, before=2, sent=0, received=0), ended(before=1)])
    assert shown(connections, "narrows_tcp_rtt_seconds_count") == shown(connections, "narrows_tcp_min_rtt_seconds_count") == 1
    assert shown(connections, "narrows_tcp_duration_seconds_count") == 2
    assert {how: shown(connections, "narrows_tcp_connections_ended_total", how=how) for how in ("closed", "reset", "failed")} == {
        "closed": 0, "reset": 1, "failed": 1}


def test_pairs_are_bounded_and_the_rest_is_counted_under_other() -> None:
    peers = Peers()
    connections = Connections(peers, 2, lambda: (20_000, 7))
    strangers = [ended(remote=number.to_bytes(16), netns=number) for number in range(20_000)]  # more than are remembered
    connections.add([ended(), *strangers])
    peers.cart = workload("wagon")
    connections.add([ended()])  # the cart was forgotten: too many strangers came
    connections.forget()
    connections.add([ended()] * 3)
    count = "narrows_tcp_rtt_seconds_count"
    assert shown(connections, count, destination_workload="cart") == 1
    assert shown(connections, count) == 20_005
    assert shown(connections, count, source_workload="other", destination_service="other") == 6  # wagon's 4, two strangers'
    assert shown(connections, "narrows_tcp_pairs") == 2
    assert shown(connections, "narrows_tcp_records_total", result="lost") == 7
