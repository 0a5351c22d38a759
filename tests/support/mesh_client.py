"""A client of the control plane over gRPC: asks for certificates and for the mesh, as an agent would."""
from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest

from controlplane.translate.names import TypeUrl
from protos.gen.envoy.service.discovery.v3 import discovery_pb2
from protos.gen.istio import ca_pb2, workload_pb2
from tests.support.authority import bearer, message
from tests.support.controlplane import ControlPlane

CREATE = "/istio.v1.auth.IstioCertificateService/CreateCertificate"
DELTA = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources"
AGAIN = 20  # a busy machine may meet that end several times
LOCAL = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]


def root_of(plane: ControlPlane) -> bytes:
    return (plane.config.parent / "ca" / "current" / "root-cert.pem").read_bytes()


@asynccontextmanager
async def channel(plane: ControlPlane, tls: bool, root: bytes = b"") -> AsyncIterator[Any]:
    if tls:
        credentials = grpc.ssl_channel_credentials(root or root_of(plane))
        made = grpc.aio.secure_channel(plane.ports[0], credentials, options=LOCAL)
    else:
        made = grpc.aio.insecure_channel(plane.listen, options=LOCAL)
    async with made as one:
        yield one


async def create(one: Any, what: Any = None, metadata: Any = None, seconds: float = 10) -> list[str]:
    call = one.unary_unary(CREATE, ca_pb2.IstioCertificateRequest.SerializeToString, ca_pb2.IstioCertificateResponse.FromString)
    answer = await call(message() if what is None else what, metadata=bearer() if metadata is None else metadata, timeout=seconds)
    return list(answer.cert_chain)


async def refused(one: Any, what: Any = None, metadata: Any = None) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as told:
        await create(one, what, metadata)
    return told.value.code(), told.value.details() or ""


class Ended(Exception):
    """The stream's status and its text."""


async def addresses(one: Any, metadata: Any, node: str = "") -> dict[str, workload_pb2.Address]:
    """The first answer of a delta stream. Raises Ended.

    grpcio calls a stream INTERNAL, whatever it ended with, whose end comes while its first message is written: such a one is asked again.
    """
    for again in range(AGAIN):
        try:
            return await _addresses(one, metadata, node)
        except Ended as ended:
            if ended.args[0] is not grpc.StatusCode.INTERNAL or again == AGAIN - 1:
                raise
    raise AssertionError


async def _addresses(one: Any, metadata: Any, node: str) -> dict[str, workload_pb2.Address]:
    call = one.stream_stream(
        DELTA, discovery_pb2.DeltaDiscoveryRequest.SerializeToString, discovery_pb2.DeltaDiscoveryResponse.FromString
    )(metadata=metadata, timeout=10)
    asked = discovery_pb2.DeltaDiscoveryRequest(type_url=TypeUrl.ADDRESS, node={"id": "x"})
    if node:
        asked.node.metadata.update({"NODE_NAME": node})
    try:
        await call.write(asked)
        answer = await call.read()
    except grpc.aio.AioRpcError:  # of a write to a stream that had ended it is INTERNAL; the call knows
        raise Ended(await call.code(), await call.details()) from None
    if answer is grpc.aio.EOF:
        raise Ended(await call.code(), await call.details())
    call.cancel()
    return {found.name: workload_pb2.Address.FromString(found.resource.value) for found in answer.resources}
