"""Who is behind a service, as a cluster's slices say it: over the wire, through changes, and by whichever resource the server has."""
from __future__ import annotations

import random
from collections.abc import Iterable
from ipaddress import ip_address
from typing import Any

import pytest
import yaml
from google.protobuf.json_format import MessageToDict

from agent.xds import decode
from controlplane.model.mesh import Mesh, Object, Touched
from controlplane.model.problems import ObjectKey
from controlplane.sources.cluster import FILE, as_map
from controlplane.sources.kinds import CLUSTER_KINDS, read
from controlplane.translate.catalog import MAKERS, Catalog
from controlplane.translate.names import TypeUrl, parse, short_name
from protos.gen.istio import workload_pb2
from protos.kubernetes import resources as known
from tests.support.cluster import followed, put
from tests.support.kubernetes.server import ApiServer
from tests.support.kubernetes.table import TABLE, Served
from tests.support.manifests import SUBSETS, destination_rule, mesh_of, pod, service
from tests.support.wait import until_async

HOST = "reviews.default.svc.cluster.local"
V1 = ObjectKey("EndpointSlice", "default", "reviews-1")
NODE = """
---
apiVersion: v1
kind: Node
metadata: {name: n1, labels: {topology.kubernetes.io/region: eu, topology.kubernetes.io/zone: eu-1}}
"""


def slice_(name: str = "reviews-1", items: Iterable[str] = (), ports: str = "[{name: http, port: 8080, protocol: TCP}]",
           version: str = "v1", of: str = "reviews", family: str = "IPv4") -> str:
    return f"""
---
apiVersion: discovery.k8s.io/{version}
kind: EndpointSlice
metadata: {{name: {name}, namespace: default, labels: {{kubernetes.io/service-name: {of}}}}}
addressType: {family}
ports: {ports}
endpoints: [{", ".join(items)}]
"""


def at(address: str, target: str = "", conditions: str = "{ready: true}", more: str = "") -> str:
    ref = f", targetRef: {{kind: Pod, namespace: default, name: {target}}}" if target else ""
    return f'{{addresses: ["{address}"], conditions: {conditions}{ref}{more}}}'


def objects(text: str) -> list[Object]:
    found = [read(FILE, as_map(body), CLUSTER_KINDS) for body in yaml.safe_load_all(text) if body]
    assert not [str(problem) for one in found for problem in one.problems]
    return [one.object for one in found if one.object is not None]


def cluster(*texts: str) -> Mesh:
    mesh = Mesh()
    mesh.apply(objects("".join(texts)))
    return mesh


def eds(mesh: Mesh, subset: str = "", host: str = HOST) -> list[tuple[str, str]]:
    """Zone and address with port, as sent."""
    message = MAKERS[TypeUrl.ENDPOINTS](mesh, parse(TypeUrl.ENDPOINTS, short_name(TypeUrl.ENDPOINTS, host, 80, subset), "default"))
    found: dict[str, Any] = MessageToDict(message)
    return [(group["locality"].get("zone", ""), "{address}:{portValue}".format(**one["endpoint"]["address"]["socketAddress"]))
            for group in found.get("endpoints", ()) for one in group["lbEndpoints"]]


def wds(mesh: Mesh, uid: str) -> workload_pb2.Workload:
    catalog = Catalog(mesh)
    catalog.update(Touched(addresses={uid}))
    made = catalog.address(uid)
    assert made is not None
    assert decode.decode(TypeUrl.ADDRESS, uid, made.content) is not None  # our agent takes it
    return workload_pb2.Address.FromString(made.content).workload


def behind(mesh: Mesh, uid: str) -> dict[str, list[tuple[int, int]]]:
    return {name: [(port.service_port, port.target_port) for port in ports.ports] for name, ports in wds(mesh, uid).services.items()}


def uid(name: str) -> str:
    return f"Kubernetes//Pod/default/{name}"


PODS = pod("a", "10.244.0.1", "reviews", labels=", version: v1") + pod("b", "10.244.0.2", "reviews") + pod("c", "10.244.0.3", "other")


def test_slices_say_who_is_behind_a_service_and_not_its_selector() -> None:
    mesh = cluster(service("reviews"), PODS, destination_rule("r", SUBSETS), NODE, slice_(items=[
        at("10.244.0.1", "a"), at("10.244.0.3", "c", more=", nodeName: n1, zone: z")]))
    assert eds(mesh) == [("", "10.244.0.1:8080"), ("eu-1", "10.244.0.3:8080")]
    assert eds(mesh, "v1") == [("", "10.244.0.1:8080")]  # subsets go by the labels of pods
    key = f"default/{HOST}"
    assert behind(mesh, uid("a")) == behind(mesh, uid("c")) == {key: [(80, 8080)]} and behind(mesh, uid("b")) == {}
    assert [one.meta.key.name for one in mesh.pods_of(mesh.service(HOST))] == ["a", "c"]  # type: ignore[arg-type]


@pytest.mark.parametrize(("conditions", "there"), [
    ("{}", True), ("{ready: true, serving: true, terminating: false}", True), ("{ready: false}", False),
    ("{ready: false, serving: true, terminating: true}", False), ("{serving: false}", True)])
def test_ready_decides_and_unknown_is_ready(conditions: str, there: bool) -> None:
    items = slice_(items=[at("10.244.0.1", "a", conditions), at("192.0.2.1", conditions=conditions)])
    assert eds(cluster(service("reviews"), PODS, items)) == ([("", "10.244.0.1:8080"), ("", "192.0.2.1:8080")] if there else [])
    published = service("reviews", more=", publishNotReadyAddresses: true")
    assert len(eds(cluster(published, PODS, items))) == 2
    outsider = wds(cluster(service("reviews"), items), "Kubernetes/discovery.k8s.io/EndpointSlice/default/reviews-1/192.0.2.1")
    assert (outsider.status == workload_pb2.HEALTHY) is there


def test_a_service_without_selector_is_reached_by_slices_made_by_hand() -> None:
    bare = service("reviews").replace("selector: {app: reviews}, ", "")
    mesh = cluster(bare)
    assert [str(one.message) for one in mesh.problems()] == ["selects nothing and no EndpointSlice is its, so it has no endpoints"]
    mesh.apply(objects(slice_(items=[at("192.0.2.1", more=", zone: far"), at("192.0.2.2")])))
    assert not mesh.problems()
    assert eds(mesh) == [("", "192.0.2.2:8080"), ("far", "192.0.2.1:8080")]
    name = "Kubernetes/discovery.k8s.io/EndpointSlice/default/reviews-1/192.0.2.1"
    one = wds(mesh, name)
    assert (one.name, one.namespace, one.service_account, one.network_mode) == ("reviews-1", "default", "", workload_pb2.HOST_NETWORK)
    assert [bytes(each) for each in one.addresses] == [ip_address("192.0.2.1").packed] and behind(mesh, name) == {
        f"default/{HOST}": [(80, 8080)]}
    assert one.tunnel_protocol == workload_pb2.NONE


def test_a_slice_speaks_for_no_service_of_files_and_no_pod_of_another_namespace() -> None:
    files = mesh_of(service("reviews"), PODS)
    files.apply(objects(slice_(items=[at("10.244.0.3", "c")])))
    assert eds(files) == [("", "10.244.0.1:80"), ("", "10.244.0.2:80")]
    other = slice_(items=['{addresses: ["10.244.0.1"], targetRef: {kind: Pod, namespace: shop, name: a}}'])
    mesh = cluster(service("reviews"), PODS, other)
    assert mesh.behind.holding("Kubernetes//Pod/shop/a") == [] and behind(mesh, uid("a")) == {}


def test_a_pod_of_two_families_is_told_once_in_the_first_of_the_service() -> None:
    two = slice_(items=[at("10.244.0.1", "a"), at("192.0.2.1")]) + slice_(
        "reviews-2", [at("fd00::1", "a"), at("2001:db8::1")], family="IPv6")
    assert eds(cluster(service("reviews", more=", ipFamilies: [IPv6, IPv4]"), PODS, two)) == [
        ("", "192.0.2.1:8080"), ("", "2001:db8::1:8080"), ("", "fd00::1:8080")]
    assert ("", "10.244.0.1:8080") in eds(cluster(service("reviews", more=", ipFamilies: [IPv4, IPv6]"), PODS, two))


def test_what_says_nothing_of_addresses_is_no_word_on_a_service() -> None:
    mesh = cluster(service("reviews"), PODS, slice_(items=["{addresses: [reviews.example]}"], family="FQDN"))
    assert len(eds(mesh)) == 2
    mesh.apply(objects(slice_(items=[], ports="[]")))  # but an empty slice is: nobody is there
    assert eds(mesh) == [] and behind(mesh, uid("a")) == {}
    mesh.apply([], [V1])
    assert len(eds(mesh)) == 2


def test_after_any_changes_what_is_published_is_as_if_made_at_once() -> None:
    rng = random.Random(11)
    pods, names = [f"p{n}" for n in range(6)], ("reviews-1", "reviews-2", "ratings-1")
    choices = [one for text in (
        *(pod(name, f"10.244.0.{n + 1}", rng.choice(["reviews", "ratings"]), ready=rng.choice(["True", "False"]))
          for n, name in enumerate(pods * 2)),
        *(service(name, ip=f"10.96.0.{n}", ports=ports) for n, name in enumerate(["reviews", "ratings"], 1)
          for ports in ("[{name: http, port: 80}]", "[{name: http, port: 80, targetPort: 81}]")),
        *(slice_(name, [at(f"10.244.0.{pods.index(each) + 1}", each, rng.choice(["{ready: true}", "{ready: false}"]))
                        for each in rng.sample(pods, 3)] + [at(f"192.0.2.{rng.randrange(1, 4)}", more=", nodeName: n1")] * rng.randrange(2),
                 rng.choice(["[{name: http, port: 80}]", "[{name: http, port: 8080}]"]), of=rng.choice(["reviews", "ratings"]))
          for name in names * 6),
        NODE, NODE.replace("eu-1", "eu-2")) for one in objects(text)]
    for _ in range(60):
        mesh = Mesh()
        catalog = Catalog(mesh)
        wanted = [parse(TypeUrl.ENDPOINTS, short_name(TypeUrl.ENDPOINTS, HOST.replace("reviews", name), 80), "default")
                  for name in ("reviews", "ratings")]
        for _ in range(25):
            for one in wanted:
                catalog.resource(one)
            gone = [one.meta.key for one in rng.sample(choices, rng.randrange(2))]
            catalog.update(mesh.apply(rng.sample(choices, rng.randrange(3)), gone))
        fresh = Mesh()
        again = Catalog(fresh)
        again.update(fresh.apply(list(mesh.objects())))
        assert {name: catalog.address(name) for name in catalog.addresses()} == {name: again.address(name) for name in again.addresses()}
        assert [catalog.resource(one) for one in wanted] == [again.resource(one) for one in wanted]
        mesh.apply([], [one.meta.key for one in mesh.objects()])
        assert not (mesh.behind._of or mesh.behind._by_uid or mesh.behind._by_node)


# -- by which resource ------------------------------------------------------------------------------------------------

SLICES = (known.ENDPOINT_SLICES, known.ENDPOINT_SLICES_V1BETA1, known.ENDPOINTS)
ENDPOINTS = """
---
apiVersion: v1
kind: Endpoints
metadata: {name: reviews, namespace: default}
subsets:
- ports: [{name: http, port: 8080}]
  addresses: [{ip: 10.244.0.1, nodeName: n1, targetRef: {kind: Pod, namespace: default, name: a}}]
  notReadyAddresses: [{ip: 10.244.0.2, targetRef: {kind: Pod, namespace: default, name: b}}]
"""
OLD = slice_(items=["{addresses: [10.244.0.1], targetRef: {kind: Pod, name: a, namespace: default}, topology: "
                    "{kubernetes.io/hostname: n1, topology.kubernetes.io/zone: old}}"], version="v1beta1")


def server_of(*served: known.Resource) -> ApiServer:
    others = [one for one in TABLE if one.resource not in SLICES]
    return ApiServer([*others, *(Served(one) for one in served)])


@pytest.mark.parametrize(("served", "text"), [
    (SLICES, slice_(items=[at("10.244.0.1", "a", more=", nodeName: n1"), at("10.244.0.2", "b", "{ready: false}")])),
    (SLICES[1:], OLD), (SLICES[2:], ENDPOINTS)], ids=["v1", "v1beta1", "Endpoints"])
async def test_the_newest_that_the_server_has_is_followed(served: tuple[known.Resource, ...], text: str) -> None:
    with server_of(*served) as server:
        put(server, service("reviews") + PODS + NODE + text)
        async with followed(server) as one:
            await until_async(lambda: one.objects, "the first state", timeout=60)
            mesh = Mesh()
            mesh.apply(one.objects.values())
            assert eds(mesh) == [("eu-1", "10.244.0.1:8080")] and behind(mesh, uid("a")) == {f"default/{HOST}": [(80, 8080)]}
            assert one.said == "" and one.cluster.states()[-1][0] == served[0].kind
            assert not server.asked("list", served[-1].plural) or served[-1].plural == served[0].plural


async def test_when_the_one_that_is_followed_goes_the_next_takes_its_place() -> None:
    with server_of(*SLICES[1:]) as server:
        put(server, service("reviews") + PODS + OLD + ENDPOINTS)
        async with followed(server) as one:
            await until_async(lambda: V1 in one.objects, "the slice", timeout=60)
            server.store.served.pop(("discovery.k8s.io", "v1beta1", "endpointslices"))
            server.cut()
            await until_async(lambda: V1 not in one.objects, "the slice went", timeout=60)
            assert ObjectKey("Endpoints", "default", "reviews") in one.objects
            await until_async(lambda: one.said == "", "well", timeout=60)


async def test_without_an_answer_which_are_served_nobody_is_served_and_a_refusal_is_no_reason_for_older_ones() -> None:
    with server_of(*SLICES) as server:
        put(server, service("reviews") + ENDPOINTS)
        silent = server.chaos.add("discover", "discovery.k8s.io/v1", code=503, reason="ServiceUnavailable")
        async with followed(server) as one:
            await until_async(lambda: "EndpointSlice: is not followed" in one.said, "the reason", timeout=60)
            assert not one.objects
            refused = server.chaos.add("list", "endpointslices", code=403, reason="Forbidden", message="endpointslices is forbidden")
            server.chaos.stop(silent)
            await until_async(lambda: "endpointslices is forbidden" in one.said, "the refusal", timeout=60)
            assert not one.objects and not server.asked("list", "endpoints")
            server.chaos.stop(refused)
            await until_async(lambda: one.objects and one.said == "", "well", timeout=90)
            assert ObjectKey("Endpoints", "default", "reviews") not in one.objects
