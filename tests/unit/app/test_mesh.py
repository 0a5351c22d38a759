"""Store, tree and commits together: what reaches the keeper, what is refused, and what a restart sends."""
from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from ipaddress import ip_address

import pytest

from agent.app.commit import Committer, Refused
from agent.app.mesh import Mesh
from agent.app.resync import difference, inherit, settle_inheritance
from agent.dataplane import blobs
from agent.model.settings import ProxySettings
from agent.state.entries import Table
from agent.state.store import Store
from agent.xds.session import Resource, Update
from agent.xds.types import TypeUrl, xdstp
from protos.gen.envoy.config.cluster.v3 import cluster_pb2
from protos.gen.envoy.config.endpoint.v3 import endpoint_pb2
from protos.gen.envoy.config.listener.v3 import listener_pb2
from protos.gen.envoy.extensions.filters.network.tcp_proxy.v3 import tcp_proxy_pb2
from protos.gen.istio import security_pb2, workload_pb2

SCOPE, AUTHORITY, CLUSTER = "ns=default", "db.default.svc.cluster.local:5432", "outbound|5432||db.default.svc.cluster.local"
KEY = f"{SCOPE}|{AUTHORITY}"


class Keeper:
    """What a keeper does with commits, without its process: a table, and entries that it refuses."""

    def __init__(self, refuses: Mapping[tuple[int, str], str] | None = None) -> None:
        self.table: dict[tuple[int, str], blobs.Put] = {}
        self.refuses = dict(refuses or {})
        self.commits: list[Sequence[blobs.Entry]] = []
        self.away = False

    async def commit(self, entries: Sequence[blobs.Entry]) -> None:
        await asyncio.sleep(0)
        if self.away:
            raise ConnectionError("gone")
        _, entries = blobs.decode_transaction(blobs.encode_transaction(1, entries))
        for entry in entries:
            if isinstance(entry, blobs.Put) and (text := self.refuses.get((entry.kind, entry.key))):
                raise Refused(text)
        self.commits.append(entries)
        for entry in entries:
            if isinstance(entry, blobs.Put):
                self.table[entry.kind, entry.key] = entry
            else:
                self.table.pop((entry.kind, entry.key), None)


class Node:
    """An agent's inside with its commit loop on one keeper."""

    def __init__(self) -> None:
        self.store = Store()
        self.store.put_settings(ProxySettings())
        self.committer = Committer(self.store)
        self.mesh = Mesh(self.store, self.committer)
        self.wanted: set[tuple[str, str]] = set()
        self.task: asyncio.Task[None] | None = None

    def start(self, keeper: Keeper) -> dict[str, dict[str, str]]:
        there = list(keeper.table.values())
        versions = self.mesh.restore(there)
        inherit(self.store, self.mesh, there)
        self.mesh.connect(self.want)
        self.follow(keeper)
        return versions

    def want(self, type_url: str, more: object, less: object) -> None:
        self.wanted |= {(type_url, name) for name in more}  # type: ignore[attr-defined]
        self.wanted -= {(type_url, name) for name in less}  # type: ignore[attr-defined]

    def follow(self, keeper: Keeper) -> None:
        first = difference(self.store, keeper.table.values())
        self.task = asyncio.create_task(self.committer.run(keeper, first))

    async def stop(self) -> None:
        if self.task is not None:
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)

    async def update(self, type_url: str, *resources: tuple[str, bytes], removed: tuple[str, ...] = (),
                     version: str = "1") -> Mapping[str, str]:
        changed = tuple(Resource(type_url, name, version, body) for name, body in resources)
        async with asyncio.timeout(10):
            return await self.mesh.apply(Update(type_url, "n", 1, changed, removed, {}))

    async def database(self) -> None:
        """A TCP destination in all its parts, as a control plane would send them when asked."""
        self.mesh.miss(KEY)
        for kind, name, body in parts():
            assert (kind, name) in self.wanted
            assert await self.update(kind, (name, body)) == {}


def parts(*ends: str) -> list[tuple[TypeUrl, str, bytes]]:
    listener = listener_pb2.Listener()
    listener.default_filter_chain.filters.add(name="tcp").typed_config.Pack(tcp_proxy_pb2.TcpProxy(cluster=CLUSTER))
    cluster = cluster_pb2.Cluster(name=CLUSTER, type=3)
    cluster.connect_timeout.seconds = 1
    assignment = endpoint_pb2.ClusterLoadAssignment(cluster_name=CLUSTER)
    for end in ends or ("10.244.0.5",):
        socket = assignment.endpoints.add().lb_endpoints.add().endpoint.address.socket_address
        socket.address, socket.port_value = end, 5432
    return [(TypeUrl.LISTENER, xdstp(TypeUrl.LISTENER, SCOPE, AUTHORITY), listener.SerializeToString()),
            (TypeUrl.CLUSTER, xdstp(TypeUrl.CLUSTER, SCOPE, CLUSTER), cluster.SerializeToString()),
            (TypeUrl.ENDPOINTS, xdstp(TypeUrl.ENDPOINTS, SCOPE, CLUSTER), assignment.SerializeToString())]


def workload(name: str, address: str) -> tuple[str, bytes]:
    uid = f"Kubernetes//Pod/default/{name}"
    message = workload_pb2.Workload(uid=uid, name=name, namespace="default", addresses=[ip_address(address).packed])
    return uid, workload_pb2.Address(workload=message).SerializeToString()


def kinds(keeper: Keeper) -> set[str]:
    return {Table(kind).name for kind, _ in keeper.table}


async def test_a_miss_ends_as_a_destination_in_force_and_its_resources_in_the_keeper() -> None:
    keeper, node = Keeper(), Node()
    node.start(keeper)
    await node.database()
    assert (Table.DESTINATION, KEY) in keeper.table and (Table.CLUSTER, f"{SCOPE}|{CLUSTER}") in keeper.table
    assert len([key for key in keeper.table if key[0] == Table.RESOURCE]) == 3
    await node.stop()


async def test_one_endpoint_change_commits_one_cluster_and_the_resource_it_came_from() -> None:
    keeper, node = Keeper(), Node()
    node.start(keeper)
    await node.database()
    before = len(keeper.commits)
    kind, name, body = parts("10.244.0.5", "10.244.0.6")[2]
    await node.update(kind, (name, body), version="2")
    assert [(entry.kind, entry.key) for entry in keeper.commits[before]] == [
        (Table.CLUSTER, f"{SCOPE}|{CLUSTER}"), (Table.RESOURCE, f"{kind}\n{name}")]
    await node.stop()


async def test_an_unknown_destination_is_answered_and_not_left_in_silence() -> None:
    keeper, node = Keeper(), Node()
    node.start(keeper)
    node.mesh.miss(KEY)
    await node.update(TypeUrl.LISTENER, removed=(xdstp(TypeUrl.LISTENER, SCOPE, AUTHORITY),))
    assert keeper.table[Table.DESTINATION, KEY] == blobs.put_unknown_destination(SCOPE, AUTHORITY)
    await node.stop()


async def test_the_next_agent_sends_nothing_when_nothing_changed_and_serves_without_a_control_plane() -> None:
    keeper, first, second = Keeper(), Node(), Node()
    first.start(keeper)
    await first.database()
    await first.update(TypeUrl.ADDRESS, workload("a", "10.244.0.5"))
    await first.stop()
    before = dict(keeper.table)
    versions = second.start(keeper)
    assert difference(second.store, keeper.table.values()) == []
    assert {name: len(held) for name, held in versions.items()} == {
        TypeUrl.ADDRESS: 1, TypeUrl.AUTHORIZATION: 0, TypeUrl.LISTENER: 1, TypeUrl.ROUTE: 0, TypeUrl.CLUSTER: 1, TypeUrl.ENDPOINTS: 1}
    assert second.wanted == first.wanted and keeper.table == before
    assert second.mesh.tree.published(KEY) is not None
    await second.stop()


def policy(name: str, scope: int) -> tuple[str, bytes]:
    made = security_pb2.Authorization(name=name, namespace="default", scope=scope, action=1, rules=[security_pb2.Rule()])
    return f"default/{name}", made.SerializeToString()


async def test_policies_of_pods_that_the_next_agent_has_not_read_yet_stay_in_force() -> None:
    keeper, first, second = Keeper(), Node(), Node()
    first.start(keeper)
    first.store.put_pod("p1", "w", SCOPE, (ip_address("10.244.0.5"),))
    assert await first.update(TypeUrl.AUTHORIZATION, policy("n", 1), policy("s", 2), policy("g", 0)) == {}
    await first.stop()
    in_force = {key for key in keeper.table if key[0] == Table.POLICY}
    assert in_force == {(Table.POLICY, "default/n"), (Table.POLICY, "default/g")}
    second.start(keeper)
    assert difference(second.store, keeper.table.values()) == []
    settle_inheritance(second.store, second.mesh)
    assert difference(second.store, keeper.table.values()) == []  # the pods are not read yet
    second.store.put_pod("p1", "w", SCOPE, (ip_address("10.244.0.5"),))
    settle_inheritance(second.store, second.mesh)
    assert difference(second.store, keeper.table.values()) == []
    second.store.remove_pod("p1")
    gone = [entry.key for entry in difference(second.store, keeper.table.values()) if isinstance(entry, blobs.Delete)]
    assert "default/n" in gone and "default/g" not in gone
    await second.stop()


async def test_a_policy_that_is_refused_is_refused_alone_and_the_last_good_one_stays() -> None:
    keeper, node = Keeper(), Node()
    node.start(keeper)
    assert await node.update(TypeUrl.AUTHORIZATION, policy("g", 0)) == {}
    before = keeper.table[Table.POLICY, "default/g"]
    said = await node.update(TypeUrl.AUTHORIZATION, policy("g", 9), policy("other", 0), version="2")
    assert set(said) == {"default/g"} and "scope 9" in said["default/g"]
    assert keeper.table[Table.POLICY, "default/g"] == before and (Table.POLICY, "default/other") in keeper.table
    keeper.refuses[Table.POLICY, "default/x"] = "POLICY default/x: no"
    assert await node.update(TypeUrl.AUTHORIZATION, policy("x", 0)) == {"default/x": "POLICY default/x: no"}
    await node.update(TypeUrl.AUTHORIZATION, removed=("default/g",))
    assert (Table.POLICY, "default/g") not in keeper.table
    await node.stop()


async def test_a_keeper_that_starts_empty_gets_everything_again_with_the_same_numbers() -> None:
    old, new, node = Keeper(), Keeper(), Node()
    node.start(old)
    await node.database()
    await node.update(TypeUrl.ADDRESS, workload("a", "10.244.0.5"))
    await node.stop()
    node.follow(new)
    await asyncio.wait_for(node.committer.in_force(), 10)
    assert new.table == old.table
    await node.stop()


async def test_what_the_data_path_refuses_is_nacked_alone_and_everything_else_is_in_force() -> None:
    bad, text = workload("b", "10.244.0.2"), "no room for it"
    keeper, node = Keeper({(Table.WORKLOAD, bad[0]): text}), Node()
    node.start(keeper)
    good = [workload(f"w{number}", f"10.244.1.{number}") for number in range(1, 20)]
    assert await node.update(TypeUrl.ADDRESS, *good[:10], bad, *good[10:]) == {bad[0]: text}
    assert sum(kind == Table.WORKLOAD for kind, _ in keeper.table) == 19
    await asyncio.wait_for(node.committer.in_force(), 10)
    assert (Table.RESOURCE, f"{TypeUrl.ADDRESS}\n{bad[0]}") not in keeper.table
    await node.stop()


async def test_a_cluster_that_the_data_path_refuses_blames_the_resource_that_brought_it() -> None:
    keeper, node = Keeper({(Table.CLUSTER, f"{SCOPE}|{CLUSTER}"): "too many endpoints"}), Node()
    node.start(keeper)
    node.mesh.miss(KEY)
    answers = [await node.update(kind, (name, body)) for kind, name, body in parts()]
    assert answers[:2] == [{}, {}]
    assert answers[2] == {parts()[2][1]: "the data path refuses it: too many endpoints"}
    await node.stop()


async def test_overlapping_addresses_refuse_the_later_workload_and_keep_the_rest() -> None:
    keeper, node = Keeper(), Node()
    node.start(keeper)
    rejected = await node.update(TypeUrl.ADDRESS, workload("a", "10.244.0.5"), workload("b", "10.244.0.5"),
                                 workload("c", "10.244.0.6"))
    assert rejected == {workload("b", "10.244.0.5")[0]:
                        "address 10.244.0.5 belongs to workload Kubernetes//Pod/default/a already"}
    assert sum(kind == Table.RESOURCE for kind, _ in keeper.table) == 2
    await node.stop()


async def test_while_the_keeper_is_away_nothing_is_acknowledged_and_nothing_is_lost() -> None:
    keeper, node = Keeper(), Node()
    node.start(keeper)
    await asyncio.wait_for(node.committer.in_force(), 10)
    keeper.away = True
    waiting = asyncio.create_task(node.update(TypeUrl.ADDRESS, workload("a", "10.244.0.5")))
    assert node.task is not None
    with pytest.raises(ConnectionError):
        await node.task
    assert not waiting.done()
    keeper.away = False
    node.follow(keeper)
    assert await waiting == {}
    assert (Table.WORKLOAD, workload("a", "10.244.0.5")[0]) in keeper.table
    await node.stop()


async def test_an_agent_that_finds_half_of_a_destination_keeps_what_the_last_one_put_in_force() -> None:
    keeper, first, second = Keeper(), Node(), Node()
    first.start(keeper)
    await first.database()
    await first.stop()
    cut = [key for key in keeper.table if key[0] == Table.RESOURCE and TypeUrl.ENDPOINTS in key[1]]
    for key in cut:
        del keeper.table[key]
    second.start(keeper)
    assert (Table.DESTINATION, KEY) in keeper.table and second.mesh.incomplete() == [KEY]
    for kind, name, body in parts("10.244.0.9"):
        await second.update(kind, (name, body), version="2")
    settle_inheritance(second.store, second.mesh)
    assert not [key for key in second.store.inherited if key[0] is not Table.POD]
    assert (Table.CLUSTER, f"{SCOPE}|{CLUSTER}") in keeper.table
    await second.stop()


async def test_pods_of_an_earlier_agent_stay_until_the_list_of_pods_was_read() -> None:
    keeper, first, second = Keeper(), Node(), Node()
    first.start(keeper)
    first.store.put_pod("p1", "w", SCOPE, (ip_address("10.244.0.5"),))
    await asyncio.wait_for(first.committer.in_force(), 10)
    await first.stop()
    before = keeper.table[Table.POD, "p1"]
    second.start(keeper)
    await asyncio.wait_for(second.committer.in_force(), 10)
    assert keeper.table[Table.POD, "p1"] == before
    second.store.put_pod("p1", "w", SCOPE, (ip_address("10.244.0.5"),))
    await asyncio.wait_for(second.committer.in_force(), 10)
    assert keeper.table[Table.POD, "p1"] == before  # the same handle
    second.store.remove_pod("p1")
    await asyncio.wait_for(second.committer.in_force(), 10)
    assert "POD" not in kinds(keeper)
    await second.stop()


async def test_idle_destinations_go_with_everything_only_they_used_and_used_ones_stay() -> None:
    now = [0.0]
    keeper, node = Keeper(), Node()
    node.mesh = Mesh(node.store, node.committer, idle_seconds=600, clock=lambda: now[0])
    node.start(keeper)
    await node.database()
    now[0] = 500
    node.mesh.used([("default", "db.default.svc.cluster.local")])
    now[0] = 1000
    node.mesh.sweep()
    assert KEY in node.mesh.tree
    now[0] = 1101
    node.mesh.sweep()
    await asyncio.wait_for(node.committer.in_force(), 10)
    assert node.wanted == set() and not {"DESTINATION", "CLUSTER", "RESOURCE"} & kinds(keeper)
    assert not [key for kind, key in keeper.table if kind == Table.NOTE and key.startswith("destination")]
    await node.stop()


async def test_more_destinations_than_the_bound_drop_the_least_recently_used() -> None:
    node = Node()
    node.mesh = Mesh(node.store, node.committer, demands=2)
    for name in ("a:1", "b:1"):
        node.mesh.miss(f"{SCOPE}|{name}")
    node.mesh.miss(f"{SCOPE}|a:1")
    node.mesh.miss(f"{SCOPE}|c:1")
    assert set(node.mesh.tree) == {f"{SCOPE}|a:1", f"{SCOPE}|c:1"}


async def test_a_key_that_cannot_be_is_not_asked_for() -> None:
    node = Node()
    node.mesh.miss("nonsense")
    assert len(node.mesh.tree) == 0
