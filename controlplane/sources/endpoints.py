"""EndpointSlice (discovery.k8s.io, v1 and v1beta1) and Endpoints -> model.

Of the conditions `ready` alone decides, as in Istio without persistent sessions: unknown is ready, and one that ends (serving,
terminating) is ready only where the service publishes those that are not. FQDN slices say nothing here, as in Istio, nor do slices of no
service.
"""
from __future__ import annotations

from controlplane.model.endpoints import Endpoint, EndpointGroup, Endpoints
from controlplane.model.objects import CLUSTER, Metadata
from controlplane.model.problems import Severity
from controlplane.sources.fields import Fields
from controlplane.sources.kubernetes import addresses_of
from controlplane.sources.text import Map

SERVICE_LABEL = "kubernetes.io/service-name"
_ZONE, _HOST = "topology.kubernetes.io/zone", "kubernetes.io/hostname"


def endpoint_slice(top: Fields, meta: Metadata) -> Endpoints:
    kind = top.choice("addressType", ("IPv4", "IPv6", "FQDN"))
    service = dict(meta.labels).get(SERVICE_LABEL, "")
    children, ports = top.list_of_fields("endpoints"), top.list_of_fields("ports")
    if kind == "FQDN" or not service:
        return Endpoints(meta, "", ())
    found = []
    for one in children:
        conditions = one.fields("conditions")
        ready = conditions.flag("ready", True) if conditions else True
        node, zone = one.text("nodeName"), one.text("zone")
        topology = one.take("topology")  # v1beta1
        if isinstance(topology, Map):
            node, zone = node or str(topology.get(_HOST, "")), zone or str(topology.get(_ZONE, ""))
        one.ignore("hints", "hostname", "deprecatedTopology")
        addresses = addresses_of(one, "addresses", [text for text, _ in one.texts("addresses")])
        # several addresses are one and the same place (the API's own rule), and the first is enough; controllers write one
        found += [Endpoint(address, ready, _pod(one, meta), node, zone) for address in addresses[:1]]
        one.finish(severity=Severity.WARNING)
    return Endpoints(meta, service, (EndpointGroup(_ports(ports), tuple(found)),))


def endpoints(top: Fields, meta: Metadata) -> Endpoints:
    """They are called as their service. What is not ready is in a list of its own."""
    groups = []
    for subset in top.list_of_fields("subsets"):
        found = []
        for key, ready in (("addresses", True), ("notReadyAddresses", False)):
            for one in subset.list_of_fields(key):
                one.ignore("hostname")
                address, node = addresses_of(one, "ip", [one.text("ip", required=True)]), one.text("nodeName")
                found += [Endpoint(each, ready, _pod(one, meta), node, "") for each in address]
                one.finish(severity=Severity.WARNING)
        groups.append(EndpointGroup(_ports(subset.list_of_fields("ports")), tuple(found)))
    return Endpoints(meta, meta.key.name, tuple(groups))


def _ports(children: list[Fields]) -> tuple[tuple[str, int], ...]:
    """TCP ports. One without a number is all ports, of which no service can name one."""
    found = {}
    for one in children:
        number, transport, name = one.integer("port", 1, 65535), one.text("protocol", "TCP"), one.text("name")
        one.ignore("appProtocol")
        if number and transport == "TCP":
            found[name] = number
    return tuple(sorted(found.items()))


def _pod(one: Fields, meta: Metadata) -> str:
    """The uid of the pod that it is. A pod of another namespace is none: a slice speaks for its own namespace only."""
    target = one.fields("targetRef")
    if target is None:
        return ""
    kind, name, namespace = target.text("kind"), target.text("name"), target.text("namespace", meta.key.namespace)
    return f"{CLUSTER}//Pod/{namespace}/{name}" if kind == "Pod" and name and namespace == meta.key.namespace else ""
