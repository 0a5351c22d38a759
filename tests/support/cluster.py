"""A cluster as the control plane's source: objects put into our API server, and what the source makes of them."""
from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from controlplane.model.mesh import Object
from controlplane.model.problems import ObjectKey
from controlplane.sources.cluster import Cluster
from controlplane.sources.folder import Changes
from protos.kubernetes.client import Client
from tests.support.kubernetes.server import ApiServer


def put(server: ApiServer, text: str) -> None:
    """Make or change what the manifests say, status included, as a cluster would in the end."""
    for body in filter(None, yaml.safe_load_all(text)):
        (served,) = [one for one in server.store.served.values()
                     if one.resource.kind == body["kind"] and body.get("apiVersion") == one.resource.api_version]
        meta = body["metadata"]
        namespace, name = meta.get("namespace", ""), meta["name"]
        status = body.pop("status", None)
        server.store.apply(served, namespace, name, body, "test", force=True)
        if status:
            server.store.merge(served, namespace, name, {"status": status}, "test", "status")


def remove(server: ApiServer, kind: str, name: str) -> None:
    (served,) = [one for one in server.store.served.values() if one.resource.kind == kind]
    server.store.delete(served, "default", name)


@dataclass
class Followed:
    cluster: Cluster
    objects: dict[ObjectKey, Object] = field(default_factory=dict)
    changes: list[Changes] = field(default_factory=list)

    async def follow(self) -> None:
        while True:
            await self.cluster.changes()
            found = self.cluster.refresh()
            if found:
                self.changes.append(found)
            self.objects.update({one.meta.key: one for one in found.puts})
            for key in found.deletes:
                del self.objects[key]

    @property
    def said(self) -> str:
        return "\n".join(str(one) for one in self.cluster.problems())


@asynccontextmanager
async def followed(server: ApiServer) -> AsyncIterator[Followed]:
    async with Client(server.configuration()) as client:
        one = Followed(Cluster(client))
        tasks = [asyncio.create_task(one.cluster.run()), asyncio.create_task(one.follow())]
        try:
            yield one
            assert not [task for task in tasks if task.done()]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def kubeconfig(server: ApiServer, folder: Path) -> Path:
    path = folder / "kubeconfig"
    path.write_text(yaml.safe_dump({
        "current-context": "c", "clusters": [{"name": "c", "cluster": {"server": server.url}}],
        "contexts": [{"name": "c", "context": {"cluster": "c"}}]}))
    return path
