"""What is wanted in force, what a commit costs, and numbers that nobody else ever gets."""
from __future__ import annotations

import json
from dataclasses import replace
from ipaddress import ip_address

from agent.model.routing import Balancer, Cluster, Endpoint
from agent.model.workload import Protocol, Service, ServicePort, Workload, WorkloadPort
from agent.state.entries import Drop, Entry, PutCluster, PutNote, PutPod, PutResource, PutService, PutWorkload, Table
from agent.state.store import GRACE, Store

HOST = "reviews.default.svc.cluster.local"
SERVICE = Service("default", HOST, "reviews", (ip_address("10.96.0.1"),), (ServicePort(9080, 9080, Protocol.HTTP),))


def workload(name: str, *addresses: str, service: str = SERVICE.key) -> Workload:
    return Workload(
        uid=f"Kubernetes//Pod/default/{name}", name=name, namespace="default",
        addresses=tuple(ip_address(one) for one in addresses), node="n1", service_account="default",
        trust_domain="cluster.local", workload_name=name, workload_type="deployment", canonical_name=name,
        canonical_revision="v1", cluster_id="Kubernetes", healthy=True,
        ports=(WorkloadPort(service, 9080, 9080, Protocol.HTTP),))


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def kinds(entries: list[Entry]) -> list[tuple[str, str]]:
    return [(type(entry).__name__, entry.key[1]) for entry in entries]


def notes(store: Store) -> list[tuple[str, bytes]]:
    return [(put.name, put.body) for put in store.entries(Table.NOTE) if isinstance(put, PutNote)]


def cluster(*ends: str) -> Cluster:
    return Cluster("ns=default", "outbound|9080||" + HOST, SERVICE.key, Balancer.LEAST_REQUEST, 10_000,
                   tuple(Endpoint(ip_address(end), 9080) for end in ends))


def test_one_endpoint_change_is_exactly_one_cluster_put() -> None:
    store = Store()
    store.put_service(SERVICE)
    for number in range(100):
        store.put_workload(workload(f"w{number}", f"10.244.0.{number + 1}"))
    store.publish((), [cluster("10.244.0.1")])
    store.take()
    store.publish((), [cluster("10.244.0.1", "10.244.0.2")])
    assert store.take() == [PutCluster(cluster("10.244.0.1", "10.244.0.2"))]
    assert store.take() == [] and not store


def test_saying_the_same_again_costs_nothing() -> None:
    store = Store()
    store.put_service(SERVICE)
    store.put_workload(workload("a", "10.244.0.1"))
    store.take()
    store.put_service(SERVICE)
    store.put_workload(workload("a", "10.244.0.1"))
    assert store.take() == []


def test_a_workload_that_comes_before_its_service_names_it_by_the_number_that_it_will_have() -> None:
    store = Store()
    store.put_workload(workload("a", "10.244.0.1"))
    early = store.service_index(SERVICE.key)
    assert early > 0
    store.put_service(SERVICE)
    put = store.entry((Table.SERVICE, SERVICE.key))
    assert isinstance(put, PutService) and put.index == early
    assert store.by_index(early) == SERVICE


def test_numbers_are_unique_over_workloads_services_and_pods() -> None:
    store = Store()
    store.put_service(SERVICE)
    store.put_workload(workload("a", "10.244.0.1"))
    handle = store.put_pod("pod-uid", workload("a").uid, "ns=default", (ip_address("10.244.0.1"),))
    numbers = [store.service_index(SERVICE.key), store.notes.known("workload", workload("a").uid), handle]
    assert len(set(numbers)) == 3 and 0 not in numbers


def test_the_later_of_two_workloads_with_one_address_is_refused_and_gets_it_when_the_first_goes() -> None:
    store = Store()
    assert store.put_workload(workload("a", "10.244.0.1")) is None
    said = store.put_workload(workload("b", "10.244.0.1", "10.244.0.2"))
    assert said == "address 10.244.0.1 belongs to workload Kubernetes//Pod/default/a already"
    put = store.entry((Table.WORKLOAD, workload("b").uid))
    assert isinstance(put, PutWorkload) and put.workload.addresses == (ip_address("10.244.0.2"),)
    assert store.workload_at(ip_address("10.244.0.1")) == workload("a", "10.244.0.1")
    store.take()
    store.remove_workload(workload("a").uid)
    assert [key for name, key in kinds(store.take()) if name == "PutWorkload"] == [workload("a").uid, workload("b").uid]
    put = store.entry((Table.WORKLOAD, workload("b").uid))
    assert isinstance(put, PutWorkload) and len(put.workload.addresses) == 2


def test_the_later_of_two_services_with_one_virtual_address_is_refused() -> None:
    store = Store()
    assert store.put_service(SERVICE) is None
    twin = replace(SERVICE, hostname="ratings.default.svc.cluster.local", name="ratings")
    assert store.put_service(twin) == f"virtual address 10.96.0.1 belongs to service {SERVICE.key} already"


def test_what_is_removed_loses_its_addresses_at_once_and_its_number_after_the_grace() -> None:
    clock = Clock()
    store = Store(clock)
    store.put_service(SERVICE)
    store.put_workload(workload("a", "10.244.0.1"))
    index = store.notes.known("workload", workload("a").uid)
    store.take()
    store.remove_workload(workload("a").uid)
    put = next(entry for entry in store.take() if isinstance(entry, PutWorkload))
    assert put.index == index and put.workload.addresses == () and not put.workload.healthy
    labels = store.by_index(index)
    assert labels is not None and labels.name == "a"
    clock.now += GRACE - 1
    store.sweep()
    assert store.take() == []
    clock.now += 2
    store.sweep()
    dropped = {entry.key for entry in store.take() if isinstance(entry, Drop)}
    assert dropped == {(Table.WORKLOAD, workload("a").uid), (Table.NOTE, f"workload\n{workload('a').uid}")}
    assert store.by_index(index) is None
    store.put_workload(workload("a", "10.244.0.1"))
    assert store.notes.known("workload", workload("a").uid) > index


def test_what_comes_back_within_the_grace_has_its_old_number() -> None:
    clock = Clock()
    store = Store(clock)
    store.put_workload(workload("a", "10.244.0.1"))
    index = store.notes.known("workload", workload("a").uid)
    store.remove_workload(workload("a").uid)
    clock.now += 10
    store.put_workload(workload("a", "10.244.0.7"))
    clock.now += 10 * GRACE
    store.sweep()
    assert store.notes.known("workload", workload("a").uid) == index
    assert (Table.WORKLOAD, workload("a").uid) in {put.key for put in store.everything()}


def test_the_number_of_a_removed_service_stays_while_a_workload_names_it() -> None:
    clock = Clock()
    store = Store(clock)
    store.put_service(SERVICE)
    store.put_workload(workload("a", "10.244.0.1"))
    index = store.service_index(SERVICE.key)
    store.remove_service(SERVICE.key)
    clock.now += 2 * GRACE
    store.sweep()
    assert store.service_index(SERVICE.key) == index
    store.remove_workload(workload("a").uid)
    clock.now += 2 * GRACE
    store.sweep()
    assert store.service_index(SERVICE.key) == 0


def test_numbers_survive_the_agent_and_are_not_given_to_others() -> None:
    first = Store()
    first.put_service(SERVICE)
    first.put_workload(workload("a", "10.244.0.1"))
    handle = first.handle("pod-uid")
    second = Store()
    assert second.restore_notes(notes(first)) == []
    second.put_workload(workload("new", "10.244.0.9"))
    second.put_service(SERVICE)
    second.put_workload(workload("a", "10.244.0.1"))
    for kind, name in (("workload", workload("a").uid), ("service", SERVICE.key)):
        assert second.notes.known(kind, name) == first.notes.known(kind, name)
    assert second.handle("pod-uid") == handle
    given = {number.index for number in first.notes.numbers.values()}
    assert second.notes.known("workload", workload("new").uid) not in given


def test_restoring_wants_what_is_in_the_keeper_already() -> None:
    first = Store()
    first.put_service(SERVICE)
    first.put_workload(workload("a", "10.244.0.1"))
    first.notes.use("ns=default|reviews:9080")
    second = Store()
    second.restore_notes(notes(first))
    second.put_service(SERVICE)
    second.put_workload(workload("a", "10.244.0.1"))
    assert {put.key: put for put in second.everything()} == {put.key: put for put in first.everything()}
    assert second.notes.destinations == {"ns=default|reviews:9080"}


def test_what_went_while_no_agent_looked_is_forgotten_after_the_grace() -> None:
    clock = Clock()
    first = Store(clock)
    first.put_workload(workload("a", "10.244.0.1"))
    second = Store(clock)
    second.restore_notes(notes(first))
    clock.now += GRACE + 1
    second.sweep()
    assert second.notes.known("workload", workload("a").uid) == 0


def test_labels_of_what_is_gone_survive_the_agent_too() -> None:
    first = Store()
    first.put_workload(workload("a", "10.244.0.1"))
    index = first.notes.known("workload", workload("a").uid)
    first.remove_workload(workload("a").uid)
    second = Store()
    second.restore_notes(notes(first))
    labels = second.by_index(index)
    assert isinstance(labels, Workload) and labels.workload_name == "a"


def test_unreadable_notes_are_named_and_the_others_are_taken() -> None:
    store = Store()
    complaints = store.restore_notes([
        ("next", b"{"), ("workload\nx", b'{"index":0}'), ("wheel\ny", b'{"index":4}'), ("service\ns", b'{"index":41}')])
    assert len(complaints) == 3 and all("earlier agent" in text for text in complaints)
    store.put_workload(workload("a"))
    assert store.notes.known("workload", workload("a").uid) > 41


def test_a_failed_commit_is_handed_over_again_as_it_is_then() -> None:
    store = Store()
    store.put_service(SERVICE)
    taken = store.take()
    store.hold("t/A", "n", "1", b"x")
    store.give_back([entry.key for entry in taken])
    again = store.take()
    assert [entry for entry in again if not isinstance(entry, PutResource)] == taken
    assert any(isinstance(entry, PutResource) for entry in again)


def test_a_pod_is_dropped_with_its_handle_and_the_handle_is_not_given_again() -> None:
    store = Store()
    handle = store.put_pod("p1", "w", "ns=default", ())
    pods = [entry for entry in store.take() if isinstance(entry, PutPod)]
    assert pods == [PutPod("p1", handle, "w", "ns=default", ())]
    store.remove_pod("p1")
    assert all(isinstance(entry, Drop) for entry in store.take())
    assert store.handle("p1") > handle


def test_notes_are_json_for_whoever_looks_into_a_dump() -> None:
    store = Store()
    store.handle("p1")
    assert {name: json.loads(body) for name, body in notes(store)} == {"next": {"next": 2}, "pod\np1": {"index": 1}}
