"""Drives a reflector by a client: the thin loop around `reflector.Reflector`. One a resource; that one is stale is no other's business."""
from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from protos.kubernetes.client import Client
from protos.kubernetes.errors import ApiError, Unreachable
from protos.kubernetes.reflector import PAGE_LIMIT, Batch, List, Reflector, State, Wait, Watch
from protos.kubernetes.resources import Resource
from protos.kubernetes.stream import Stream

T = TypeVar("T")
SILENT_SECONDS = 15.0  # how long after its timeoutSeconds a watch may take to end


class Follower(Generic[T]):
    """`await run()` until it is cancelled. `deliver` gets each batch in the loop's thread, and must be quick; what it raises ends `run`.

    An object is `kind` as msgspec decodes it (`dict` for what is read elsewhere). `labels` and `fields` are selectors.
    """

    def __init__(self, client: Client, resource: Resource, kind: type[T], deliver: Callable[[Batch[T]], None], *, namespace: str = "",
                 labels: str = "", fields: str = "", optional: bool = False, limit: int = PAGE_LIMIT,
                 silent_seconds: float = SILENT_SECONDS, clock: Callable[[], float] = time.monotonic) -> None:
        self.resource = resource
        self._client, self._kind, self._deliver = client, kind, deliver
        self._namespace, self._labels, self._fields = namespace, labels, fields
        self._silent, self._clock = silent_seconds, clock
        self._core: Reflector[T] = Reflector(clock(), optional=optional, limit=limit)
        self._sleeping = asyncio.Event()

    def state(self) -> State:
        return self._core.state()

    def hurry(self) -> None:
        """Do not wait any longer for the next try: something changed that may help."""
        self._sleeping.set()

    async def run(self) -> None:
        while True:
            action = self._core.next()
            try:
                if isinstance(action, Wait):
                    await self._wait(action.seconds)
                elif isinstance(action, List):
                    self._core.page(await self._client.page(
                        self.resource, self._namespace, self._kind, limit=action.limit, continue_=action.continue_, labels=self._labels,
                        fields=self._fields), self._clock())
                else:
                    await self._watch(action)
            except ApiError as error:
                self._core.failed(error, self._clock())
            self._give()

    async def _wait(self, seconds: float) -> None:
        self._sleeping.clear()
        try:
            async with asyncio.timeout(seconds):
                await self._sleeping.wait()
        except TimeoutError:
            return

    async def _watch(self, action: Watch) -> None:
        loop = asyncio.get_running_loop()
        async with self._client.watch(self.resource, self._namespace, resource_version=action.resource_version, seconds=action.seconds,
                                      labels=self._labels, fields=self._fields) as watching:
            self._core.opened(self._clock())
            stream = Stream(watching.path, self._kind)
            deadline = loop.time() + action.seconds + self._silent
            while True:
                try:
                    async with asyncio.timeout_at(deadline):
                        data = await watching.read()
                except TimeoutError:
                    raise Unreachable("watch", watching.path, 0, "Silent",
                                      f"it should have ended after {action.seconds} s, and did not") from None
                except Unreachable:
                    data = b""  # a cut is an end: what was not told is told after the resume
                if not data:
                    self._core.ended(self._clock())
                    return
                for event in stream.feed(data):
                    if not self._core.event(event, self._clock()):
                        return
                self._give()

    def _give(self) -> None:
        if batch := self._core.take():
            self._deliver(batch)
