"""Kubernetes objects as far as the mesh needs them. Frozen; made by `sources`, which has checked every value."""
from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from ipaddress import IPv4Address, IPv6Address

from controlplane.model.problems import ObjectKey, Place

CLUSTER = "Kubernetes"  # Istio's default cluster id; part of every workload's uid
CLUSTER_DOMAIN = "cluster.local"

IPAddress = IPv4Address | IPv6Address
Labels = tuple[tuple[str, str], ...]  # sorted


class Protocol(StrEnum):
    """What a service port is declared to carry. AUTO: nothing is declared, so the first bytes decide."""

    AUTO = "auto"
    TCP = "tcp"
    HTTP = "http"  # HTTP/1.x
    HTTP2 = "http2"
    GRPC = "grpc"
    TLS = "tls"


@dataclass(frozen=True, slots=True)
class Metadata:
    """`created` is metadata.creationTimestamp as it stands there (RFC 3339 in UTC sorts as text), `uid` the API server's; may be empty."""

    key: ObjectKey
    place: Place
    created: str
    labels: Labels
    uid: str = ""

    @property
    def age(self) -> tuple[str, str, str]:
        """Sorts the oldest first; those without a timestamp come after those with one, by namespace and name."""
        return self.created or "~", self.key.namespace, self.key.name


@dataclass(frozen=True, slots=True)
class Namespace:
    meta: Metadata


@dataclass(frozen=True, slots=True)
class ServiceAccount:
    meta: Metadata


@dataclass(frozen=True, slots=True)
class Node:
    meta: Metadata
    region: str
    zone: str


@dataclass(frozen=True, slots=True)
class ServicePort:
    """A TCP port. `target` is a number, or the name of a container's port."""

    name: str
    port: int
    target: int | str
    protocol: Protocol
    place: Place


@dataclass(frozen=True, slots=True)
class Service:
    """A service that the mesh carries: not ExternalName, TCP ports only. Headless: no addresses."""

    meta: Metadata
    selector: Labels  # empty: nothing is selected
    addresses: tuple[IPAddress, ...]
    ports: tuple[ServicePort, ...]
    families: tuple[int, ...]  # 4, 6; empty when not said
    publish_not_ready: bool

    @property
    def hostname(self) -> str:
        return hostname_of(self.meta.key.namespace, self.meta.key.name)

    @property
    def address_name(self) -> str:
        """The name of its `istio.workload.Address`."""
        return f"{self.meta.key.namespace}/{self.hostname}"

    def port(self, number: int) -> ServicePort | None:
        return next((port for port in self.ports if port.port == number), None)


class WorkloadType(StrEnum):
    DEPLOYMENT = "deployment"
    CRONJOB = "cronjob"
    POD = "pod"
    JOB = "job"


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod with what its status says. One without an address, or that has ended, is not `alive` and is not published; one
    without an address may still run in a moment, and needs its certificate then."""

    meta: Metadata
    node: str
    service_account: str
    addresses: tuple[IPAddress, ...]
    alive: bool
    ended: bool
    ready: bool
    host_network: bool
    ports: tuple[tuple[str, int], ...]  # named TCP ports of its containers
    owner: tuple[str, str]  # kind and name of the controller; ("", "") without one
    redirected: bool = False  # its node's agent has captured it, so tunnels end there

    @property
    def uid(self) -> str:
        return f"{CLUSTER}//Pod/{self.meta.key.namespace}/{self.meta.key.name}"


def hostname_of(namespace: str, name: str) -> str:
    return f"{name}.{namespace}.svc.{CLUSTER_DOMAIN}"


def full_host(host: str, namespace: str) -> str:
    """The full name of a host as a resource in `namespace` means it: a name without a dot is a service there; names with
    dots stand for themselves (Istio's rule: `reviews.other` is not completed)."""
    return hostname_of(namespace, host) if "." not in host else host
