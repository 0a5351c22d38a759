"""What comes in, of capture by hooks: which pods sk_lookup captures, what an earlier agent left of that, and whether the keeper is served.

Everything here blocks, and is called by `Hooks`, one call at a time.
"""
from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from agent import netlink
from agent.capture.egress import netns_cookie
from agent.capture.ingress import Ingress, IngressError
from agent.capture.loader import Template
from agent.capture.pins import Pins
from agent.model.pod import CaptureSettings, LocalPod


@dataclass(frozen=True, slots=True)
class Inside:
    """A captured pod, as it was put in. `cookie`: of its namespace."""

    pod: LocalPod
    settings: CaptureSettings
    cookie: int
    redirected: bool  # rules redirect, too


class Inward:
    """`problem`: why nobody can be put in, or ""."""

    def __init__(self) -> None:
        self.problem = "not loaded yet"
        self.records: dict[str, Inside] = {}  # by pod uid
        self.left_pods: set[int] = set()  # cookies
        self.left_links: set[int] = set()  # cgroup ids
        self._ingress: Ingress | None = None  # there are pins: what stands can be taken away, whether or not anything can be loaded
        self._served: tuple[int, Path, int] | None = None  # the keeper's pid, and its cgroup
        self._unadopted = ""  # why listeners that are older than the hook are not known

    def open(self, pins: Pins) -> None:
        """Find out what an earlier agent left. OSError when that cannot be read."""
        if (pins.maps / "inbound").exists():
            self._ingress = Ingress(pins)
            self.left_pods, self.left_links = set(self._ingress.captured()), self._ingress.linked()

    def loaded(self, pins: Pins, lookup: Template | None, problem: str) -> None:
        self.problem = problem or ("" if lookup is not None else "no program is loaded")
        self._served = None  # with new pins it is served anew
        if not self.problem or self._ingress is None:
            self._ingress = Ingress(pins, lookup)

    def serving(self, pid: int) -> bool:
        """Whether there is nothing to do for this keeper."""
        return bool(self.problem) or (self._served is not None and self._served[0] == pid)

    def serve(self, pid: int, cgroup: Path) -> str:
        """See to it that this keeper is served. Returns why not, or ""."""
        if self.problem:
            return self.problem
        if self._served is not None and self._served[0] == pid:
            return ""
        try:
            ingress = self._known()
            before, number = self._served, ingress.serve(str(cgroup))
            self._served = pid, cgroup, number
            self.left_links.discard(number)
            if before is not None and before[2] != number:
                ingress.unlink(before[2])
        except (IngressError, OSError) as error:
            return str(error)
        self._adopt(pid)
        return ""

    def capture(self, pod: LocalPod, settings: CaptureSettings, *, redirected: bool) -> None:
        """Put a pod in, or change how. IngressError: it is as it was."""
        ingress = self._known()
        with suppress(OSError):  # said by `capture` itself
            if self._served is not None and not ingress.has_listener(netns_cookie(pod.netns)):
                self._adopt(self._served[0])
        try:
            cookie = ingress.capture(pod.netns, pod.addresses, settings, redirected=redirected)
        except IngressError as error:
            raise IngressError(f"{error}; {self._unadopted}" if self._unadopted else str(error)) from None
        before = self.records.get(pod.uid)
        self.records[pod.uid] = Inside(pod, settings, cookie, redirected)
        self.left_pods.discard(cookie)
        if before is not None and before.cookie != cookie:  # the runtime made the namespace again
            ingress.release(before.cookie)

    def holds(self, pod: LocalPod, cookie: int) -> bool:
        """Whether anything captures it, of ours or of an earlier agent's."""
        return pod.uid in self.records or cookie in self.left_pods

    def stop(self, pod: LocalPod, cookie: int) -> None:
        """Capture no more of what comes to it; nothing to do for one that is not held. `cookie`: of its namespace now, 0: there is none."""
        record = self.records.pop(pod.uid, None)
        lived = record.cookie if record is not None else cookie
        if record is None and lived not in self.left_pods:
            return
        self.left_pods.discard(lived)
        ingress = self._known()
        ingress.release(lived, pod.netns if lived == cookie and netlink.is_namespace(pod.netns) else None)

    def look(self) -> tuple[dict[str, list[str]], list[str]]:
        """What does not stand: of each captured pod by uid, and of the keeper, which is repaired at once. OSError when pins are gone."""
        if not self.records or self._ingress is None:
            return {}, []
        ingress, records = self._ingress, dict(self.records)
        wrong: list[str] = []
        if self._served is not None and (wrong := ingress.serves(self._served[2])):
            pid, cgroup, _ = self._served
            self._served = None  # if this fails it is looked for anew
            if said := self.serve(pid, cgroup):
                raise IngressError(said)
        entered = ingress.entered({one.pod.netns: one.cookie for one in records.values()})
        lives = self._served is not None and os.path.exists(f"/proc/{self._served[0]}")  # else its listeners ended with it
        found = {}
        for uid, one in records.items():
            with suppress(OSError):  # the pod is going
                lacks = ingress.lacks(entered, one.pod.netns, one.cookie, one.pod.addresses, one.settings)
                if lives and one.cookie not in entered.listeners:
                    lacks.append("its listener in the map `listeners`")
                if lacks and not one.redirected:
                    found[uid] = lacks
        return found, wrong

    def reap(self, cookies: set[int], keeper: int) -> int:
        """Remove what an earlier agent left of pods of which none is known. `keeper`: id of the cgroup that stays linked while a pod is
        captured. Returns how many."""
        if self._ingress is None:
            return 0
        gone = self.left_pods - cookies
        for cookie in gone:
            self._ingress.release(cookie)
        self.left_pods -= gone
        unlinked = self.left_links - ({keeper} if self.records or self.left_pods else set())
        for number in unlinked:
            self._ingress.unlink(number)
        self.left_links -= unlinked
        return len(gone) + len(unlinked)

    @property
    def left(self) -> bool:
        return bool(self.left_pods or self.left_links)

    def _adopt(self, pid: int) -> None:
        try:
            self._known().adopt(pid)
            self._unadopted = ""
        except IngressError as error:
            self._unadopted = str(error)

    def _known(self) -> Ingress:
        if self._ingress is None:
            raise IngressError(self.problem or "no programs are loaded")
        return self._ingress
