"""The pods of this node: each brought to what its annotations ask, in an order that never leaves one half captured.

    enrol      workers know the mesh -> keeper makes listeners -> workers know the pod -> capture (verified) -> captured
    un-enrol   capture goes -> others hear of it, live connections finish -> marks, listeners and what workers know go
    gone       capture if the namespace is still there, then the rest at once

Every pod has one task of its own that works on the newest wish; a failure is retried with a backoff and the pod stays what
it was. States and their legal transitions are in tracked.py, how a pod is captured in capture.py.
"""
from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from agent import netlink
from agent.app.capture import Capture
from agent.app.commit import Committer
from agent.app.events import Events
from agent.app.linger import open_connections
from agent.app.repair import WATCH_SECONDS, Repair
from agent.app.tracked import Attached, KeeperAway, MeshUnknown, PodIdentities, PodKeeper, PodNames, State, Superseded, Tracked
from agent.capture.reconcile import CaptureError
from agent.model.pod import CaptureSettings, Enrolment, LocalPod
from agent.model.workload import spiffe
from agent.state.entries import Table
from agent.state.store import Store
from agent.telemetry.capture import CaptureFigures

RETRY_FIRST, RETRY_LAST = 0.2, 30.0  # seconds, doubling
LINGER_SECONDS = 3600.0  # an un-enrolled pod's last connections may go on for so long (tcp_idle_timeout's bound)
LINGER_POLL = 2.0  # seconds between two looks whether they have ended
TOLD_SECONDS = 5.0  # others hear so late, generously, that a pod takes no tunnels any more: until then it does

log = logging.getLogger("narrows.pods")


class Pods:
    """See the head of this file. `follow` takes wishes, `attach` a keeper connection."""

    def __init__(self, *, node: str, cluster: str, trust_domain: str, store: Store, committer: Committer, events: Events,
                 decide: Callable[[LocalPod], Enrolment], capture: Capture, identities: PodIdentities, dns: PodNames) -> None:
        self._node = node
        self._cluster = cluster
        self._trust_domain = trust_domain
        self._store = store
        self._committer = committer
        self._events = events
        self._decide = decide
        self._capture = capture
        self._identities = identities
        self._dns = dns
        self._pods: dict[str, Tracked] = {}  # by uid
        self._keeper: PodKeeper | None = None
        self._attached: dict[str, Attached] = {}  # by pod uid
        self._named: set[str] = set()  # uids whose identity this keeper has from us
        self._news = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()
        self._synced = False  # the first list of pods was taken
        self._informed = False  # the mesh is known
        self._repair = Repair(self._pods, capture, events)
        self._unchosen = "not found out yet"

    # -- wishes -----------------------------------------------------------------------------------------------------

    def put(self, pod: LocalPod) -> None:
        """A pod is there or has changed."""
        tracked = self._pods.get(pod.uid)
        if tracked is None:
            for other in [one for one in self._pods.values() if one.pod.ref == pod.ref and not one.deleted]:
                self.remove(other.pod.uid)  # made again under the same name before its removal was seen
            tracked = self._pods[pod.uid] = Tracked(pod, old=not self._synced)
            tracked.task = asyncio.create_task(self._work(tracked), name=f"pod {pod.ref}")
        elif tracked.pod == pod:
            return
        tracked.pod, tracked.final = pod, False
        tracked.changed.set()

    def remove(self, uid: str) -> None:
        """A pod is gone."""
        if tracked := self._pods.get(uid):
            tracked.deleted, tracked.final = True, False
            tracked.changed.set()

    def synced(self) -> None:
        """Everything that is there was put: what the keeper holds beyond it is of pods that are gone."""
        self._synced = True
        known = {key for table, key in self._store.inherited if table is Table.POD}
        for uid in (set(self._attached) | known) - set(self._pods):
            task = asyncio.create_task(self._detach(uid), name=f"forget {uid}")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def informed(self) -> None:
        """Workloads and services of the mesh are known from now on: pods that waited for that go on."""
        if not self._informed:
            self._informed = True
            self.again()

    def again(self) -> None:
        """Look at every pod again now."""
        for tracked in self._pods.values():
            tracked.changed.set()

    async def close(self) -> None:
        """Stop working. Nothing of any pod changes."""
        tasks = [*self._tasks, *(one.task for one in self._pods.values() if one.task)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._capture.hooks.close()
        await asyncio.to_thread(self._capture.rules.close)

    # -- the keeper -------------------------------------------------------------------------------------------------

    def attach(self, keeper: PodKeeper, attached: Mapping[str, Attached]) -> None:
        """A keeper is there, and holds these pods already."""
        self._keeper, self._attached = keeper, dict(attached)
        self._capture.hooks.keeper(keeper.peer)
        self._named.clear()
        self._dns.drop_all()  # a new keeper needs the port; the same one gives the same sockets again
        for tracked in self._pods.values():
            tracked.final = False
            tracked.changed.set()
        if self._synced:
            self.synced()

    def detach(self) -> None:
        """The keeper is away. Capture stays as it is: its workers may serve on, and a new keeper will."""
        self._keeper = None

    # -- questions --------------------------------------------------------------------------------------------------

    def missing(self) -> list[str]:
        """Pods that are to be captured and are not, in words."""
        found = [f"pod {one.pod.ref} is not captured: {one.reason}" for one in self._pods.values()
                 if not one.deleted and (not one.final or (one.wanted and one.state is not State.CAPTURED))]
        return found if self._synced else ["the list of this node's pods has not been read yet", *found]

    @property
    def settled(self) -> bool:
        """Whether every pod of the node was decided on."""
        return self._synced and all(one.final for one in self._pods.values())

    def shown(self) -> list[dict[str, Any]]:
        return [self._show(one) for one in sorted(self._pods.values(), key=lambda one: one.pod.ref) if one.state is not State.GONE]

    def tracked(self) -> list[Tracked]:
        return list(self._pods.values())

    def captured(self) -> list[LocalPod]:
        return [one.pod for one in self._pods.values() if one.state is State.CAPTURED]

    def decided(self) -> list[tuple[LocalPod, bool]] | None:
        """Each pod that was decided on, and whether the proxy has connections of it; None while not all pods are known."""
        proxied = {State.ENTERING: True, State.CAPTURED: True, State.LEAVING: True, State.OUT: False}
        return [(one.pod, proxied[one.state]) for one in self._pods.values() if one.state in proxied] if self._synced else None

    def figures(self) -> CaptureFigures:
        """For metrics; called from the thread that renders them."""
        pods = list(self._pods.values())
        states = Counter(str(one.state) for one in pods)
        methods = Counter(way for one in pods if one.state is State.CAPTURED and one.way
                          for way in (("egress", one.way.egress), ("ingress", one.way.ingress)))
        return CaptureFigures({str(state): states[str(state)] for state in State}, methods, self._repair.count,
                              self._repair.exposed_seconds, self.capture()["backend"])

    @property
    def repairs(self) -> int:
        return self._repair.count

    def capture(self) -> dict[str, Any]:
        """What redirects are written with, and why; no backend when that could not be found out (yet). And how it is with eBPF."""
        chosen = self._capture.rules.chosen
        return {"backend": chosen.name if chosen else "", "reason": chosen.reason if chosen else self._unchosen,
                "ebpf": self._capture.hooks.shown()}

    def by_handle(self) -> dict[int, tuple[str, str]]:
        """Name and identity of the pods that the keeper holds listeners for."""
        return {attached.handle: (one.pod.ref, self._identity(one.pod))
                for uid, attached in self._attached.items() if (one := self._pods.get(uid)) is not None}

    async def wait(self, namespace: str, name: str, seconds: float) -> dict[str, Any] | None:
        """The pod as soon as the decision on it is final, or as it is after `seconds`; None when there is none."""
        def found() -> Tracked | None:
            return next((one for one in self._pods.values() if one.pod.ref == f"{namespace}/{name}" and not one.deleted), None)

        with suppress(TimeoutError):
            async with asyncio.timeout(seconds), self._news:
                await self._news.wait_for(lambda: (one := found()) is not None and one.final)
        one = found()
        return self._show(one) if one else None

    # -- one pod ----------------------------------------------------------------------------------------------------

    async def _work(self, one: Tracked) -> None:
        delay = RETRY_FIRST
        while one.state is not State.GONE:
            await one.changed.wait()
            one.changed.clear()
            try:
                await self._settle(one)
                delay = RETRY_FIRST
            except Superseded:
                continue
            except KeeperAway as error:  # `attach` and `informed` wake everybody
                one.reason = str(error)
                if one.deleted:
                    await self._end(one)
            except Exception as error:  # ConnectionError of the keeper and netlink's errors are OSErrors
                if not isinstance(error, (CaptureError, OSError)):
                    log.exception("a fault of ours while working on a pod", extra={"about": one.about})
                # the namespace of a pod that is being removed goes first; that is no failure
                if one.deleted:
                    await self._end(one)
                    break
                one.reason = str(error)
                self._events.add("CaptureFailed", one.about, f"{error}; it is tried again", warning=True)
                if self._keeper is not None:
                    await self._decided(one)
                    with suppress(TimeoutError):
                        async with asyncio.timeout(delay):
                            await one.changed.wait()
                    delay = min(delay * 2, RETRY_LAST)
                    one.changed.set()

    async def _settle(self, one: Tracked) -> None:
        """Bring one pod to its newest wish. Raises when that failed; nothing is redirected then that was not before."""
        if one.deleted:
            await self._end(one)
            return
        if one.pod.waits or one.pod.ended:
            await self._apart(one)
            await self._decided(one)
            return
        enrolment = self._decide(one.pod)
        if enrolment.refused:
            self._events.add("AnnotationRefused", one.about, "; ".join(enrolment.refused), warning=True)
            one.reason = "; ".join(enrolment.refused)
            # an earlier agent may have captured it: refused means that nothing changes
            if one.state is State.NEW and not await self._adopt(one):
                one.step(State.OUT, one.reason)
        elif enrolment.settings is not None:
            one.wanted = True
            if enrolment.doubts:
                self._events.add("AnnotationRefused", one.about, "; ".join(enrolment.doubts), warning=True)
            await self._enter(one, enrolment.settings, enrolment.method)
        else:
            one.wanted = False
            await self._leave(one, enrolment.reason)
        await self._decided(one)

    async def _apart(self, one: Tracked) -> None:
        """One whose network is not known stays what it is; one that has ended is let go, and its namespace with it."""
        one.wanted = False
        if one.pod.waits:
            one.reason = one.pod.waits
            if one.state is State.NEW and one.pod.uid not in self._attached:
                one.step(State.OUT, one.reason)
            return
        if one.pod.netns and (one.state not in (State.NEW, State.OUT) or one.pod.uid in self._attached):
            with suppress(CaptureError, OSError):
                await self._capture.remove(one.pod)
        await self._detach(one.pod.uid)
        one.way = None
        if one.state is State.CAPTURED:
            one.step(State.LEAVING, one.pod.ended)
        one.step(State.OUT, one.pod.ended)
        one.pod = replace(one.pod, netns="", hold=None)

    async def _adopt(self, one: Tracked) -> bool:
        """Whether this pod is captured by an earlier agent of this instance already."""
        self._present()
        if one.pod.uid not in self._attached or not await self._capture.captured(one.pod):
            return False
        one.step(State.ENTERING, one.reason)
        self._know(one, None)  # which ports that agent excluded is not known
        await self._resolve(one)
        one.step(State.CAPTURED, f"captured as before: {one.reason}")
        return True

    async def _enter(self, one: Tracked, settings: CaptureSettings, method: str) -> None:
        pod = one.pod
        self._present()
        choice = await self._capture.choose(pod, method)
        captured, before = one.state is State.CAPTURED, one.way
        stands = captured or (one.state is State.NEW and pod.uid in self._attached)  # by an earlier agent
        if not captured:
            one.step(State.ENTERING, "being captured")
        await self._listen(one)
        # pods of this node connect to it in memory only when the way to its application stands: marks, routes, a sysctl
        self._know(one, settings.exclude_inbound_ports if stands else None)
        refused = await one.unless_changed(self._committer.in_force())
        if said := next((text for key, text in refused.items() if key[1] == pod.uid), None):
            raise CaptureError(f"the data path refuses the pod: {said}")
        settings = replace(settings, dns=self._dns.wanted(settings) and await self._resolve(one))
        one.moving = True
        try:
            entered = await self._capture.enter(pod, settings, choice, before if captured else None,
                                               old=(one.old or captured) and before is None)
        except CaptureError as error:
            one.way = None
            one.step(State.ENTERING, str(error))  # the redirects were taken back
            raise
        finally:
            one.moving = False
        one.way = way = entered.way
        one.seen, one.looked = b"", time.monotonic()
        one.step(State.CAPTURED, way.reason)
        if way.choice.why and (before is None or before.choice.why != way.choice.why):
            self._events.add("CaptureFallback", one.about, f"{way.choice.missed} is captured by {self._capture.backend} and not by eBPF: "
                             f"{way.choice.why}", warning=True)
        if not captured or entered.changed:
            self._events.add("Captured", one.about, f"captured by {way.name} in {entered.seconds * 1000:.0f} ms: "
                             f"{len(entered.changed)} changes")
        if not stands:
            self._know(one, settings.exclude_inbound_ports)
            await one.unless_changed(self._committer.in_force())

    async def _listen(self, one: Tracked) -> None:
        """Have the keeper hold listeners inside the pod's namespace, once: for both families, since IPv6 may be switched on later.

        Redirects may be there already, of an earlier agent or keeper: without listeners their connections are refused,
        with listeners before workers know the mesh they would pass by its routes. So the mesh comes first.
        """
        uid = one.pod.uid
        keeper = self._present()
        if uid not in self._attached:
            if not self._informed:
                raise MeshUnknown("the control plane has not told yet who is in the mesh")
            await one.unless_changed(self._committer.in_force())
            keeper = self._present()
        netns = netlink.open_namespace(one.pod.netns)
        try:
            inode = os.fstat(netns).st_ino
            attached = self._attached.get(uid)
            same = attached is not None and attached.netns == inode
            if same and uid in self._named:
                return
            if attached is not None and not same:  # the runtime made the namespace again
                self._dns.drop(uid)
                await keeper.delete_pod(attached.handle)
                del self._attached[uid]
                self._store.remove_pod(uid)
            # of one that is there already it learns the identity only: an agent before this one may have named none
            handle = attached.handle if attached is not None and same else self._store.handle(uid)
            await keeper.add_pod(handle, uid, (4, 6), netns, self._identity(one.pod))
            self._attached[uid] = Attached(handle, inode)
            self._named.add(uid)
        finally:
            os.close(netns)

    async def _resolve(self, one: Tracked) -> bool:
        """Whether somebody answers the pod's DNS questions from now on: before they are redirected."""
        keeper, attached = self._present(), self._attached[one.pod.uid]
        return await self._dns.serve(one.pod, lambda: keeper.dns_sockets(attached.handle))

    def _identity(self, pod: LocalPod) -> str:
        return spiffe(self._trust_domain, pod.namespace, pod.service_account or "default")

    def _know(self, one: Tracked, excluded: tuple[int, ...] | None) -> None:
        pod = one.pod
        self._identities.hold(pod.uid, self._identity(pod))
        self._store.put_pod(pod.uid, f"{self._cluster}//Pod/{pod.namespace}/{pod.name}", f"ns={pod.namespace}",
                            pod.addresses, self._identity(pod), excluded)

    async def _leave(self, one: Tracked, reason: str) -> None:
        pod = one.pod
        if one.state is State.NEW:
            self._present()
            if pod.uid not in self._attached and not (one.old and await self._capture.captured(pod)):
                one.step(State.OUT, reason)
                return
            one.step(State.ENTERING, "captured by an earlier agent")
        if one.state is State.OUT:
            one.reason = reason
            return
        if one.state is not State.LEAVING:
            one.moving = True
            try:
                await self._capture.release(pod)
            finally:
                one.moving = False
            one.way = None
            if pod.uid in self._attached:
                self._know(one, None)  # new connections are not ours any more, from pods of this node neither
                self._committer.nudge()
            one.step(State.LEAVING, reason)  # OUT only when nothing is left: who is woken on the way must come back here
            self._events.add("Released", one.about, f"not captured any more: {reason}; live connections finish")
        await self._decided(one)
        await self._linger(one)
        if not one.changed.is_set():
            await self._capture.remove(pod)
            await self._detach(pod.uid)
            one.step(State.OUT, reason)

    async def _linger(self, one: Tracked) -> None:
        """Until the pod's last connection through us ended, its wish changed, or LINGER_SECONDS are over; at least TOLD_SECONDS.

        After those its tunnels say GOAWAY: a peer that had not heard before would only dial the next one.
        """
        told = time.monotonic() + TOLD_SECONDS
        gone = False
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                while not one.changed.is_set() and (time.monotonic() < told
                                                    or await asyncio.to_thread(open_connections, one.pod) > 0):
                    if not gone and time.monotonic() >= told:
                        gone = await self._go(one.pod.uid)
                    with suppress(TimeoutError):
                        async with asyncio.timeout(LINGER_POLL):
                            await one.changed.wait()

    async def _go(self, uid: str) -> bool:
        """Whether the peers of the pod's tunnels were told to go elsewhere, or can never be."""
        attached = self._attached.get(uid)
        if attached is None:
            return True
        if self._keeper is None:
            return False
        try:
            await self._keeper.leave_pod(attached.handle)
        except ConnectionError:
            return False  # away; the next one is asked
        except OSError:
            pass  # of a build that cannot: they end when nobody has used them for a while
        return True

    async def _end(self, one: Tracked) -> None:
        """The pod is gone: its rules go with its namespace, unless that is still there."""
        if one.state in (State.CAPTURED, State.LEAVING, State.ENTERING) or one.pod.uid in self._attached:
            with suppress(CaptureError, OSError):
                await self._capture.remove(one.pod)
        await self._detach(one.pod.uid)
        one.step(State.GONE, "gone")
        self._pods.pop(one.pod.uid, None)
        await self._decided(one)

    async def _detach(self, uid: str) -> None:
        self._identities.release(uid)
        self._dns.drop(uid)
        self._named.discard(uid)
        attached = self._attached.pop(uid, None)
        if attached is not None and self._keeper is not None:
            with suppress(OSError):  # it is away: the next connection's inventory shows what is left
                await self._keeper.delete_pod(attached.handle)
        self._store.remove_pod(uid)
        self._committer.nudge()

    async def _decided(self, one: Tracked) -> None:
        if one.changed.is_set() and one.state is not State.GONE:
            return  # a newer wish is waiting: this decision is not the last
        async with self._news:
            one.final = True
            self._news.notify_all()

    # -- repair -----------------------------------------------------------------------------------------------------

    async def watch(self) -> None:
        """For ever: look at every captured pod, and where something is not as it was, compare and repair."""
        await self.choose()
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            await self._repair.look([one.pod for one in self._pods.values()], all_known=self._synced)

    async def choose(self) -> None:
        """Find out what to capture with, before a pod asks."""
        try:
            chosen = await self._capture.rules.backend()
        except (CaptureError, OSError) as error:
            self._unchosen = str(error)
            self._events.add("CaptureUnavailable", "capture", f"no pod can be captured: {error}", warning=True)
        else:
            self._events.add("CaptureChosen", "capture", f"capture by {chosen.name}: {chosen.reason}",
                             warning=chosen.name != "iptables" and chosen.reason.startswith("no legacy"))

    # -- inside -----------------------------------------------------------------------------------------------------

    def _present(self) -> PodKeeper:
        if self._keeper is None:
            raise KeeperAway("the keeper is away")
        return self._keeper

    def _show(self, one: Tracked) -> dict[str, Any]:
        pod, way = one.pod, one.way if one.state is State.CAPTURED else None
        return one.shown() | {
            "node": self._node,
            "families": self._capture.hooks.families(pod.uid) if way else [],
            "handle": attached.handle if (attached := self._attached.get(pod.uid)) else None,
            "dns": self._dns.shown(pod.uid) if way and way.settings.dns else None,
            "events": self._events.about(one.about),
        }
