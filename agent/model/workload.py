"""Who is where: workloads and services, as `istio.workload.Address` tells them (WDS)."""
from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, StrEnum
from ipaddress import IPv4Address, IPv6Address, ip_address

IPAddress = IPv4Address | IPv6Address


def address_of(said: str | bytes) -> IPAddress:
    """An address as text or as its 4 or 16 bytes. An IPv4-mapped one (RFC 4291 2.5.5.2) is the IPv4 address: so packets have it, and so a
    worker looks it up. Raises ValueError."""
    address = ip_address(said)
    return address.ipv4_mapped or address if isinstance(address, IPv6Address) else address


class Protocol(StrEnum):
    """What a service port carries. AUTO: undeclared, so the first bytes decide (bounded sniffing)."""

    AUTO = "auto"
    TCP = "tcp"
    HTTP = "http"  # HTTP/1.x that the proxy parses
    HTTP2 = "http2"  # opaque TCP for now
    GRPC = "grpc"  # opaque TCP for now
    TLS = "tls"  # opaque TCP


@dataclass(frozen=True, slots=True)
class ServicePort:
    """A port of a service. `target_port` 0 means that each workload says its own (named target port)."""

    port: int
    target_port: int
    protocol: Protocol


@dataclass(frozen=True, slots=True)
class Service:
    """`istio.workload.Service`; its key in every table is `namespace/hostname`."""

    namespace: str
    hostname: str
    name: str
    addresses: tuple[IPAddress, ...]  # virtual addresses; empty when headless
    ports: tuple[ServicePort, ...]

    @property
    def key(self) -> str:
        return f"{self.namespace}/{self.hostname}"


@dataclass(frozen=True, slots=True)
class WorkloadPort:
    """One port on which a workload serves one service."""

    service: str  # Service.key
    service_port: int
    target_port: int
    protocol: Protocol


class Tunnel(IntEnum):
    """How a workload is reached (`istio.workload.TunnelProtocol`)."""

    NONE = 0
    HBONE = 1


@dataclass(frozen=True, slots=True)
class Workload:
    """`istio.workload.Workload`: one pod (or VM). Names and labels are those of mesh-facts 1.9 and 1.12."""

    uid: str  # `<cluster>//Pod/<namespace>/<name>`
    name: str
    namespace: str
    addresses: tuple[IPAddress, ...]
    node: str
    service_account: str
    trust_domain: str
    workload_name: str
    workload_type: str
    canonical_name: str
    canonical_revision: str
    cluster_id: str
    healthy: bool
    ports: tuple[WorkloadPort, ...]
    region: str = ""
    zone: str = ""
    tunnel: Tunnel = Tunnel.NONE
    policies: tuple[str, ...] = ()  # `namespace/name` of those that select it by labels

    @property
    def identity(self) -> str:
        """SPIFFE ID."""
        return spiffe(self.trust_domain, self.namespace, self.service_account)


def spiffe(trust_domain: str, namespace: str, service_account: str) -> str:
    """The identity of whoever runs under that service account."""
    return f"spiffe://{trust_domain}/ns/{namespace}/sa/{service_account}"
