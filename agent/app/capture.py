"""Brings a pod's capture to what its method asks, in an order in which no connect passes by and none is turned to nobody.

    redirects alone       rules
    hooks alone           rules that let 15001 pass and redirect only what hooks do not capture -> hooks
    redirects to hooks    rules that let 15001 pass, with the redirect -> hooks -> rules without the redirect
    hooks to redirects    rules that let 15001 pass, with the redirect -> hooks stop -> rules -> links go

That is egress; of ingress 15006 is let pass by sk_lookup while rules redirect to it too. What a pod connects to and what comes to it
change in the same steps, each in its own direction. While both are in force a connect meets the hook, and the redirect finds that it
stays in the pod; what comes in meets the redirect. Listeners are there before all of it.
"""
from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass, replace

from agent import netlink
from agent.app.hooks import Hooks
from agent.app.method import EBPF, Choice, Way, wanted
from agent.capture.egress import EgressError
from agent.capture.ingress import IngressError
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
        out, inside = wanted(self._node, asked)
        if not (out or inside):
            return Choice(False, False)
        unfit = await asyncio.to_thread(self.hooks.unfit, pod)
        said = await self.hooks.problems(pod)
        egress, ingress = (unfit or said.egress) if out else "", said.ingress if inside else ""
        return Choice(out and not egress, inside and not ingress, egress, ingress, waits=out and bool(unfit))

    async def enter(self, pod: LocalPod, settings: CaptureSettings, choice: Choice, before: Way | None, *, old: bool) -> Entered:
        """Capture a pod, or change how. `before`: as it is captured now; `old`: an earlier agent may have captured it, who knows how.
        `settings.dns` set: somebody answers the pod's DNS questions already.

        On an error nothing of it is captured.
        """
        started = time.monotonic()
        # of the namespace and not of the pod's addresses: one that has IPv6 and no address yet may get one
        families = await asyncio.to_thread(netlink.families, pod.netns)
        changed: list[str] = []

        async def rules(*, redirect: bool, hooks: bool, inbound: bool) -> Plan:
            wish = plan(settings, families, self._instance, redirect=redirect, hooks=hooks, inbound=inbound, dns=bool(settings.dns))
            changed.extend((await self.rules.apply(pod.netns, wish)).changed)
            return wish

        try:
            held_out, held_in = await self.hooks.held(pod)
            stood = before.plan.redirects if before is not None else ()
            found = await self._redirects(pod) if old else {chain.hook for table in stood for chain in table.chains}
            out, inside = not held_out and "OUTPUT" in found, not held_in and "PREROUTING" in found
            turned = "PREROUTING" in found  # an agent may have ended half way
            if (choice.egress and not held_out) or (choice.ingress and not held_in):
                await rules(redirect=not held_out and (out or not choice.egress), hooks=held_out or choice.egress,
                            inbound=not held_in and (inside or not choice.ingress))
            choice = await self._hook(pod, settings, choice, redirected=turned)
            if (held_out and not choice.egress) or (held_in and not choice.ingress):
                if held_in and not choice.ingress:
                    with suppress(IngressError):  # it lets 15006 pass then; else who connects is refused for a moment
                        await self.hooks.capture_inward(pod, settings, redirected=True)
                await rules(redirect=not choice.egress, hooks=True, inbound=not choice.ingress)
                await self._unhook(pod, egress=not choice.egress, ingress=not choice.ingress)
                changed.append("no hooks any more")
            wish = await rules(redirect=not choice.egress, hooks=choice.egress, inbound=not choice.ingress)
            if found and not wish.redirects:
                changed.extend((await self.rules.release(pod.netns)).changed)
            if choice.ingress and turned:
                choice = await self._alone(pod, settings, choice)
                if not choice.ingress:
                    wish = await rules(redirect=not choice.egress, hooks=choice.egress, inbound=True)
            if not choice.egress:
                with suppress(EgressError):
                    await self.hooks.forget(pod)
            if (choice.egress and not held_out) or (choice.ingress and not held_in):
                changed.append("hooks")
            way = Way(wish, settings, EBPF if choice.egress else self.backend, EBPF if choice.ingress else self.backend, choice)
            return Entered(way, tuple(changed), time.monotonic() - started)
        except CaptureError:
            await self._unhook(pod)
            raise

    async def _hook(self, pod: LocalPod, settings: CaptureSettings, choice: Choice, *, redirected: bool) -> Choice:
        """Put the pod into the hooks that are chosen. What fails is as it was before, and is not chosen any more."""
        if choice.egress:
            try:
                await self.hooks.capture(pod, settings)
            except EgressError as error:
                choice = replace(choice, egress=False, why_egress=str(error))
        if choice.ingress:
            try:
                await self.hooks.capture_inward(pod, settings, redirected=redirected)
            except IngressError as error:
                choice = replace(choice, ingress=False, why_ingress=str(error))
        return choice

    async def _alone(self, pod: LocalPod, settings: CaptureSettings, choice: Choice) -> Choice:
        """The redirect has gone: sk_lookup closes 15006."""
        try:
            await self.hooks.capture_inward(pod, settings)
        except IngressError as error:
            with suppress(IngressError):
                await self.hooks.stop_inward(pod)
            return replace(choice, ingress=False, why_ingress=str(error))
        return choice

    async def _unhook(self, pod: LocalPod, *, egress: bool = True, ingress: bool = True) -> None:
        """Both at once, so that each goes though the other fails: somebody removed the maps, and with them what they captured."""
        if egress:
            with suppress(EgressError, OSError):
                await self.hooks.stop(pod)
        if ingress:
            with suppress(IngressError, OSError):
                await self.hooks.stop_inward(pod)

    async def captured(self, pod: LocalPod) -> bool:
        """Whether connections in the pod's namespace are turned to us. A namespace that cannot be looked into has none."""
        if any(await self.hooks.held(pod)):
            return True
        try:
            return bool(await self._redirects(pod))
        except (CaptureError, OSError):
            return False

    async def _redirects(self, pod: LocalPod) -> set[str]:
        """From where rules of ours redirect: OUTPUT, PREROUTING, or both."""
        chains = await self.rules.chains(pod.netns)
        return {name.rpartition("_")[2] for table, names in chains.items() if "nat" in table for name in names}

    async def release(self, pod: LocalPod) -> None:
        """New connections go past us; live ones keep what they need until `remove`."""
        if (await self.hooks.held(pod))[1]:
            await self._mark(pod)
        await self._unhook(pod)
        await self.rules.release(pod.netns)

    async def _mark(self, pod: LocalPod) -> None:
        """A connection that came in by sk_lookup may need a way to the application yet, as for its next request. Marks make it then."""
        families = await asyncio.to_thread(netlink.families, pod.netns)
        if not any("mangle" in table for table in await self.rules.chains(pod.netns)):
            wish = plan(CaptureSettings(), families, self._instance, redirect=False, hooks=True)
            await self.rules.apply(pod.netns, replace(wish, redirects=()))

    async def remove(self, pod: LocalPod) -> None:
        """Everything of ours goes, also when the namespace has gone before."""
        await self._unhook(pod)
        with suppress(EgressError):
            await self.hooks.forget(pod)
        await self.rules.remove(pod.netns)
