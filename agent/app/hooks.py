"""Socket hooks on this node: loaded once, the keeper's cgroup served, pods put in and taken out, and all of it looked at again and again.

The kernel keeps what an earlier agent put in force, with nobody's help. So this begins with what is pinned (`_left`): pods claim theirs
as they are decided on, and what nobody claims is of pods that are gone. Everything that asks the kernel runs in a thread, one at a time.
"""
from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from agent.app.events import Events
from agent.capture import pins as pins_of_bpf
from agent.capture.egress import LAYOUT, Captured, Egress, EgressError, netns_cookie
from agent.capture.loader import HOOKS, LoadError, load
from agent.capture.pins import PinError
from agent.model.pod import CaptureSettings, LocalPod
from agent.netlink.cgroup import find_cgroup2, of_process

T = TypeVar("T")
LOAD_SECONDS = 15.0  # a pod waits so long for the programs; then redirects capture it until they are there. It takes 0.3 s from the cache
TRY_AGAIN = "SIGHUP to the agent tries again"


@dataclass(frozen=True, slots=True)
class Record:
    """A captured pod, as it was put in."""

    pod: LocalPod
    settings: CaptureSettings
    captured: Captured


@dataclass(frozen=True, slots=True)
class Served:
    """The keeper whose listeners learn where connections were meant to go."""

    pid: int
    cgroup: Path
    number: int


class Hooks:
    """`loaded` is called when programs are there for which a pod did not wait."""

    def __init__(self, instance: str, run_dir: Path, events: Events, loaded: Callable[[], None]) -> None:
        self._instance = instance
        self._cache = run_dir / "bpf-cache"
        self._events = events
        self._loaded = loaded
        self._alone = asyncio.Lock()
        self._egress: Egress | None = None  # there are pins: what stands can be taken away, whether or not anything can be loaded
        self._opened = False
        self._loading: asyncio.Task[None] | None = None
        self._problem = "not loaded yet"
        self._missed = False  # a pod did without, because the programs were not there yet
        self._lacking: dict[str, str] = {}
        self._keeper = 0  # pid; 0: none is known
        self._served: Served | None = None
        self._records: dict[str, Record] = {}  # by pod uid
        self._stopped: dict[str, int] = {}  # by pod uid the id of its cgroup, whose links are still there
        self._left_pods: set[int] = set()  # cookies
        self._left_links: set[int] = set()  # cgroup ids

    # -- what others ask ----------------------------------------------------------------------------------------------

    @property
    def records(self) -> Mapping[str, Record]:
        """Pods in force by uid: their cgroups and namespaces as the kernel numbers them."""
        return self._records

    def shown(self) -> dict[str, str]:
        """For `narrows status`: state (off, loading, ready, failed) and why."""
        if self._loading is None:
            return {"state": "off", "reason": "nobody asks for it"}
        if not self._loading.done():
            return {"state": "loading", "reason": ""}
        lacking = "; ".join(f"{name}: {why}" for name, why in self._lacking.items())
        return {"state": "failed", "reason": self._problem} if self._problem else {"state": "ready", "reason": lacking}

    @staticmethod
    def unfit(pod: LocalPod) -> str:
        """Why this pod as its runtime describes it cannot be captured by hooks; "" when it can. It may be otherwise later."""
        if not pod.cgroup:
            return "its runtime names no cgroup (narrows.cgroup of the pod file)"
        if not pod.addresses:
            return "it has no address"
        if not os.path.isdir(pod.cgroup):
            return f"its cgroup {pod.cgroup} is not there"
        return ""

    async def problem(self, pod: LocalPod) -> str:
        """Why hooks cannot capture this pod now, or "". Loads the programs if nobody has, and sees to it that the keeper is served."""
        self.begin()
        assert self._loading is not None
        await asyncio.wait([self._loading], timeout=LOAD_SECONDS)
        if not self._loading.done():
            self._missed = True
            return "the programs are still being loaded"
        if self._problem:
            return self._problem
        if said := await self._serve():
            return said
        assert self._served is not None
        if self._served.cgroup.is_relative_to(pod.cgroup):
            return f"its cgroup {pod.cgroup} is the keeper's too, whose own connections would come back to it"
        return ""

    # -- what is done -------------------------------------------------------------------------------------------------

    def keeper(self, pid: int) -> None:
        self._keeper = pid

    def begin(self) -> None:
        """Load the programs, once."""
        if self._loading is None:
            self._loading = asyncio.create_task(self._load(), name="load BPF programs")

    def again(self) -> None:
        """Once more, if that has failed."""
        if self._loading is not None and self._loading.done() and self._problem:
            self._loading = None
            self.begin()

    async def close(self) -> None:
        """Everything in force stays."""
        if self._loading is not None:
            self._loading.cancel()
            await asyncio.gather(self._loading, return_exceptions=True)

    async def capture(self, pod: LocalPod, settings: CaptureSettings, still: Callable[[], bool] = lambda: True) -> None:
        """Put a pod in, or change how. EgressError: it is as it was; OSError: its namespace cannot be entered.

        `still` is asked when nobody else is at work: nothing is done if not.
        """
        def work(egress: Egress) -> None:
            if not still():
                return
            made = egress.capture(pod.netns, pod.cgroup, pod.addresses, settings)
            before = self._records.get(pod.uid)
            self._records[pod.uid] = Record(pod, settings, made)
            self._left_pods.discard(made.cookie)
            self._left_links.discard(made.cgroup)
            self._stopped.pop(pod.uid, None)
            if before is not None and before.captured.cookie != made.cookie:
                egress.stop(before.captured.cookie)
            if before is not None and before.captured.cgroup != made.cgroup:
                self._unlink(egress, before.captured.cgroup)
        await self._do(work)

    async def held(self, pod: LocalPod) -> bool:
        """Whether anything captures it now, of ours or of an earlier agent's."""
        await self._open()
        if pod.uid in self._records or not (self._left_pods or self._left_links):
            return pod.uid in self._records
        cookie, cgroup = await asyncio.to_thread(_numbers, pod)
        return cookie in self._left_pods or cgroup in self._left_links

    async def stop(self, pod: LocalPod) -> None:
        """Capture no more of what it connects to; nothing to do for a pod that is not held. The links stay until `forget`."""
        await self._open()
        record = self._records.get(pod.uid)

        def work(egress: Egress) -> None:
            cookie, cgroup = (record.captured.cookie, record.captured.cgroup) if record is not None else _numbers(pod)
            if record is not None or cookie in self._left_pods or cgroup in self._left_links:
                self._records.pop(pod.uid, None)
                try:
                    egress.stop(cookie)
                except EgressError:  # somebody removed the maps' pins; programs that are linked have the maps still
                    self._unlink(egress, cgroup)
                self._stopped[pod.uid] = cgroup
            self._records.pop(pod.uid, None)
            self._left_pods.discard(cookie)
            self._left_links.discard(cgroup)
        if self._egress is not None:
            await self._do(work)

    async def forget(self, pod: LocalPod) -> None:
        """Take the links of a pod that was stopped."""
        if (cgroup := self._stopped.pop(pod.uid, None)) is not None:
            await self._do(lambda egress: self._unlink(egress, cgroup))

    async def look(self, known: Iterable[LocalPod], *, all_known: bool) -> dict[str, list[str]]:
        """What of each captured pod does not stand, by uid. What is the keeper's is repaired at once, what nobody claims is removed.

        `known`: pods of this node; `all_known`: that these are all. Programs or maps that somebody removed are loaded again.
        """
        await self._open()
        if self._egress is None:
            return {}
        try:
            if all_known and self._keeper and (self._left_pods or self._left_links):
                await self._reap(list(known))
            if not self._records:
                return {}
            await self._serve()
            return await self._do(self._look)
        except (EgressError, OSError) as error:
            self._lost(f"the pins of capture by eBPF are not as they were: {error}; loading again")
            await self._load()
            await self._serve()  # before any pod is put in again: what it connects to must be known to the proxy
            return {uid: ["programs and maps"] for uid in self._records}

    # -- inside -------------------------------------------------------------------------------------------------------

    def _look(self, egress: Egress) -> dict[str, list[str]]:
        records, served = dict(self._records), self._served
        standing = egress.standing({one.captured.cgroup for one in records.values()} | ({served.number} if served else set()))
        if served is not None and (wrong := egress.serves(standing, served.number)):
            self._served = None  # if this fails it is looked for anew
            egress.serve(str(served.cgroup))
            self._served = served
            self._events.add("Repaired", "keeper", f"somebody took socket hooks off the keeper's cgroup {served.cgroup}; repaired: "
                             f"{', '.join(wrong)}", warning=True)
        found = {}
        for uid, one in records.items():
            wrong = egress.lacks(standing, one.captured, one.pod.addresses, one.settings)
            try:
                if os.stat(one.pod.cgroup).st_ino != one.captured.cgroup:
                    wrong = [f"its cgroup {one.pod.cgroup} was made again"]
            except OSError:
                wrong = [f"its cgroup {one.pod.cgroup} is gone"]
            if wrong:
                found[uid] = wrong
        return found

    async def _open(self) -> None:
        """Find out, once, what an earlier agent of this instance left."""
        async with self._alone:
            if self._opened:
                return

            def work() -> tuple[Egress | None, set[int], set[int]]:
                for pins in pins_of_bpf.found(self._instance):
                    if pins.root.name == f"v{LAYOUT}" and (pins.maps / "pods").exists():
                        egress = Egress(pins)
                        return egress, set(egress.captured()), egress.linked()
                return None, set(), set()
            try:
                self._egress, self._left_pods, self._left_links = await asyncio.to_thread(work)
            except (EgressError, OSError) as error:
                self._lost(f"what an earlier agent left of capture by eBPF cannot be read: {error}")
            self._opened = True

    async def _load(self) -> None:
        await self._open()

        def work() -> tuple[Egress, dict[str, str], str]:
            pins = pins_of_bpf.claim(self._instance, LAYOUT)
            found = load(pins, self._cache)
            lacking = {name: why for name, why in found.hooks.items() if why}
            return Egress(pins, lacking), lacking, found.problem
        try:
            egress, self._lacking, self._problem = await asyncio.to_thread(work)
            if not self._problem or self._egress is None:
                self._egress = egress
            self._served = None  # with new pins it is served anew
        except (LoadError, PinError, OSError) as error:
            self._problem = str(error)
        if self._problem:
            self._events.add("EbpfUnavailable", "capture", f"capture by eBPF is not available, redirects capture what pods connect to: "
                             f"{self._problem}; {TRY_AGAIN}", warning=True)
        else:
            lacks = [f"{hook.lack} ({hook.name}: {self._lacking[hook.name]})" for hook in HOOKS if hook.name in self._lacking]
            self._events.add("EbpfReady", "capture", "socket hooks are loaded" + (f"; {'; '.join(lacks)}" if lacks else ""),
                             warning=bool(lacks))
        if self._missed:
            self._missed = False
            self._loaded()

    async def _serve(self) -> str:
        """See to it that the keeper of now is served. Returns why not, or ""."""
        pid = self._keeper
        if not pid:
            return "the keeper is away"
        if self._served is not None and self._served.pid == pid:
            return ""

        def work(egress: Egress) -> str:
            try:
                cgroup, root = of_process(pid), find_cgroup2()
            except LookupError as error:
                return str(error)
            if cgroup == root:
                return (f"the keeper (pid {pid}) is in the root of cgroup v2, whose hooks would see every process of the node; start it in "
                        "a cgroup of its own, as systemd and container runtimes do")
            before = self._served
            self._served = Served(pid, cgroup, egress.serve(str(cgroup)))
            self._left_links.discard(self._served.number)
            if before is not None and before.number != self._served.number:
                self._unlink(egress, before.number)
            return ""
        try:
            return await self._do(work)
        except (EgressError, OSError) as error:
            return str(error)

    async def _reap(self, known: list[LocalPod]) -> None:
        """Remove what an earlier agent left of pods that are gone. What is left of others they claim themselves."""
        keeper = self._keeper

        def work(egress: Egress) -> int:
            pods, cgroups = (set(numbers) for numbers in zip(*(_numbers(pod) for pod in known), strict=True)) if known else (set(), set())
            gone = self._left_pods - pods
            for cookie in gone:
                egress.stop(cookie)
            if self._records or self._left_pods - gone:  # somebody is captured, and the proxy has to hear of it
                with suppress(LookupError, OSError):
                    cgroups.add(os.stat(of_process(keeper)).st_ino)
            unlinked = self._left_links - cgroups
            for cgroup in unlinked:
                self._unlink(egress, cgroup)
            self._left_pods -= gone
            self._left_links -= unlinked
            return len(gone) + len(unlinked)
        if count := await self._do(work):
            self._events.add("EbpfCleaned", "capture", f"socket hooks of pods that are gone were removed ({count} entries)")

    def _lost(self, text: str) -> None:
        self._events.add("EbpfLost", "capture", text, warning=True)

    def _unlink(self, egress: Egress, cgroup: int) -> None:
        """Unless it is another pod's too: a runtime may put several into one."""
        if all(one.captured.cgroup != cgroup for one in self._records.values()):
            egress.unlink(cgroup)

    async def _do(self, work: Callable[[Egress], T]) -> T:
        async with self._alone:
            egress = self._egress
            if egress is None:
                raise EgressError("no programs are loaded")
            return await asyncio.to_thread(work, egress)


def _numbers(pod: LocalPod) -> tuple[int, int]:
    """Cookie and cgroup id; 0 for what is not there."""
    cookie = cgroup = 0
    with suppress(OSError):
        cookie = netns_cookie(pod.netns)
    with suppress(OSError):
        cgroup = os.stat(pod.cgroup).st_ino if pod.cgroup else 0
    return cookie, cgroup
