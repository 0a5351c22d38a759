"""The owner of a lab: what is wanted, what runs, and the loop that brings the second to the first.

Level-triggered: every change sets one flag, and each round looks at everything. A round makes and ends pods, then tells
DNS, the nodes' rules and the control plane's folder what changed.
"""
from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from agent import netlink
from agent.lab import cleanup, dns, network, schedule, services, system
from agent.lab.config import ConfigFolder
from agent.lab.objects import Found
from agent.lab.place import MAX_NODES, NodeAddresses, Place
from agent.lab.pods import Host, LabPod
from agent.lab.spec import (
    Deployment,
    Key,
    MeshObject,
    Namespace,
    Object,
    Pod,
    PodTemplate,
    Service,
    key_of,
    same_workload,
)
from agent.lab.tokens import Tokens

EVENTS = 500  # kept; older ones are dropped
SETTLE = 0.02  # seconds in which changes are gathered into one round
CAPTURE_SECONDS = 1.0  # agents are asked so often which pods they have captured
DECIDED = {"captured": True, "leaving": False, "out": False}  # an agent's states of a pod that say whether it takes tunnels
COLLECT = 3.0  # seconds for killed processes to be collected; it takes milliseconds
HASH_LABEL = "pod-template-hash"


class Refused(ValueError):
    """Something cannot be done as asked; nothing was changed."""


@dataclass(frozen=True, slots=True)
class Options:
    """`nodes`: how many at least; `workers` per node; without `mesh` the same network and no processes of the mesh."""

    nodes: int | None = None
    workers: int | None = None
    mesh: bool = True
    access_log: str = "json"
    capture: str = "auto"
    tunnels: bool = True  # captured pods are announced as ones that take tunnels, and captured pods reach them by nothing else
    same_node_tunnel: bool = False  # and no two pods of one worker are joined without a tunnel
    certificate_lifetime: float = 24.0  # hours
    observe: str = "off"


class Supervisor:
    """One lab between `start` and `stop`. Cleaning up afterwards is cleanup.py's."""

    def __init__(self, place: Place, options: Options) -> None:
        self.place, self.options = place, options
        self.families = netlink.families(None)
        self.admins = system.Admins(place)
        self.nodes: dict[str, int] = {}
        self.wanted: dict[Key, Object] = {}
        self.pods: dict[tuple[str, str], LabPod] = {}
        self.processes: list[system.Process] = []
        self.events: collections.deque[dict[str, Any]] = collections.deque(maxlen=EVENTS)
        self.began = time.time()
        self._host = Host(place, self.families, self.admins if options.mesh else None, self._changed, self.event)
        self._ips = services.ClusterIPs()
        self._zone = dns.Zone()
        self._servers: list[dns.Server] = []
        self._ending: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._last_number: dict[str, int] = {}
        self._wake = asyncio.Event()
        self._settled = asyncio.Event()
        self._loop: asyncio.Task[None] | None = None
        self._watch: asyncio.Task[None] | None = None
        self._config = ConfigFolder(place.config)
        self._tokens = Tokens(place)
        self._rules = ""
        self._trouble = ""
        self._apply_lock = asyncio.Lock()

    # -- begin and end ----------------------------------------------------------------------------------------------

    async def start(self, found: Iterable[Found]) -> None:
        """Make the fabric, the nodes and the mesh, then bring up what is wanted. Refused or OSError when that fails."""
        wanted = list(found)
        if shutil.which("nft") is None:
            raise Refused("nft is not installed, which makes cluster IPs: apt-get install nftables")
        top = self.place.directory
        for directory in (self.place.config, self.place.logs, top / "nodes", top / "pods"):
            directory.mkdir(parents=True, exist_ok=True)
        await asyncio.to_thread(network.make_fabric, self.place)
        named = [name for item in wanted if (name := _node_name(item.thing))]
        if self.options.mesh:
            self._tokens.add([])
            self._process(system.control_plane(self.place, self.options.certificate_lifetime, self.event))
        await self._add_nodes(schedule.default_nodes(named, self.options.nodes))
        await self.apply(wanted)
        self._loop = asyncio.create_task(self._rounds(), name="rounds")
        if self.options.mesh and self.options.tunnels:
            self._watch = asyncio.create_task(self._follow_capture(), name="capture")

    async def stop(self) -> None:
        """End every process of the lab and our own tasks; what is left on the machine is cleanup.py's.

        The processes first: one that outlives the loop that waits for it ends with a complaint of asyncio's.
        """
        for loop in (self._loop, self._watch):
            if loop is not None:
                loop.cancel()
        for server in self._servers:
            server.close()
        await self.admins.close()
        tasks = list(self._ending.values())
        waiting: list[asyncio.Task[None]] = []
        for pod in self.pods.values():
            pod.terminating = True
            if pod._task is not None:
                (waiting if any(container.child for container in pod.containers) else tasks).append(pod._task)
        for process in self.processes:
            process.ending = True
            if process._task is not None:
                (waiting if process.pid else tasks).append(process._task)
        for task in tasks:
            task.cancel()
        await asyncio.to_thread(cleanup.kill_tree, self.place.cgroup)
        if waiting:
            await asyncio.wait(waiting, timeout=COLLECT)
        for task in waiting:
            task.cancel()

    async def _add_nodes(self, names: Iterable[str]) -> None:
        fresh = [name for name in names if name not in self.nodes]
        if len(self.nodes) + len(fresh) > MAX_NODES:
            raise Refused(f"a lab has at most {MAX_NODES} nodes")
        for name in fresh:
            self.nodes[name] = len(self.nodes) + 1
            await asyncio.to_thread(network.make_node, self.place, name, self.nodes[name], self.families)
        await asyncio.to_thread(network.join_nodes, self.place, self.nodes, self.families, fresh)
        for name in fresh:
            server, own = dns.Server(self._zone), NodeAddresses(self.nodes[name])
            addresses = [own.gateway_4] + ([own.gateway_6] if 6 in self.families else [])
            await server.start(f"/run/netns/{self.place.node_netns(name)}", addresses)
            self._servers.append(server)
            directory = self.place.node(name)
            (directory / "pods").mkdir(parents=True, exist_ok=True)
            directory.chmod(0o700)
            if self.options.mesh:
                self._tokens.add([name])
                self._process(system.keeper(self.place, name, self.options.workers, self.event))
                self._process(system.agent(self.place, name, self.options.access_log, self.options.capture, self.options.same_node_tunnel,
                                           self.options.observe, self.event))
            self._rules = ""  # the new node has none yet

    def _process(self, process: system.Process) -> None:
        self.processes.append(process)
        process.begin()

    # -- what is wanted ---------------------------------------------------------------------------------------------

    async def apply(self, found: Iterable[Found]) -> list[str]:
        """Take objects, new or changed. Returns a line per object; Refused before anything changed."""
        async with self._apply_lock:
            things = [item.thing for item in found]
            self._check(things)
            await self._add_nodes(sorted({name for thing in things if (name := _node_name(thing))}))
            lines = []
            for thing in things:
                key = key_of(thing)
                before = self.wanted.get(key)
                wanted = thing
                if isinstance(before, Pod | Deployment) and isinstance(thing, Pod | Deployment):
                    # an edited copy, applied from elsewhere, still finds the files of its programs
                    wanted = _keep_folder(thing, before.template.folder)
                self.wanted[key] = wanted
                did = "created" if before is None else "unchanged" if before == wanted else "configured"
                lines.append(f"{key[0].lower()}/{key[2]} {did}")
            self._changed()
            return lines

    def _check(self, things: list[Object]) -> None:
        """Refuse what does not fit together, before anything changes."""
        known = {"default"} | {key[2] for key in self.wanted if key[0] == "Namespace"}
        known |= {thing.name for thing in things if isinstance(thing, Namespace)}
        trial = self._ips.copy()
        for thing in things:
            if not isinstance(thing, Namespace | MeshObject) and thing.namespace not in known:
                raise Refused(f"{type(thing).__name__} {thing.namespace}/{thing.name}: there is no namespace "
                              f"{thing.namespace}; add a Namespace object")
            if isinstance(thing, Service):
                try:
                    trial.assign(thing)
                except services.ServiceError as error:
                    raise Refused(f"Service {thing.namespace}/{thing.name}: {error}") from error

    def delete(self, kind: str, namespace: str, name: str) -> str:
        """Stop wanting an object. Refused if there is none."""
        for key in self.wanted:
            if key[0].lower() == kind.lower() and key[2] == name and key[1] in ("", namespace):
                del self.wanted[key]
                if key[0] == "Namespace":
                    for other in [other for other in self.wanted if other[1] == name]:
                        del self.wanted[other]
                self._changed()
                return f"{key[0].lower()}/{name} deleted"
        owned = self.pods.get((namespace, name))
        if kind.lower() == "pod" and owned is not None and not owned.terminating:
            self._end(owned)  # its Deployment makes another one, as in a cluster
            return f"pod/{name} deleted"
        raise Refused(f"there is no {kind} {name}" + (f" in namespace {namespace}" if namespace else ""))

    # -- rounds -----------------------------------------------------------------------------------------------------

    def _changed(self) -> None:
        self._settled.clear()
        self._wake.set()

    def event(self, subject: str, text: str) -> None:
        self.events.append({"time": time.time(), "subject": subject, "text": text})

    async def _rounds(self) -> None:
        while True:
            await self._wake.wait()
            await asyncio.sleep(SETTLE)
            self._wake.clear()
            try:
                self._reconcile_pods()
                await self._publish()
                self._trouble = ""
            except Exception as error:  # one bad round must not end the lab; the next change tries again
                if str(error) != self._trouble:
                    self.event("lab", f"{type(error).__name__}: {error}")
                self._trouble = str(error)
                await asyncio.sleep(1)
                self._wake.set()
            if not self._wake.is_set():
                self._settled.set()

    def _reconcile_pods(self) -> None:
        for pod in list(self.pods.values()):
            namespace = self._namespace(pod.namespace.name)
            if namespace != pod.namespace:
                pod.describe(namespace, pod.template)
            if pod.owner:
                if ("Deployment", namespace.name, pod.owner) not in self.wanted:
                    self._end(pod)
                continue
            asked = self.wanted.get(("Pod", namespace.name, pod.name))
            if not isinstance(asked, Pod) or not same_workload(asked.template, pod.template):
                self._end(pod)
            elif asked.template != pod.template:
                pod.describe(namespace, asked.template)
        for thing in list(self.wanted.values()):
            if isinstance(thing, Pod) and (thing.namespace, thing.name) not in self.pods:
                self._begin(thing.namespace, thing.name, thing.template)
            elif isinstance(thing, Deployment):
                self._reconcile_deployment(thing)

    def _reconcile_deployment(self, deployment: Deployment) -> None:
        digest = deployment.template.hash()
        living = [pod for pod in self.pods.values() if not pod.terminating
                  and (pod.namespace.name, pod.owner) == (deployment.namespace, deployment.name)]
        fresh = [pod for pod in living if pod.template.labels.get(HASH_LABEL) == digest]
        old = [pod for pod in living if pod.template.labels.get(HASH_LABEL) != digest]
        labels = deployment.template.labels | {HASH_LABEL: digest}
        for _ in range(deployment.replicas - len(fresh)):
            names = {name for namespace, name in self.pods if namespace == deployment.namespace}
            self._begin(deployment.namespace, schedule.pod_name(deployment.name, digest, names),
                        dataclasses.replace(deployment.template, labels=labels), deployment.name)
        fresh.sort(key=lambda pod: (not pod.ready, pod.created))  # the unready and the newest go first
        for pod in fresh[deployment.replicas:]:
            self._end(pod)
        # an old pod goes for each new one that is ready, so that a change of the template interrupts nobody
        keep = max(0, deployment.replicas - sum(pod.ready for pod in fresh))
        old.sort(key=lambda pod: (not pod.ready, pod.created))
        for pod in old[keep:]:
            self._end(pod)

    def _begin(self, namespace: str, name: str, template: PodTemplate, owner: str = "") -> None:
        counts = dict.fromkeys(self.nodes, 0)
        for pod in self.pods.values():
            counts[pod.node] += 1
        node = template.node_name or schedule.choose(counts)
        used = {pod.number for pod in self.pods.values() if pod.node == node}
        number = self._last_number[node] = schedule.free_number(used, self._last_number.get(node, 1))
        pod = LabPod(self._host, self._namespace(namespace), name, node, self.nodes[node], number, template, owner)
        self.pods[namespace, name] = pod
        pod.begin()

    def _end(self, pod: LabPod) -> None:
        key = (pod.namespace.name, pod.name)
        if key in self._ending:
            return
        pod.terminating = True

        async def end() -> None:
            try:
                await pod.end()
            except Exception as error:
                self.event(f"pod {pod.ref}", f"could not be removed: {error}")
            finally:
                del self._ending[key]
                self.pods.pop(key, None)
                self._changed()

        self._ending[key] = asyncio.create_task(end(), name=f"end {pod.ref}")

    def _namespace(self, name: str) -> Namespace:
        found = self.wanted.get(("Namespace", "", name))
        return found if isinstance(found, Namespace) else Namespace(name)

    async def _follow_capture(self) -> None:
        """A pod may be captured or let go at any time: the control plane is to know it."""
        while True:
            await asyncio.sleep(CAPTURE_SECONDS)
            await self._look_at_capture()

    async def _look_at_capture(self) -> None:
        """Who does not answer, or has not looked at a pod yet, has nothing new: what an agent that starts again has not taken over
        is captured still, and peers that were told otherwise would send in plain text."""
        for node in list(self.nodes):
            for key, told in (await self.admins.pods(node)).items():
                pod, captured = self.pods.get(key), DECIDED.get(told["state"])
                if pod is not None and pod.uid == told["uid"] and captured not in (None, pod.captured):
                    pod.captured = bool(captured)
                    self._changed()

    # -- what others are told ---------------------------------------------------------------------------------------

    def exposed(self) -> list[services.Exposed]:
        backends = [pod.backend() for pod in self.pods.values()]
        found = []
        for thing in self.wanted.values():
            if isinstance(thing, Service):
                families = tuple(family for family in thing.families if family in self.families) or (4,)
                service = thing if families == thing.families else dataclasses.replace(thing, families=families)
                found.append(services.Exposed(service, self._ips.assign(service),
                                              tuple(services.members(service, backends))))
        return found

    async def _publish(self) -> None:
        for key in [key for key in self._ips.holders() if key not in self.wanted]:
            self._ips.release(key)
        exposed = self.exposed()
        self._zone.replace(services.names(exposed))
        if self.options.mesh:
            await self._config.write(self.pods.values(), exposed, self.wanted)
        rules = services.ruleset(exposed)
        if rules != self._rules:
            await asyncio.gather(*(asyncio.to_thread(services.load, f"/run/netns/{self.place.node_netns(node)}", rules)
                                   for node in self.nodes))
            self._rules = rules

    # -- state ------------------------------------------------------------------------------------------------------

    async def missing(self) -> list[str]:
        """What is not as wanted yet, in words; empty when everything runs and is ready, and the control plane was told of it."""
        if self._watch is not None:
            await self._look_at_capture()
        texts = [f"pod {pod.ref} on {pod.node}: {pod.state()}" for pod in self.pods.values() if not pod.ready]
        if not self._settled.is_set():
            texts.append(self._trouble or "changes are being made")
        if self.options.mesh:
            if text := await self.admins.control_plane():
                texts.append(f"control plane: {text}")
            for node in self.nodes:
                if text := await self.admins.missing(node):
                    texts.append(f"agent {node}: {text}")
        return texts

    async def wait(self, seconds: float) -> list[str]:
        """Wait until nothing is missing, at most `seconds`; returns what still is."""
        deadline = time.monotonic() + seconds
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._settled.wait(), max(0.05, deadline - time.monotonic()))
            missing = await self.missing()
            if not missing or time.monotonic() > deadline:
                return missing
            await asyncio.sleep(0.05)


def _keep_folder(thing: Pod | Deployment, folder: str) -> Pod | Deployment:
    return dataclasses.replace(thing, template=dataclasses.replace(thing.template, folder=folder))


def _node_name(thing: Object) -> str:
    return thing.template.node_name if isinstance(thing, Pod | Deployment) else ""
