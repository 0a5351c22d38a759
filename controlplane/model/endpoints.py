"""Who is behind a service as a cluster says it (EndpointSlice, and Endpoints where there are none), by service, pod and node."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from controlplane.model.objects import CLUSTER, IPAddress, Metadata
from controlplane.model.problems import ObjectKey

_GROUPS = {"EndpointSlice": "discovery.k8s.io", "Endpoints": ""}


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One address behind a service. `pod` is the uid of the pod that has it; empty: nobody's that we know (a slice made by hand)."""

    address: IPAddress
    ready: bool
    pod: str
    node: str
    zone: str


@dataclass(frozen=True, slots=True)
class EndpointGroup:
    """Endpoints that serve the same ports. `ports`: the service's TCP ports by name, and the numbers that they have here."""

    ports: tuple[tuple[str, int], ...]
    endpoints: tuple[Endpoint, ...]


@dataclass(frozen=True, slots=True)
class Endpoints:
    """An EndpointSlice (one group) or an Endpoints object (a group a subset). `service` is one of its own namespace; empty: of none."""

    meta: Metadata
    service: str
    groups: tuple[EndpointGroup, ...]

    def uid(self, one: Endpoint) -> str:
        """Of the workload that the endpoint is: the pod's, else one of its own (as istiod names it)."""
        key = self.meta.key
        return one.pod or f"{CLUSTER}/{_GROUPS[key.kind]}/{key.kind}/{key.namespace}/{key.name}/{one.address}"

    def uids(self) -> set[str]:
        return {self.uid(one) for group in self.groups for one in group.endpoints}

    def of(self, uid: str) -> list[tuple[EndpointGroup, Endpoint]]:
        """Where this workload stands in it."""
        return [(group, one) for group in self.groups for one in group.endpoints if self.uid(one) == uid]

    def differing(self, other: Endpoints) -> set[str]:
        """Workloads that are not the same in both: a change of one endpoint among a thousand costs one."""
        if self.service != other.service or [one.ports for one in self.groups] != [one.ports for one in other.groups]:
            return self.uids() | other.uids()
        return {self.uid(one) for mine, others in zip(self.groups, other.groups, strict=True)
                for one in set(mine.endpoints) ^ set(others.endpoints)}


class Behind:
    """Held by service, by workload, and those that are no pod by node. Not for objects that change in place: remove and add."""

    def __init__(self) -> None:
        self._of: dict[tuple[str, str], dict[ObjectKey, Endpoints]] = {}  # namespace, service
        self._by_uid: dict[str, dict[ObjectKey, Endpoints]] = {}
        self._by_node: dict[str, dict[ObjectKey, Endpoints]] = {}

    def add(self, one: Endpoints) -> None:
        for held in self._places(one):
            held[one.meta.key] = one

    def remove(self, one: Endpoints) -> None:
        for held in self._places(one):
            held.pop(one.meta.key, None)
        service = one.meta.key.namespace, one.service
        if not self._of[service]:
            del self._of[service]
        for table, names in ((self._by_uid, one.uids()), (self._by_node, _nodes(one))):
            for name in names:
                if not table[name]:
                    del table[name]

    def of(self, namespace: str, service: str) -> list[Endpoints]:
        """By name."""
        return [one for _, one in sorted(self._of.get((namespace, service), {}).items())]

    def holding(self, uid: str) -> list[Endpoints]:
        """Those in which the workload is, by name."""
        return [one for _, one in sorted(self._by_uid.get(uid, {}).items())]

    def on_node(self, node: str) -> list[Endpoints]:
        """Those with an endpoint there that is no pod."""
        return list(self._by_node.get(node, {}).values())

    def _places(self, one: Endpoints) -> Iterator[dict[ObjectKey, Endpoints]]:
        yield self._of.setdefault((one.meta.key.namespace, one.service), {})
        for uid in one.uids():
            yield self._by_uid.setdefault(uid, {})
        for node in _nodes(one):
            yield self._by_node.setdefault(node, {})


def _nodes(one: Endpoints) -> set[str]:
    return {each.node for group in one.groups for each in group.endpoints if each.node and not each.pod}
