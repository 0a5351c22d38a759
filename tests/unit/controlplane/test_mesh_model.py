"""All objects together: who has an address, who selects whom, which rule speaks, what does not fit."""

from __future__ import annotations

import random
from ipaddress import ip_address

from controlplane.model.mesh import Mesh
from controlplane.model.problems import ObjectKey
from tests.support.manifests import REVIEWS, SUBSETS, destination_rule, good, mesh_of, pod, service, virtual_service

HOST = "reviews.default.svc.cluster.local"


def told(mesh: Mesh) -> list[str]:
    return [str(problem) for problem in mesh.problems()]


def change(mesh: Mesh, text: str) -> tuple[set[str], set[str]]:
    touched = mesh.apply(good(text).objects.values())
    return touched.hosts, touched.addresses


def test_an_update_touches_what_depends_on_it_and_nothing_else() -> None:
    mesh = mesh_of(REVIEWS, service("ratings", ip="10.96.0.20"), pod("ratings-0", "10.244.1.9", "ratings"))
    assert change(mesh, pod("reviews-v1-0", "10.244.1.5", "reviews", labels=", version: v1", ready="False")) == (
        {HOST},
        {"Kubernetes//Pod/default/reviews-v1-0"},
    )
    assert change(mesh, virtual_service("r", "hosts: [ratings]\nhttp: [{route: [{destination: {host: reviews}}]}]"))[0] == {
        "ratings.default.svc.cluster.local"
    }
    hosts, addresses = change(mesh, service("reviews", "[{name: http, port: 9081}]"))
    assert hosts == {HOST, "ratings.default.svc.cluster.local"}  # its port is part of the route to it
    assert addresses == {f"default/{HOST}", "Kubernetes//Pod/default/reviews-v1-0", "Kubernetes//Pod/default/reviews-v2-0"}
    assert change(mesh, service("reviews", "[{name: http, port: 9081}]")) == (set(), set())


def test_the_later_claimant_of_an_address_is_refused_until_it_is_free() -> None:
    mesh = mesh_of(REVIEWS)
    change(mesh, pod("thief", "10.96.0.10", "thief") + service("copy", ip="10.244.1.5"))
    assert told(mesh) == [
        "test.yaml:5: Pod default/thief: its address 10.96.0.10 is already that of Service default/reviews (test.yaml:5); it is not "
        "in force; give one of them another address",
        "test.yaml:12: Service default/copy: its address 10.244.1.5 is already that of Pod default/reviews-v1-0 (test.yaml:11); it is "
        "not in force; give one of them another address",
    ]
    assert mesh.pod("Kubernetes//Pod/default/thief") is None and mesh.service("copy.default.svc.cluster.local") is None
    touched = mesh.apply([], [ObjectKey("Service", "default", "reviews"), ObjectKey("Pod", "default", "reviews-v1-0")])
    assert {"Kubernetes//Pod/default/thief", "default/copy.default.svc.cluster.local"} <= touched.addresses
    assert mesh.pod("Kubernetes//Pod/default/thief") is not None and mesh.service("copy.default.svc.cluster.local") is not None
    assert not any("already that" in one for one in told(mesh))


def test_keeping_one_of_two_addresses_keeps_it_from_others() -> None:
    mesh = mesh_of(service("a", ip="10.96.0.1", more=', clusterIPs: ["10.96.0.1", "fd00::1"]'), service("b", ip="10.96.0.1"))
    change(mesh, service("a", ip="10.96.0.1"))
    assert mesh.service("b.default.svc.cluster.local") is None
    change(mesh, service("a", ip="10.96.0.2"))
    assert mesh.service("b.default.svc.cluster.local") is not None


def test_pods_of_the_host_network_may_share_their_nodes_address() -> None:
    one, two = (pod(name, "10.0.0.1", "x").replace("nodeName: n1", "nodeName: n1, hostNetwork: true") for name in ("a", "b"))
    mesh = mesh_of(one, two)
    assert told(mesh) == [] and len(list(mesh.pods())) == 2


def test_a_rule_for_a_name_beats_one_for_a_pattern_and_an_older_beats_a_younger() -> None:
    def rule(name: str, host: str, created: str = "") -> str:
        return virtual_service(
            name,
            f"hosts: ['{host}']\nhttp: [{{route: [{{destination: {{host: reviews}}}}]}}]",
            meta=f', creationTimestamp: "{created}"' if created else "",
        )

    mesh = mesh_of(
        REVIEWS,
        rule("wide", "*.svc.cluster.local"),
        rule("near", "*.default.svc.cluster.local"),
        rule("young", "reviews", "2026-02-01T00:00:00Z"),
        rule("aaa", "reviews"),
    )
    order = ["young", "aaa", "near", "wide"]
    for name in order:
        found = mesh.virtual_service(HOST)
        assert found is not None and found.meta.key.name == name
        mesh.apply([], [found.meta.key])
    assert mesh.virtual_service(HOST) is None


def test_a_second_virtual_service_for_a_host_is_told_that_it_has_no_effect() -> None:
    spec = "hosts: [reviews]\nhttp: [{route: [{destination: {host: reviews}}]}]"
    mesh = mesh_of(REVIEWS, virtual_service("b", spec))
    assert told(mesh) == []
    change(mesh, virtual_service("a", spec))
    assert [
        one
        for one in told(mesh)
        if "VirtualService default/b: the host reviews.default.svc.cluster.local is already routed by VirtualService default/a" in one
        and "warning" in one
    ]
    mesh.apply([], [ObjectKey("VirtualService", "default", "a")])
    assert told(mesh) == []


def test_a_destination_rule_of_the_clients_namespace_beats_that_of_the_hosts() -> None:
    mesh = mesh_of(REVIEWS, destination_rule("mine", f"host: {HOST}\n", namespace="shop"))
    rules = {scope: mesh.destination_rule(HOST, scope) for scope in ("shop", "default", "other")}
    assert {scope: rule.meta.key.name for scope, rule in rules.items() if rule} == {
        "shop": "mine",
        "default": "reviews",
        "other": "reviews",
    }


def test_what_names_nothing_is_warned_of_and_no_more_once_it_exists() -> None:
    spec = """
hosts: [review, reviews.default]
http:
- route:
  - destination: {host: reviews, subset: v3}
    weight: 50
  - destination: {host: gone}
    weight: 25
  - destination: {host: reviews, port: {number: 1}}
    weight: 25
"""
    mesh = mesh_of(virtual_service("vs", spec), destination_rule("dr", "host: nobody\n"))
    assert len(told(mesh)) == 6
    change(mesh, REVIEWS)
    found = "\n".join(told(mesh))
    assert "names the host review.default.svc.cluster.local, and no service is called so; it has no effect" in found
    assert "names the host reviews.default, and no service is called so; it has no effect; write reviews.default.svc.cluster.local" in found
    assert (
        "routes to the subset v3 of reviews.default.svc.cluster.local, which no DestinationRule defines; requests get 503; "
        "defined are v1, v2" in found
    )
    assert "routes to gone.default.svc.cluster.local, and no service is called so; requests get 503" in found
    assert "routes to port 1 of reviews.default.svc.cluster.local, which has no such TCP port; requests get 503; it has 9080" in found
    assert "DestinationRule default/dr: is for the host nobody.default.svc.cluster.local" in found
    assert all("test.yaml:" in one and "warning" in one for one in told(mesh))
    change(mesh, service("review", ip="10.96.0.77") + service("gone", ip="10.96.0.78") + service("nobody", ip="10.96.0.79"))
    assert len(told(mesh)) == 3


def test_routes_for_a_host_without_http_are_warned_of() -> None:
    mesh = mesh_of(
        service("db", "[{name: tcp-db, port: 5432}]"), virtual_service("vs", "hosts: [db]\nhttp: [{route: [{destination: {host: db}}]}]")
    )
    assert any("no port of db.default.svc.cluster.local carries HTTP/1, so its http routes have no effect" in one for one in told(mesh))


def test_a_selector_selects_by_all_labels_within_its_namespace() -> None:
    mesh = mesh_of(REVIEWS, pod("other", "10.244.9.9", "reviews", namespace="shop"))
    assert [one.meta.key.name for one in mesh.selected("default", (("app", "reviews"),))] == ["reviews-v1-0", "reviews-v2-0"]
    assert [one.meta.key.name for one in mesh.selected("default", (("app", "reviews"), ("version", "v2")))] == ["reviews-v2-0"]
    assert mesh.selected("default", ()) == [] and mesh.selected("default", (("app", "none"),)) == []


def test_after_any_order_of_changes_the_mesh_is_as_if_made_at_once() -> None:
    """The indexes never drift: random puts and deletes, then the same objects into a new mesh."""
    rng = random.Random(7)
    texts = [
        *[
            pod(f"p{n}", f"10.244.0.{n % 9 + 1}", rng.choice("abc"), labels=f", version: v{n % 2}", ready=rng.choice(["True", "False"]))
            for n in range(14)
        ],
        *[
            service(name, ip=ip, ports=ports)
            for name in "abc"
            for ip in ("10.96.0.1", "10.96.0.2", "10.244.0.1", "None")
            for ports in ("[{name: http, port: 80}]", "[{port: 81}]")
        ],
        *[
            virtual_service(name, f"hosts: ['{host}']\nhttp: [{{route: [{{destination: {{host: b}}}}]}}]")
            for name in "xy"
            for host in ("a", "c", "*.default.svc.cluster.local")
        ],
        *[destination_rule(name, SUBSETS.replace("reviews", host)) for name in "mn" for host in "ab"],
    ]
    objects = [next(iter(good(text).objects.values())) for text in texts]
    for _ in range(60):
        mesh = Mesh()
        for _ in range(40):
            mesh.apply(rng.sample(objects, rng.randrange(3)), [one.meta.key for one in rng.sample(objects, rng.randrange(3))])
        mesh.apply([], [key for key in [one.meta.key for one in mesh.objects()] if not mesh.in_force(key)])
        fresh = Mesh()
        fresh.apply(list(mesh.objects()))
        for name in "abc":
            host = f"{name}.default.svc.cluster.local"
            assert mesh.service(host) == fresh.service(host)
            assert mesh.selected("default", (("app", name),)) == fresh.selected("default", (("app", name),))
            assert mesh.virtual_service(host) == fresh.virtual_service(host)
            assert mesh.destination_rule(host, "default") == fresh.destination_rule(host, "default")
        assert {one.uid for one in mesh.pods()} == {one.uid for one in fresh.pods()}
        assert told(mesh) == told(fresh)
        mesh.apply([], [one.meta.key for one in mesh.objects()])
        for table in (
            "_objects",
            "_claims",
            "_out",
            "_services",
            "_pods",
            "_pods_by_label",
            "_services_by_label",
            "_pods_by_node",
            "_referrers",
            "_problems",
        ):
            assert not getattr(mesh, table), table


def test_addresses_are_compared_as_addresses() -> None:
    mesh = mesh_of(service("a", ip="fd00::1"), service("b", ip="fd00:0:0::1"))
    assert mesh.service("b.default.svc.cluster.local") is None
    found = mesh.service("a.default.svc.cluster.local")
    assert found is not None and found.addresses == (ip_address("fd00::1"),)


def test_a_mapped_address_is_the_ipv4_address_it_stands_for() -> None:
    found = mesh_of(service("a", ip="::ffff:10.96.0.1")).service("a.default.svc.cluster.local")
    assert found is not None and found.addresses == (ip_address("10.96.0.1"),)
