"""Sessions' requests and responses <-> xDS messages."""
from __future__ import annotations

from typing import Any

from google.protobuf.any_pb2 import Any as AnyMessage

from controlplane.server import delta, sotw
from controlplane.server.session import DEFAULT_SCOPE, Named
from protos.gen.envoy.config.core.v3 import core_pb2
from protos.gen.envoy.service.discovery.v3 import discovery_pb2


def scope_of(node: Any) -> str:
    """The client's namespace: metadata NAMESPACE, else default."""
    fields = node.metadata.fields
    return (fields["NAMESPACE"].string_value if "NAMESPACE" in fields else "") or DEFAULT_SCOPE


def node_of(node: Any) -> str:
    """The node that an agent says it is on: metadata NODE_NAME; empty when it says none."""
    fields = node.metadata.fields
    name: str = fields["NODE_NAME"].string_value if "NODE_NAME" in fields else ""
    return name


def delta_request(message: Any) -> delta.Request:
    return delta.Request(
        message.type_url, tuple(message.resource_names_subscribe), tuple(message.resource_names_unsubscribe),
        dict(message.initial_resource_versions), message.response_nonce,
        message.error_detail.message if message.HasField("error_detail") else None)


def delta_response(response: delta.Response, who: str) -> Any:
    return discovery_pb2.DeltaDiscoveryResponse(
        type_url=response.type_url, nonce=response.nonce, removed_resources=response.removed,
        resources=[discovery_pb2.Resource(name=one.name, version=one.made.version, resource=_any(response.type_url, one))
                   for one in response.resources],
        control_plane=core_pb2.ControlPlane(identifier=who))


def sotw_request(message: Any) -> sotw.Request:
    return sotw.Request(message.type_url, tuple(message.resource_names), message.version_info, message.response_nonce,
                        message.error_detail.message if message.HasField("error_detail") else None)


def sotw_response(response: sotw.Response, who: str) -> Any:
    return discovery_pb2.DiscoveryResponse(
        type_url=response.type_url, version_info=response.version, nonce=response.nonce,
        resources=[_any(response.type_url, one) for one in response.resources],
        control_plane=core_pb2.ControlPlane(identifier=who))


def _any(type_url: str, one: Named) -> AnyMessage:
    return AnyMessage(type_url=type_url, value=one.made.content)
