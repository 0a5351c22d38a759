"""The life of one pod: network, decision of the agent, containers, probes, end.

    made -> networked -> decided -> running <-> restarting -> ended

A pod that asks for the mesh starts no process before the agent has said that it is captured or why not: traffic that
slips past the mesh once cannot be called back.
"""
from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from agent.lab import cleanup, network, probes, runtime
from agent.lab.place import CLUSTER_DOMAIN, NodeAddresses, Place
from agent.lab.services import Backend
from agent.lab.spec import Container, Namespace, PodTemplate, Probe, dump
from agent.model.workload import IPAddress

BACKOFF = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)  # seconds before the n-th restart; the last one stays
STEADY = 30.0  # seconds of running after which a container's count of failures starts anew
GRACE = 2.0  # seconds between SIGTERM and SIGKILL; a cluster gives 30, a lab should not make its user wait
UNDECIDED = 10.0  # seconds that a pod which asked for no mesh waits for an agent that says nothing
ASK_SECONDS = 3.0  # one question to the agent
QUIET = 5.0  # seconds in which a starting container may fail its probe without an event
RETRY = 0.25  # seconds between two questions to an agent that does not answer


class Agents(Protocol):
    """The agents of the nodes, as pods need them."""

    async def decision(self, node: str, namespace: str, name: str, seconds: float) -> dict[str, Any] | None:
        """What the node's agent says of a pod as soon as that is final, or after `seconds`; None if it does not know it.

        OSError when it cannot be asked.
        """


@dataclass(slots=True)
class Host:
    """What a pod needs of its lab. `agents` is None in a lab without mesh."""

    place: Place
    families: tuple[int, ...]
    agents: Agents | None
    changed: Callable[[], None]
    event: Callable[[str, str], None]  # subject, text


@dataclass(slots=True)
class ContainerState:
    spec: Container
    launch: runtime.Launch | None = None
    pid: int = 0  # the container's first process as this machine numbers it; 0: not running
    child: int = 0  # the launcher in front of it
    ready: bool = False
    restarts: int = 0
    text: str = "waiting"


@dataclass(slots=True)
class LabPod:
    """A pod of the lab. `owner` is its Deployment's name, or ""."""

    host: Host
    namespace: Namespace
    name: str
    node: str
    node_number: int
    number: int  # of its addresses on the node
    template: PodTemplate
    owner: str = ""
    uid: str = field(default_factory=lambda: str(uuid.uuid4()))
    containers: list[ContainerState] = field(default_factory=list)
    phase: str = "waiting for its network"
    terminating: bool = False
    captured: bool = False  # as its agent said last
    created: float = field(default_factory=time.time)
    _task: asyncio.Task[None] | None = None

    def __post_init__(self) -> None:
        self.containers = [ContainerState(spec) for spec in self.template.containers]

    # -- what others see --------------------------------------------------------------------------------------------

    @property
    def ref(self) -> str:
        return f"{self.namespace.name}/{self.name}"

    @property
    def addresses(self) -> tuple[IPAddress, ...]:
        return NodeAddresses(self.node_number).pod(self.number, self.host.families)

    @property
    def ready(self) -> bool:
        return not self.terminating and all(container.ready for container in self.containers)

    @property
    def netns(self) -> str:
        return f"/run/netns/{self.host.place.pod_netns(self.namespace.name, self.name)}"

    @property
    def cgroup(self) -> Path:
        return self.host.place.pod_cgroup(self.node, self.namespace.name, self.name)

    @property
    def files(self) -> Path:
        return self.host.place.pod(self.namespace.name, self.name)

    @property
    def _pod_file(self) -> Path:
        return self.host.place.node(self.node) / "pods" / f"{self.namespace.name}.{self.name}.json"

    def backend(self) -> Backend:
        ports = {name: number for container in self.template.containers for name, number, _ in container.ports if name}
        return Backend(self.namespace.name, self.name, self.template.labels, self.addresses, ports, self.ready,
                       self.template.hostname, self.template.subdomain)

    def manifest(self) -> dict[str, Any]:
        """The pod as a cluster's API would show it."""
        meta: dict[str, Any] = {"name": self.name, "namespace": self.namespace.name, "uid": self.uid,
                                "labels": self.template.labels, "annotations": self.template.annotations}
        if self.owner:  # a Deployment owns its pods through a ReplicaSet, whose name is what pods are named by
            meta["generateName"] = self.name.rsplit("-", 1)[0] + "-"
            meta["ownerReferences"] = [{"apiVersion": "apps/v1", "kind": "ReplicaSet", "controller": True,
                                        "name": self.name.rsplit("-", 1)[0]}]
        containers = [{"name": spec.name, "ports": [{"name": name, "containerPort": number, "protocol": protocol}
                                                    for name, number, protocol in spec.ports]}
                      for spec in self.template.containers]
        ready = "True" if self.ready else "False"
        status = {"phase": "Running" if any(container.pid for container in self.containers) else "Pending",
                  "podIP": str(self.addresses[0]), "podIPs": [{"ip": str(address)} for address in self.addresses],
                  "hostIP": str(NodeAddresses(self.node_number).fabric_4),
                  "conditions": [{"type": "Ready", "status": ready}, {"type": "ContainersReady", "status": ready}]}
        if self.terminating:
            meta["deletionTimestamp"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        return {"apiVersion": "v1", "kind": "Pod", "metadata": meta,
                "spec": {"nodeName": self.node, "serviceAccountName": self.template.service_account,
                         "hostNetwork": False, "containers": containers},
                "status": status}

    def state(self) -> str:
        if self.terminating:
            return "ending"
        odd = [container.text for container in self.containers if container.text != "running"]
        if self.phase == "running" and odd:
            return odd[0]
        if self.phase == "running" and not self.ready:
            return "running, not ready"
        return self.phase

    # -- life -------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        self._task = asyncio.create_task(self._live(), name=f"pod {self.ref}")

    def describe(self, namespace: Namespace, template: PodTemplate) -> None:
        """Take new labels and annotations, of the pod or of its namespace, without touching its processes."""
        self.namespace, self.template = namespace, template
        if self._pod_file.exists():
            self._write_pod_file()
        self.host.changed()

    async def end(self) -> None:
        """End the processes and remove everything of the pod. It must be out of every service before."""
        self.terminating = True
        self.host.changed()
        for container in self.containers:
            if container.child:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(container.child, signal.SIGTERM)
        if self._task is not None:
            if any(container.child for container in self.containers):
                await asyncio.wait([self._task], timeout=GRACE)
            self._task.cancel()
            await asyncio.wait([self._task], timeout=GRACE)
        await asyncio.to_thread(self._remove)
        self.host.changed()

    def _remove(self) -> None:
        cleanup.kill_tree(self.cgroup)
        self._pod_file.unlink(missing_ok=True)
        network.remove_pod(self.host.place, self.node, self.namespace.name, self.name)
        cleanup.remove_tree(self.cgroup)
        for path in sorted(self.files.glob("*")):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.files.rmdir()

    async def _live(self) -> None:
        try:
            await asyncio.to_thread(self._furnish)
            self.phase = "waiting for the agent"
            self.host.changed()
            await self._decided()
            self.phase = "running"
            async with asyncio.TaskGroup() as group:
                for container in self.containers:
                    group.create_task(self._keep_running(container))
        except* Exception as failed:
            text = "; ".join(str(error) for error in failed.exceptions)
            self.phase = f"failed: {text}"
            self.host.event(f"pod {self.ref}", self.phase)
            self.host.changed()

    def _furnish(self) -> None:
        place, own = self.host.place, NodeAddresses(self.node_number)
        network.make_pod(place, self.node, self.node_number, namespace=self.namespace.name, name=self.name,
                         addresses=self.addresses)
        runtime.make_cgroup(self.cgroup)
        self.files.mkdir(parents=True, exist_ok=True)
        domains = (f"{self.namespace.name}.svc.{CLUSTER_DOMAIN}", f"svc.{CLUSTER_DOMAIN}", CLUSTER_DOMAIN)
        (self.files / "resolv.conf").write_text(
            f"nameserver {own.gateway_4}\nsearch {' '.join(domains)}\noptions ndots:5\n")
        hostname = self.template.hostname or self.name
        lines = ["127.0.0.1\tlocalhost", "::1\tlocalhost ip6-localhost ip6-loopback"]
        full = f"{hostname}.{self.template.subdomain}.{domains[0]}\t" if self.template.subdomain else ""
        lines += [f"{address}\t{full}{hostname}" for address in self.addresses]
        (self.files / "hosts").write_text("\n".join(lines) + "\n")
        for path in ("resolv.conf", "hosts"):
            (self.files / path).chmod(0o644)  # read by the pod's user, whatever the umask here
        if self.host.agents is not None:
            self._write_pod_file()

    def _write_pod_file(self) -> None:
        if self.host.agents is None:
            return
        body = self.manifest()
        body["narrows"] = {"netns": self.netns, "cgroup": str(self.cgroup), "namespaceLabels": self.namespace.labels,
                           "namespaceAnnotations": self.namespace.annotations}
        replace_file(self._pod_file, dump(body))

    async def _decided(self) -> None:
        """Wait until the agent has decided on this pod, for ever if it asks for the mesh."""
        agents = self.host.agents
        if agents is None:
            return
        wanted = asks_for_mesh(self.template, self.namespace)
        started, said = time.monotonic(), ""
        while True:
            try:
                told = await agents.decision(self.node, self.namespace.name, self.name, ASK_SECONDS)
                if told is not None and settled(told):
                    return
                text = f"its agent says: {told['reason']}" if told else "its agent does not know it yet"
            except OSError as error:
                text = f"its agent cannot be asked ({error})"
            waited = time.monotonic() - started
            if not wanted and waited > UNDECIDED:
                self.host.event(f"pod {self.ref}", f"started without the mesh, which it did not ask for: {text}")
                return
            if text != said and waited > 2:
                said = text
                self.host.event(f"pod {self.ref}", f"not started, for it asks for the mesh: {text}; see the agent's "
                                f"log in {self.host.place.node(self.node)}")
            await asyncio.sleep(RETRY)

    async def _keep_running(self, container: ContainerState) -> None:
        failures = 0
        log = runtime.Log(self.files / f"{container.spec.name}.log")
        try:
            while True:
                began = time.monotonic()
                status = await self._run_once(container, log)
                if self.terminating:
                    return
                failures = 0 if time.monotonic() - began > STEADY else failures + 1
                pause = BACKOFF[min(failures, len(BACKOFF)) - 1] if failures else BACKOFF[0]
                container.text = f"ended with {status}, starts again in {pause:g} s"
                container.ready, container.restarts = False, container.restarts + 1
                log.line(f"container {container.spec.name} ended with {status}, starts again in {pause:g} s")
                self.host.event(f"pod {self.ref}", f"container {container.spec.name} {container.text}; "
                                f"see `narrows lab logs {self.ref}`")
                self.host.changed()
                await asyncio.sleep(pause)
        finally:
            log.close()

    async def _run_once(self, container: ContainerState, log: runtime.Log) -> int:
        own = NodeAddresses(self.node_number)
        context = runtime.PodContext(self.namespace.name, self.name, self.uid, self.node, str(own.fabric_4),
                                     self.addresses, self.template)
        launch = runtime.container_launch(container.spec, context, cgroup=self.cgroup, netns=self.netns,
                                          files=self.files)
        running = await runtime.start(launch, asyncio.subprocess.PIPE)
        assert running.process.stdout is not None
        container.launch, container.pid, container.child = launch, running.inner, running.process.pid
        container.text = "running"
        pump = asyncio.create_task(log.pump(running.process.stdout))
        prober = asyncio.create_task(self._probe(container))
        try:
            status = await running.wait()
            await asyncio.wait([pump], timeout=1)  # what is still in the pipe; a daemon may hold it open
            return status
        finally:
            container.pid = container.child = 0
            container.ready = False
            for task in (pump, prober):
                task.cancel()

    async def _probe(self, container: ContainerState) -> None:
        probe = container.spec.readiness
        if probe is None:
            container.ready = container.pid != 0
            self.host.changed()
            return
        await asyncio.sleep(probe.initial_delay)
        passed = failed = 0
        node = f"/run/netns/{self.host.place.node_netns(self.node)}"
        said, started = "", time.monotonic()
        while True:
            began, before = time.monotonic(), container.ready
            try:
                why = await probes.once(probe, node, self.addresses[0],
                                        lambda argv, seconds: self._execute(container, argv, seconds))
            except Exception as error:  # a probe must never end the pod
                why = f"probe failed: {type(error).__name__}: {error}"
            passed, failed = (passed + 1, 0) if not why else (0, failed + 1)
            if passed >= probe.success_threshold:
                container.ready = True
            elif failed >= probe.failure_threshold:
                container.ready = False
                if why != said and (before or time.monotonic() - started > QUIET):
                    self.host.event(f"pod {self.ref}", f"not ready: {why}")
                    said = why
            if container.ready != before:
                self.host.changed()
            await asyncio.sleep(max(0.0, _period(probe, container.ready) - (time.monotonic() - began)))

    async def _execute(self, container: ContainerState, argv: tuple[str, ...], seconds: float) -> int:
        if container.launch is None or not container.pid:
            return 126
        running = await runtime.start(runtime.exec_launch(container.launch, container.pid, list(argv)))
        try:
            return await asyncio.wait_for(running.wait(), seconds)
        finally:
            if running.process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    running.process.kill()
                await running.process.wait()


def _period(probe: Probe, ready: bool) -> float:
    """A lab asks a container that is not ready yet at least every 0.2 s, so that starting is quick; then as told."""
    return probe.period if ready else min(probe.period, 0.2)


def settled(told: dict[str, Any]) -> bool:
    """Whether an agent's word on a pod lets it start: it is captured, or it shall not be. A failed try is neither."""
    return bool(told["captured"]) or (bool(told["final"]) and told["state"] == "out")


def asks_for_mesh(template: PodTemplate, namespace: Namespace) -> bool:
    """Whether pod or namespace ask for capture, or say something odd about it: then the agent must decide first."""
    key, label = "narrows.mesh/intercept", "istio.io/dataplane-mode"
    for value, off in ((template.annotations.get(key), "disabled"), (template.labels.get(label), "none"),
                       (namespace.annotations.get(key), "disabled"), (namespace.labels.get(label), "none")):
        if value is not None:
            return value != off
    return False


def replace_file(path: Path, text: str) -> None:
    """Write a file beside its place and rename it, so that no reader sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(text)
    beside.replace(path)


def read_json(data: bytes) -> Any:
    return json.loads(data)
