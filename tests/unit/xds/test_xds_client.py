"""The stream against a real gRPC server on a unix socket: what a control plane sees of us, whatever it does."""
from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from agent.xds.client import Client, Node
from agent.xds.session import Session, Update
from agent.xds.tree import NAMED
from agent.xds.types import TypeUrl
from protos.gen.envoy.service.discovery.v3 import discovery_pb2

SECONDS = 10.0


class ControlPlane:
    """An ADS server that a test plays: what came in is in `requests`, what goes out is put into `send`."""

    def __init__(self) -> None:
        self.requests: asyncio.Queue[Any] = asyncio.Queue()
        self.send: asyncio.Queue[Any] = asyncio.Queue()
        self.streams = 0

    async def _serve(self, incoming: AsyncIterator[Any], _: Any) -> AsyncIterator[Any]:
        self.streams += 1

        async def read() -> None:
            async for request in incoming:
                await self.requests.put(request)

        reader = asyncio.create_task(read())
        try:
            while True:
                message = await self.send.get()
                if message is None:
                    return
                yield message
        finally:
            reader.cancel()

    @asynccontextmanager
    async def listening(self, path: Path) -> AsyncIterator[None]:
        handler = grpc.stream_stream_rpc_method_handler(
            self._serve, discovery_pb2.DeltaDiscoveryRequest.FromString,
            discovery_pb2.DeltaDiscoveryResponse.SerializeToString)
        server = grpc.aio.server()
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(
            "envoy.service.discovery.v3.AggregatedDiscoveryService", {"DeltaAggregatedResources": handler}),))
        server.add_insecure_port(f"unix:{path}")
        await server.start()
        try:
            yield
        finally:
            await server.stop(None)

    async def request(self) -> Any:
        async with asyncio.timeout(SECONDS):
            return await self.requests.get()

    def address(self, nonce: str, *names: str, version: str = "1", removed: tuple[str, ...] = ()) -> None:
        message = discovery_pb2.DeltaDiscoveryResponse(type_url=TypeUrl.ADDRESS, nonce=nonce, removed_resources=removed)
        for name in names:
            one = message.resources.add(name=name, version=version)
            one.resource.type_url = TypeUrl.ADDRESS
        self.send.put_nowait(message)


@asynccontextmanager
async def following(path: Path, apply: Callable[[Update], Awaitable[Mapping[str, str]]]
                    ) -> AsyncIterator[tuple[Client, Session]]:
    session = Session([TypeUrl.ADDRESS], NAMED)
    client = Client(f"unix:{path}", Node("n1"), session, apply)
    task = asyncio.create_task(client.run())
    try:
        yield client, session
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def accept(_: Update) -> Mapping[str, str]:
    return {}


async def test_the_first_request_says_who_asks_as_ztunnel_does_and_only_the_first(tmp_path: Path) -> None:
    plane = ControlPlane()
    async with plane.listening(tmp_path / "xds"), following(tmp_path / "xds", accept) as (client, _):
        first = await plane.request()
        assert first.type_url == TypeUrl.ADDRESS and list(first.resource_names_subscribe) == []
        assert first.node.id == "ztunnel~127.0.0.1~narrows-n1.narrows-system~narrows-system.svc.cluster.local"
        assert first.node.metadata["NODE_NAME"] == "n1" and first.node.metadata["CLUSTER_ID"] == "Kubernetes"
        client.want(TypeUrl.LISTENER, ["a"])
        second = await plane.request()
        assert list(second.resource_names_subscribe) == ["a"] and not second.HasField("node")


async def test_an_update_is_acknowledged_when_it_is_in_force_and_not_before(tmp_path: Path) -> None:
    plane = ControlPlane()
    gate: asyncio.Future[Mapping[str, str]] = asyncio.get_running_loop().create_future()
    got = asyncio.Event()

    def apply(_: Update) -> Awaitable[Mapping[str, str]]:
        got.set()
        return gate

    async with plane.listening(tmp_path / "xds"), following(tmp_path / "xds", apply) as (client, session):
        await plane.request()
        plane.address("n1", "u1", "u2")
        async with asyncio.timeout(SECONDS):
            await got.wait()
        assert plane.requests.empty() and session.held(TypeUrl.ADDRESS) == {}
        gate.set_result({"u2": "bad address"})
        answer = await plane.request()
        assert (answer.response_nonce, answer.error_detail.message) == ("n1", "u2: bad address")
        assert session.held(TypeUrl.ADDRESS) == {"u1": "1"} and client.status.rejected == 1


async def test_a_control_plane_that_comes_back_is_told_what_is_held(tmp_path: Path) -> None:
    plane = ControlPlane()
    async with following(tmp_path / "xds", accept) as (client, _):
        async with plane.listening(tmp_path / "xds"):
            await plane.request()
            plane.address("n1", "u1")
            await plane.request()
        async with plane.listening(tmp_path / "xds"):
            client.hurry()
            again = await plane.request()
            assert dict(again.initial_resource_versions) == {"u1": "1"} and again.HasField("node")
            assert client.status.streams == 2


async def test_a_stream_that_the_server_closes_in_order_is_opened_again_at_once(tmp_path: Path) -> None:
    plane = ControlPlane()
    async with plane.listening(tmp_path / "xds"), following(tmp_path / "xds", accept):
        for number in range(3):
            await plane.request()
            plane.address(f"n{number}", "u1", version=str(number))
            await plane.request()
            plane.send.put_nowait(None)
        await plane.request()
        assert plane.streams == 4


async def test_a_server_that_breaks_the_protocol_is_left_and_the_reason_is_shown(tmp_path: Path) -> None:
    plane = ControlPlane()
    async with plane.listening(tmp_path / "xds"), following(tmp_path / "xds", accept) as (client, _):
        await plane.request()
        plane.address("", "u1")
        await plane.request()
        assert "without nonce" in client.status.error and plane.streams == 2


async def test_reading_stops_while_too_many_updates_wait_to_be_in_force(tmp_path: Path) -> None:
    plane = ControlPlane()
    gate: asyncio.Future[Mapping[str, str]] = asyncio.get_running_loop().create_future()
    taken: list[Update] = []

    def apply(update: Update) -> Awaitable[Mapping[str, str]]:
        taken.append(update)
        return gate

    async with plane.listening(tmp_path / "xds"), following(tmp_path / "xds", apply):
        await plane.request()
        for number in range(60):
            plane.address(f"n{number}", f"u{number}")
        seen = -1
        async with asyncio.timeout(SECONDS):
            while len(taken) != seen or len(taken) < 16:  # until it stands still
                seen = len(taken)
                await asyncio.sleep(0.2)
        assert len(taken) < 25
        gate.set_result({})
        nonces = [(await plane.request()).response_nonce for _ in range(60)]
        assert nonces == [f"n{number}" for number in range(60)]


async def test_a_fault_of_ours_ends_the_client_instead_of_being_retried_for_ever(tmp_path: Path) -> None:
    plane = ControlPlane()

    def apply(_: Update) -> Awaitable[Mapping[str, str]]:
        raise RuntimeError("broken")

    session = Session([TypeUrl.ADDRESS], NAMED)
    client = Client(f"unix:{tmp_path / 'xds'}", Node("n1"), session, apply)
    async with plane.listening(tmp_path / "xds"):
        plane.address("n1", "u1")
        with pytest.raises(ExceptionGroup) as raised:
            async with asyncio.timeout(SECONDS):
                await client.run()
        assert raised.group_contains(RuntimeError, match="broken")
