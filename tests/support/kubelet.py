"""What the API server says of a node's pods, changed as kubelet and users change it. Their processes: tests/support/kubepods.py."""
from __future__ import annotations

from typing import Any

from protos.kubernetes.resources import NAMESPACES, PODS
from tests.support.kubernetes.server import ApiServer
from tests.support.kubernetes.table import Object, Served

NODE = "n1"
ON = {"narrows.mesh/intercept": "enabled"}


class Board:
    """The objects of one API server."""

    def __init__(self, server: ApiServer) -> None:
        self.server = server
        self.namespace("default")

    def served(self, plural: str) -> Served:
        (found,) = [one for one in self.server.store.served.values() if one.resource.plural == plural]
        return found

    def namespace(self, name: str, **metadata: Any) -> None:
        body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, **metadata}}
        self.server.store.apply(self.served(NAMESPACES.plural), "", name, body, "test", force=True)

    def pod(self, name: str, *, node: str = NODE, containers: tuple[str, ...] = ("c",), host_network: bool = False,
            annotations: dict[str, str] | None = None, labels: dict[str, str] | None = None, namespace: str = "default") -> str:
        """Bound to a node, without status. Its uid."""
        body = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "annotations": annotations or {}, "labels": labels or {}},
                "spec": {"nodeName": node, "hostNetwork": host_network,
                         "containers": [{"name": one, "image": "none"} for one in containers]}}
        made = self.server.store.create(self.served(PODS.plural), namespace, body, "test")
        return str(made["metadata"]["uid"])

    def status(self, name: str, phase: str = "Running", *ips: str) -> None:
        status = {"phase": phase, "podIP": ips[0] if ips else None, "podIPs": [{"ip": ip} for ip in ips] or None}
        self.server.store.merge(self.served(PODS.plural), "default", name, {"status": status}, "kubelet", "status")

    def annotate(self, name: str, **annotations: str | None) -> None:
        """None removes one."""
        self.server.store.merge(self.served(PODS.plural), "default", name, {"metadata": {"annotations": annotations}}, "test")

    def get(self, name: str) -> Object:
        return self.server.store.get(self.served(PODS.plural), "default", name)

    def annotations(self, name: str) -> dict[str, str]:
        return dict(self.get(name)["metadata"].get("annotations") or {})

    def delete(self, name: str) -> None:
        self.server.store.delete(self.served(PODS.plural), "default", name)
