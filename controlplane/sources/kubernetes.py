"""Kubernetes kinds -> model. Fields that Kubernetes has and the mesh does not need are ignored by name; one that this version
does not know is a warning only, since a cluster may be newer than we are."""
from __future__ import annotations

from ipaddress import IPv6Address, ip_address

from controlplane.model.objects import (
    IPAddress,
    Metadata,
    Namespace,
    Node,
    Pod,
    Service,
    ServiceAccount,
    ServicePort,
)
from controlplane.model.problems import Severity
from controlplane.sources.fields import Fields, describe
from controlplane.sources.protocols import declared
from controlplane.sources.text import Map

REDIRECTION = "ambient.istio.io/redirection"
_POD_SPEC = [
    "activeDeadlineSeconds", "affinity", "automountServiceAccountToken", "dnsConfig", "dnsPolicy", "enableServiceLinks",
    "ephemeralContainers", "hostAliases", "hostIPC", "hostPID", "hostUsers", "hostname", "hostnameOverride",
    "imagePullSecrets", "nodeSelector", "os", "overhead", "preemptionPolicy", "priority", "priorityClassName",
    "readinessGates", "resourceClaims", "resources", "restartPolicy", "runtimeClassName", "schedulerName",
    "schedulingGates", "securityContext", "serviceAccount", "setHostnameAsFQDN", "shareProcessNamespace", "subdomain",
    "terminationGracePeriodSeconds", "tolerations", "topologySpreadConstraints", "volumes", "workloadRef",
]
_SERVICE_SPEC = [
    "allocateLoadBalancerNodePorts", "externalTrafficPolicy", "healthCheckNodePort", "ipFamilyPolicy",
    "loadBalancerClass", "loadBalancerIP", "loadBalancerSourceRanges", "sessionAffinityConfig", "trafficDistribution",
]


def namespace(top: Fields, meta: Metadata) -> Namespace:
    top.ignore("spec", "status")
    return Namespace(meta)


def service_account(top: Fields, meta: Metadata) -> ServiceAccount:
    top.ignore("secrets", "imagePullSecrets", "automountServiceAccountToken")
    return ServiceAccount(meta)


def node(top: Fields, meta: Metadata) -> Node:
    top.ignore("spec", "status")
    labels = dict(meta.labels)
    return Node(meta, labels.get("topology.kubernetes.io/region", ""), labels.get("topology.kubernetes.io/zone", ""))


def service(top: Fields, meta: Metadata) -> Service | None:
    top.ignore("status")
    spec = top.fields("spec", required=True)
    if spec is None:
        return None
    kind = spec.choice("type", ("ClusterIP", "NodePort", "LoadBalancer", "ExternalName"), "ClusterIP")
    if kind == "ExternalName":
        spec.error("type", "ExternalName is not supported yet", "call the outer name itself; unknown destinations pass through")
    spec.ignore("externalName", *_SERVICE_SPEC)
    selector = spec.labels("selector")
    addresses = _cluster_addresses(spec)
    families = tuple(4 if text == "IPv4" else 6 for text, _ in spec.texts("ipFamilies") if text in ("IPv4", "IPv6"))
    if len(families) < len(spec.take("ipFamilies") or ()):
        spec.error("ipFamilies", "has an entry that is neither IPv4 nor IPv6")
    if spec.choice("sessionAffinity", ("None", "ClientIP"), "None") != "None":
        spec.warn("sessionAffinity", "is not honoured in the mesh; each connection is balanced anew")
    if spec.choice("internalTrafficPolicy", ("Cluster", "Local"), "Cluster") != "Cluster":
        spec.warn("internalTrafficPolicy", "is not honoured in the mesh; endpoints of every node are used")
    if spec.texts("externalIPs"):
        spec.warn("externalIPs", "are not addresses of the mesh; what is sent there passes through")
    ports = _service_ports(spec)
    publish_not_ready = spec.flag("publishNotReadyAddresses")
    spec.finish(severity=Severity.WARNING)
    return Service(meta, selector, addresses, ports, families, publish_not_ready)


def _cluster_addresses(spec: Fields) -> tuple[IPAddress, ...]:
    given = [text for text, _ in spec.texts("clusterIPs")]
    first = spec.text("clusterIP")
    if first and given and given[0] != first:
        spec.error("clusterIPs", f"begins with {given[0]}, clusterIP is {first}", "give both the same, or only one")
    texts = given or ([first] if first else [])
    if texts == ["None"]:
        return ()
    return addresses_of(spec, "clusterIPs" if given else "clusterIP", texts)


def _service_ports(spec: Fields) -> tuple[ServicePort, ...]:
    found: list[ServicePort] = []
    children = spec.list_of_fields("ports")
    for one in children:
        number = one.integer("port", 1, 65535, required=True)
        transport = one.choice("protocol", ("TCP", "UDP", "SCTP"), "TCP")
        name = one.name("name")
        one.ignore("nodePort")
        target = _target(one, number)
        protocol = declared(one, one.text("appProtocol"), name, number)
        if len(children) > 1 and not name:
            one.warn("name", "is missing; every port of a service with several needs one")
        one.finish(severity=Severity.WARNING)
        if not number or transport != "TCP":
            continue  # only TCP is captured
        if any(other.port == number for other in found):
            one.error("port", f"{number} is here twice")
            continue
        found.append(ServicePort(name, number, target, protocol, one.place("port")))
    return tuple(found)


def _target(one: Fields, default: int) -> int | str:
    value = one.take("targetPort")
    if value is None or value == 0:
        return default
    if isinstance(value, str) and value:
        return int(value) if value.isascii() and value.isdecimal() and 0 < int(value) < 65536 else value
    return one.integer("targetPort", 1, 65535, default)


def pod(top: Fields, meta: Metadata) -> Pod | None:
    spec = top.fields("spec", required=True)
    if spec is None:
        return None
    spec.ignore(*_POD_SPEC)
    ports: dict[str, int] = {}
    for list_name in ("containers", "initContainers"):
        for container in spec.list_of_fields(list_name):
            for port in container.list_of_fields("ports"):
                number = port.integer("containerPort", 1, 65535, required=True)
                transport, name = port.text("protocol", "TCP"), port.text("name")
                if name and number and transport == "TCP":
                    ports.setdefault(name, number)
    account, node_name = spec.name("serviceAccountName", "default"), spec.name("nodeName")
    host_network = spec.flag("hostNetwork")
    spec.finish(severity=Severity.WARNING)
    addresses, phase, ready = _status(top)
    ending = top.fields("metadata")
    going = ending is not None and "deletionTimestamp" in ending
    owner = _owner(ending) if ending is not None else ("", "")
    ended = phase in ("Succeeded", "Failed")
    return Pod(meta, node_name, account, addresses, bool(addresses) and not ended, ended,
               ready and not going, host_network, tuple(sorted(ports.items())), owner, _redirected(ending))


def _status(top: Fields) -> tuple[tuple[IPAddress, ...], str, bool]:
    status = top.fields("status")
    if status is None:
        return (), "", False
    texts = [one.text("ip", required=True) for one in status.list_of_fields("podIPs")]
    key = "podIPs" if texts else "podIP"
    if not texts and "podIP" in status:
        texts = [status.text("podIP")]
    ready = any(one.text("type") == "Ready" and one.text("status") == "True" for one in status.list_of_fields("conditions"))
    return addresses_of(status, key, texts), status.text("phase"), ready


def _redirected(metadata: Fields | None) -> bool:
    """What a node's agent says of a pod that it has captured (Istio's annotation)."""
    annotations = metadata.take("annotations") if metadata is not None else None
    return isinstance(annotations, Map) and annotations.get(REDIRECTION) == "enabled"


def _owner(metadata: Fields) -> tuple[str, str]:
    for one in metadata.list_of_fields("ownerReferences"):
        if one.flag("controller"):
            return one.text("kind", required=True), one.text("name", required=True)
    return "", ""


def addresses_of(holder: Fields, key: str, texts: list[str]) -> tuple[IPAddress, ...]:
    found: list[IPAddress] = []
    for text in texts:
        try:
            address = ip_address(text)
        except ValueError:
            holder.error(key, f"{describe(text)} is no IP address")
            continue
        if isinstance(address, IPv6Address) and address.ipv4_mapped:
            address = address.ipv4_mapped  # packets have that
        if address.is_unspecified or address.is_multicast or address.is_loopback:
            holder.error(key, f"{text} can be no address of a pod or service")
        elif address not in found:
            found.append(address)
    return tuple(found)
