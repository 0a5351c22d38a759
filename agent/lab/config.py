"""The folder that the control plane watches: one file per object, as a cluster's API would show it.

A file is written when its text changes, by renaming, and goes with its object. `validate` knows how files are called.
"""
from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from agent.lab.objects import plain
from agent.lab.pods import LabPod, replace_file
from agent.lab.services import Exposed
from agent.lab.spec import Key, MeshObject, Namespace, Object, Service, dump
from agent.model.workload import IPAddress

REDIRECTION = "ambient.istio.io/redirection"  # Istio's; the control plane says HBONE of such a pod


class ConfigFolder:
    """What was written last, so that only what changed is written again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._written: dict[str, str] = {}
        self._services: dict[str, tuple[Service, tuple[IPAddress, ...], str]] = {}  # file -> what it was made of, its text

    async def write(self, pods: Iterable[LabPod], exposed: Iterable[Exposed], wanted: Mapping[Key, Object]) -> None:
        """Bring the folder to these pods, services, and the namespaces and mesh resources of `wanted`.

        The files are written by a thread: thousands of them take seconds, in which probes and DNS go on.
        """
        files: dict[str, str] = {}
        for pod in pods:
            files[f"pod.{pod.namespace.name}.{pod.name}.yaml"] = dump(pod_manifest(pod))
        services: dict[str, tuple[Service, tuple[IPAddress, ...], str]] = {}
        for item in exposed:
            name = f"service.{item.service.namespace}.{item.service.name}.yaml"
            known = self._services.get(name)
            if known is None or known[:2] != (item.service, item.addresses):
                known = item.service, item.addresses, dump(service_manifest(item))
            services[name] = known
            files[name] = known[2]
        for thing in wanted.values():
            if isinstance(thing, MeshObject):
                files[f"{thing.kind.lower()}.{thing.namespace}.{thing.name}.yaml"] = dump(plain(thing.body))
            elif isinstance(thing, Namespace):
                files[f"namespace.{thing.name}.yaml"] = dump({
                    "apiVersion": "v1", "kind": "Namespace",
                    "metadata": {"name": thing.name, "labels": thing.labels, "annotations": thing.annotations}})
        self._services = services
        await asyncio.to_thread(self._replace, files)

    def _replace(self, files: Mapping[str, str]) -> None:
        """Write what changed. What was written is remembered file by file: after an error the next call goes on from there."""
        for name, text in files.items():
            if self._written.get(name) != text:
                replace_file(self._folder / name, text)
                self._written[name] = text
        for name in self._written.keys() - files.keys():
            (self._folder / name).unlink(missing_ok=True)
            del self._written[name]


def pod_manifest(pod: LabPod) -> dict[str, Any]:
    """A pod as a cluster's API would show it, with what its node's agent writes there: that tunnels end at it."""
    manifest = pod.manifest()
    if pod.captured:
        meta = manifest["metadata"]
        meta["annotations"] = meta["annotations"] | {REDIRECTION: "enabled"}
    return manifest


def service_manifest(item: Exposed) -> dict[str, Any]:
    """A service as a cluster's API would show it, with its addresses."""
    service = item.service
    addresses = [str(address) for address in item.addresses] or ["None"]
    ports = []
    for port in service.ports:
        shape: dict[str, Any] = {"port": port.port, "targetPort": port.target, "protocol": port.protocol}
        if port.name:
            shape["name"] = port.name
        if port.app_protocol:
            shape["appProtocol"] = port.app_protocol
        ports.append(shape)
    return {"apiVersion": "v1", "kind": "Service",
            "metadata": {"name": service.name, "namespace": service.namespace, "labels": service.labels,
                         "annotations": service.annotations},
            "spec": {"selector": service.selector, "ports": ports, "clusterIP": addresses[0], "clusterIPs": addresses,
                     "ipFamilies": [f"IPv{family}" for family in service.families],
                     "publishNotReadyAddresses": service.publish_not_ready}}
