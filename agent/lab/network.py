"""Namespaces, links, addresses and routes of the lab: a fabric joins the nodes, a bridge on each node its pods.

A pod's address has the full prefix length, so that its packets to a neighbour go through the node as well and the
node can undo the address translation of cluster IPs on the way back. Nothing is made in the host's own namespace.
All functions block; the supervisor calls them in threads.
"""
from __future__ import annotations

import hashlib
from collections.abc import Iterable

from agent import netlink
from agent.lab.place import (
    BRIDGE,
    PROBE_SOURCE_4,
    PROBE_SOURCE_6,
    SERVICE_RANGE_4,
    SERVICE_RANGE_6,
    NodeAddresses,
    Place,
)
from agent.model.workload import IPAddress

FABRIC_BRIDGE = "fabric"
MTU = 1500


def make_fabric(place: Place) -> None:
    namespace = netlink.create_namespace(place.fabric_netns)
    _quiet_bridge(namespace, FABRIC_BRIDGE)


def make_node(place: Place, node: str, number: int, families: tuple[int, ...]) -> str:
    """Make the node's namespace with its bridge and its place on the fabric. Returns the namespace's path."""
    own = NodeAddresses(number)
    fabric = str(netlink.NAMESPACES / place.fabric_netns)
    namespace = netlink.create_namespace(place.node_netns(node))
    netlink.write_sysctl(namespace, "net.ipv4.ip_forward", 1)
    for scope in ("all", "default"):
        netlink.write_sysctl(namespace, f"net.ipv4.conf.{scope}.rp_filter", 0)
        netlink.write_sysctl(namespace, f"net.ipv4.conf.{scope}.send_redirects", 0)  # neighbours talk through the node
    if 6 in families:
        netlink.write_sysctl(namespace, "net.ipv6.conf.all.forwarding", 1)
        netlink.write_sysctl(namespace, "net.ipv6.conf.default.accept_dad", 0)
    _quiet_bridge(namespace, BRIDGE)
    # A bridge takes the lowest address of its ports: unless it has one of its own, each new pod may change the gateway's.
    netlink.set_link(namespace, BRIDGE, mac=f"02:00:0a:f4:{number:02x}:01")
    netlink.add_veth(fabric, f"node{number}", "eth0", namespace)
    netlink.set_link(fabric, f"node{number}", master=FABRIC_BRIDGE, up=True)
    netlink.set_link(namespace, "eth0", up=True)
    netlink.add_address(namespace, BRIDGE, f"{own.gateway_4}/24")
    netlink.add_address(namespace, BRIDGE, f"{PROBE_SOURCE_4}/32")
    netlink.add_address(namespace, "eth0", f"{own.fabric_4}/24")
    # A cluster IP that no rule translates still needs a way out, on which it is refused.
    netlink.add_route(namespace, SERVICE_RANGE_4, link=BRIDGE)
    if 6 in families:
        netlink.add_address(namespace, BRIDGE, f"{own.gateway_6}/64")
        netlink.add_address(namespace, BRIDGE, f"{PROBE_SOURCE_6}/128")
        netlink.add_address(namespace, "eth0", f"{own.fabric_6}/64")
        netlink.add_route(namespace, SERVICE_RANGE_6, link=BRIDGE)
    return namespace


def join_nodes(place: Place, numbers: dict[str, int], families: tuple[int, ...], new: Iterable[str]) -> None:
    """Routes between each of the `new` nodes and every node, both ways."""
    fresh = set(new)
    for node, number in numbers.items():
        namespace = str(netlink.NAMESPACES / place.node_netns(node))
        for other, other_number in numbers.items():
            if other == node or not {node, other} & fresh:
                continue
            there = NodeAddresses(other_number)
            netlink.add_route(namespace, there.pods_4, gateway=there.fabric_4)
            if 6 in families:
                netlink.add_route(namespace, there.pods_6, gateway=there.fabric_6)
        del number


def make_pod(place: Place, node: str, number: int, *, namespace: str, name: str,
             addresses: tuple[IPAddress, ...]) -> str:
    """Make a pod's namespace, joined to the bridge of its node (which has that number). Returns its path."""
    gateways = NodeAddresses(number)
    node_namespace = str(netlink.NAMESPACES / place.node_netns(node))
    pod_namespace = netlink.create_namespace(place.pod_netns(namespace, name))
    # as containerd does: a process without NET_BIND_SERVICE may listen on port 80 of its own namespace
    netlink.write_sysctl(pod_namespace, "net.ipv4.ip_unprivileged_port_start", 0)
    port = port_of(namespace, name)
    if any(address.version == 6 for address in addresses):
        # IPv6 has no way to send no redirects: a pod that follows one talks past the node, which must undo cluster IPs
        for scope in ("all", "default"):
            netlink.write_sysctl(pod_namespace, f"net.ipv6.conf.{scope}.accept_redirects", 0)
    netlink.add_veth(node_namespace, port, "eth0", pod_namespace)
    netlink.set_link(node_namespace, port, master=BRIDGE, up=True)
    netlink.set_link(pod_namespace, "eth0", up=True)
    for address in addresses:
        gateway = gateways.gateway_4 if address.version == 4 else gateways.gateway_6
        bits = address.max_prefixlen
        netlink.add_address(pod_namespace, "eth0", f"{address}/{bits}")
        netlink.add_route(pod_namespace, f"{gateway}/{bits}", link="eth0")
        netlink.add_route(pod_namespace, "0.0.0.0/0" if bits == 32 else "::/0", gateway=gateway, link="eth0")
    return pod_namespace


def remove_pod(place: Place, node: str, namespace: str, name: str) -> None:
    """Remove a pod's link and namespace. Its processes must have ended."""
    node_namespace = netlink.NAMESPACES / place.node_netns(node)
    if node_namespace.exists():
        netlink.delete_link(str(node_namespace), port_of(namespace, name))
    netlink.delete_namespace(place.pod_netns(namespace, name))


def port_of(namespace: str, name: str) -> str:
    """The pod's port on the node's bridge: link names end at 15 bytes, pods' names at 253."""
    return "p" + hashlib.sha256(f"{namespace}/{name}".encode()).hexdigest()[:12]


def _quiet_bridge(namespace: str, name: str) -> None:
    netlink.add_bridge(namespace, name)
    for family in ("ip", "ip6"):
        try:  # neighbours on a bridge are no business of netfilter; the sysctl exists where br_netfilter is loaded
            netlink.write_sysctl(namespace, f"net.bridge.bridge-nf-call-{family}tables", 0)
        except netlink.NetlinkError as error:
            if error.errno is None or not isinstance(error.__cause__, FileNotFoundError):
                raise
