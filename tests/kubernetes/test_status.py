"""The status of refused objects on the real API server, with the definitions that a cluster gets."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.controlplane import control_plane
from tests.support.kubernetes.real import Cluster
from tests.support.manifests import service, virtual_service
from tests.support.wait import until

pytestmark = pytest.mark.netns  # the folder's fixtures make namespaces


def test_kubectl_shows_why_an_object_is_refused_until_it_is_right(cluster: Cluster, namespace: str, tmp_path: Path) -> None:
    def status() -> dict[str, Any]:
        found: dict[str, Any] = json.loads(cluster.kubectl("-n", namespace, "get", "virtualservice", "reviews", "-o", "json"))
        return found.get("status") or {}

    more = ["--kubeconfig", str(cluster.kubeconfig), "--leader-lease", f"{namespace}/narrows"]
    with control_plane(tmp_path, more=more) as plane:
        wrong = "hosts: [reviews]\nhttp: [{rout: [{destination: {host: reviews}}]}]"
        cluster.apply(namespace, virtual_service("reviews", wrong, namespace))
        found = until(status, "the status", 60)
        assert found["conditions"][0]["status"] == "False" and "rout" in found["conditions"][0]["message"]
        assert found["validationMessages"] == [{"level": "ERROR", "type": {"code": "NRW0001", "name": "Refused"}}]
        cluster.apply(namespace, virtual_service("reviews", wrong.replace("rout:", "route:"), namespace))
        until(lambda: status().get("conditions", [{}])[0].get("status") == "True", "it is refused no more, and names no service", 60)
        cluster.apply(namespace, service("reviews", namespace=namespace).replace('clusterIP: "10.96.0.10", ', ""))
        until(lambda: status()["conditions"][0]["reason"] == "Accepted" and not status()["validationMessages"], "it is right", 60)
        assert plane.end() == 0
    lease = json.loads(cluster.kubectl("-n", namespace, "get", "lease", "narrows", "-o", "json"))
    assert lease["spec"].get("holderIdentity", "") == ""
