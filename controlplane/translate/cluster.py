"""Clusters and their endpoints: `outbound|port|subset|host`."""
from __future__ import annotations

from google.protobuf.duration_pb2 import Duration

from controlplane.model.mesh import Mesh
from controlplane.model.objects import IPAddress, Service
from controlplane.model.routing import Balancer, DestinationRule, Subset
from controlplane.translate.backends import backends
from controlplane.translate.listener import ADS
from controlplane.translate.names import TypeUrl, Wanted
from protos.gen.envoy.config.cluster.v3 import cluster_pb2
from protos.gen.envoy.config.core.v3 import core_pb2
from protos.gen.envoy.config.endpoint.v3 import endpoint_pb2

BALANCERS = {Balancer.LEAST_REQUEST: cluster_pb2.Cluster.LEAST_REQUEST, Balancer.ROUND_ROBIN: cluster_pb2.Cluster.ROUND_ROBIN,
             Balancer.RANDOM: cluster_pb2.Cluster.RANDOM}
CONNECT_TIMEOUT_MS = 10_000  # Istio's default


def _found(mesh: Mesh, wanted: Wanted) -> tuple[Service, DestinationRule | None, Subset | None] | None:
    """What a cluster stands for; None: the service, its port or the subset does not exist."""
    service = mesh.service(wanted.host)
    if service is None or service.port(wanted.port) is None:
        return None
    rule = mesh.destination_rule(wanted.host, wanted.scope)
    subset = rule.subset(wanted.subset) if rule and wanted.subset else None
    return None if wanted.subset and subset is None else (service, rule, subset)


def cluster(mesh: Mesh, wanted: Wanted) -> cluster_pb2.Cluster | None:
    found = _found(mesh, wanted)
    if found is None:
        return None
    service, rule, subset = found
    policies = [one.policy for one in (subset, rule) if one is not None]  # the nearest first
    balancer = next((one.balancer for one in policies if one.balancer), Balancer.LEAST_REQUEST)
    timeout = next((one.connect_timeout_ms for one in policies if one.connect_timeout_ms), CONNECT_TIMEOUT_MS)
    result = cluster_pb2.Cluster(
        name=wanted.named(TypeUrl.CLUSTER),
        type=cluster_pb2.Cluster.EDS,
        eds_cluster_config=cluster_pb2.Cluster.EdsClusterConfig(eds_config=ADS, service_name=wanted.named(TypeUrl.ENDPOINTS)),
        connect_timeout=Duration(seconds=timeout // 1000, nanos=timeout % 1000 * 1_000_000),
        lb_policy=BALANCERS[balancer],
    )
    result.metadata.filter_metadata["istio"].update({"services": [
        {"host": service.hostname, "name": service.meta.key.name, "namespace": service.meta.key.namespace}]})
    return result


def endpoints(mesh: Mesh, wanted: Wanted) -> endpoint_pb2.ClusterLoadAssignment | None:
    """Who is behind the service and of the subset, by locality. Nobody is an empty list, no service is None."""
    found = _found(mesh, wanted)
    if found is None:
        return None
    service, _, subset = found
    port = service.port(wanted.port)
    assert port is not None
    result = endpoint_pb2.ClusterLoadAssignment(cluster_name=wanted.named(TypeUrl.ENDPOINTS))
    groups: dict[tuple[str, str], list[tuple[IPAddress, int]]] = {}
    needed = set(subset.labels) if subset else set()
    for one in backends(mesh, service, port):
        if needed <= one.labels:
            groups.setdefault((one.region, one.zone), []).append((one.address, one.port))
    for (region, zone), members in sorted(groups.items()):
        locality = result.endpoints.add(locality=core_pb2.Locality(region=region, zone=zone))
        locality.load_balancing_weight.value = len(members)
        for address, number in sorted(set(members), key=lambda one: (one[0].version, one[0].packed, one[1])):
            socket = core_pb2.SocketAddress(address=str(address), port_value=number)
            locality.lb_endpoints.add(endpoint=endpoint_pb2.Endpoint(address=core_pb2.Address(socket_address=socket)),
                                      health_status=core_pb2.HEALTHY)
    return result
