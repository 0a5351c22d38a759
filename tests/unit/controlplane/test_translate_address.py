"""Who is where, as istiod would tell it to ztunnel."""

from __future__ import annotations

import pytest
from google.protobuf.json_format import MessageToDict

from controlplane.model.mesh import Mesh
from controlplane.translate.address import service_address, workload_address
from tests.support.manifests import REVIEWS, mesh_of, pod, service

OWNED = ", ownerReferences: [{apiVersion: x/v1, kind: %s, name: %s, controller: true}]"


def workload(mesh: Mesh, name: str) -> dict[str, object]:
    found = mesh.pod(f"Kubernetes//Pod/default/{name}")
    assert found is not None
    told: dict[str, object] = MessageToDict(workload_address(found, mesh))["workload"]
    return told


def test_a_pod_is_told_whole() -> None:
    node = "---\napiVersion: v1\nkind: Node\nmetadata: {name: n1, labels: {" \
        "topology.kubernetes.io/region: r, topology.kubernetes.io/zone: z}}\n"
    mesh = mesh_of(
        REVIEWS,
        node,
        pod(
            "reviews-v3-7d-x",
            "10.244.1.7",
            "reviews",
            labels=", version: v3, pod-template-hash: 7d",
            meta=OWNED % ("ReplicaSet", "reviews-v3-7d"),
        ),
    )
    assert workload(mesh, "reviews-v3-7d-x") == {
        "uid": "Kubernetes//Pod/default/reviews-v3-7d-x",
        "name": "reviews-v3-7d-x",
        "namespace": "default",
        "node": "n1",
        "addresses": ["CvQBBw=="],
        "serviceAccount": "sa-reviews",
        "canonicalName": "reviews",
        "canonicalRevision": "v3",
        "workloadName": "reviews-v3",
        "clusterId": "Kubernetes",
        "locality": {"region": "r", "zone": "z"},
        "services": {
            "default/reviews.default.svc.cluster.local": {"ports": [{"servicePort": 9080, "targetPort": 9080, "appProtocol": "HTTP11"}]}
        },
    }


def test_a_service_is_told_whole() -> None:
    mesh = mesh_of(
        service(
            "a",
            "[{name: http-x, port: 80, targetPort: web}, {name: db, port: 3306, targetPort: 3307}]",
            more=(', clusterIPs: ["10.96.0.10", "fd00::1"], ipFamilies: [IPv4, IPv6], publishNotReadyAddresses: true'),
        )
    )
    one = mesh.service("a.default.svc.cluster.local")
    assert one is not None and one.address_name == "default/a.default.svc.cluster.local"
    assert MessageToDict(service_address(one)) == {
        "service": {
            "name": "a",
            "namespace": "default",
            "hostname": "a.default.svc.cluster.local",
            "canonical": True,
            "ipFamilies": "DUAL",
            "addresses": [{"address": "CmAACg=="}, {"address": "/QAAAAAAAAAAAAAAAAAAAQ=="}],
            "loadBalancing": {"healthPolicy": "ALLOW_ALL"},
            "ports": [{"servicePort": 80, "appProtocol": "HTTP11"}, {"servicePort": 3306, "targetPort": 3307, "appProtocol": "TCP"}],
        }
    }


def test_a_headless_service_has_no_address() -> None:
    one = mesh_of(service("a", ip="None")).service("a.default.svc.cluster.local")
    assert one is not None and "addresses" not in MessageToDict(service_address(one))["service"]


def test_a_named_port_is_that_of_each_pod() -> None:
    mesh = mesh_of(
        service("a", "[{name: http, port: 80, targetPort: web}]"),
        pod("a-0", "10.244.0.1", "a", ports="{name: web, containerPort: 8080}"),
        pod("a-1", "10.244.0.2", "a", ports="{name: web, containerPort: 8081}"),
        pod("a-2", "10.244.0.3", "a"),
    )
    key = "default/a.default.svc.cluster.local"
    ports = {name: workload(mesh, name)["services"][key].get("ports", []) for name in ("a-0", "a-1", "a-2")}  # type: ignore[index]
    assert {name: [port["targetPort"] for port in found] for name, found in ports.items()} == {"a-0": [8080], "a-1": [8081], "a-2": []}


@pytest.mark.parametrize(
    ("meta", "labels", "name", "kind"),
    [
        ("", "", "p-ab12-xyz", "POD"),
        ("", ", pod-template-hash: ab12", "p", None),
        (OWNED % ("ReplicaSet", "p-ab12"), ", pod-template-hash: ab12", "p", None),
        (OWNED % ("ReplicaSet", "bare"), "", "bare", "POD"),
        (OWNED % ("StatefulSet", "db"), "", "db", "POD"),
        (OWNED % ("Job", "nightly-28470000"), "", "nightly", "CRONJOB"),
        (OWNED % ("Job", "once"), "", "once", "JOB"),
    ],
)
def test_a_workload_is_called_what_a_person_called_it(meta: str, labels: str, name: str, kind: str | None) -> None:
    told = workload(mesh_of(pod("p-ab12-xyz", "10.244.0.1", "a", labels=labels, meta=meta)), "p-ab12-xyz")
    assert (told["workloadName"], told.get("workloadType")) == (name, kind)  # DEPLOYMENT is 0 and not printed


@pytest.mark.parametrize(
    ("labels", "name", "revision"),
    [
        (", version: v2", "a", "v2"),
        ("", "a", "latest"),
        (", app.kubernetes.io/name: k, app.kubernetes.io/version: '7'", "k", "7"),
        (", app.kubernetes.io/name: k, service.istio.io/canonical-name: c, service.istio.io/canonical-revision: r", "c", "r"),
    ],
)
def test_canonical_name_and_revision_come_from_labels_in_istios_order(labels: str, name: str, revision: str) -> None:
    told = workload(mesh_of(pod("p", "10.244.0.1", "a", labels=labels)), "p")
    assert (told["canonicalName"], told["canonicalRevision"]) == (name, revision)


def test_a_pod_that_is_not_ready_or_is_ending_is_unhealthy_and_one_that_ended_is_not_told() -> None:
    mesh = mesh_of(
        pod("a", "10.244.0.1", "a", ready="False"),
        pod("b", "10.244.0.2", "a", meta=', deletionTimestamp: "2026-01-01T00:00:00Z"'),
        pod("c", "10.244.0.3", "a").replace("Running", "Succeeded"),
        pod("d", "10.244.0.4", "a").replace('{ip: "10.244.0.4"}', ""),
    )
    assert [workload(mesh, name)["status"] for name in "ab"] == ["UNHEALTHY", "UNHEALTHY"]
    assert [one.meta.key.name for one in mesh.pods()] == ["a", "b"]


def test_a_pod_of_the_host_network_says_so() -> None:
    mesh = mesh_of(pod("a", "10.0.0.1", "a").replace("nodeName: n1", "nodeName: n1, hostNetwork: true"))
    assert workload(mesh, "a")["networkMode"] == "HOST_NETWORK"
