"""Looks at every captured pod again and again, and where something is not as it was, compares and repairs."""
from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping

from agent import netlink
from agent.app.capture import Capture
from agent.app.events import Events
from agent.app.method import Way
from agent.app.tracked import State, Tracked
from agent.capture import watch
from agent.capture.egress import EgressError
from agent.capture.ingress import IngressError
from agent.capture.plan import Plan
from agent.capture.reconcile import Backend, CaptureError
from agent.model.pod import LocalPod

WATCH_SECONDS = 2.5  # each captured pod is looked at so often: half of the 5 s within which a foreign edit is to be repaired


class Repair:
    """`pods` are those of the agent, by uid."""

    def __init__(self, pods: Mapping[str, Tracked], capture: Capture, events: Events) -> None:
        self._pods = pods
        self._capture = capture
        self._events = events
        self.count = 0
        self.exposed_seconds = 0.0  # how long, at most, capture was not as planned before it was repaired

    async def look(self, known: Iterable[LocalPod], *, all_known: bool) -> None:
        """One look. `known`: the pods of this node; `all_known`: these are all."""
        lacking = await self._capture.hooks.look(known, all_known=all_known)
        todo = {one.pod.netns: (one, one.way) for one in self._pods.values() if one.state is State.CAPTURED and one.way}
        if not todo:
            return
        now = time.monotonic()
        chosen = self._capture.rules.chosen
        prints = await asyncio.to_thread(watch.prints, {netns: _target(way.plan, chosen) for netns, (_, way) in todo.items()})
        work = []
        for netns, (one, way) in todo.items():
            found, lacks = prints.get(netns, b""), lacking.get(one.pod.uid, [])
            if not found and not netlink.is_namespace(netns):
                continue  # the pod is going, and its namespace went first
            if way.choice.waits and not self._capture.hooks.unfit(one.pod):
                one.changed.set()  # it has a cgroup now
            elif found and found == one.seen and not lacks:
                one.looked = now
            else:
                work.append(self._repair(one, way, found, lacks, now))
        await asyncio.gather(*work)

    async def _repair(self, one: Tracked, way: Way, found: bytes, lacks: list[str], now: float) -> None:
        """Compare one pod with its plan. `found` was read before: what changes meanwhile makes another print."""
        if not one.stands(way) or one.changed.is_set():
            return
        if await asyncio.to_thread(_other_families, one.pod.netns, way.plan):
            one.changed.set()  # IPv6 was switched on or off: `_enter` makes another plan
            return
        try:
            if lacks:
                await self._capture.hooks.mend(one.pod, way.settings, lambda: one.stands(way))
        except (EgressError, IngressError, OSError):
            one.changed.set()  # what hooks cannot do any more redirects do; `_enter` says so
            return
        try:
            wrong = [*lacks, *await self._capture.rules.repair(one.pod.netns, way.plan, lambda: one.stands(way))]
        except (CaptureError, OSError) as error:
            if one.stands(way) and not one.deleted:
                one.seen = b""
                one.step(State.ENTERING, f"its rules were changed and cannot be repaired: {error}")
                one.changed.set()  # `_work` tells, tries again, and waits longer each time
            return
        if not one.stands(way):
            return
        if not wrong:
            one.seen, one.looked = found, now
            return
        exposed = time.monotonic() - (one.looked or now)
        one.repairs += 1
        one.seen, one.looked = b"", time.monotonic()
        self.count += 1
        self.exposed_seconds += exposed
        what = "the pod's socket hooks" if lacks else "the rules in the pod's namespace"
        self._events.add("Repaired", one.about, f"somebody changed {what}; repaired "
                         f"({one.repairs}), after at most {exposed:.1f} s: {'; '.join(wrong)[:500]}", warning=True)


def _other_families(netns: str, plan: Plan) -> bool:
    """Whether the namespace has other families now than those of the plan. Blocking; a namespace that is going has no others."""
    try:
        return set(netlink.families(netns)) != set(plan.families)
    except OSError:
        return False


def _target(plan: Plan, backend: Backend | None) -> watch.Target:
    legacy = backend is None or backend.name == "iptables"
    return watch.Target(plan.families, tuple(dict.fromkeys(table.name for table in plan.tables)) if legacy else None)
