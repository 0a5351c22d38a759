"""The parts of on-demand destinations: when they are complete, what is wanted, what goes."""
from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address

import pytest

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
from agent.xds.tree import NAMED, ClusterPart, EndpointsPart, ListenerPart, PartName, Published, RoutePart, Tree
from agent.xds.types import TypeUrl, xdstp

SCOPE, AUTHORITY = "ns=default", "reviews.default:9080"
KEY = f"{SCOPE}|{AUTHORITY}"
LISTENER = xdstp(TypeUrl.LISTENER, SCOPE, AUTHORITY)
RDS = xdstp(TypeUrl.ROUTE, SCOPE, AUTHORITY)


def cds(name: str) -> str:
    return xdstp(TypeUrl.CLUSTER, SCOPE, name)


def eds(name: str) -> str:
    return xdstp(TypeUrl.ENDPOINTS, SCOPE, name)


def hosts(*clusters: str) -> tuple[VirtualHost, ...]:
    match = RouteMatch(StringMatch(MatchKind.PREFIX, "/"))
    weighted = tuple(WeightedCluster(name, 1) for name in clusters)
    return (VirtualHost("v", ("*",), (Route("r", match, weighted),)),)


def cluster(name: str, *ends: str) -> Cluster:
    endpoints = tuple(Endpoint(ip_address(end), 9080) for end in ends)
    return Cluster(SCOPE, name, "default/reviews.default", Balancer.LEAST_REQUEST, 10_000, endpoints)


def put_listener(tree: Tree, authority: str = AUTHORITY, rds: str = RDS) -> None:
    tree.put(TypeUrl.LISTENER, xdstp(TypeUrl.LISTENER, SCOPE, authority),
             ListenerPart(SCOPE, authority, None, rds, None))


def put_routes(tree: Tree, *clusters: str, rds: str = RDS) -> None:
    tree.put(TypeUrl.ROUTE, rds, RoutePart(SCOPE, AUTHORITY, hosts(*clusters)))


def put_cluster(tree: Tree, name: str) -> None:
    tree.put(TypeUrl.CLUSTER, cds(name), ClusterPart(cluster(name), eds(name)))


def put_endpoints(tree: Tree, name: str, *ends: str) -> None:
    tree.put(TypeUrl.ENDPOINTS, eds(name), EndpointsPart(SCOPE, name, cluster(name, *ends).endpoints))


def complete(tree: Tree) -> Published:
    tree.demand(KEY)
    tree.publish()
    put_listener(tree)
    tree.publish()
    put_routes(tree, "v1")
    tree.publish()
    put_cluster(tree, "v1")
    tree.publish()
    put_endpoints(tree, "v1", "10.0.0.1")
    return tree.publish()


def publish(tree: Tree) -> Published:
    """What came into force, without the subscriptions (those have tests of their own)."""
    return replace(tree.publish(), subscribe=frozenset(), unsubscribe=frozenset())


def test_each_part_that_comes_asks_for_the_next_and_only_the_last_publishes() -> None:
    tree = Tree()
    tree.demand(KEY)
    steps = [lambda: None, lambda: put_listener(tree), lambda: put_routes(tree, "v1"), lambda: put_cluster(tree, "v1")]
    wanted = []
    for step in steps:
        step()
        assert not tree.publish()
        wanted.append({name for names in tree.wanted().values() for name in names})
    assert wanted == [{LISTENER}, {LISTENER, RDS}, {LISTENER, RDS, cds("v1")}, {LISTENER, RDS, cds("v1"), eds("v1")}]
    assert tree.missing(KEY) == (eds("v1"),)
    put_endpoints(tree, "v1", "10.0.0.1")
    destination = Destination(SCOPE, AUTHORITY, hosts("v1"), None)
    assert publish(tree) == Published((destination,), (cluster("v1", "10.0.0.1"),))
    assert tree.missing(KEY) == () and not tree.publish()


def test_parts_may_come_in_any_order() -> None:
    tree = Tree()
    tree.demand(KEY)
    put_endpoints(tree, "v1", "10.0.0.1")
    put_cluster(tree, "v1")
    put_routes(tree, "v1")
    put_listener(tree)
    assert [one.key for one in tree.publish().destinations] == [KEY]


def test_an_unknown_destination_is_published_without_routes() -> None:
    tree = Tree()
    tree.demand(KEY)
    tree.publish()
    tree.remove(TypeUrl.LISTENER, LISTENER)
    assert publish(tree) == Published((Destination(SCOPE, AUTHORITY, None, None),))
    assert tree.wanted()[TypeUrl.LISTENER] == {LISTENER}  # it may come to exist
    put_listener(tree)
    put_routes(tree, "v1")
    assert not tree.publish()  # known now, but not whole yet


def test_one_endpoint_change_publishes_one_cluster_and_nothing_else() -> None:
    tree = Tree()
    complete(tree)
    put_endpoints(tree, "v1", "10.0.0.1", "10.0.0.2")
    assert publish(tree) == Published((), (cluster("v1", "10.0.0.1", "10.0.0.2"),))


def test_new_routes_wait_for_their_clusters_while_the_old_ones_stay_wanted() -> None:
    tree = Tree()
    complete(tree)
    put_routes(tree, "v2")
    assert not tree.publish()
    assert tree.wanted()[TypeUrl.CLUSTER] == {cds("v1"), cds("v2")}
    put_endpoints(tree, "v1", "10.0.0.9")  # the old version goes on being kept up to date
    assert tree.publish().clusters == (cluster("v1", "10.0.0.9"),)
    put_cluster(tree, "v2")
    tree.publish()
    put_endpoints(tree, "v2", "10.0.0.2")
    switched = tree.publish()
    assert switched.destinations == (Destination(SCOPE, AUTHORITY, hosts("v2"), None),)
    assert switched.clusters == (cluster("v2", "10.0.0.2"),)
    assert switched.dropped_clusters == (f"{SCOPE}|v1",)
    assert tree.wanted()[TypeUrl.CLUSTER] == {cds("v2")}


def test_a_cluster_that_does_not_exist_leaves_the_rest_of_the_destination_in_force() -> None:
    tree = Tree()
    tree.demand(KEY)
    put_listener(tree)
    put_routes(tree, "v1", "ghost")
    put_cluster(tree, "v1")
    put_endpoints(tree, "v1", "10.0.0.1")
    assert not tree.publish()
    tree.remove(TypeUrl.CLUSTER, cds("ghost"))
    published = tree.publish()
    assert [one.name for one in published.clusters] == ["v1"] and len(published.destinations) == 1


def test_what_only_the_dropped_destination_used_goes_with_it_and_what_is_shared_stays() -> None:
    tree = Tree()
    complete(tree)
    other = f"{SCOPE}|other.default:80"
    tree.demand(other)
    put_listener(tree, "other.default:80", rds="rds2")
    put_routes(tree, "v1", "v2", rds="rds2")
    put_cluster(tree, "v2")
    put_endpoints(tree, "v2", "10.0.0.2")
    tree.publish()
    tree.drop(other)
    assert publish(tree) == Published((), (), (other,), (f"{SCOPE}|v2",))
    assert tree.wanted() == {TypeUrl.LISTENER: {LISTENER}, TypeUrl.ROUTE: {RDS}, TypeUrl.CLUSTER: {cds("v1")},
                             TypeUrl.ENDPOINTS: {eds("v1")}}
    tree.drop(KEY)
    assert publish(tree) == Published((), (), (KEY,), (f"{SCOPE}|v1",))
    assert not any(tree.wanted().values()) and len(tree) == 0


def test_a_destination_dropped_and_asked_for_again_before_anyone_looked_is_still_there() -> None:
    tree = Tree()
    complete(tree)
    tree.drop(KEY)
    tree.demand(KEY)
    published = tree.publish()
    assert published.dropped_destinations == () and [one.key for one in published.destinations] == [KEY]


def test_a_tcp_destination_needs_no_routes() -> None:
    tree = Tree()
    tree.demand(KEY)
    tree.put(TypeUrl.LISTENER, LISTENER, ListenerPart(SCOPE, AUTHORITY, None, None, (WeightedCluster("v1", 1),)))
    tree.put(TypeUrl.CLUSTER, cds("v1"), ClusterPart(cluster("v1"), None, cluster("v1", "10.0.0.1").endpoints))
    published = tree.publish()
    assert published.destinations == (Destination(SCOPE, AUTHORITY, None, (WeightedCluster("v1", 1),)),)
    assert published.clusters == (cluster("v1", "10.0.0.1"),)


def test_restored_parts_that_nothing_wants_are_named_once() -> None:
    tree = Tree()
    complete(tree)
    put_cluster(tree, "stray")
    tree.publish()
    assert tree.unused() == [(TypeUrl.CLUSTER, cds("stray"))]
    assert tree.unused() == []


@pytest.mark.parametrize("key", ["", "reviews:80", "ns=|a:80", "ns=default|reviews", "ns=default|reviews:0",
                                 "ns=default|reviews:65536", "ns=default|:80", "ns=default|a b:80", "ns=d|a?:80",
                                 "ns=default|a:٣"])
def test_a_key_that_is_none_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match=r"key|port|character"):
        Tree().demand(key)


def test_subscriptions_are_told_as_differences() -> None:
    tree = Tree()
    told: set[PartName] = set()

    def step() -> None:
        found = tree.publish()
        assert not told & found.subscribe and found.unsubscribe <= told
        told.update(found.subscribe)
        told.difference_update(found.unsubscribe)
        assert {url: {name for kind, name in told if kind is url} for url in NAMED} == tree.wanted()

    tree.demand(KEY)
    step()
    for part in (lambda: put_listener(tree), lambda: put_routes(tree, "v1"), lambda: put_cluster(tree, "v1"),
                 lambda: put_endpoints(tree, "v1", "10.0.0.1"), lambda: put_routes(tree, "v2"),
                 lambda: put_cluster(tree, "v2"), lambda: put_endpoints(tree, "v2"), lambda: tree.drop(KEY)):
        part()
        step()
    assert told == set()
