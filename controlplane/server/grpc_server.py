"""AggregatedDiscoveryService over grpc.aio: one task reads a stream's requests, one writes its responses.

Nothing queues up here. The writer waits for gRPC to take each message; what changes meanwhile is marked in the session.
"""
from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from controlplane.server import wire
from controlplane.server.hub import Client, Hub
from controlplane.server.session import SessionError
from protos.gen.envoy.service.discovery.v3 import discovery_pb2

SERVICE = "envoy.service.discovery.v3.AggregatedDiscoveryService"
FIRST_SECONDS = 30.0  # a stream that asks for nothing that long is ended
REQUEST_BYTES = 64 << 20  # initial_resource_versions of a large mesh
OPTIONS = [
    ("grpc.max_receive_message_length", REQUEST_BYTES),
    ("grpc.max_send_message_length", -1),
    # a stream is silent for hours; clients may ping every 10 s all the same (Envoy, our agent: 30 s)
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.so_reuseport", 0),  # a second control plane on the same port is a mistake, not a share
    ("grpc.server_handshake_timeout_ms", 10_000),  # who connects and says nothing holds a descriptor that long
    ("grpc.max_concurrent_streams", 1000),  # of one connection; an agent has one, and 8 certificate requests
]
Metadata = Iterable[tuple[str, str | bytes]] | None
log = logging.getLogger("narrows.controlplane.xds")


class ListenError(OSError):
    """Nobody can be served at that place; the text says why and what to do."""


class EndingError(Exception):
    """The control plane ends, and with it the stream."""


class UnknownCallerError(Exception):
    """The caller is not let in; the text is for them. `unavailable`: nobody can tell now who it is, and they may ask again."""

    def __init__(self, text: str, unavailable: bool = False) -> None:
        super().__init__(text)
        self.code = grpc.StatusCode.UNAVAILABLE if unavailable else grpc.StatusCode.UNAUTHENTICATED


@dataclass(frozen=True, slots=True)
class Network:
    """How a port is guarded: TLS (`credentials` makes those of one port), and who may follow. `admit` returns the caller's node, or raises
    UnknownCallerError."""

    credentials: Callable[[], grpc.ServerCredentials]
    admit: Callable[[Metadata], Awaitable[str]]


class Server:
    """ADS for one hub, and `services` beside it, at one place: `unix:PATH`, where the socket's mode says who may follow the mesh, or
    `HOST:PORT`, which needs a Network."""

    def __init__(self, hub: Hub, who: str, services: Iterable[Any] = (), network: Network | None = None) -> None:
        self._hub = hub
        self._who = who
        self._services = tuple(services)
        self._network = network
        self._server: grpc.aio.Server | None = None
        self._path: Path | None = None

    async def start(self, listen: str) -> str:
        """Returns where it listens (with the port that the kernel chose for port 0). Raises ListenError."""
        server = grpc.aio.server(options=OPTIONS)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {
            "DeltaAggregatedResources": grpc.stream_stream_rpc_method_handler(
                self._delta, discovery_pb2.DeltaDiscoveryRequest.FromString,
                discovery_pb2.DeltaDiscoveryResponse.SerializeToString),
            "StreamAggregatedResources": grpc.stream_stream_rpc_method_handler(
                self._sotw, discovery_pb2.DiscoveryRequest.FromString,
                discovery_pb2.DiscoveryResponse.SerializeToString),
        }), *self._services))
        where = listen
        mask = os.umask(0o177)  # the socket is the owner's alone from its first moment
        try:
            if listen.startswith("unix:"):
                self._path = Path(listen.removeprefix("unix:"))
                free_socket(self._path)
                self._network = None
                port = server.add_insecure_port(listen)
            elif self._network is None:
                raise ListenError(f"cannot listen at {listen}: a port is served with TLS only, and there is no certificate authority")
            else:
                port = server.add_secure_port(listen, self._network.credentials())
        except RuntimeError as error:
            raise ListenError(f"cannot listen at {listen}: {error}") from None
        finally:
            os.umask(mask)
        if self._path is None:
            if port == 0:
                raise ListenError(f"cannot listen at {listen}; is the port taken?")
            where = f"{listen.rpartition(':')[0]}:{port}"
        await server.start()
        if self._path is not None:
            self._path.chmod(0o600)
        self._server = server
        return where

    async def stop(self, grace: float = 1.0) -> None:
        self._hub.end()
        if self._server is not None:
            await self._server.stop(grace)
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    # -- streams ----------------------------------------------------------------------------------------------------

    async def _delta(self, requests: AsyncIterator[Any], context: Any) -> None:
        await self._stream(requests, context, "delta", wire.delta_request, wire.delta_response)

    async def _sotw(self, requests: AsyncIterator[Any], context: Any) -> None:
        await self._stream(requests, context, "sotw", wire.sotw_request, wire.sotw_response)

    async def _stream(self, requests: AsyncIterator[Any], context: Any, protocol: str, read: Callable[[Any], Any],
                      write: Callable[[Any, str], Any]) -> None:
        caller = ""
        if self._network is not None:
            try:
                caller = await self._network.admit(context.invocation_metadata())
            except UnknownCallerError as unknown:
                self._hub.counts.errors["unauthenticated"] += 1
                log.warning("a client is not let in", extra={"peer": context.peer(), "reason": str(unknown)})
                await context.abort(unknown.code, str(unknown))
        try:
            async with asyncio.timeout(FIRST_SECONDS):
                first = await anext(requests)
        except TimeoutError:
            self._hub.counts.errors["silent"] += 1
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, f"no request came within {FIRST_SECONDS:g} s")
            return
        except StopAsyncIteration:
            return
        said = wire.node_of(first.node)
        if caller and said and said != caller:
            self._hub.counts.errors["impersonation"] += 1
            await context.abort(grpc.StatusCode.PERMISSION_DENIED,
                                f"the token is that of the node {caller}, and the client says it is {said}")
            return
        client = self._hub.join(context.peer(), first.node.id, wire.scope_of(first.node), protocol)
        if client is None:
            self._hub.counts.errors["full"] += 1
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many clients; come again later")
            return
        reason = "it closed the stream"
        writing = asyncio.create_task(self._write(client, context, write), name=f"xds-write-{client.number}")
        reading = asyncio.create_task(self._read(client, requests, read, first), name=f"xds-read-{client.number}")
        try:
            done, _ = await asyncio.wait({writing, reading}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if error := task.exception():
                    raise error
        except SessionError as error:
            reason = str(error)
            self._hub.counts.errors["protocol"] += 1
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, reason)
        except EndingError:
            reason = "the control plane ends"
            await context.abort(grpc.StatusCode.UNAVAILABLE, f"{reason}; connect again")
        except asyncio.CancelledError:
            reason = "the connection ended"
            raise
        except grpc.RpcError as error:
            reason = f"the connection ended: {error}"
        finally:
            for task in (writing, reading):
                task.cancel()
            await asyncio.gather(writing, reading, return_exceptions=True)
            self._hub.leave(client, reason)

    async def _read(self, client: Client, requests: AsyncIterator[Any], read: Callable[[Any], Any], first: Any) -> None:
        message = first
        while True:
            self._hub.heard(client, client.session.receive(read(message)))
            client.wake.set()
            try:
                message = await anext(requests)
            except StopAsyncIteration:
                return

    async def _write(self, client: Client, context: Any, write: Callable[[Any, str], Any]) -> None:
        while True:
            await client.wake.wait()
            client.wake.clear()
            if self._hub.ending:
                raise EndingError
            for response in client.session.responses():
                await context.write(write(response, self._who))
                self._hub.wrote(client, response.type_url)
            self._hub.caught_up(client)


def free_socket(path: Path) -> None:
    """Remove the socket of one who died. Raises ListenError when somebody lives there, or it is no socket."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise ListenError(f"{path.parent} is no folder; make it, or name another place") from None
        return
    if not stat.S_ISSOCK(mode):
        raise ListenError(f"{path} is there and is no socket; remove it, or name another place")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1)
        with contextlib.suppress(ConnectionRefusedError, FileNotFoundError):
            probe.connect(str(path))
            raise ListenError(f"another process serves {path}; end it, or name another place")
    path.unlink(missing_ok=True)
