"""Who is behind a service's port: what the cluster says (slices) where it says anything, else the pods that the service selects."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from controlplane.model.mesh import Mesh
from controlplane.model.objects import IPAddress, Pod, Service, ServicePort
from controlplane.translate.address import target_port


@dataclass(frozen=True, slots=True)
class Backend:
    """One that takes connections. `labels` are its pod's; none without a pod."""

    address: IPAddress
    port: int
    labels: frozenset[tuple[str, str]]
    region: str
    zone: str


def backends(mesh: Mesh, service: Service, port: ServicePort) -> Iterator[Backend]:
    """Those that are ready, or all where the service publishes them; a pod once, at its address of the service's first family."""
    if mesh.slices(service):
        yield from _of_slices(mesh, service, port)
        return
    for pod in mesh.selected(service.meta.key.namespace, service.selector):
        number, address = target_port(port, pod), _first(service, pod.addresses)
        if (pod.ready or service.publish_not_ready) and number and address:
            yield _backend(mesh, pod, address, number, pod.node, "")


def _of_slices(mesh: Mesh, service: Service, port: ServicePort) -> Iterator[Backend]:
    of_pods: dict[str, dict[IPAddress, Backend]] = {}  # a pod of two families is in two slices
    for one in mesh.slices(service):
        for group in one.groups:
            number = dict(group.ports).get(port.name)
            if number is None:
                continue
            for endpoint in group.endpoints:
                if not endpoint.ready and not service.publish_not_ready:
                    continue
                found = _backend(mesh, mesh.pod(endpoint.pod), endpoint.address, number, endpoint.node, endpoint.zone)
                if endpoint.pod:
                    of_pods.setdefault(endpoint.pod, {})[endpoint.address] = found
                else:
                    yield found
    for several in of_pods.values():
        address = _first(service, tuple(sorted(several, key=lambda each: (each.version, each.packed))))
        if address:
            yield several[address]


def _backend(mesh: Mesh, pod: Pod | None, address: IPAddress, number: int, node_name: str, zone: str) -> Backend:
    node = mesh.node(node_name)
    return Backend(address, number, frozenset(pod.meta.labels) if pod else frozenset(), node.region if node else "",
                   node.zone if node else zone)


def _first(service: Service, addresses: tuple[IPAddress, ...]) -> IPAddress | None:
    """The one of the service's first family that is there."""
    if not service.families:
        return addresses[0] if addresses else None
    return next((address for family in service.families for address in addresses if address.version == family), None)
