"""Names, paths and addresses of a lab, all derived from its name: whoever knows the name can remove everything."""
from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from pathlib import Path

from agent.model.workload import IPAddress
from agent.netlink.cgroup import find_cgroup2

RUN = Path("/run/narrows/lab")
NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,38}[a-z0-9])?")  # no dot: `narrows.<lab>.` is then nobody else's prefix
MAX_NODES = 200  # third byte of a pod's address
PODS_PER_NODE = 250  # last byte, without the network, the node and the broadcast address

# Labs are isolated by their namespaces, so every lab uses the same ranges.
POD_RANGE_4, POD_RANGE_6 = ip_network("10.244.0.0/16"), ip_network("fd00:10:244::/48")
SERVICE_RANGE_4, SERVICE_RANGE_6 = ip_network("10.96.0.0/16"), ip_network("fd00:10:96::/112")
FABRIC_4, FABRIC_6 = ip_network("172.31.0.0/24"), ip_network("fd00:172:31::/64")
# Where readiness probes come from: Istio's address, which capture lets pass (mesh-facts 2.4).
PROBE_SOURCE_4, PROBE_SOURCE_6 = ip_address("169.254.7.127"), ip_address("fd16:9254:7127:1337:ffff:ffff:ffff:ffff")
BRIDGE = "pods"  # the bridge of a node
CLUSTER_DOMAIN = "cluster.local"


@dataclass(frozen=True, slots=True)
class Place:
    """Everything that a lab of this name owns on the machine."""

    name: str

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise ValueError(f"{self.name!r} cannot name a lab: 1 to 40 lower-case letters, digits and -")

    @property
    def directory(self) -> Path:
        return RUN / self.name

    @property
    def socket(self) -> Path:
        return self.directory / "lab.sock"

    @property
    def config(self) -> Path:
        return self.directory / "config"

    @property
    def xds(self) -> Path:
        return self.directory / "xds.sock"

    @property
    def control_plane(self) -> Path:
        return self.directory / "control-plane.sock"

    @property
    def authority(self) -> Path:
        """The folder of the control plane's certificate authority, with its audit log."""
        return self.directory / "ca"

    @property
    def tokens(self) -> Path:
        """Hashes of the nodes' tokens, for the control plane."""
        return self.directory / "node-tokens"

    @property
    def logs(self) -> Path:
        return self.directory / "logs"

    def node(self, node: str) -> Path:
        """The run directory of the node's agent and keeper."""
        return self.directory / "nodes" / node

    def token(self, node: str) -> Path:
        """With what the node's agent calls the control plane."""
        return self.node(node) / "ca-token"

    def pod(self, namespace: str, name: str) -> Path:
        return self.directory / "pods" / f"{namespace}.{name}"

    @property
    def lock(self) -> Path:
        """Held by the supervisor as long as it lives; beside the directory, since that comes and goes."""
        return RUN / f".{self.name}.lock"

    @property
    def cgroup(self) -> Path:
        return find_cgroup2() / "narrows.lab" / self.name

    def system_cgroup(self, process: str) -> Path:
        return self.cgroup / "system" / process

    def pod_cgroup(self, node: str, namespace: str, name: str) -> Path:
        return self.cgroup / "nodes" / node / f"{namespace}.{name}"

    @property
    def netns_prefix(self) -> str:
        return f"narrows.{self.name}."

    @property
    def fabric_netns(self) -> str:
        return f"{self.netns_prefix}fabric"

    def node_netns(self, node: str) -> str:
        return f"{self.netns_prefix}node.{node}"

    def pod_netns(self, namespace: str, name: str) -> str:
        full = f"{self.netns_prefix}pod.{namespace}.{name}"
        if len(full) <= 200:
            return full
        return f"{full[:180]}.{hashlib.sha256(full.encode()).hexdigest()[:16]}"


@dataclass(frozen=True, slots=True)
class NodeAddresses:
    """Addresses of the node with a number from 1 to MAX_NODES; IPv6 ones are not used where the kernel has none."""

    number: int

    @property
    def pods_4(self) -> IPv4Network:
        return IPv4Network(f"10.244.{self.number}.0/24")

    @property
    def pods_6(self) -> IPv6Network:
        return IPv6Network(f"fd00:10:244:{self.number:x}::/64")

    @property
    def gateway_4(self) -> IPAddress:
        return self.pods_4[1]

    @property
    def gateway_6(self) -> IPAddress:
        return self.pods_6[1]

    @property
    def fabric_4(self) -> IPAddress:
        return FABRIC_4[self.number]

    @property
    def fabric_6(self) -> IPAddress:
        return FABRIC_6[self.number]

    def pod(self, number: int, families: tuple[int, ...]) -> tuple[IPAddress, ...]:
        """Addresses of the node's pod with a number from 2 to PODS_PER_NODE + 1; the same number in both families."""
        return tuple(self.pods_4[number] if family == 4 else self.pods_6[number] for family in families)
