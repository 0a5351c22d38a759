"""deploy/daemonset on the real API server: what it takes, and that the rights it grants are enough."""
from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from agent.workloads.proc import Processes
from tests.support.controlplane import control_plane
from tests.support.kubernetes.kubelet import Kubelet
from tests.support.kubernetes.real import Cluster
from tests.support.wait import until

pytestmark = pytest.mark.netns

FOLDER = Path(__file__).resolve().parent.parent.parent / "deploy/daemonset"
SPACE = "narrows-system"
# what 1.20 is too old for: it serves this in the version before, with the same fields, and replaces pods of a DaemonSet without a surge
OLDER = {("policy/v1", "PodDisruptionBudget"): "policy/v1beta1"}
SURGE = {"maxSurge": 1, "maxUnavailable": 0}


@pytest.fixture(scope="module")
def objects(cluster: Cluster) -> list[dict[str, Any]]:
    """Of the kustomization, as this kubectl makes them."""
    return list(yaml.safe_load_all(cluster.kubectl("kustomize", str(FOLDER))))


@pytest.fixture(scope="module")
def rights(cluster: Cluster, objects: list[dict[str, Any]]) -> Iterator[None]:
    """Accounts and roles only, without what they are for."""
    granted = [one for one in objects if one["kind"] in ("Namespace", "ServiceAccount") or one["apiVersion"].startswith("rbac.")]
    cluster.kubectl("apply", "-f", "-", given=yaml.safe_dump_all(granted))
    yield
    cluster.kubectl("delete", "--wait=false", "-f", "-", given=yaml.safe_dump_all(granted))
    until(lambda: cluster.ask("GET", f"/api/v1/namespaces/{SPACE}")[0] == 404, "the namespace is gone", 90, 0.1)


def test_every_manifest_is_taken(cluster: Cluster, objects: list[dict[str, Any]], rights: None) -> None:
    kinds = {one["kind"] for one in objects}
    assert {"DaemonSet", "Deployment", "Service", "ClusterRole", "PodDisruptionBudget"} <= kinds
    for one in objects:
        one["apiVersion"] = OLDER.get((one["apiVersion"], one["kind"]), one["apiVersion"])
        if one["kind"] == "DaemonSet":
            assert one["spec"]["updateStrategy"].pop("rollingUpdate") == SURGE
        cluster.kubectl("apply", "--dry-run=server", "-f", "-", given=json.dumps(one))


def test_the_control_planes_account_may_read_all_that_it_follows_and_no_secret_elsewhere(cluster: Cluster, rights: None, namespace: str,
                                                                                         tmp_path: Path) -> None:
    path = cluster.kubeconfig_of(cluster.token(SPACE, "narrows-control-plane"))
    with control_plane(tmp_path, more=["--kubeconfig", str(path)]) as plane:
        assert "is not followed" not in plane.get("/debug/problems")[1]
        cluster.kubectl("-n", namespace, "create", "service", "clusterip", "web", "--tcp=80")
        until(lambda: f"web.{namespace}.svc.cluster.local" in plane.get("/debug/registryz")[1], "a service that was made", 30)
    said = cluster.kubectl("--kubeconfig", str(path), "-n", namespace, "get", "secrets", check=False)
    assert "cannot list resource \"secrets\"" in said


def test_the_agent_finds_pods_of_both_drivers_among_processes(cluster: Cluster, kubelet: Callable[..., Kubelet], namespace: str) -> None:
    for systemd in (False, True):
        node = kubelet(systemd=systemd)
        name = "systemd" if systemd else "cgroupfs"
        body = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": {
            "nodeName": node.name, "containers": [{"name": "main", "image": "test/pause"}]}}
        cluster.apply(namespace, body)
        pod = node.pod(namespace, name)
        found = Processes().find([pod.uid]).sandboxes[pod.uid]
        assert found.netns.id.inode == pod.inode and found.cgroup == str(pod.cgroup) and found.lives()
        node.recreate(namespace, name)
        node.pod(namespace, name)
        assert not found.lives()
        again = Processes().find([pod.uid]).sandboxes[pod.uid]
        assert again.netns.id != found.netns.id and again.cgroup == found.cgroup
