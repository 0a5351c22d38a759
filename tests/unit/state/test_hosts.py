"""Names to addresses: which of several services is meant, wildcards, headless services, and changes."""
from __future__ import annotations

from ipaddress import ip_address

from agent.model.workload import Protocol, Service, ServicePort, Workload, WorkloadPort
from agent.state.store import Store


def service(host: str, *addresses: str, namespace: str = "shop") -> Service:
    return Service(namespace, host, host.partition(".")[0], tuple(map(ip_address, addresses)), (ServicePort(80, 80, Protocol.TCP),))


def workload(name: str, address: str, *services: str, healthy: bool = True) -> Workload:
    return Workload(f"Kubernetes//Pod/shop/{name}", name, "shop", (ip_address(address),), "n", "default", "cluster.local", name, "pod",
                    name, "", "Kubernetes", healthy, tuple(WorkloadPort(key, 80, 80, Protocol.TCP) for key in services))


def found(store: Store, host: str, namespace: str = "shop") -> list[str]:
    return sorted(map(str, store.hosts.addresses(host, namespace)))


def test_a_name_is_the_service_of_the_clients_namespace_else_the_first_with_addresses() -> None:
    store = Store()
    for namespace, address in (("a", ()), ("b", ("10.0.0.2",)), ("c", ("10.0.0.3",))):
        store.put_service(service("api.example.com", *address, namespace=namespace))
    assert found(store, "api.example.com", "c") == ["10.0.0.3"]
    assert found(store, "api.example.com", "elsewhere") == ["10.0.0.2"]
    assert found(store, "api.example.com", "a") == []  # its own has none: not somebody else's
    assert found(store, "www.example.com") == []


def test_a_wildcard_holds_below_it_and_an_exact_or_longer_name_goes_first() -> None:
    store = Store()
    store.put_service(service("*.example.com", "10.0.0.1"))
    store.put_service(service("*.deep.example.com", "10.0.0.2"))
    store.put_service(service("www.Example.com", "10.0.0.3"))
    assert [found(store, f"{name}example.com") for name in ("a.", "a.b.", "x.deep.", "www.", "")] == [
        ["10.0.0.1"], ["10.0.0.1"], ["10.0.0.2"], ["10.0.0.3"], []]


def test_a_headless_service_is_its_healthy_workloads_as_they_come_and_go() -> None:
    store = Store()
    store.put_service(service("db.shop.svc.cluster.local"))
    key = "shop/db.shop.svc.cluster.local"
    store.put_workload(workload("db-0", "10.1.0.1", key))
    store.put_workload(workload("db-1", "10.1.0.2", key))
    store.put_workload(workload("db-2", "10.1.0.3", key, healthy=False))
    assert found(store, "db.shop.svc.cluster.local") == ["10.1.0.1", "10.1.0.2"]
    store.put_workload(workload("db-0", "10.1.0.9", key))
    store.put_workload(workload("db-1", "10.1.0.2"))
    assert found(store, "db.shop.svc.cluster.local") == ["10.1.0.9"]
    store.remove_workload("Kubernetes//Pod/shop/db-0")
    assert found(store, "db.shop.svc.cluster.local") == []
    store.put_service(service("db.shop.svc.cluster.local", "10.0.0.7"))
    assert found(store, "db.shop.svc.cluster.local") == ["10.0.0.7"]
    store.remove_service(key)
    assert found(store, "db.shop.svc.cluster.local") == []
    assert not store.hosts._services and store.hosts._endpoints.keys() <= {key}
