"""The Kubernetes source: the pods that the API server has bound to this node, with the networks that are found for them here.

    API server -> pods of the node, namespaces --+
    /proc -> sandboxes (proc.py) ----------------+--> the same events as of files.py

A pod is told as soon as it is known. Its network is looked for while that is not known: at once when something of the pod changed, else
less and less often. And it is looked whether what was found still lives: a sandbox that is made again under its pod is told as a change.
While the API server is away, what was told stays, and `stale` says since when.
"""
from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace

import msgspec

from agent import netlink
from agent.model.pod import LocalPod
from agent.model.workload import IPAddress, address_of
from agent.workloads.files import Delete, Event, Malformed, Synced, Upsert
from agent.workloads.proc import Found, Processes, Sandbox, ScanError
from protos.kubernetes.client import Client
from protos.kubernetes.follow import Follower
from protos.kubernetes.objects import Key, Metadata, Struct
from protos.kubernetes.reflector import Batch, State
from protos.kubernetes.resources import NAMESPACES, PODS

LOOK_FIRST, LOOK_LAST = 0.1, 5.0  # seconds between two looks for a network, doubling; a change of the pod begins anew
QUIET = 0.02  # seconds; what is told in such a time is looked at together
CHECK_SECONDS = 2.5  # between two looks whether sandboxes live: one system call each
ENDED = ("Succeeded", "Failed")
STATUS, REDIRECTION = "narrows.mesh/status", "ambient.istio.io/redirection"  # of ours: what became of the pod
MIRROR, HASH = "kubernetes.io/config.mirror", "kubernetes.io/config.hash"  # kubelet's, on the object that stands for a static pod
PROXY = "istio-proxy"  # a sidecar's container, also where it was written by hand


class _Container(Struct, frozen=True):
    name: str = ""


class _Spec(Struct, frozen=True):
    service_account_name: str = ""
    host_network: bool = False
    containers: list[_Container] | None = None
    init_containers: list[_Container] | None = None


class _IP(Struct, frozen=True):
    ip: str = ""


class _Status(Struct, frozen=True):
    phase: str = ""
    pod_ip: str = msgspec.field(default="", name="podIP")
    pod_ips: list[_IP] | None = msgspec.field(default=None, name="podIPs")


class Pod(Struct, frozen=True):
    """As much of a pod as is read here."""

    metadata: Metadata
    spec: _Spec = _Spec()
    status: _Status = _Status()


class Namespace(Struct, frozen=True):
    metadata: Metadata


@dataclass(slots=True)
class _Known:
    """One pod. `told` is what the agent has; `waits` why its network is not known."""

    pod: Pod
    told: LocalPod | None = None
    sandbox: Sandbox | None = None
    addresses: tuple[IPAddress, ...] = ()  # of the sandbox
    waits: str = "its network has not been looked for yet"
    delay: float = LOOK_FIRST
    due: float = 0.0

    @property
    def placed(self) -> bool:
        """Whether it is to have a network of its own."""
        return not self.pod.spec.host_network and self.pod.status.phase not in ENDED

    @property
    def cgroup_uid(self) -> str:
        """How kubelet names its cgroup: a static pod's by the hash of its file."""
        meta = self.pod.metadata.annotations or {}
        return meta.get(HASH, "") or self.pod.metadata.uid if MIRROR in meta else self.pod.metadata.uid


class ClusterSource:
    """Pods of one node. Iterate `events()` once; it ends only by cancellation. The client is the caller's."""

    def __init__(self, client: Client, node: str, processes: Processes | None = None) -> None:
        self._processes = processes or Processes()
        self._changed = asyncio.Event()
        self._pods = Follower(client, PODS, Pod, self._take_pods, fields=f"spec.nodeName={node}")
        self._namespaces = Follower(client, NAMESPACES, Namespace, self._take_namespaces)
        self._known: dict[Key, _Known] = {}
        self._gone: list[_Known] = []
        self._defaults: dict[str, Metadata] = {}
        self._malformed: dict[Key, str] = {}
        self._checked = 0.0
        self.looks = 0  # at /proc

    async def events(self) -> AsyncIterator[Event]:
        """What is there, Synced, then every change as it happens."""
        tasks = [asyncio.create_task(one.run(), name=f"follow {one.resource}") for one in (self._pods, self._namespaces)]
        synced = False
        try:
            while True:
                for task in tasks:
                    if task.done():
                        task.result()
                if self._pods.state().synced and self._namespaces.state().synced:
                    for event in await self._round():
                        yield event
                        del event  # it holds a namespace
                    if not synced:
                        synced = True
                        yield Synced()
                await self._wait()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def states(self) -> list[tuple[str, State]]:
        """Of each kind that is followed, by its name."""
        return [(one.resource.kind, one.state()) for one in (self._pods, self._namespaces)]

    def stale(self) -> tuple[float, str] | None:
        """Since when (monotonic time) and why the API server is not followed; None while it is."""
        found = [(state.stale_since, f"{kind}: {state.reason}") for kind, state in self.states() if state.stale_since is not None]
        return min(found, default=None)

    def written(self) -> dict[str, dict[str, str]]:
        """What pods (by uid) say of themselves in our annotations, as the API server has it."""
        return {one.pod.metadata.uid: {name: value for name, value in (one.pod.metadata.annotations or {}).items()
                                       if name in (STATUS, REDIRECTION)} for one in self._known.values()}

    # -- what the API server tells ----------------------------------------------------------------------------------

    def _take_pods(self, batch: Batch[Pod]) -> None:
        for key in batch.deletes:
            if (one := self._known.pop(key, None)) is not None:
                self._gone.append(one)
        for key, pod in batch.puts.items():
            before = self._known.get(key)
            if before is not None and before.pod.metadata.uid == pod.metadata.uid:
                before.pod, before.delay, before.due = pod, LOOK_FIRST, 0.0
                continue
            if before is not None:  # made again under its name
                self._gone.append(before)
            self._known[key] = _Known(pod)
        self._changed.set()

    def _take_namespaces(self, batch: Batch[Namespace]) -> None:
        for key in batch.deletes:
            self._defaults.pop(key.name, None)
        self._defaults.update({key.name: one.metadata for key, one in batch.puts.items()})
        self._changed.set()

    async def _wait(self) -> None:
        """Until something was told, or a look is due."""
        now = time.monotonic()
        due = [one.due for one in self._known.values() if one.placed and one.sandbox is None]
        seconds = max(LOOK_FIRST, min([*due, now + CHECK_SECONDS]) - now)
        try:
            async with asyncio.timeout(seconds):
                await self._changed.wait()
                await asyncio.sleep(QUIET)
        except TimeoutError:
            return

    # -- what is told -----------------------------------------------------------------------------------------------

    async def _round(self) -> list[Event]:
        self._changed.clear()
        await self._look()
        gone, self._gone = self._gone, []
        found: list[Event] = [Delete(one.told) for one in gone if one.told is not None]
        for one in self._known.values():
            pod = self._local(one)
            if pod != one.told:
                found.append(Upsert(pod))
                # who has ended lets go of its namespace when the agent has
                one.told = replace(pod, netns="", hold=None) if pod.ended else pod
        return found + list(self._unreadable())

    def _unreadable(self) -> Iterator[Event]:
        now = self._pods.state().unreadable
        for key, why in now.items():
            if self._malformed.get(key) != why:
                known = self._known.get(key)
                yield Malformed(f"pod {key}: {why}; what was known of it stays", known.told if known else None)
        self._malformed = now

    def _local(self, one: _Known) -> LocalPod:
        meta, spec = one.pod.metadata, one.pod.spec
        namespace = self._defaults.get(meta.namespace)
        ended = f"it has ended (phase {one.pod.status.phase})" if one.pod.status.phase in ENDED else ""
        waits = "" if spec.host_network or ended else one.waits if one.sandbox is None else "" if namespace else \
            f"its namespace {meta.namespace} is not known yet"
        if ended:
            one.sandbox = None
        last = one.told if ended else None
        return LocalPod(
            uid=meta.uid, namespace=meta.namespace, name=meta.name, service_account=spec.service_account_name or "default",
            addresses=_addresses(one.pod) or one.addresses, netns=one.sandbox.netns.path if one.sandbox else last.netns if last else "",
            cgroup=one.sandbox.cgroup if one.sandbox else "", host_network=spec.host_network,
            labels=meta.labels or {}, annotations={name: value for name, value in (meta.annotations or {}).items()
                                                   if name not in (STATUS, REDIRECTION)},
            namespace_labels=(namespace.labels if namespace else None) or {},
            namespace_annotations=(namespace.annotations if namespace else None) or {},
            sidecar=any(container.name == PROXY for container in [*(spec.containers or ()), *(spec.init_containers or ())]),
            waits=waits, ended=ended, hold=one.sandbox.netns if one.sandbox else last.hold if last else None)

    # -- where their networks are -----------------------------------------------------------------------------------

    async def _look(self) -> None:
        """One look at /proc for all whose network is not known or has ended, if there are some."""
        now = time.monotonic()
        check, due = now - self._checked >= CHECK_SECONDS, []
        for one in self._known.values():
            if one.placed and (one.due <= now if one.sandbox is None else check and one.due <= now and not one.sandbox.lives()):
                due.append(one)
        if check:
            self._checked = now
        if not due:
            return
        self.looks += 1
        try:
            found = await asyncio.to_thread(self._processes.find, {one.cgroup_uid for one in due})
        except ScanError as error:
            found = Found()
            for one in due:
                one.waits = str(error)
        fresh = [sandbox.netns.path for sandbox in found.sandboxes.values()]
        inside = await asyncio.to_thread(netlink.own_addresses, fresh)
        for one in due:
            sandbox = found.sandboxes.get(one.cgroup_uid)
            one.due, one.delay = now + one.delay, min(one.delay * 2, LOOK_LAST)
            if sandbox is None:  # what was found once stays: a container that restarts may have been the only process
                one.waits = _why(one.cgroup_uid, found) or one.waits
            elif why := _stranger(one, inside.get(sandbox.netns.path, ())):
                one.waits = why
            else:
                one.addresses = inside[sandbox.netns.path]
                if one.sandbox is not None and one.sandbox.netns.id == sandbox.netns.id:
                    sandbox = replace(sandbox, netns=one.sandbox.netns)  # the same by the same path: no change
                one.sandbox = sandbox
                one.delay = LOOK_FIRST


def _addresses(pod: Pod) -> tuple[IPAddress, ...]:
    found = []
    for text in [one.ip for one in pod.status.pod_ips or ()] or [pod.status.pod_ip]:
        try:
            found.append(address_of(text))
        except ValueError:
            continue  # of a field that only kubelet writes
    return tuple(dict.fromkeys(found))


def _why(uid: str, found: Found) -> str:
    if uid in found.closed:
        return "its processes may not be looked into; the agent needs CAP_SYS_PTRACE, and a profile (AppArmor) that allows it"
    if uid in found.on_node:
        return "its processes have the network of the node, although it does not ask for it (hostNetwork)"
    if found.processes:
        return "none of its processes runs on this node yet (an agent in a container needs hostPID)"
    return ""


def _stranger(one: _Known, inside: tuple[IPAddress, ...]) -> str:
    """Why the namespace that was found is not taken for the pod's: what kubelet says of its addresses is the second witness."""
    said = _addresses(one.pod)
    if not inside:
        return "its network has no address yet"
    if said and not set(said) & set(inside):
        return f"its network has {', '.join(map(str, inside))} and not {', '.join(map(str, said))}, which its status says"
    if not said and MIRROR in (one.pod.metadata.annotations or {}):
        return "it is a static pod, and its status says no address yet"  # anybody may write the hash of another
    return ""
