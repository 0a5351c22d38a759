"""Who is where and what to do, in whatever order it comes; what is in use survives its replacement."""
from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import ip_address

import pytest

from agent.dataplane import blobs
from agent.model.routing import (
    Balancer,
    Cluster,
    Destination,
    Endpoint,
    MatchKind,
    Route,
    RouteMatch,
    StringMatch,
    VirtualHost,
    WeightedCluster,
)
from agent.model.workload import Protocol, Service, ServicePort, Workload
from ext.route import asked_door, door
from tests.support.blobs import (
    CLUSTER,
    DESTINATION,
    HOST,
    POD,
    PUTS,
    SCOPE,
    SERVICE,
    VIP,
    VIP6,
    WORKLOAD,
    everything,
    index_of,
    transaction,
    with_endpoints,
)


@pytest.fixture(autouse=True)
def no_block_is_lost() -> Iterator[None]:
    before = door.live_blocks()
    yield
    assert door.live_blocks() == before


def loaded() -> door.Tables:
    tables = door.Tables()
    tables.load(everything())
    return tables


# ---- addresses


def test_a_service_is_found_by_each_of_its_addresses_and_ports() -> None:
    tables = loaded()
    for ip in (VIP, VIP6, f"::ffff:{VIP}"):
        assert tables.service_at(ip, 9080) == (11, f"{HOST}:9080", 2)
        assert tables.service_at(ip, 6379) == (11, f"{HOST}:6379", 1)
        assert tables.service_at(ip, 80) is None
        assert tables.service_by_address(ip) == 11
    assert tables.service_at("10.96.0.2", 9080) is None
    assert tables.service_by_address("::1") == 0


def test_a_workload_is_found_by_address_and_tells_what_it_serves() -> None:
    tables = loaded()
    assert tables.workload_by_address("10.244.1.5") == tables.workload_by_address("fd00:10:244:1::5") == 21
    assert tables.workload_port(21, 9080) == (11, 9080, 2)
    assert tables.workload_port(21, 9081) is None
    assert tables.workload_by_address("10.244.1.6") == 0
    assert tables.workload_by_index(22) is None


def test_an_ipv4_address_is_not_the_ipv6_address_that_starts_alike() -> None:
    tables = loaded()
    assert tables.workload_by_address(ip_address(ip_address("10.244.1.5").packed + bytes(12))) == 0


def test_services_may_share_an_address_and_differ_in_ports() -> None:
    tables = loaded()
    other = replace(SERVICE, hostname="other.example", ports=(ServicePort(81, 81, Protocol.TCP),))
    tables.load(transaction(blobs.put_service(12, other)))
    assert (tables.service_at(VIP, 9080)[0], tables.service_at(VIP, 81)[0]) == (11, 12)
    tables.load(transaction(blobs.Delete(blobs.Kind.SERVICE, other.key)))
    assert (tables.service_at(VIP, 9080)[0], tables.service_at(VIP, 81)) == (11, None)


def test_of_two_that_claim_an_address_the_newest_has_it_until_it_goes() -> None:
    tables = loaded()
    second = replace(WORKLOAD, uid="second", addresses=(ip_address("10.244.1.5"),))
    tables.load(transaction(blobs.put_workload(22, second, index_of)))
    assert tables.workload_by_address("10.244.1.5") == 22
    tables.load(transaction(PUTS["workload"]))
    assert tables.workload_by_address("10.244.1.5") == 21
    tables.load(transaction(blobs.Delete(blobs.Kind.WORKLOAD, WORKLOAD.uid)))
    assert tables.workload_by_address("10.244.1.5") == 22
    tables.load(transaction(blobs.Delete(blobs.Kind.WORKLOAD, "second")))
    assert tables.workload_by_address("10.244.1.5") == 0


def test_a_workload_that_moves_leaves_its_old_address() -> None:
    tables = loaded()
    moved = replace(WORKLOAD, addresses=(ip_address("10.244.9.9"),))
    tables.load(transaction(blobs.put_workload(21, moved, index_of)))
    assert (tables.workload_by_address("10.244.1.5"), tables.workload_by_address("10.244.9.9")) == (0, 21)


# ---- in any order


def test_an_endpoint_learns_its_workload_when_that_comes_later() -> None:
    tables = door.Tables()
    tables.load(transaction(PUTS["cluster"]))
    assert [e[4] for e in tables.cluster(CLUSTER.key)[3]] == [0, 0]
    tables.load(transaction(PUTS["workload"]))
    assert [e[4] for e in tables.cluster(CLUSTER.key)[3]] == [21, 0]
    tables.load(transaction(blobs.Delete(blobs.Kind.WORKLOAD, WORKLOAD.uid)))
    assert [e[4] for e in tables.cluster(CLUSTER.key)[3]] == [0, 0]


def test_a_pod_learns_its_workload_when_that_comes_later() -> None:
    tables = door.Tables()
    tables.load(transaction(PUTS["pod"]))
    assert tables.pod(POD)[0] == 0
    tables.load(transaction(PUTS["workload"]))
    assert tables.pod(POD)[0] == 21
    assert tables.pod(POD + 1) is None


def test_a_route_finds_its_cluster_when_that_comes_later() -> None:
    tables = door.Tables()
    tables.load(transaction(PUTS["service"], PUTS["pod"], PUTS["destination"]))
    request = asked_door.Request("/", HOST)
    assert tables.route(POD, VIP, 9080, request)["there"] is False
    tables.load(transaction(PUTS["cluster"]))
    assert tables.route(POD, VIP, 9080, request)["there"] is True
    tables.load(transaction(blobs.Delete(blobs.Kind.CLUSTER, CLUSTER.key)))
    assert tables.route(POD, VIP, 9080, request)["there"] is False


def test_a_cluster_of_another_scope_is_another_cluster() -> None:
    tables = door.Tables()
    other = blobs.put_cluster(replace(CLUSTER, scope="ns=other"), index_of)
    tables.load(transaction(PUTS["service"], PUTS["pod"], PUTS["destination"], other))
    assert tables.route(POD, VIP, 9080, asked_door.Request("/", HOST))["there"] is False


# ---- on demand


def test_who_waits_for_a_destination_sees_the_answer() -> None:
    tables = door.Tables()
    tables.load(transaction(PUTS["service"], PUTS["pod"]))
    assert tables.destination(POD, VIP, 9080) == "miss"
    waiting = tables.wait(POD, VIP, 9080)
    also = tables.wait(POD, VIP6, 9080)
    assert waiting.key == also.key == DESTINATION.key == PUTS["destination"].key
    generation = tables.generation
    tables.load(transaction(PUTS["destination"]))
    assert (waiting.state, also.state, tables.generation) == ("http+tcp", "http+tcp", generation + 1)
    assert tables.destination(POD, VIP, 9080) == "http+tcp"
    waiting.release()
    also.release()


def test_a_destination_nobody_waits_for_any_more_is_forgotten() -> None:
    tables = door.Tables()
    tables.load(transaction(PUTS["service"], PUTS["pod"]))
    slots = tables.counts["slots"]
    waiting = [tables.wait(POD, VIP, 9080) for _ in range(3)]
    assert tables.counts["slots"] == slots + 1
    for one in waiting:
        one.release()
    assert tables.counts["slots"] == slots


def test_a_destination_that_was_dropped_is_asked_for_again() -> None:
    tables = loaded()
    tables.load(transaction(blobs.Delete(blobs.Kind.DESTINATION, DESTINATION.key)))
    assert tables.destination(POD, VIP, 9080) == "miss"


def test_the_answer_depends_on_who_asks() -> None:
    tables = loaded()
    stranger = blobs.put_pod("other", 8, WORKLOAD.uid, "ns=other", ())
    tables.load(transaction(stranger))
    assert (tables.destination(POD, VIP, 9080), tables.destination(8, VIP, 9080)) == ("http+tcp", "miss")
    waiting = tables.wait(8, VIP, 9080)
    assert waiting.key == f"ns=other|{HOST}:9080"
    tables.load(transaction(blobs.put_unknown_destination("ns=other", f"{HOST}:9080")))
    assert (tables.destination(POD, VIP, 9080), waiting.state) == ("http+tcp", "unknown")


# ---- references


def test_a_cluster_in_use_survives_its_replacement_and_its_deletion() -> None:
    tables = loaded()
    held = tables.hold(CLUSTER.key)
    before = held.endpoints
    tables.load(transaction(with_endpoints(Endpoint(ip_address("10.9.9.9"), 1))))
    tables.load(transaction(blobs.Delete(blobs.Kind.CLUSTER, CLUSTER.key)))
    assert (held.endpoints, held.key) == (before, (SCOPE, CLUSTER.name))
    held.begin(0)
    held.end(0)
    held.release()


def test_what_is_in_flight_is_known_to_the_next_version_of_a_cluster() -> None:
    tables = door.Tables()
    a, b, c = (Endpoint(ip_address(f"10.0.0.{i}"), 80) for i in (1, 2, 3))
    tables.load(transaction(with_endpoints(a, b, balancer=Balancer.LEAST_REQUEST)))
    old = tables.hold(CLUSTER.key)
    old.begin(0)
    old.begin(0)
    old.begin(1)
    tables.load(transaction(with_endpoints(c, replace(b, weight=5), a, replace(a, port=81))))
    new = tables.hold(CLUSTER.key)
    assert new.active == [0, 1, 2, 0]
    old.end(0)
    assert (old.active, new.active) == ([1, 1], [0, 1, 1, 0])
    new.begin(2)
    assert old.active == [2, 1]


def test_the_load_of_many_endpoints_is_carried_over() -> None:
    tables = door.Tables()
    endpoints = [Endpoint(ip_address(f"10.1.{i // 250}.{i % 250}"), 8000 + i % 3) for i in range(1000)]
    tables.load(transaction(with_endpoints(*endpoints)))
    old = tables.hold(CLUSTER.key)
    for i in range(0, 1000, 7):
        old.begin(i)
    tables.load(transaction(with_endpoints(*reversed(endpoints))))
    assert tables.hold(CLUSTER.key).active == list(reversed(old.active))


# ---- size


def big_mesh(services: int) -> list[blobs.Entry]:
    entries: list[blobs.Entry] = []
    for i in range(services):
        host = f"s{i}.ns{i % 50}.svc.cluster.local"
        service = Service(f"ns{i % 50}", host, f"s{i}", (ip_address(0x0A600000 + i),), (ServicePort(80, 8080, Protocol.HTTP),))
        workload = replace(WORKLOAD, uid=f"k//Pod/ns/{i}", addresses=(ip_address(0x0AF40000 + i),), ports=())
        name = f"outbound|80||{host}"
        route = Route("default", RouteMatch(StringMatch(MatchKind.PREFIX, "/")), (WeightedCluster(name, 1),))
        destination = Destination(SCOPE, f"{host}:80", (VirtualHost(host, (host, f"s{i}", "*"), (route,)),), None)
        cluster = Cluster(SCOPE, name, service.key, Balancer.LEAST_REQUEST, 10_000, (Endpoint(workload.addresses[0], 8080),) * 1)
        entries += [blobs.put_service(i + 1, service), blobs.put_workload(i + 1, workload, index_of),
                    blobs.put_destination(destination), blobs.put_cluster(cluster, index_of)]
    return [*entries, PUTS["pod"]]


def test_five_thousand_services_load_at_once_and_change_one_by_one(capsys: pytest.CaptureFixture[str]) -> None:
    data = transaction(*big_mesh(5000))
    tables = door.Tables()
    live = door.live_blocks()
    start = time.perf_counter()
    tables.load(data)
    whole = time.perf_counter() - start
    blocks = door.live_blocks() - live
    assert tables.counts["services"] == tables.counts["workloads"] == 5000
    for i in (0, 2500, 4999):
        vip = ip_address(0x0A600000 + i)
        assert tables.service_at(vip, 80)[0] == i + 1
        assert tables.route(POD, vip, 80, asked_door.Request("/", f"s{i}"))["there"] is True
    host = "s7.ns7.svc.cluster.local"
    change = [
        transaction(blobs.put_cluster(Cluster(
            SCOPE, f"outbound|80||{host}", "", Balancer.LEAST_REQUEST, 10_000,
            (Endpoint(ip_address(f"10.9.0.{n}"), 8080),)), index_of))
        for n in (1, 2)
    ]
    tables.load(change[1])
    blocks = door.live_blocks() - live
    door.fail_block(20)  # a change allocates for what it changes, whatever is there
    tables.load(change[0])
    door.fail_block(0)
    rounds = 200
    start = time.perf_counter()
    for i in range(rounds):
        tables.load(change[i % 2])
    one = (time.perf_counter() - start) / rounds
    assert tables.cluster(f"{SCOPE}|outbound|80||{host}")[3][0][0] == "10.9.0.2"
    assert door.live_blocks() - live == blocks
    with capsys.disabled():
        print(f"\n5,000 services: {len(data) / 1e6:.1f} MB in {whole * 1e3:.1f} ms, {blocks} blocks; "
              f"one endpoint changes: {one * 1e6:.1f} us")


def test_indexes_are_found_after_many_came_and_went() -> None:
    tables = door.Tables()
    workload = Workload(*(getattr(WORKLOAD, f) for f in WORKLOAD.__slots__))
    for i in range(1, 300):
        tables.load(transaction(blobs.put_workload(i, replace(workload, uid=f"w{i}", addresses=()), index_of)))
        if i > 10:
            tables.load(transaction(blobs.Delete(blobs.Kind.WORKLOAD, f"w{i - 10}")))
    assert [i for i in range(1, 400) if tables.workload_by_index(i)] == list(range(290, 300))
