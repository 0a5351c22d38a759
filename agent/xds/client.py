"""The agent's ADS stream: one grpc.aio call that feeds the sans-I/O session and sends what it answers.

    read -> Session.received -> apply(update) -> (in force) -> Session.settled -> ACK or NACK

`apply` is called in the order of arrival and returns a future; up to IN_FLIGHT updates wait for theirs, then reading stops,
so a slow keeper slows the control plane down and nothing piles up here. The stream is replaced with a backoff; what is in
force stays, and the next stream resumes by versions.
"""
from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio

from agent.xds import messages
from agent.xds.session import Request, Session, SessionError, Update

METHOD = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources"
IN_FLIGHT = 16  # updates that wait to be in force
OUTGOING = 1024  # requests that wait to be written; more means that the server does not read
BACKOFF_FIRST, BACKOFF_LAST = 0.01, 15.0  # seconds, doubling; ztunnel's
CONNECT_SECONDS = 5.0
MESSAGE_BYTES = 200 << 20  # a full workload push of a large mesh; ztunnel's bound
OPTIONS = [
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    ("grpc.max_send_message_length", MESSAGE_BYTES),  # initial_resource_versions of a large mesh
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),  # the stream is silent for hours
    ("grpc.enable_http_proxy", 0),  # http_proxy of the environment is not for the control plane
    ("grpc.enable_retries", 0),
    ("grpc.use_local_subchannel_pool", 1),  # a new channel shall dial, not inherit another's backoff
    ("grpc.initial_reconnect_backoff_ms", 1000),
]

log = logging.getLogger("narrows.xds")

Apply = Callable[[Update], Awaitable[Mapping[str, str]]]
Open = Callable[[Sequence[tuple[str, Any]]], Any]
Metadata = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Node:
    """Who asks. The id has ztunnel's shape, so that a control plane of Istio's kind knows what to send."""

    name: str  # of the node
    cluster: str = "Kubernetes"
    address: str = "127.0.0.1"
    pod: str = "narrows"
    namespace: str = "narrows-system"

    @property
    def id(self) -> str:
        return f"ztunnel~{self.address}~{self.pod}-{self.name}.{self.namespace}~{self.namespace}.svc.cluster.local"

    @property
    def metadata(self) -> dict[str, str]:
        return {
            "NAME": f"{self.pod}-{self.name}",
            "NAMESPACE": self.namespace,
            "INSTANCE_IPS": self.address,
            "NODE_NAME": self.name,
            "CLUSTER_ID": self.cluster,
        }


@dataclass(slots=True)
class Status:
    """The stream for an operator. `since` is when the state began (Unix seconds)."""

    state: str = "connecting"  # connecting, connected
    since: float = field(default_factory=time.time)
    error: str = ""  # why the last stream ended
    streams: int = 0
    responses: int = 0
    rejected: int = 0  # resources


class Client:
    """Keeps one stream to `target` (`unix:/path` or `host:port`) for as long as `run` runs.

    `open_channel(options)` makes its channels, plain ones by default; `credentials()` gives the metadata of a stream. Either may raise
    OSError or ValueError, which is why there is no stream. `apply(update)` must start its work before it returns; what it returns is
    awaited for the names it rejects. `acknowledged(type_url)` is called after each ACK was made up. Not for several threads.
    """

    def __init__(self, target: str, node: Node, session: Session, apply: Apply,
                 acknowledged: Callable[[str], None] = lambda _: None, *, open_channel: Open | None = None,
                 credentials: Callable[[], Metadata] = tuple) -> None:
        self._target = target
        self._open = open_channel or (lambda options: grpc.aio.insecure_channel(target, options))
        self._credentials = credentials
        self._node = node
        self._session = session
        self._apply = apply
        self._acknowledged = acknowledged
        self._outgoing: asyncio.Queue[Request] = asyncio.Queue(OUTGOING)
        self._overflow = asyncio.Event()
        self._hurry = asyncio.Event()
        self._settling: asyncio.Queue[tuple[Update, Awaitable[Mapping[str, str]]]] = asyncio.Queue(IN_FLIGHT)
        self.status = Status()

    def want(self, type_url: str, more: Iterable[str], less: Iterable[str] = ()) -> None:
        """From now on `more` are wanted too and `less` no more; told to the server at once when there is a stream."""
        self._send(self._session.want(type_url, more, less))

    def hurry(self) -> None:
        """Do not wait for the rest of the backoff."""
        self._hurry.set()

    async def run(self) -> None:
        """Returns only when cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._settle(), name="xds-settle")
            group.create_task(self._follow(), name="xds-follow")

    # -- inside -----------------------------------------------------------------------------------------------------

    async def _follow(self) -> None:
        delay = BACKOFF_FIRST
        while True:
            before = self.status.responses
            reason = await self._stream()
            self.status.error = reason
            if self.status.state == "connected":
                log.warning("the stream to the control plane ended; what is in force stays",
                            extra={"target": self._target, "reason": reason or "closed by the control plane"})
            self._state("connecting")
            if self.status.responses > before:
                delay = BACKOFF_FIRST
                if not reason:  # the server recycles its streams: nothing is wrong
                    continue
            self._hurry.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(delay * random.uniform(0.5, 1.0)):
                    await self._hurry.wait()
            delay = min(delay * 2, BACKOFF_LAST)

    async def _stream(self) -> str:
        """One stream from dial to end. Returns why it ended, "" when the server closed it in order."""
        try:
            metadata, opened = self._credentials(), self._open(OPTIONS)
        except (OSError, ValueError) as error:
            return f"{self._target} cannot be called: {error}"
        async with opened as channel:
            try:
                async with asyncio.timeout(CONNECT_SECONDS):
                    await channel.channel_ready()
            except TimeoutError:
                return f"nobody answers at {self._target} (is the control plane running?)"
            call = channel.stream_stream(METHOD, request_serializer=messages.to_wire,
                                         response_deserializer=messages.from_wire)(metadata=metadata)
            self.status.streams += 1
            while not self._outgoing.empty():
                self._outgoing.get_nowait()
            self._overflow.clear()
            first = self._session.opened()
            tasks = [asyncio.create_task(self._write(call, first), name="xds-write"),
                     asyncio.create_task(self._read(call), name="xds-read"),
                     asyncio.create_task(self._overflow.wait(), name="xds-overflow")]
            try:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                return await _reason(done, call)
            finally:
                self._session.closed()
                call.cancel()
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _write(self, call: Any, first: list[Request]) -> None:
        # only the first request of a stream says who asks
        node: tuple[str, dict[str, str]] | None = (self._node.id, self._node.metadata)
        for request in first:
            await call.write(messages.request(request, node))
            node = None
        while True:
            await call.write(messages.request(await self._outgoing.get(), node))
            node = None

    async def _read(self, call: Any) -> None:
        while True:
            answer = await call.read()
            if answer is grpc.aio.EOF:
                return
            if self.status.state != "connected":
                self._state("connected")
                log.info("following the control plane", extra={"target": self._target})
            self.status.responses += 1
            update = self._session.received(messages.response(answer))
            if update is not None:
                log.debug("update", extra={"type": update.type_url, "changed": len(update.changed),
                                           "removed": len(update.removed)})
                await self._settling.put((update, self._apply(update)))

    async def _settle(self) -> None:
        while True:
            update, in_force = await self._settling.get()
            rejected = await in_force
            answer = self._session.settled(update, rejected)
            bad = {**update.malformed, **rejected}
            self.status.rejected += len(bad)
            for name, reason in bad.items():
                log.warning("a resource is refused; the last good one stays",
                            extra={"type": update.type_url, "resource": name, "reason": reason})
            if answer is not None:
                self._send([answer])
                self._acknowledged(update.type_url)

    def _send(self, requests: list[Request]) -> None:
        for request in requests:
            if self._outgoing.full():
                self._overflow.set()  # a new stream says everything anew
                return
            self._outgoing.put_nowait(request)

    def _state(self, state: str) -> None:
        if state != self.status.state:
            self.status.state, self.status.since = state, time.time()


async def _reason(done: set[asyncio.Task[Any]], call: Any) -> str:
    for task in done:
        error = task.exception()
        if isinstance(error, SessionError):
            return str(error)
        if isinstance(error, grpc.aio.AioRpcError):
            return f"{error.code().name}: {error.details()}"
        if error is not None and not isinstance(error, asyncio.InvalidStateError):
            raise error
        if task.get_name() == "xds-overflow":
            return f"the control plane read none of {OUTGOING} requests"
    code = await call.code()
    return "" if code is grpc.StatusCode.OK else f"{code.name}: {await call.details()}"
