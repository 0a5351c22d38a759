"""`narrows control-plane` on the real API server: what kubectl and the controllers do there, a stock gRPC client does by xDS."""
from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.controlplane import ControlPlane, control_plane
from tests.support.grpc_client import Client
from tests.support.kubernetes.kubelet import Kubelet
from tests.support.kubernetes.real import Cluster
from tests.support.manifests import SUBSETS, destination_rule, virtual_service
from tests.support.wait import until

pytestmark = pytest.mark.netns

PORT = 9080
PEER = str(Path(__file__).parent.parent / "support" / "grpc_peer.py")
JASON = """
hosts: [reviews]
http:
- match: [{headers: {end-user: {exact: jason}}}]
  route: [{destination: {host: reviews, subset: v2}}]
- route: [{destination: {host: reviews, subset: v1}}]
"""
# gRPC's C core does not know LEAST_REQUEST, our default
RULE = SUBSETS + "trafficPolicy: {loadBalancer: {simple: ROUND_ROBIN}}\n"


def deployment(version: str, replicas: int) -> dict[str, Any]:
    labels = {"app": "reviews", "version": version}
    container = {"name": "main", "image": "test/peer", "ports": [{"containerPort": PORT}],
                 "command": ["sh", "-c", f'sleep infinity | exec {sys.executable} {PEER} serve {PORT} "$IP"'],  # while stdin is open
                 "env": [{"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}],
                 "readinessProbe": {"tcpSocket": {"port": PORT}}}
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": f"reviews-{version}"}, "spec": {
        "replicas": replicas, "selector": {"matchLabels": labels}, "template": {
            "metadata": {"labels": labels}, "spec": {"containers": [container], "terminationGracePeriodSeconds": 1}}}}


SERVICE = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "reviews"}, "spec": {
    "selector": {"app": "reviews"}, "ports": [{"name": "grpc-web", "port": PORT}]}}


@pytest.fixture
def node(kubelet: Callable[..., Kubelet]) -> Kubelet:
    return kubelet()


@pytest.fixture
def plane(cluster: Cluster, tmp_path: Path) -> Iterator[ControlPlane]:
    with control_plane(tmp_path, more=["--kubeconfig", str(cluster.kubeconfig)]) as made:
        yield made


@pytest.fixture
def client(node: Kubelet, namespace: str, plane: ControlPlane, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Client:
    bootstrap = tmp_path / "bootstrap.json"
    bootstrap.write_text(json.dumps({
        "xds_servers": [{"server_uri": plane.listen, "channel_creds": [{"type": "insecure"}], "server_features": ["xds_v3"]}],
        "node": {"id": "oracle", "metadata": {"NAMESPACE": namespace}}}))
    monkeypatch.setenv("GRPC_XDS_BOOTSTRAP", str(bootstrap))
    target = f"xds:///reviews.{namespace}.svc.cluster.local:{PORT}"
    return Client(node.node.netns.start(sys.executable, PEER, "ask", target, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))


def addresses(cluster: Cluster, namespace: str, version: str) -> set[str]:
    return {one["status"]["podIP"] for one in cluster.ready(namespace, f"version={version}")}


def test_kubectl_routes_scales_and_deletes_and_a_grpc_client_follows(cluster: Cluster, namespace: str, client: Client,
                                                                     plane: ControlPlane) -> None:
    cluster.apply(namespace, deployment("v1", 1), deployment("v2", 1), SERVICE, destination_rule("reviews", RULE, namespace))
    v1, v2 = (until(lambda v=v: addresses(cluster, namespace, v), f"{v} is ready", 60) for v in ("v1", "v2"))  # type: ignore[misc]
    until(lambda: client.ask(4).keys() == v1 | v2, "both versions are called", 60)
    cluster.apply(namespace, virtual_service("reviews", JASON, namespace))
    until(lambda: client.ask(20) == dict.fromkeys(v1, 20) and client.ask(20, "end-user=jason") == dict.fromkeys(v2, 20),
          "jason gets v2, others v1", 60)
    cluster.kubectl("-n", namespace, "scale", "deployment/reviews-v1", "--replicas=2")
    more = until(lambda: found if len(found := addresses(cluster, namespace, "v1")) == 2 else None, "another v1", 60)
    until(lambda: client.ask(20).keys() == more, "it is called", 60)
    cluster.kubectl("-n", namespace, "delete", "virtualservice", "reviews")
    until(lambda: client.ask(20).keys() == more | v2, "without rules all are called", 60)
    cluster.kubectl("-n", namespace, "delete", "deployment", "reviews-v2")
    until(lambda: client.ask(20).keys() == more, "what is gone is not called", 60)
    assert [one["message"] for one in plane.debug("problems")["problems"] if namespace in json.dumps(one)] == []


def test_what_the_api_server_takes_and_the_mesh_refuses_is_said_and_the_last_good_stays(
        cluster: Cluster, namespace: str, client: Client, plane: ControlPlane) -> None:
    cluster.apply(namespace, deployment("v1", 1), deployment("v2", 1), SERVICE, destination_rule("reviews", RULE, namespace),
          virtual_service("reviews", "hosts: [reviews]\nhttp: [{route: [{destination: {host: reviews, subset: v1}}]}]", namespace))
    (v1,) = until(lambda: addresses(cluster, namespace, "v1"), "v1 is ready", 60)
    until(lambda: client.ask(4) == {v1: 4}, "v1 is called", 60)
    wrong = "hosts: [reviews]\nhttp: [{rout: [{destination: {host: reviews, subset: v2}}]}]"
    cluster.apply(namespace, virtual_service("reviews", wrong, namespace))
    said = until(lambda: [one for one in plane.debug("problems")["problems"] if namespace in json.dumps(one)], "the problem is said", 60)
    assert "rout" in said[0]["message"] and said[0]["hint"].endswith("the last good version stays in force")
    assert client.ask(4) == {v1: 4}
