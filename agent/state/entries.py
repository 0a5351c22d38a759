"""What a commit to the keeper consists of, before it is encoded: one entry, one blob."""
from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from agent.model.identity import Certificate, Trust
from agent.model.policy import Policy
from agent.model.routing import Cluster, Destination
from agent.model.settings import ProxySettings
from agent.model.workload import IPAddress, Service, Workload


class Table(IntEnum):
    """The kinds of blobs; the numbers are those of ARCHITECTURE.md (twin: agent/dataplane/blobs.py)."""

    SETTINGS = 1
    WORKLOAD = 2
    SERVICE = 3
    DESTINATION = 4
    CLUSTER = 5
    POD = 6
    TRUST = 8
    CERTIFICATE = 9
    POLICY = 7
    RESOURCE = 128
    NOTE = 129


Key = tuple[Table, str]


@dataclass(frozen=True, slots=True)
class PutSettings:
    settings: ProxySettings

    @property
    def key(self) -> Key:
        return Table.SETTINGS, ""


@dataclass(frozen=True, slots=True)
class PutWorkload:
    index: int
    workload: Workload

    @property
    def key(self) -> Key:
        return Table.WORKLOAD, self.workload.uid


@dataclass(frozen=True, slots=True)
class PutService:
    index: int
    service: Service

    @property
    def key(self) -> Key:
        return Table.SERVICE, self.service.key


@dataclass(frozen=True, slots=True)
class PutDestination:
    destination: Destination

    @property
    def key(self) -> Key:
        return Table.DESTINATION, self.destination.key


@dataclass(frozen=True, slots=True)
class PutCluster:
    cluster: Cluster

    @property
    def key(self) -> Key:
        return Table.CLUSTER, self.cluster.key


@dataclass(frozen=True, slots=True)
class PutPod:
    """A captured pod: `handle` is its number between agent, keeper and workers."""

    uid: str
    handle: int
    workload: str  # Workload.uid
    scope: str  # `ns=<namespace>`
    addresses: tuple[IPAddress, ...]
    identity: str = ""  # SPIFFE ID
    excluded: tuple[int, ...] | None = None  # ports not captured inbound; None: it is not connected to directly

    @property
    def key(self) -> Key:
        return Table.POD, self.uid


@dataclass(frozen=True, slots=True)
class PutTrust:
    trust: Trust

    @property
    def key(self) -> Key:
        return Table.TRUST, self.trust.trust_domain


@dataclass(frozen=True, slots=True)
class PutCertificate:
    certificate: Certificate

    @property
    def key(self) -> Key:
        return Table.CERTIFICATE, self.certificate.identity


@dataclass(frozen=True, slots=True)
class PutPolicy:
    """A policy that a pod here can be subject to."""

    policy: Policy

    @property
    def key(self) -> Key:
        return Table.POLICY, self.policy.key


@dataclass(frozen=True, slots=True)
class PutResource:
    """A resource as the control plane sent it, for the next agent."""

    type_url: str
    name: str
    version: str
    body: bytes

    @property
    def key(self) -> Key:
        return resource_key(self.type_url, self.name)


@dataclass(frozen=True, slots=True)
class PutNote:
    """What the agent must remember over its own death; JSON."""

    name: str
    body: bytes

    @property
    def key(self) -> Key:
        return Table.NOTE, self.name


@dataclass(frozen=True, slots=True)
class Drop:
    key: Key


Put = (PutSettings | PutWorkload | PutService | PutDestination | PutCluster | PutPod | PutPolicy | PutTrust | PutCertificate
       | PutResource | PutNote)
Entry = Put | Drop


def resource_key(type_url: str, name: str) -> Key:
    return Table.RESOURCE, f"{type_url}\n{name}"
