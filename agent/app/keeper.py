"""One connection to a keeper in the terms of the agent's other rooms."""
from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.app.commit import Refused
from agent.app.tracked import Attached
from agent.dataplane import blobs
from agent.dataplane.client import KeeperAway, KeeperClient, KeeperRefused, connect
from agent.dataplane.protocol import Hello, Miss, WorkerChange, WorkerState
from agent.dataplane.readers import Readers

PULSE_SECONDS = 1.0  # between two questions to the keeper; each is one small datagram each way
HUNG_SECONDS = 3.0  # without an answer, and readiness says so: the keeper answers in under a millisecond, a commit takes it some ten
GONE = frozenset({WorkerState.DIED, WorkerState.DOWN})  # REPLACED names the new one


@dataclass(frozen=True, slots=True)
class Inventory:
    puts: tuple[blobs.Put, ...]
    pods: Mapping[str, Attached]  # by pod uid


class KeeperLink:
    """Made by `open_link`. Every request raises KeeperAway (a ConnectionError) when the keeper goes away."""

    def __init__(self, client: KeeperClient) -> None:
        self._client = client
        self._heard = time.monotonic()
        self.worker_pids: dict[int, int] = {}

    @property
    def hello(self) -> Hello:
        return self._client.hello

    @property
    def pid(self) -> int:
        return self._client.hello.pid

    @property
    def peer(self) -> int:
        """The keeper's process as the kernel names it to this one."""
        return self._client.peer

    async def inventory(self) -> Inventory:
        found = await self._client.inventory()
        # one that does not listen is as good as none: POD_ADD makes its listeners again
        pods = {one.uid: Attached(one.handle, one.netns if one.listening else 0) for one in found.pods}
        return Inventory(found.blobs, pods)

    async def readers(self) -> Readers:
        """Raises OSError when the shared memory is not what this release reads."""
        try:
            return Readers(await self._client.shm())
        except ValueError as error:
            raise OSError(str(error)) from error

    async def commit(self, entries: Sequence[blobs.Entry]) -> None:
        """Raises commit.Refused when the data path does not take the transaction."""
        try:
            await self._client.commit(entries)
        except KeeperRefused as error:
            raise Refused(str(error)) from None

    async def add_pod(self, handle: int, uid: str, families: tuple[int, ...], netns: int, identity: str) -> None:
        await self._client.add_pod(handle, uid, families, netns, identity)

    async def dns_sockets(self, handle: int) -> list[int]:
        return await self._client.dns_sockets(handle)

    async def leave_pod(self, handle: int) -> None:
        await self._client.leave_pod(handle)

    async def delete_pod(self, handle: int) -> None:
        await self._client.delete_pod(handle)

    async def make_key(self, identity: str) -> tuple[int, bytes]:
        return await self._client.make_key(identity)

    async def forget_key(self, key: int) -> None:
        await self._client.forget_key(key)

    async def keys(self) -> dict[int, str]:
        """Number -> identity."""
        return {one.id: one.identity for one in await self._client.keys()}

    async def workers(self) -> list[dict[str, Any]]:
        found = await self._client.workers()
        self.worker_pids = {one.index: one.pid for one in found if one.pid}
        return [{"index": one.index, "pid": one.pid, "state": one.state.name.lower(), "restarts": one.restarts,
                 "pods": one.pods} for one in found]

    @property
    def silent(self) -> float:
        """Seconds since the keeper answered last; under two while it lives, since `pulse` asks."""
        return time.monotonic() - self._heard

    @property
    def hung(self) -> bool:
        return self.silent > HUNG_SECONDS

    async def pulse(self) -> None:
        """Ask for a sign of life each second, for as long as the connection is open. One that does not answer is asked on."""
        while True:
            with suppress(KeeperAway):  # gone: `listen` ends too, and says why
                await self.workers()
                self._heard = time.monotonic()
            await asyncio.sleep(PULSE_SECONDS)

    async def listen(self, miss: Callable[[str], None], worker: Callable[[WorkerChange], None]) -> None:
        """Pass events on until the connection ends, which raises KeeperAway."""
        async for event in self._client.events():
            match event:
                case Miss(key):
                    miss(key)
                case WorkerChange(index, pid, state):
                    if state not in GONE:
                        self.worker_pids[index] = pid
                    elif self.worker_pids.get(index) == pid:
                        del self.worker_pids[index]
                    worker(event)

    async def close(self) -> None:
        await self._client.close()


async def open_link(path: Path) -> KeeperLink:
    """Connect and take over: from now on the keeper hears this agent. Raises OSError."""
    link = KeeperLink(await connect(path))
    try:
        await link.workers()
    except BaseException:
        await link.close()
        raise
    return link
