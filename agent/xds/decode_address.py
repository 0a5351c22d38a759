"""`istio.workload.Address` -> Workload or Service. Lenient where a newer control plane may know more than we do:

an unknown enum value must not drop a workload (mesh-facts 8.3). Strict where traffic would go to the wrong place.
"""
from __future__ import annotations

from typing import Any

from agent.model.workload import IPAddress, Protocol, Service, ServicePort, Tunnel, Workload, WorkloadPort, address_of
from agent.xds.strict import Refused

DEFAULT_TRUST_DOMAIN = "cluster.local"  # Istio's, when a workload names none
DEFAULT_ACCOUNT = "default"
HOST_NETWORK = 1  # NetworkMode: its address is the node's, so it must never be looked up by address
UNHEALTHY = 1  # WorkloadStatus
LEGACY_MTLS = 2  # TunnelProtocol
TYPES = {0: "deployment", 1: "cronjob", 2: "pod", 3: "job"}  # WorkloadType; labels as in Istio's metrics
PROTOCOLS = {0: Protocol.AUTO, 1: Protocol.HTTP, 2: Protocol.HTTP2, 3: Protocol.GRPC, 4: Protocol.TCP, 5: Protocol.TLS}
NAME_BOUND = 1024  # characters of a uid or key


def decode_address(name: str, message: Any) -> Workload | Service:
    """`message` is an istio.workload.Address that came under `name`. Raises Refused with a reason for an operator."""
    which = message.WhichOneof("type")
    if which == "workload":
        workload = _workload(message.workload)
        _same(name, workload.uid, "uid")
        return workload
    if which == "service":
        service = _service(message.service)
        _same(name, service.key, "namespace/hostname")
        return service
    raise Refused("it holds neither a workload nor a service")


def _workload(one: Any) -> Workload:
    if not one.uid:
        raise Refused("a workload without uid")
    addresses = () if one.network_mode == HOST_NETWORK else _addresses(one.addresses)
    ports = tuple(
        WorkloadPort(service, _port(port.service_port, service), _port(port.target_port, service),
                     PROTOCOLS.get(port.app_protocol, Protocol.AUTO))
        for service in sorted(one.services)
        for port in one.services[service].ports
        if port.target_port  # 0: this workload has no such named port, so it does not serve it
    )
    return Workload(
        uid=one.uid,
        name=one.name,
        namespace=one.namespace,
        addresses=addresses,
        node=one.node,
        service_account=one.service_account or DEFAULT_ACCOUNT,
        trust_domain=one.trust_domain or DEFAULT_TRUST_DOMAIN,
        workload_name=one.workload_name,
        workload_type=TYPES.get(one.workload_type, "unknown"),
        canonical_name=one.canonical_name,
        canonical_revision=one.canonical_revision,
        cluster_id=one.cluster_id,
        healthy=one.status != UNHEALTHY,
        ports=ports,
        region=one.locality.region,
        zone=one.locality.zone,
        tunnel=_tunnel(one.tunnel_protocol),
        policies=tuple(one.authorization_policies),
    )


def _tunnel(number: int) -> Tunnel:
    """A sidecar's own mTLS (2) is reached in plain text, as ztunnel does. A protocol that we do not know is taken for HBONE: that
    fails, where leaving the tunnel or the workload out would send plain text."""
    return Tunnel.NONE if number in (Tunnel.NONE, LEGACY_MTLS) else Tunnel.HBONE


def _service(one: Any) -> Service:
    if not one.hostname:
        raise Refused("a service without hostname")
    if one.HasField("waypoint"):
        raise Refused("it is to be reached through a waypoint, which this version does not do; "
                      "take the label istio.io/use-waypoint off the service")
    virtual = []
    for network_address in one.addresses:
        address = _address(network_address.address)
        if network_address.HasField("length") and network_address.length != 8 * len(network_address.address):
            raise Refused(f"its virtual address {address}/{network_address.length} is a range, which is not supported")
        if address not in virtual:
            virtual.append(address)
    ports: dict[int, ServicePort] = {}
    for port in one.ports:
        number = _port(port.service_port, one.hostname)
        target = _port(port.target_port, one.hostname) if port.target_port else 0
        ports[number] = ServicePort(number, target, PROTOCOLS.get(port.app_protocol, Protocol.AUTO))
    return Service(one.namespace, one.hostname, one.name, tuple(virtual), tuple(ports.values()))


def _addresses(raw: Any) -> tuple[IPAddress, ...]:
    return tuple(dict.fromkeys(_address(one) for one in raw))


def _address(raw: bytes) -> IPAddress:
    if len(raw) not in (4, 16):
        raise Refused(f"an address of {len(raw)} bytes; IPv4 has 4, IPv6 16")
    return address_of(raw)


def _port(number: int, whose: str) -> int:
    if not 0 < number < 65536:
        raise Refused(f"port {number} of {whose} is not between 1 and 65535")
    return number


def _same(name: str, key: str, what: str) -> None:
    if len(key) > NAME_BOUND:
        raise Refused(f"its {what} has {len(key)} characters, at most {NAME_BOUND}")
    if name != key:
        raise Refused(f"it came under this name but its {what} is {key!r}")
