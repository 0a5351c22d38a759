"""Resources on demand, each with the hash of its content as version. What nobody asked for is never made.

Addresses are for everyone and are kept made; listeners, routes, clusters and endpoints are made per scope when they are asked
for, and kept until their host is touched. The order of types is that of make before break.
"""
from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from controlplane.model.mesh import Mesh, Touched
from controlplane.translate.address import outsider_address, service_address, workload_address
from controlplane.translate.authorization import authorization
from controlplane.translate.cluster import cluster, endpoints
from controlplane.translate.listener import listener
from controlplane.translate.names import TypeUrl, Wanted, is_workload
from controlplane.translate.route import routes

MAKERS: dict[TypeUrl, Callable[[Mesh, Wanted], Any]] = {
    TypeUrl.LISTENER: listener, TypeUrl.ROUTE: routes, TypeUrl.CLUSTER: cluster, TypeUrl.ENDPOINTS: endpoints,
}
# a workload names policies: they come first
ORDER = (TypeUrl.AUTHORIZATION, TypeUrl.ADDRESS, TypeUrl.CLUSTER, TypeUrl.ENDPOINTS, TypeUrl.LISTENER, TypeUrl.ROUTE)
MADE_BOUND = 200_000  # resources kept made; beyond that the oldest is made again when it is asked for


@dataclass(frozen=True, slots=True)
class Made:
    """A resource as bytes. Equal content has an equal version, across restarts and replicas."""

    version: str
    content: bytes


def made(message: Any) -> Made:
    content = message.SerializeToString(deterministic=True)
    return Made(hashlib.blake2b(content, digest_size=8).hexdigest(), content)


class Catalog:
    """What there is to be had, as of the last `update`. `trust_domain` is that of every workload; empty: cluster.local."""

    def __init__(self, mesh: Mesh, trust_domain: str = "") -> None:
        self._mesh = mesh
        self._trust_domain = trust_domain
        self._addresses: dict[str, Made] = {}
        self._policies: dict[str, Made] = {}
        self._made: dict[Wanted, Made | None] = {}
        self._by_host: dict[str, set[Wanted]] = {}

    def update(self, touched: Touched) -> set[str]:
        """Follow a change of the mesh. Returns the names of the addresses that differ or vanished."""
        for host in touched.hosts:
            for wanted in self._by_host.pop(host, ()):
                self._made.pop(wanted, None)
        for name in touched.policies:
            message = authorization(self._mesh, name)
            if message is None:
                self._policies.pop(name, None)
            else:
                self._policies[name] = made(message)
        changed = set()
        for name in touched.addresses:
            now, before = self._make_address(name), self._addresses.get(name)
            if now == before:
                continue
            changed.add(name)
            if now is None:
                del self._addresses[name]
            else:
                self._addresses[name] = now
        return changed

    def addresses(self) -> Iterable[str]:
        """Every name, services before workloads."""
        return sorted(self._addresses, key=lambda name: (is_workload(name), name))

    def address(self, name: str) -> Made | None:
        return self._addresses.get(name)

    def policies(self) -> Iterable[str]:
        """Every name."""
        return sorted(self._policies)

    def policy(self, name: str) -> Made | None:
        return self._policies.get(name)

    def resource(self, wanted: Wanted) -> Made | None:
        """None: it does not exist."""
        if wanted not in self._made:
            message = MAKERS[wanted.type_url](self._mesh, wanted)
            if len(self._made) >= MADE_BOUND:
                self._forget(next(iter(self._made)))
            self._made[wanted] = None if message is None else made(message)
            self._by_host.setdefault(wanted.host, set()).add(wanted)
        return self._made[wanted]

    def __iter__(self) -> Iterator[Wanted]:
        """What is kept made of layer 7."""
        return iter(self._made)

    def _forget(self, wanted: Wanted) -> None:
        del self._made[wanted]
        held = self._by_host.get(wanted.host, set())
        held.discard(wanted)
        if not held:
            self._by_host.pop(wanted.host, None)

    def _make_address(self, name: str) -> Made | None:
        if is_workload(name):
            pod = self._mesh.pod(name)
            found = (workload_address(pod, self._mesh, self._trust_domain) if pod
                     else outsider_address(name, self._mesh, self._trust_domain))
            return made(found) if found else None
        service = self._mesh.service(name.partition("/")[2])
        return made(service_address(service)) if service and service.address_name == name else None
