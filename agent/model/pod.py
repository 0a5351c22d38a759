"""A pod on this node, as the container runtime and its annotations describe it."""
from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network

from agent.model.workload import IPAddress

Network = IPv4Network | IPv6Network


@dataclass(frozen=True, slots=True)
class CaptureSettings:
    """What the annotations of a captured pod ask of capture; ports are TCP, lists are sorted."""

    exclude_outbound_ports: tuple[int, ...] = ()
    exclude_inbound_ports: tuple[int, ...] = ()
    exclude_outbound_ranges: tuple[Network, ...] = ()
    include_outbound_ranges: tuple[Network, ...] | None = None  # None: all (`*`); (): none
    dns: bool | None = None  # port 53 goes to the DNS proxy; None: as the node does


@dataclass(frozen=True, slots=True)
class LocalPod:
    """One pod of this node. `uid` is the runtime's and changes when the pod is made again under the same name."""

    uid: str
    namespace: str
    name: str
    service_account: str
    addresses: tuple[IPAddress, ...]
    netns: str  # path to open(2) and setns(2); "" while `waits` or `ended` says why
    cgroup: str  # path of its cgroup v2 directory, or ""
    host_network: bool
    labels: dict[str, str] = field(default_factory=dict)
    annotations: dict[str, str] = field(default_factory=dict)
    namespace_labels: dict[str, str] = field(default_factory=dict)
    namespace_annotations: dict[str, str] = field(default_factory=dict)
    sidecar: bool = False  # it has a proxy of its own
    waits: str = ""  # why its network is not known: nothing of it changes meanwhile
    ended: str = ""  # its processes have ended and do not come back: nothing of ours is kept in it
    hold: object = field(default=None, compare=False, repr=False)  # what `netns` leads to stays while this does

    @property
    def ref(self) -> str:
        """`namespace/name`, as operators write it."""
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class Enrolment:
    """The decision on one pod. `settings` is None when it is not to be captured, and `reason` says why.

    `refused` holds what was malformed (pod, annotation, value, what is expected): nothing of such a pod changes.
    `method` is what the pod wishes to be captured by: ebpf, iptables, or auto, which leaves it to the node. `doubts` is what was malformed
    and passed over.
    """

    settings: CaptureSettings | None
    reason: str
    refused: tuple[str, ...] = ()
    method: str = "auto"
    doubts: tuple[str, ...] = ()
