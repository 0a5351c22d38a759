"""Where the session's values meet protobuf: requests out, responses in, and the message classes by name."""
from __future__ import annotations

from typing import Any

from agent.xds.session import Request, Resource, Response
from protos.gen.envoy.config.cluster.v3 import cluster_pb2
from protos.gen.envoy.config.endpoint.v3 import endpoint_pb2
from protos.gen.envoy.config.listener.v3 import listener_pb2
from protos.gen.envoy.config.route.v3 import route_pb2
from protos.gen.envoy.extensions.filters.network.http_connection_manager.v3 import http_connection_manager_pb2
from protos.gen.envoy.extensions.filters.network.tcp_proxy.v3 import tcp_proxy_pb2
from protos.gen.envoy.service.discovery.v3 import discovery_pb2
from protos.gen.istio import security_pb2, workload_pb2

INVALID_ARGUMENT = 3  # google.rpc.Code of a NACK

_CLASSES: dict[str, Any] = {one.DESCRIPTOR.full_name: one for one in (
    workload_pb2.Address,
    security_pb2.Authorization,
    listener_pb2.Listener,
    route_pb2.RouteConfiguration,
    cluster_pb2.Cluster,
    endpoint_pb2.ClusterLoadAssignment,
    http_connection_manager_pb2.HttpConnectionManager,
    tcp_proxy_pb2.TcpProxy,
)}

from_wire = discovery_pb2.DeltaDiscoveryResponse.FromString


def to_wire(message: Any) -> bytes:
    data: bytes = message.SerializeToString()
    return data


def message_class(full_name: str) -> Any:
    """The class of a message that the decoder reads. Raises KeyError for any other."""
    return _CLASSES[full_name]


def request(one: Request, node: tuple[str, dict[str, str]] | None = None) -> Any:
    """A DeltaDiscoveryRequest. `node` (id and metadata) stands on the first request of a stream."""
    message = discovery_pb2.DeltaDiscoveryRequest(
        type_url=one.type_url,
        resource_names_subscribe=one.subscribe,
        resource_names_unsubscribe=one.unsubscribe,
        initial_resource_versions=dict(one.initial_versions),
        response_nonce=one.nonce,
    )
    if one.error:
        message.error_detail.code = INVALID_ARGUMENT
        message.error_detail.message = one.error
    if node is not None:
        message.node.id, metadata = node
        message.node.user_agent_name = "narrows"
        message.node.metadata.update(metadata)
    return message


def response(message: Any) -> Response:
    """A DeltaDiscoveryResponse as the session takes it; bodies are not looked at."""
    return Response(
        message.type_url,
        message.nonce,
        tuple(Resource(one.resource.type_url, one.name, one.version, one.resource.value) for one in message.resources),
        tuple(message.removed_resources),
    )
