"""What the lab is asked to run, parsed: frozen types that nobody parses again."""
from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

# The capabilities that container runtimes give by default (Docker, containerd), by their numbers in linux/capability.h.
DEFAULT_CAPABILITIES: dict[str, int] = {
    "CHOWN": 0, "DAC_OVERRIDE": 1, "FOWNER": 3, "FSETID": 4, "KILL": 5, "SETGID": 6, "SETUID": 7, "SETPCAP": 8,
    "NET_BIND_SERVICE": 10, "NET_RAW": 13, "SYS_CHROOT": 18, "MKNOD": 27, "AUDIT_WRITE": 29, "SETFCAP": 31,
}


class ProbeKind(StrEnum):
    HTTP = "httpGet"
    TCP = "tcpSocket"
    EXEC = "exec"


@dataclass(frozen=True, slots=True)
class Probe:
    """A readiness probe; times in seconds, Kubernetes' defaults."""

    kind: ProbeKind
    port: int = 0
    path: str = "/"
    scheme: str = "HTTP"
    headers: tuple[tuple[str, str], ...] = ()
    command: tuple[str, ...] = ()
    initial_delay: float = 0
    period: float = 10
    timeout: float = 1
    success_threshold: int = 1
    failure_threshold: int = 3


@dataclass(frozen=True, slots=True)
class EnvVar:
    """A variable with a value, or with the path of a field of the pod (`status.podIP`)."""

    name: str
    value: str = ""
    field_path: str = ""


@dataclass(frozen=True, slots=True)
class Container:
    name: str
    argv: tuple[str, ...]  # command and args, $(VAR) not expanded yet
    env: tuple[EnvVar, ...]
    working_dir: str  # as written; relative or empty: below PodTemplate.folder
    uid: int | None
    gid: int | None
    capabilities: tuple[int, ...]
    ports: tuple[tuple[str, int, str], ...]  # name, number, protocol
    readiness: Probe | None


@dataclass(frozen=True, slots=True)
class PodTemplate:
    """What Pod and a Deployment's template have in common."""

    labels: dict[str, str]
    annotations: dict[str, str]
    node_name: str
    service_account: str
    containers: tuple[Container, ...]
    hostname: str = ""
    subdomain: str = ""
    folder: str = "/"  # of the manifest that defined it first

    def directory(self, container: Container) -> str:
        """Where a container's process starts, absolute."""
        return os.path.normpath(os.path.join(self.folder, container.working_dir))

    def hash(self) -> str:
        """Ten letters that change when anything of the template changes; in pods' names as in Kubernetes."""
        digest = hashlib.sha256(repr(self).encode()).digest()
        return _letters(digest[:10])


@dataclass(frozen=True, slots=True)
class Namespace:
    name: str
    labels: dict[str, str] = field(default_factory=dict)
    annotations: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ServiceAccount:
    namespace: str
    name: str


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod that is asked for by itself; pods of a Deployment get theirs from the template."""

    namespace: str
    name: str
    template: PodTemplate


@dataclass(frozen=True, slots=True)
class Deployment:
    namespace: str
    name: str
    replicas: int
    selector: dict[str, str]
    template: PodTemplate


@dataclass(frozen=True, slots=True)
class ServicePort:
    """`target` is a number, or the name of a container's port."""

    name: str
    port: int
    target: int | str
    protocol: str  # TCP or UDP
    app_protocol: str


@dataclass(frozen=True, slots=True)
class Service:
    """`cluster_ip`: an address, "" to have one given, "None" when headless."""

    namespace: str
    name: str
    selector: dict[str, str]
    ports: tuple[ServicePort, ...]
    cluster_ip: str = ""
    families: tuple[int, ...] = (4,)
    publish_not_ready: bool = False
    labels: dict[str, str] = field(default_factory=dict)
    annotations: dict[str, str] = field(default_factory=dict)

    @property
    def headless(self) -> bool:
        return self.cluster_ip == "None"

    @property
    def hostname(self) -> str:
        return f"{self.name}.{self.namespace}.svc.cluster.local"


@dataclass(frozen=True, slots=True)
class MeshObject:
    """A resource that only the control plane reads; the lab hands it over as it is."""

    kind: str
    namespace: str
    name: str
    body: dict[str, Any]


Object = Namespace | ServiceAccount | Pod | Deployment | Service | MeshObject
Key = tuple[str, str, str]  # kind, namespace, name


def key_of(thing: Object) -> Key:
    match thing:
        case Namespace():
            return "Namespace", "", thing.name
        case MeshObject():
            return thing.kind, thing.namespace, thing.name
        case _:
            return type(thing).__name__, thing.namespace, thing.name


def same_workload(one: PodTemplate, other: PodTemplate) -> bool:
    """Whether the running processes may stay: only labels and annotations differ."""
    return replace(one, labels={}, annotations={}) == replace(other, labels={}, annotations={})


def _letters(digest: bytes) -> str:
    alphabet = "bcdfghjklmnpqrstvwxz2456789"  # Kubernetes': no vowels, so no words
    return "".join(alphabet[byte % len(alphabet)] for byte in digest)


def dump(body: object) -> str:
    """JSON, which is YAML: what the lab writes for the agents and the control plane to read."""
    return json.dumps(body, indent=1, sort_keys=True) + "\n"
