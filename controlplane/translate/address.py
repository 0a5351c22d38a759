"""Pods and services -> istio.workload.Address: who is where. Field by field as istiod fills them for ztunnel."""
from __future__ import annotations

import re

from controlplane.model.mesh import Mesh
from controlplane.model.objects import CLUSTER, Pod, Protocol, Service, ServicePort, WorkloadType, hostname_of
from controlplane.model.security import Mode
from protos.gen.istio import workload_pb2 as wire

APP_PROTOCOLS = {Protocol.AUTO: wire.UNKNOWN, Protocol.HTTP: wire.HTTP11, Protocol.HTTP2: wire.HTTP2, Protocol.GRPC: wire.GRPC,
                 Protocol.TCP: wire.TCP, Protocol.TLS: wire.TLS}
TYPES = {WorkloadType.DEPLOYMENT: wire.DEPLOYMENT, WorkloadType.CRONJOB: wire.CRONJOB, WorkloadType.POD: wire.POD,
         WorkloadType.JOB: wire.JOB}
FAMILIES = {(4,): wire.IPV4_ONLY, (6,): wire.IPV6_ONLY, (4, 6): wire.DUAL, (6, 4): wire.DUAL}
HASH_LABEL = "pod-template-hash"
# a Job made by a CronJob is named <CronJob>-<minutes since 1970>
_CRON = re.compile(r"(.+)-[0-9]{8,10}\Z")


def service_address(service: Service) -> wire.Address:
    return wire.Address(service=wire.Service(
        name=service.meta.key.name,
        namespace=service.meta.key.namespace,
        hostname=service.hostname,
        addresses=[wire.NetworkAddress(address=address.packed) for address in service.addresses],
        ports=[wire.Port(service_port=port.port, target_port=port.target if isinstance(port.target, int) else 0,
                         app_protocol=APP_PROTOCOLS[port.protocol]) for port in service.ports],
        load_balancing=wire.LoadBalancing(health_policy=wire.LoadBalancing.ALLOW_ALL) if service.publish_not_ready else None,
        ip_families=FAMILIES.get(service.families, wire.AUTOMATIC),
        canonical=True,
    ))


def workload_address(pod: Pod, mesh: Mesh, trust_domain: str = "") -> wire.Address:
    key, labels = pod.meta.key, dict(pod.meta.labels)
    name, kind = owner(pod)
    node = mesh.node(pod.node)
    return wire.Address(workload=wire.Workload(
        uid=pod.uid,
        name=key.name,
        namespace=key.namespace,
        addresses=[address.packed for address in pod.addresses],
        trust_domain=trust_domain,
        tunnel_protocol=tunnel(pod, mesh),
        service_account=pod.service_account,
        node=pod.node,
        canonical_name=first(labels, "service.istio.io/canonical-name", "app.kubernetes.io/name", "app") or name,
        canonical_revision=first(labels, "service.istio.io/canonical-revision", "app.kubernetes.io/version",
                                 "version") or "latest",
        workload_type=TYPES[kind],
        workload_name=name,
        authorization_policies=mesh.policies.of(pod),
        cluster_id=CLUSTER,
        status=wire.HEALTHY if pod.ready else wire.UNHEALTHY,
        services={service.address_name: port_list(service, pod, mesh) for service in mesh.services_of(pod)},
        locality=wire.Locality(region=node.region, zone=node.zone) if node and (node.region or node.zone) else None,
        network_mode=wire.HOST_NETWORK if pod.host_network else wire.STANDARD,
    ))


def tunnel(pod: Pod, mesh: Mesh) -> wire.TunnelProtocol:
    """HBONE where somebody takes tunnels, and nobody said that there shall be none."""
    return wire.HBONE if pod.redirected and mesh.policies.strictness(pod).mode is not Mode.DISABLE else wire.NONE


def outsider_address(uid: str, mesh: Mesh, trust_domain: str = "") -> wire.Address | None:
    """An endpoint that is no pod, as istiod tells it: others may have its address too, so nobody looks it up by that (HOST_NETWORK), and
    nobody is known to run there. None: no service has it."""
    for one in mesh.behind.holding(uid):
        service = mesh.service(hostname_of(one.meta.key.namespace, one.service))
        if service is None or one not in mesh.slices(service):
            continue
        found = one.of(uid)
        return wire.Address(workload=wire.Workload(
            uid=uid,
            name=one.meta.key.name,
            namespace=one.meta.key.namespace,
            addresses=[found[0][1].address.packed],
            trust_domain=trust_domain,
            workload_type=wire.POD,
            workload_name=one.meta.key.name,
            cluster_id=CLUSTER,
            status=wire.HEALTHY if any(each.ready for _, each in found) else wire.UNHEALTHY,
            services={service.address_name: _ports_of(service, [dict(group.ports) for group, _ in found])},
            network_mode=wire.HOST_NETWORK,
        ))
    return None


def port_list(service: Service, pod: Pod, mesh: Mesh) -> wire.PortList:
    """The ports of the service that this pod serves."""
    if slices := mesh.slices(service):
        return _ports_of(service, [dict(group.ports) for one in mesh.behind.holding(pod.uid) if one in slices
                                   for group, _ in one.of(pod.uid)])
    return wire.PortList(ports=[
        wire.Port(service_port=port.port, target_port=number, app_protocol=APP_PROTOCOLS[port.protocol])
        for port in service.ports if (number := target_port(port, pod))])


def _ports_of(service: Service, groups: list[dict[str, int]]) -> wire.PortList:
    return wire.PortList(ports=[
        wire.Port(service_port=port.port, target_port=number, app_protocol=APP_PROTOCOLS[port.protocol])
        for port in service.ports if (number := next((group[port.name] for group in groups if port.name in group), 0))])


def target_port(port: ServicePort, pod: Pod) -> int:
    """The pod's port that a service port leads to; 0 when its name is none of the pod's ports."""
    return port.target if isinstance(port.target, int) else dict(pod.ports).get(port.target, 0)


def owner(pod: Pod) -> tuple[str, WorkloadType]:
    """The workload that a person wrote: a ReplicaSet stands for its Deployment, a Job for its CronJob."""
    kind, name = pod.owner
    if kind == "ReplicaSet":
        template = dict(pod.meta.labels).get(HASH_LABEL)
        if template and name.endswith(f"-{template}"):
            return name[:-len(template) - 1], WorkloadType.DEPLOYMENT
        return name, WorkloadType.POD
    if kind == "Job":
        cron = _CRON.match(name)
        return (cron[1], WorkloadType.CRONJOB) if cron else (name, WorkloadType.JOB)
    if kind:
        return name, WorkloadType.DEPLOYMENT if kind == "Deployment" else WorkloadType.POD
    before, mark, _ = pod.meta.key.name.partition(f"-{dict(pod.meta.labels).get(HASH_LABEL, '')}-")
    return (before, WorkloadType.DEPLOYMENT) if mark != "--" and mark else (pod.meta.key.name, WorkloadType.POD)


def first(labels: dict[str, str], *names: str) -> str:
    return next((labels[name] for name in names if labels.get(name)), "")
