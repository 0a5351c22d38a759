"""Cluster IPs without the mesh: which address a service has, which pods answer for it, and the rules that say so.

The part of kube-proxy that a fair control pod needs. The rules are one table of nftables per node, replaced as a whole
in one transaction; connections that live stay where they are, for address translation is kept per connection.
"""
from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import ip_address

from agent import netlink
from agent.lab.place import SERVICE_RANGE_4, SERVICE_RANGE_6
from agent.lab.spec import Key, Service, ServicePort, key_of
from agent.model.workload import IPAddress

TABLE = "narrows-lab"


class ServiceError(ValueError):
    """A service cannot have the address that it asks for."""


@dataclass(frozen=True, slots=True)
class Backend:
    """What services need to know about a pod."""

    namespace: str
    name: str
    labels: Mapping[str, str]
    addresses: tuple[IPAddress, ...]
    ports: Mapping[str, int]  # named ports of its containers
    ready: bool
    hostname: str = ""
    subdomain: str = ""


class ClusterIPs:
    """Gives addresses to services: the same name gets the same address as long as no other took it first."""

    def __init__(self) -> None:
        self._of: dict[Key, tuple[IPAddress, ...]] = {}
        self._holder: dict[IPAddress, Key] = {}

    def assign(self, service: Service) -> tuple[IPAddress, ...]:
        """Addresses of a service, its first family first; () when headless. ServiceError if one is not to be had."""
        key = key_of(service)
        if service.headless:
            self.release(key)
            return ()
        have = {address.version: address for address in self._of.get(key, ())}
        chosen = []
        for index, family in enumerate(service.families):
            space = SERVICE_RANGE_4 if family == 4 else SERVICE_RANGE_6
            asked = ip_address(service.cluster_ip) if service.cluster_ip and index == 0 else None
            if asked is not None:
                if asked not in space:
                    raise ServiceError(f"clusterIP {asked} is not in the lab's range {space}; leave it out to get one")
                if (holder := self._holder.get(asked, key)) != key:
                    raise ServiceError(f"clusterIP {asked} belongs to service {'/'.join(holder[1:])} already")
                chosen.append(asked)
            elif family in have:
                chosen.append(have[family])
            else:
                chosen.append(self._free(service, family))
        found = tuple(chosen)
        if found != self._of.get(key):
            self.release(key)
            self._of[key] = found
            self._holder.update(dict.fromkeys(found, key))
        return found

    def holders(self) -> list[Key]:
        return list(self._of)

    def copy(self) -> ClusterIPs:
        """The same, to try something out."""
        other = ClusterIPs()
        other._of, other._holder = dict(self._of), dict(self._holder)
        return other

    def release(self, key: Key) -> None:
        for address in self._of.pop(key, ()):
            del self._holder[address]

    def _free(self, service: Service, family: int) -> IPAddress:
        space = SERVICE_RANGE_4 if family == 4 else SERVICE_RANGE_6
        size = space.num_addresses - 12  # the first ten are for addresses that a manifest asks for
        start = int.from_bytes(hashlib.sha256(service.hostname.encode()).digest()[:4], "big")
        for step in range(size):
            address = space[11 + (start + step) % size]
            if address not in self._holder:
                return address
        raise ServiceError(f"no free address in {space}")


def members(service: Service, pods: Iterable[Backend]) -> list[Backend]:
    """The pods that a service selects, ready or not, by name."""
    if not service.selector:
        return []
    wanted = service.selector.items()
    return sorted((pod for pod in pods if pod.namespace == service.namespace and pod.addresses and
                   all(pod.labels.get(key) == value for key, value in wanted)), key=lambda pod: pod.name)


def targets(port: ServicePort, pods: Iterable[Backend], family: int) -> list[tuple[IPAddress, int]]:
    """Addresses and ports where a service port is answered; a pod without the named port is left out."""
    found = []
    for pod in pods:
        number = port.target if isinstance(port.target, int) else pod.ports.get(port.target)
        found += [(address, number) for address in pod.addresses if address.version == family and number]
    return found


@dataclass(frozen=True, slots=True)
class Exposed:
    """A service with its addresses, and the pods that take its traffic now."""

    service: Service
    addresses: tuple[IPAddress, ...]
    members: tuple[Backend, ...]

    @property
    def serving(self) -> tuple[Backend, ...]:
        return tuple(pod for pod in self.members if pod.ready or self.service.publish_not_ready)


def ruleset(exposed: Iterable[Exposed]) -> str:
    """The table that `nft -f` takes, the same on every node. A port without an endpoint has no rule and is refused."""
    chains: list[str] = []
    jumps: dict[int, list[str]] = {4: [], 6: []}
    hairpins: dict[int, set[str]] = {4: set(), 6: set()}
    for item in exposed:
        for address in item.addresses:
            for port in item.service.ports:
                ends = targets(port, item.serving, address.version)
                if not ends:
                    continue
                chain = f"service-{len(chains)}"
                chains += [_chain(chain, item.service, port, address, ends)]
                jumps[address.version].append(f"{address} . {port.protocol.lower()} . {port.port} : goto {chain}")
                hairpins[address.version] |= {f"{end} . {end}" for end, _ in ends}
    lines = [f"add table inet {TABLE}", f"delete table inet {TABLE}", f"table inet {TABLE} {{"]
    for version, word, kind in ((4, "ip", "ipv4_addr"), (6, "ip6", "ipv6_addr")):
        elements = f"\n  elements = {{ {', '.join(sorted(hairpins[version]))} }}" if hairpins[version] else ""
        lines.append(f" set hairpin{version} {{\n  type {kind} . {kind}{elements}\n }}")
        del word
    lines += chains
    lines.append(" chain services {")
    for version, word in ((4, "ip"), (6, "ip6")):
        if jumps[version]:
            lines.append(f"  {word} daddr . meta l4proto . th dport vmap {{ {', '.join(jumps[version])} }}")
    lines += [
        " }",
        " chain prerouting {\n  type nat hook prerouting priority dstnat\n  jump services\n }",
        " chain output {\n  type nat hook output priority -100\n  jump services\n }",
        # a pod that reaches itself through its service would see its own address as the peer's
        " chain postrouting {\n  type nat hook postrouting priority srcnat\n"
        "  ip saddr . ip daddr @hairpin4 masquerade\n  ip6 saddr . ip6 daddr @hairpin6 masquerade\n }",
        f" chain refuse {{\n  ip daddr {SERVICE_RANGE_4} meta l4proto tcp reject with tcp reset\n"
        f"  ip daddr {SERVICE_RANGE_4} reject with icmp type port-unreachable\n"
        f"  ip6 daddr {SERVICE_RANGE_6} meta l4proto tcp reject with tcp reset\n"
        f"  ip6 daddr {SERVICE_RANGE_6} reject with icmpv6 type port-unreachable\n }}",
        " chain forward {\n  type filter hook forward priority filter\n  jump refuse\n }",
        " chain local {\n  type filter hook output priority filter\n  jump refuse\n }",
        "}",
    ]
    return "\n".join(lines) + "\n"


def _chain(name: str, service: Service, port: ServicePort, address: IPAddress,
           ends: list[tuple[IPAddress, int]]) -> str:
    family = "ip" if address.version == 4 else "ip6"
    choice = ", ".join(f"{index} : {end} . {number}" for index, (end, number) in enumerate(ends))
    proto = port.protocol.lower()
    return (f" chain {name} {{ # {service.hostname}:{port.port}\n"
            f"  meta l4proto {proto} dnat {family} to numgen random mod {len(ends)} map {{ {choice} }}\n }}")


def load(namespace: str, text: str) -> None:
    """Replace the table in a node's namespace. RuntimeError with what nft says if it refuses; nothing changed then."""
    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(["nft", "-f", "-"], input=text, capture_output=True, text=True, timeout=30, check=False)

    done = netlink.in_netns(namespace, run)
    if done.returncode != 0:
        raise RuntimeError(f"nft refused the cluster IPs in {namespace}: {done.stderr.strip()[:2000]}")


def names(exposed: Iterable[Exposed]) -> Iterator[tuple[str, tuple[IPAddress, ...]]]:
    """What DNS knows: each service, each pod of a headless one, and pods that have a hostname below it."""
    for item in exposed:
        service = item.service
        if service.headless:
            of = {pod.name: tuple(address for address in pod.addresses if address.version in service.families)
                  for pod in item.serving}
            yield service.hostname, tuple(address for addresses in of.values() for address in addresses)
            for pod in item.serving:
                if pod.hostname and pod.subdomain == service.name:
                    yield f"{pod.hostname}.{service.hostname}", of[pod.name]
        else:
            yield service.hostname, item.addresses
