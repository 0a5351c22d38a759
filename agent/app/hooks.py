"""Socket hooks on this node: loaded once, the keeper's cgroup served, pods put in and taken out, and all of it looked at again and again.

The kernel keeps what an earlier agent put in force, with nobody's help. So this begins with what is pinned (`_left`): pods claim theirs
as they are decided on, and what nobody claims is of pods that are gone. Everything that asks the kernel runs in a thread, one at a time.
What pods connect to (egress) and what comes to them (ingress, inward.py) fail apart: a kernel that refuses the one may take the other.
"""
from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from agent import netlink
from agent.app.events import Events
from agent.app.inward import Inward
from agent.app.own import Own, incomplete, own_of, told
from agent.capture import pins as pins_of_bpf
from agent.capture.egress import LAYOUT, Captured, Egress, EgressError, netns_cookie
from agent.capture.ingress import IngressError
from agent.capture.loader import HOOKS, INGRESS, Loaded, LoadError, load
from agent.capture.pins import PinError, Pins
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
    own: Own


@dataclass(frozen=True, slots=True)
class Sides:
    """Why hooks cannot capture in a direction; "" when they can."""

    egress: str
    ingress: str

    @classmethod
    def alike(cls, why: str) -> Sides:
        return cls(why, why)


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
        self._inward = Inward()

    # -- what others ask ----------------------------------------------------------------------------------------------

    @property
    def records(self) -> Mapping[str, Record]:
        """Pods by uid that are in force with what they connect to: their cgroups and namespaces as the kernel numbers them."""
        return self._records

    def shown(self) -> dict[str, Any]:
        """For `narrows status`: state (off, loading, ready, failed), why, and which directions can be captured."""
        if self._loading is None:
            return {"state": "off", "reason": "nobody asks for it", "directions": []}
        if not self._loading.done():
            return {"state": "loading", "reason": "", "directions": []}
        lacking = "; ".join(f"{name}: {why}" for name, why in self._lacking.items())
        if not self.able:
            return {"state": "failed", "reason": both(self._problem, self._inward.problem), "directions": []}
        return {"state": "ready", "reason": lacking, "directions": self.able}

    def families(self, uid: str) -> list[dict[str, str | None]]:
        """Of a pod whose connects hooks capture: where they go in each family, or why they are refused. Else empty."""
        return record.own.shown() if (record := self._records.get(uid)) is not None else []

    @property
    def able(self) -> list[str]:
        """Directions for which the programs are there."""
        return [name for name, why in (("egress", self._problem), ("ingress", self._inward.problem)) if not why]

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

    async def problems(self, pod: LocalPod) -> Sides:
        """Why hooks cannot capture this pod now. Loads the programs if nobody has, and sees to it that the keeper is served."""
        self.begin()
        assert self._loading is not None
        await asyncio.wait([self._loading], timeout=LOAD_SECONDS)
        if not self._loading.done():
            self._missed = True
            return Sides.alike("the programs are still being loaded")
        if self._problem and self._inward.problem:
            return Sides(self._problem, self._inward.problem)
        said = await self._serve()
        egress = self._problem or said.egress
        if not egress and self._served is not None and self._served.cgroup.is_relative_to(pod.cgroup):
            egress = f"its cgroup {pod.cgroup} is the keeper's too, whose own connections would come back to it"
        return Sides(egress, self._inward.problem or said.ingress)

    # -- what is done -------------------------------------------------------------------------------------------------

    def keeper(self, pid: int) -> None:
        self._keeper = pid

    def begin(self) -> None:
        """Load the programs, once."""
        if self._loading is None:
            self._loading = asyncio.create_task(self._load(), name="load BPF programs")

    def again(self) -> None:
        """Once more, if that has failed."""
        if self._loading is not None and self._loading.done() and (self._problem or self._inward.problem):
            self._loading = None
            self.begin()

    async def close(self) -> None:
        """Everything in force stays."""
        if self._loading is not None:
            self._loading.cancel()
            await asyncio.gather(self._loading, return_exceptions=True)

    async def capture(self, pod: LocalPod, settings: CaptureSettings, still: Callable[[], bool] = lambda: True) -> None:
        """Put in what a pod connects to, or change how. EgressError: it is as it was; OSError: its namespace cannot be entered.

        `still` is asked when nobody else is at work: nothing is done if not.
        """
        def work(egress: Egress) -> None:
            if not still():
                return
            before = self._records.get(pod.uid)
            there = netlink.own_addresses([pod.netns] if incomplete(pod) else [])
            own = own_of(pod, there.get(pod.netns, ()), before.own if before else None)
            made = egress.capture(pod.netns, pod.cgroup, own.addresses, settings)
            self._records[pod.uid] = Record(pod, settings, made, own)
            self._left_pods.discard(made.cookie)
            self._left_links.discard(made.cgroup)
            self._stopped.pop(pod.uid, None)
            if before is not None and before.captured.cookie != made.cookie:
                egress.stop(before.captured.cookie)
            if before is not None and before.captured.cgroup != made.cgroup:
                self._unlink(egress, before.captured.cgroup)
        await self._do(work)

    async def capture_inward(self, pod: LocalPod, settings: CaptureSettings, *, redirected: bool = False) -> None:
        """The same of what comes to it. IngressError: it is as it was. `redirected`: rules redirect it, too."""
        await self._apart(lambda: self._inward.capture(pod, settings, redirected=redirected))

    async def mend(self, pod: LocalPod, settings: CaptureSettings, still: Callable[[], bool]) -> None:
        """Put a pod in again as it is in. EgressError, IngressError: it lacks something still."""
        if pod.uid in self._records:
            await self.capture(pod, settings, still)

        def work() -> None:
            if pod.uid in self._inward.records and still():
                self._inward.capture(pod, settings, redirected=False)
        await self._apart(work)

    async def held(self, pod: LocalPod) -> tuple[bool, bool]:
        """Whether anything captures what it connects to, and what comes to it, of ours or of an earlier agent's."""
        await self._open()
        egress, ingress = pod.uid in self._records, pod.uid in self._inward.records
        if (egress or not (self._left_pods or self._left_links)) and (ingress or not self._inward.left_pods):
            return egress, ingress
        cookie, cgroup = await asyncio.to_thread(_numbers, pod)
        return egress or cookie in self._left_pods or cgroup in self._left_links, self._inward.holds(pod, cookie)

    async def stop(self, pod: LocalPod) -> None:
        """Capture no more of what it connects to; nothing to do for a pod that is not held. Its cgroup's links stay until `forget`."""
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

    async def stop_inward(self, pod: LocalPod) -> None:
        """Capture no more of what comes to it. Connections that live go on."""
        await self._open()
        await self._apart(lambda: self._inward.stop(pod, _numbers(pod)[0]))

    async def forget(self, pod: LocalPod) -> None:
        """Take the links of a pod that was stopped."""
        if (cgroup := self._stopped.pop(pod.uid, None)) is not None:
            await self._do(lambda egress: self._unlink(egress, cgroup))

    async def look(self, known: Iterable[LocalPod], *, all_known: bool) -> dict[str, list[str]]:
        """What of each captured pod does not stand, by uid. What is the keeper's is repaired at once, what nobody claims is removed.

        `known`: pods of this node; `all_known`: that these are all. Programs or maps that somebody removed are loaded again.
        """
        await self._open()
        try:
            if all_known and self._keeper and (self._left_pods or self._left_links or self._inward.left):
                await self._reap(list(known))
            if not self._records and not self._inward.records:
                return {}
            await self._serve()
            found = await self._do(self._look) if self._records else {}
            for uid, wrong in (await self._apart(self._look_inward)).items():
                found.setdefault(uid, []).extend(wrong)
            return found
        except (EgressError, IngressError, OSError) as error:
            self._lost(f"the pins of capture by eBPF are not as they were: {error}; loading again")
            await self._load()
            await self._serve()  # before any pod is put in again: what it connects to must be known to the proxy
            return {uid: ["programs and maps"] for uid in {**self._records, **self._inward.records}}

    # -- inside -------------------------------------------------------------------------------------------------------

    def _look(self, egress: Egress) -> dict[str, list[str]]:
        records, served = dict(self._records), self._served
        standing = egress.standing({one.captured.cgroup for one in records.values()} | ({served.number} if served else set()))
        if served is not None and (wrong := egress.serves(standing, served.number)):
            self._served = None  # if this fails it is looked for anew
            egress.serve(str(served.cgroup))
            self._served = served
            self._repaired(wrong)
        found = {}
        there = netlink.own_addresses([one.pod.netns for one in records.values() if incomplete(one.pod)])
        for uid, one in records.items():
            wrong = egress.lacks(standing, one.captured, one.own.addresses, one.settings)
            try:
                if os.stat(one.pod.cgroup).st_ino != one.captured.cgroup:
                    wrong = [f"its cgroup {one.pod.cgroup} was made again"]
            except OSError:
                wrong = [f"its cgroup {one.pod.cgroup} is gone"]
            if wrong:
                found[uid] = wrong
            elif (have := there.get(one.pod.netns)) is not None and (own := own_of(one.pod, have, one.own)) != one.own:
                try:
                    self._follow(egress, one, own)
                except (EgressError, OSError):
                    found[uid] = ["its own address"]
        return found

    def _follow(self, egress: Egress, one: Record, own: Own) -> None:
        """The pod's namespace has another address now. EgressError, OSError: it is as it was."""
        made = egress.capture(one.pod.netns, one.pod.cgroup, own.addresses, one.settings)
        self._records[one.pod.uid] = replace(one, captured=made, own=own)
        self._events.add("OwnAddress", f"pod {one.pod.ref}", told(own))

    def _look_inward(self) -> dict[str, list[str]]:
        found, wrong = self._inward.look()
        if wrong:
            self._repaired(wrong)
        return found

    def _repaired(self, wrong: list[str]) -> None:
        self._events.add("Repaired", "keeper", f"somebody took socket hooks off the keeper's cgroup; repaired: {', '.join(wrong)}",
                         warning=True)

    async def _open(self) -> None:
        """Find out, once, what an earlier agent of this instance left."""
        async with self._alone:
            if self._opened:
                return

            def work() -> None:
                for pins in pins_of_bpf.found(self._instance):
                    if pins.root.name != f"v{LAYOUT}":
                        continue
                    self._inward.open(pins)
                    if (pins.maps / "pods").exists():
                        self._egress = Egress(pins)
                        self._left_pods, self._left_links = set(self._egress.captured()), self._egress.linked()
            try:
                await asyncio.to_thread(work)
            except (EgressError, OSError) as error:
                self._lost(f"what an earlier agent left of capture by eBPF cannot be read: {error}")
            self._opened = True

    async def _load(self) -> None:
        await self._open()

        def work() -> tuple[Pins, Loaded]:
            pins = pins_of_bpf.claim(self._instance, LAYOUT)
            return pins, load(pins, self._cache, hooks=(*HOOKS, *INGRESS))
        try:
            pins, found = await asyncio.to_thread(work)
            self._lacking = {name: why for name, why in found.hooks.items() if why}
            self._problem = found.problem
            if not self._problem or self._egress is None:
                self._egress = Egress(pins, self._lacking)
            self._inward.loaded(pins, found.lookup, found.ingress_problem)
            self._served = None  # with new pins it is served anew
        except (LoadError, PinError, OSError) as error:
            self._problem = self._inward.problem = str(error)
        if said := both(self._problem, self._inward.problem):
            what = {"egress": "what pods connect to", "ingress": "what comes to pods"}
            able = [what[name] for name in self.able]
            self._events.add("EbpfUnavailable", "capture", f"capture by eBPF is not available, redirects capture "
                             f"{' and '.join(text for text in what.values() if text not in able)}: {said}; {TRY_AGAIN}", warning=True)
        if self.able:
            lacks = [f"{hook.lack} ({hook.name}: {self._lacking[hook.name]})" for hook in HOOKS if hook.lack and hook.name in self._lacking]
            self._events.add("EbpfReady", "capture", "socket hooks are loaded" + (f"; {'; '.join(lacks)}" if lacks else ""),
                             warning=bool(lacks))
        if self._missed:
            self._missed = False
            self._loaded()

    async def _serve(self) -> Sides:
        """See to it that the keeper of now is served. Says why not."""
        pid = self._keeper
        if not pid:
            return Sides.alike("the keeper is away")
        if self._served is not None and self._served.pid == pid and self._inward.serving(pid):
            return Sides("", "")
        try:
            cgroup, root = await asyncio.to_thread(lambda: (of_process(pid), find_cgroup2()))
        except (LookupError, OSError) as error:
            return Sides.alike(str(error))
        if cgroup == root:
            return Sides.alike(f"the keeper (pid {pid}) is in the root of cgroup v2, whose hooks would see every process of the node; "
                               "start it in a cgroup of its own, as systemd and container runtimes do")

        def work(egress: Egress) -> None:
            before = self._served
            self._served = Served(pid, cgroup, egress.serve(str(cgroup)))
            self._left_links.discard(self._served.number)
            if before is not None and before.number != self._served.number:
                self._unlink(egress, before.number)
        said = ""
        try:
            if not self._problem and (self._served is None or self._served.pid != pid):
                await self._do(work)
        except (EgressError, OSError) as error:
            said = str(error)
        return Sides(said, await self._apart(lambda: self._inward.serve(pid, cgroup)))

    async def _reap(self, known: list[LocalPod]) -> None:
        """Remove what an earlier agent left of pods that are gone. What is left of others they claim themselves."""
        keeper = self._keeper

        def work() -> int:
            pods, cgroups = (set(numbers) for numbers in zip(*(_numbers(pod) for pod in known), strict=True)) if known else (set(), set())
            of_keeper = 0
            with suppress(LookupError, OSError):
                of_keeper = os.stat(of_process(keeper)).st_ino
            gone, unlinked = self._left_pods - pods, set[int]()
            if (egress := self._egress) is not None:
                for cookie in gone:
                    egress.stop(cookie)
                if self._records or self._left_pods - gone:  # somebody is captured, and the proxy has to hear of it
                    cgroups.add(of_keeper)
                unlinked = self._left_links - cgroups
                for cgroup in unlinked:
                    self._unlink(egress, cgroup)
                self._left_pods -= gone
                self._left_links -= unlinked
            return len(gone) + len(unlinked) + self._inward.reap(pods, of_keeper)
        if count := await self._apart(work):
            self._events.add("EbpfCleaned", "capture", f"socket hooks of pods that are gone were removed ({count} entries)")

    def _lost(self, text: str) -> None:
        self._events.add("EbpfLost", "capture", text, warning=True)

    def _unlink(self, egress: Egress, cgroup: int) -> None:
        """Unless it is another pod's too: a runtime may put several into one."""
        if all(one.captured.cgroup != cgroup for one in self._records.values()):
            egress.unlink(cgroup)

    async def _do(self, work: Callable[[Egress], T]) -> T:
        def there() -> T:
            if self._egress is None:
                raise EgressError("no programs are loaded")
            return work(self._egress)
        return await self._apart(there)

    async def _apart(self, work: Callable[[], T]) -> T:
        """In a thread, while nobody else asks the kernel."""
        async with self._alone:
            return await asyncio.to_thread(work)


def both(egress: str, ingress: str) -> str:
    """What is said of the two directions, in one."""
    if egress == ingress:
        return egress
    return "; ".join(f"{name}: {text}" for name, text in (("egress", egress), ("ingress", ingress)) if text)


def _numbers(pod: LocalPod) -> tuple[int, int]:
    """Cookie and cgroup id; 0 for what is not there."""
    cookie = cgroup = 0
    with suppress(OSError):
        cookie = netns_cookie(pod.netns)
    with suppress(OSError):
        cgroup = os.stat(pod.cgroup).st_ino if pod.cgroup else 0
    return cookie, cgroup
