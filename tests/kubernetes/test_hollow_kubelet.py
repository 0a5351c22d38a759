"""What tests of this folder stand on: pods of the real controllers are namespaces, cgroups and processes in kubelet's shape."""
from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.kubernetes.kubelet import Kubelet, Pod
from tests.support.kubernetes.real import Cluster
from tests.support.wait import until

pytestmark = pytest.mark.netns

SERVER = """
import http.server, os
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(os.environ["NAME"].encode())
    def log_message(self, *_): pass
http.server.HTTPServer((os.environ["IP"], 8080), Handler).serve_forever()
"""
Start = Callable[..., Kubelet]


def web(name: str, replicas: int, **resources: str) -> list[dict[str, Any]]:
    container = {
        "name": "main", "image": "test/web", "command": ["/usr/bin/python3", "-c", SERVER],
        "ports": [{"name": "http", "containerPort": 8080}],
        "env": [{"name": "NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
                {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}],
        "readinessProbe": {"httpGet": {"path": "/", "port": "http"}}, "resources": {"requests": resources} if resources else {}}
    labels = {"app": name}
    deployment = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name}, "spec": {
        "replicas": replicas, "selector": {"matchLabels": labels}, "template": {
            "metadata": {"labels": labels}, "spec": {"containers": [container], "terminationGracePeriodSeconds": 1}}}}
    service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": {
        "selector": labels, "ports": [{"name": "http", "port": 80, "targetPort": "http"}]}}
    return [deployment, service]


def addresses(cluster: Cluster, namespace: str) -> set[str]:
    """Of ready endpoints, as the controller wrote them."""
    slices = cluster.ask("GET", f"/apis/discovery.k8s.io/v1beta1/namespaces/{namespace}/endpointslices")[1]["items"]
    return {address for one in slices for each in one.get("endpoints") or () if each["conditions"].get("ready")
            for address in each["addresses"]}


def running(cluster: Cluster, kubelet: Kubelet, namespace: str, count: int) -> list[Pod]:
    found = until(lambda: found if len(found := cluster.ready(namespace)) == count else None, f"{count} pods are ready", 60)
    return [kubelet.pod(namespace, one["metadata"]["name"]) for one in found]


def test_pods_of_a_deployment_are_reached_and_follow_its_scale(cluster: Cluster, kubelet: Start, namespace: str) -> None:
    node = kubelet()
    cluster.apply(namespace, *web("web", 2))
    pods = running(cluster, node, namespace, 2)
    for one in pods:
        assert node.node.netns.run("curl", "-s", "-m", "5", f"http://{one.ip}:8080/").stdout == one.key.name
    assert len({os.stat(one.netns.path).st_ino for one in pods}) == 2
    until(lambda: addresses(cluster, namespace) == {one.ip for one in pods}, "both are endpoints", 60)
    cluster.kubectl("-n", namespace, "scale", "deployment/web", "--replicas=1")
    until(lambda: len(node.pods()) == 1, "one is left", 60)
    (left,) = node.pods().values()
    until(lambda: addresses(cluster, namespace) == {left.ip}, "it is the endpoint", 60)
    gone = next(one for one in pods if one.uid != left.uid)
    assert not gone.cgroup.exists() and not Path(gone.netns.path).exists()


@pytest.mark.parametrize(("systemd", "requests", "pattern"), [
    pytest.param(False, {}, r"/kubepods/besteffort/pod{uid}/[0-9a-f]{{64}}", id="cgroupfs"),
    pytest.param(False, {"cpu": "10m"}, r"/kubepods/burstable/pod{uid}/[0-9a-f]{{64}}", id="cgroupfs-burstable"),
    pytest.param(True, {"cpu": "10m"}, r"/kubepods\.slice/kubepods-burstable\.slice/kubepods-burstable-pod{uid_}\.slice/"
                 r"cri-containerd-[0-9a-f]{{64}}\.scope", id="systemd")])
def test_processes_are_in_cgroups_as_kubelet_names_them(cluster: Cluster, kubelet: Start, namespace: str, systemd: bool,
                                                        requests: dict[str, str], pattern: str) -> None:
    node = kubelet(systemd=systemd)
    cluster.apply(namespace, *web("web", 1, **requests))
    (pod,) = running(cluster, node, namespace, 1)
    wanted = pattern.format(uid=pod.uid, uid_=pod.uid.replace("-", "_"))
    for process in pod.processes.values():
        (path,) = [line[3:] for line in Path(f"/proc/{process.pid}/cgroup").read_text().splitlines() if line.startswith("0::")]
        assert re.search(wanted + "$", path), path
        assert os.stat(f"/proc/{process.pid}/ns/net").st_ino == os.stat(pod.netns.path).st_ino
    assert {f"containerd://{pod.containers['main']}"} == {
        each["containerID"] for one in cluster.ready(namespace) for each in one["status"]["containerStatuses"]}


def test_a_sandbox_that_is_made_anew_is_another_namespace_under_the_same_pod(cluster: Cluster, kubelet: Start, namespace: str) -> None:
    node = kubelet()
    cluster.apply(namespace, *web("web", 1))
    (before,) = running(cluster, node, namespace, 1)
    node.recreate(namespace, before.key.name)
    after = node.pod(namespace, before.key.name)
    assert after.uid == before.uid and after.ip != before.ip and after.netns.path != before.netns.path and after.cgroup == before.cgroup
    until(lambda: addresses(cluster, namespace) == {after.ip}, "the endpoint is the new address", 60)


def test_a_container_that_ends_fails_its_pod_and_a_job_succeeds(cluster: Cluster, kubelet: Start, namespace: str) -> None:
    kubelet()
    for name, command in (("bad", "exit 3"), ("good", "exit 0")):
        body = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": {
            "restartPolicy": "Never", "containers": [{"name": "main", "image": "test/sh", "command": ["sh", "-c", command]}]}}
        cluster.apply(namespace, body)

    def phases() -> dict[str, str]:
        found = cluster.ask("GET", f"/api/v1/namespaces/{namespace}/pods")[1]["items"]
        return {one["metadata"]["name"]: one["status"]["phase"] for one in found}
    until(lambda: phases() == {"bad": "Failed", "good": "Succeeded"}, "how they ended", 60)
