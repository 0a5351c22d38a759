"""Brings a pod's capture to what its method asks, in an order in which no connect passes by and none is turned to nobody.

    redirects alone       rules
    hooks alone           rules that let 15001 pass and redirect only what comes in -> hooks
    redirects to hooks    rules that let 15001 pass, with the redirect -> hooks -> rules without the redirect
    hooks to redirects    rules that let 15001 pass, with the redirect -> hooks stop -> rules -> links go

While both are in force a connect meets the hook, and the redirect finds that it stays in the pod. Listeners are there before all of it.
"""
from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass, replace

from agent import netlink
from agent.app.hooks import Hooks
from agent.app.method import EBPF, Choice, Way, wants_hooks
from agent.capture.egress import EgressError
from agent.capture.plan import Plan, plan
from agent.capture.reconcile import CaptureError, Reconciler
from agent.model.pod import CaptureSettings, LocalPod


@dataclass(frozen=True, slots=True)
class Entered:
    """A pod is captured. `changed` names what was written; `seconds` is the duration."""

    way: Way
    changed: tuple[str, ...]
    seconds: float


class Capture:
    """Of one instance. `node`: its --capture. Any call may raise CaptureError, and OSError for a namespace that cannot be entered."""

    def __init__(self, instance: str, node: str, reconciler: Reconciler, hooks: Hooks) -> None:
        self._instance = instance
        self._node = node
        self.rules = reconciler
        self.hooks = hooks

    @property
    def backend(self) -> str:
        """What redirects are written with."""
        return chosen.name if (chosen := self.rules.chosen) else "iptables"

    async def choose(self, pod: LocalPod, asked: str) -> Choice:
        """`asked`: what the pod's annotation says, `auto` when it says nothing."""
        if not wants_hooks(self._node, asked):
            return Choice(False)
        if said := await asyncio.to_thread(self.hooks.unfit, pod):
            return Choice(False, said, waits=True)
        said = await self.hooks.problem(pod)
        return Choice(not said, said)

    async def enter(self, pod: LocalPod, settings: CaptureSettings, choice: Choice, before: Way | None, *, old: bool) -> Entered:
        """Capture a pod, or change how. `before`: as it is captured now; `old`: an earlier agent may have captured it, who knows how.
        `settings.dns` set: somebody answers the pod's DNS questions already.

        On an error nothing of it is captured.
        """
        started = time.monotonic()
        # of the namespace and not of the pod's addresses: one that has IPv6 and no address yet may get one
        families = await asyncio.to_thread(netlink.families, pod.netns)
        changed: list[str] = []

        async def rules(*, redirect: bool, hooks: bool) -> Plan:
            wish = plan(settings, families, self._instance, redirect=redirect, hooks=hooks, dns=bool(settings.dns))
            changed.extend((await self.rules.apply(pod.netns, wish)).changed)
            return wish

        try:
            held = await self.hooks.held(pod)
            if choice.hooks:
                if not held:
                    await rules(redirect=old or (before is not None and not before.hooked), hooks=True)
                try:
                    await self.hooks.capture(pod, settings)
                except EgressError as error:  # as it was before
                    choice = replace(choice, hooks=False, why=str(error))
                else:
                    wish = await rules(redirect=False, hooks=True)
                    return Entered(Way(wish, settings, EBPF, self.backend, choice), (*changed, *([] if held else ["socket hooks"])),
                                   time.monotonic() - started)
            if held:
                await rules(redirect=True, hooks=True)
                await self.hooks.stop(pod)
                changed.append("no socket hooks")
            wish = await rules(redirect=True, hooks=False)
            with suppress(EgressError):
                await self.hooks.forget(pod)
            return Entered(Way(wish, settings, self.backend, self.backend, choice), tuple(changed), time.monotonic() - started)
        except CaptureError:
            with suppress(EgressError, OSError):
                await self.hooks.stop(pod)
            raise

    async def captured(self, pod: LocalPod) -> bool:
        """Whether connections in the pod's namespace are turned to us. A namespace that cannot be looked into has none."""
        if await self.hooks.held(pod):
            return True
        try:
            chains = await self.rules.chains(pod.netns)
        except (CaptureError, OSError):
            return False
        return any(names and "nat" in table for table, names in chains.items())

    async def release(self, pod: LocalPod) -> None:
        """New connections go past us; live ones keep what they need until `remove`."""
        await self._stop(pod)
        await self.rules.release(pod.netns)

    async def remove(self, pod: LocalPod) -> None:
        """Everything of ours goes, also when the namespace has gone before."""
        await self._stop(pod)
        with suppress(EgressError):
            await self.hooks.forget(pod)
        await self.rules.remove(pod.netns)

    async def _stop(self, pod: LocalPod) -> None:
        with suppress(EgressError):  # somebody removed the maps, and with them what they captured
            await self.hooks.stop(pod)
