"""A destination `host:port` -> API listener. The port's declared protocol decides what is in it (ARCHITECTURE.md)."""
from __future__ import annotations

from typing import Any

from google.protobuf.any_pb2 import Any as AnyMessage

from controlplane.model.mesh import Mesh
from controlplane.model.objects import Protocol
from controlplane.translate.names import TypeUrl, Wanted
from protos.gen.envoy.config.core.v3 import core_pb2
from protos.gen.envoy.config.listener.v3 import listener_pb2
from protos.gen.envoy.extensions.filters.http.router.v3 import router_pb2
from protos.gen.envoy.extensions.filters.network.http_connection_manager.v3 import http_connection_manager_pb2 as hcm_pb2
from protos.gen.envoy.extensions.filters.network.tcp_proxy.v3 import tcp_proxy_pb2

ADS = core_pb2.ConfigSource(ads=core_pb2.AggregatedConfigSource(), resource_api_version=core_pb2.V3)
HTTP = {Protocol.HTTP, Protocol.AUTO}


def listener(mesh: Mesh, wanted: Wanted) -> listener_pb2.Listener | None:
    """None: there is no such service, or it has no such port."""
    service = mesh.service(wanted.host)
    port = service.port(wanted.port) if service else None
    if port is None:
        return None
    found = listener_pb2.Listener(name=wanted.named(TypeUrl.LISTENER))
    if port.protocol in HTTP:
        found.api_listener.api_listener.CopyFrom(packed(hcm_pb2.HttpConnectionManager(
            rds=hcm_pb2.Rds(config_source=ADS, route_config_name=wanted.named(TypeUrl.ROUTE)),
            http_filters=[hcm_pb2.HttpFilter(name="envoy.filters.http.router", typed_config=packed(router_pb2.Router()))],
        )))
    if port.protocol is not Protocol.HTTP:
        proxy = tcp_proxy_pb2.TcpProxy(stat_prefix=f"{wanted.host}:{wanted.port}", cluster=wanted.named(TypeUrl.CLUSTER, ""))
        found.default_filter_chain.filters.add(name="envoy.filters.network.tcp_proxy", typed_config=packed(proxy))
    return found


def packed(message: Any) -> AnyMessage:
    found = AnyMessage()
    found.Pack(message, deterministic=True)
    return found
