"""Observation of TCP connections by the kernel: loads the program, sees to it that the right connections are told, and counts them.

A failure of any of it costs figures, never a connection. The kernel goes on telling while the agent is away, and what it told until the
ring was full is read by the next.
"""
from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.app.events import Events
from agent.capture import pins as pins_of_bpf
from agent.capture.egress import LAYOUT
from agent.capture.loader import OBSERVE, LoadError, load
from agent.capture.observe import PART, ObserveError, Records, Watch, is_ours
from agent.capture.pins import PinError
from agent.dataplane.readers import ORDER
from agent.model.pod import LocalPod
from agent.model.workload import Service, Workload, address_of
from agent.netlink.cgroup import find_cgroup2, of_process
from agent.state.store import Store
from agent.telemetry.connections import Connections

OFF, CAPTURED, ALL = "off", "captured", "all"
READ_SECONDS = 0.5  # few connections wake nobody; these are read so late at most
READ_RECORDS = 2000  # in one turn of the loop: 4 ms
LOOK_TURNS = 5  # of reading, between two looks at pods and links
FORGET_TURNS = 20  # until a new name of an address is seen
RETRY_FIRST, RETRY_LAST = 1.0, 60.0  # seconds, doubling
ABOUT = "observation"


@dataclass(frozen=True, slots=True)
class Wish:
    """A pod whose connections are to be told. `cgroup`: its own is to be linked, since no proxy of ours serves it."""

    pod: LocalPod
    cgroup: bool


@dataclass(slots=True)
class _Told:
    wish: Wish
    cookie: int
    number: int  # id of its cgroup; 0: not linked


class Observation:
    """`pods`: (pod, whether the proxy serves it) of all that are decided on; None while they are not all known. `watch` runs for ever."""

    def __init__(self, choice: str, instance: str, run_dir: Path, events: Events, store: Store,
                 pods: Callable[[], Iterable[tuple[LocalPod, bool]] | None], pairs: int) -> None:
        self._choice = choice
        self._instance = instance
        self._cache = run_dir / "bpf-cache"
        self._events = events
        self._store = store
        self._pods = pods
        self._keeper = 0  # pid; 0: none is known
        self._served = 0  # id of its cgroup
        self._told: dict[str, _Told] = {}  # by pod uid
        self._cookies: dict[int, LocalPod] = {}
        self._records: Records | None = None
        self._problem = ""
        self._unserved = ""  # why captured pods' connections are not told; those of others may be
        self._again = asyncio.Event()
        self.collector = Connections(self, pairs, self._counted)

    # -- what others ask ----------------------------------------------------------------------------------------------

    def shown(self) -> dict[str, Any]:
        """For `narrows status`: state (off, loading, ready, failed), why, how many pods, records told and lost."""
        ready = "ready" if self._records is not None else "loading"
        told, lost = self._counted()
        return {"choice": self._choice, "state": "off" if self._choice == OFF else "failed" if self._problem else ready,
                "reason": self._problem or self._unserved, "pods": len(self._told), "told": told, "lost": lost}

    def here(self, cookie: int) -> Workload | None:
        pod = self._cookies.get(cookie)
        return self._store.workload_at(pod.addresses[0]) if pod is not None and pod.addresses else None

    def at(self, address: bytes) -> Workload | None:
        return self._store.workload_at(address_of(address))

    def service(self, address: bytes) -> Service | None:
        return self._store.service_at(address_of(address))

    # -- what is done -------------------------------------------------------------------------------------------------

    def keeper(self, pid: int) -> None:
        self._keeper = pid

    def again(self) -> None:
        """Load once more, if that has failed."""
        self._again.set()

    async def watch(self) -> None:
        if self._choice == OFF:
            for left in pins_of_bpf.found(self._instance):
                if is_ours(left):  # an earlier agent was told otherwise
                    await asyncio.to_thread(pins_of_bpf.clean, left)
            await asyncio.Event().wait()
        delay = RETRY_FIRST
        while True:
            self._again.clear()
            try:
                watch, records = await asyncio.to_thread(self._load)
                self._records, self._problem = records, ""
                await self._follow(watch, records)
            except (LoadError, PinError, ObserveError, OSError, RuntimeError) as error:
                self._problem = str(error)
                self._events.add("ObservationFailed", ABOUT, f"connections are not observed: {error}; it is tried again", warning=True)
            with suppress(TimeoutError):
                async with asyncio.timeout(delay):
                    await self._again.wait()
            delay = min(delay * 2, RETRY_LAST)

    def _load(self) -> tuple[Watch, Records]:
        pins = pins_of_bpf.claim(self._instance, LAYOUT, part=PART)
        found = load(pins, self._cache, hooks=OBSERVE)
        if refused := "; ".join(why for why in found.hooks.values() if why):
            raise LoadError(refused)
        return Watch(pins), Records(pins, ORDER)

    async def _follow(self, watch: Watch, records: Records) -> None:
        """Until something is wrong, which it raises."""
        self._events.add("ObservationReady", ABOUT, f"connections of {self._choice} pods are observed")
        loop = asyncio.get_running_loop()
        wrong: asyncio.Future[None] = loop.create_future()

        def readable() -> None:
            try:
                self._read(records)
            except RuntimeError as error:
                loop.remove_reader(records.fileno())
                if not wrong.done():
                    wrong.set_exception(error)

        loop.add_reader(records.fileno(), readable)
        try:
            turn = 0
            while True:
                if turn % FORGET_TURNS == 0:
                    self.collector.forget()
                if turn % LOOK_TURNS == 0 and (pods := self._pods()) is not None:
                    await asyncio.to_thread(self._settle, watch, self._wishes(pods))
                while self._read(records) == READ_RECORDS:
                    await asyncio.sleep(0)
                turn += 1
                await asyncio.wait([wrong], timeout=READ_SECONDS)
                if wrong.done():
                    wrong.result()
        finally:
            loop.remove_reader(records.fileno())
            self._read(records)
            self._records = None
            records.close()
            wrong.cancel()

    def _read(self, records: Records) -> int:
        found = records.read(READ_RECORDS)
        self.collector.add(found)
        return len(found)

    def _wishes(self, pods: Iterable[tuple[LocalPod, bool]]) -> dict[str, Wish]:
        return {pod.uid: Wish(pod, not proxied) for pod, proxied in pods
                if pod.netns and pod.addresses and not pod.host_network and (proxied or (self._choice == ALL and pod.cgroup))}

    # -- in a thread --------------------------------------------------------------------------------------------------

    def _settle(self, watch: Watch, wishes: dict[str, Wish]) -> None:
        """Bring the kernel to the wishes: what is there and nobody wishes goes, also of an earlier agent."""
        watched, linked = set(watch.watched()), watch.linked()
        self._serve(watch, linked)
        for uid, wish in wishes.items():
            before = self._told.get(uid)
            try:
                if before is not None and before.wish == wish and before.cookie in watched and (not wish.cgroup or before.number in linked):
                    continue
                cookie = watch.add(wish.pod.netns, wish.pod.addresses, wish.pod.cgroup if wish.cgroup else None)
                self._told[uid] = _Told(wish, cookie, os.stat(wish.pod.cgroup).st_ino if wish.cgroup else 0)
            except (ObserveError, OSError) as error:  # one that is going has no namespace or no cgroup any more
                self._told.pop(uid, None)
                self._events.add("NotObserved", f"pod {wish.pod.ref}", f"its connections are not observed: {error}")
        self._told = {uid: one for uid, one in self._told.items() if uid in wishes}
        self._cookies = {one.cookie: one.wish.pod for one in self._told.values()}
        for cookie in watched - set(self._cookies):
            watch.remove(cookie)
        for number in linked - {self._served, *(one.number for one in self._told.values())}:
            watch.unlink(number)

    def _serve(self, watch: Watch, linked: set[int]) -> None:
        """The keeper's cgroup. While the keeper is away its link stays."""
        if not self._keeper:
            return
        try:
            cgroup = of_process(self._keeper)
            if cgroup == find_cgroup2():
                raise ObserveError("it is in the root of cgroup v2, whose hooks would see every process of the node; start it in a cgroup "
                                   "of its own, as systemd and container runtimes do")
            self._served = cgroup.stat().st_ino
            if self._served not in linked:
                watch.serve(str(cgroup))
            self._unserved = ""
        except FileNotFoundError:
            return  # it is ending
        except (LookupError, ObserveError) as error:
            self._unserved = f"connections of captured pods are not observed: the keeper (pid {self._keeper}): {error}"
            self._events.add("KeeperNotObserved", ABOUT, self._unserved, warning=True)

    def _counted(self) -> tuple[int, int]:
        records = self._records
        try:
            return records.counted() if records is not None else (0, 0)
        except (OSError, ValueError):  # closed meanwhile: this is the thread that renders
            return (0, 0)
