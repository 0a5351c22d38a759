"""The composition root of the agent: one object that knows every room, and their life from start to SIGTERM.

    pod files, or Kubernetes -> Pods --------> keeper (listeners), store (POD), capture child (redirects)
    control plane -> Mesh ----> store -> Committer -> keeper -> workers
    workers -> keeper -> MISS -> Mesh -> control plane
    shared memory -> DataPath -> /metrics, access log

The agent may die and come back at any time: what is in force is read from the keeper, the difference is sent. It ends
without touching the data path.
"""
from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from prometheus_client.registry import CollectorRegistry

from agent.admin.server import AdminServer
from agent.app import dump, logs
from agent.app.access import Access
from agent.app.capture import Capture
from agent.app.certificates import Certificates
from agent.app.commit import Committer
from agent.app.dns import Dns
from agent.app.encode import encode_put
from agent.app.events import Events
from agent.app.hooks import Hooks
from agent.app.keeper import KeeperLink, open_link
from agent.app.mesh import Mesh
from agent.app.method import EBPF, backend_of
from agent.app.observation import OFF, Observation
from agent.app.observe import DataPath
from agent.app.pods import Pods
from agent.app.resync import difference, inherit, settle_inheritance
from agent.app.source import PodSource, open_source
from agent.app.tracking import Tracking
from agent.capture.reconcile import Reconciler
from agent.dataplane import blobs
from agent.dataplane.authorize import verdict
from agent.dataplane.protocol import WorkerChange, WorkerState
from agent.dataplane.readers import DURATION_BOUNDS_MS, SIZE_BOUNDS
from agent.model.settings import ProxySettings
from agent.state.entries import PutPod, Table
from agent.state.store import Store
from agent.telemetry.accesslog import AccessLog
from agent.telemetry.capture import CaptureCollector, ConntrackCollector
from agent.telemetry.collector import DataPathCollector
from agent.telemetry.dns import DnsCollector
from agent.telemetry.identity import CertificateCollector
from agent.telemetry.kubernetes import KubernetesCollector
from agent.telemetry.process import KeeperCollector, ProcessCollector
from agent.telemetry.server import Ports
from agent.workloads.enrol import enrol
from agent.workloads.files import Delete, Event, Malformed, SourceError, Synced, Upsert
from agent.xds.client import Client, Node
from agent.xds.session import Session
from agent.xds.tree import NAMED
from agent.xds.types import WHOLE, TypeUrl
from protos.kubernetes.configuration import Configuration

RETRY_FIRST, RETRY_LAST = 0.05, 2.0  # seconds between attempts to reach the keeper; it is on this machine
SOURCE_RETRY = 1.0  # seconds until the pod directory is followed again

log = logging.getLogger("narrows.agent")


@dataclass(frozen=True, slots=True)
class Options:
    run_dir: Path
    node: str
    xds: str
    cluster: str = "Kubernetes"
    trust_domain: str = "cluster.local"
    ca: str | None = None  # None: where the control plane serves ADS
    ca_token: Path | None = None
    ca_root: Path | None = None
    ca_crl: Path | None = None
    metrics_address: str | None = None
    metrics_port: int = 15020
    readiness_port: int = 15021
    access_log: str = "json"  # one of accesslog.FORMATS, or off
    same_node_tunnel: bool = False
    early_tunnels: int = 8
    idle_seconds: float = 600.0
    capture: str = "auto"  # auto, ebpf, iptables, nftables
    observe: str = OFF  # off, captured, all
    observe_pairs: int = 500
    dns_capture: bool = False
    kubernetes: Configuration | None = None  # where pods are followed; None: files of the run directory


class Agent:
    """`run` returns when `stop` was called (or a signal came)."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._started = time.time()
        self._stopping = asyncio.Event()
        self._events = Events()
        self._store = Store()
        self._store.put_settings(ProxySettings(access_log=options.access_log != "off",
                                               access_log_tcp=options.access_log.endswith("-tcp"),
                                               same_node_tunnel=options.same_node_tunnel, early_tunnels=options.early_tunnels))
        self._committer = Committer(self._store)
        self._mesh = Mesh(self._store, self._committer, idle_seconds=options.idle_seconds)
        self._session = Session(WHOLE, NAMED)
        self._told: set[str] = set()  # types of WHOLE that are in force as a whole
        plane = Access(options.xds, options.cluster, options.ca_token, options.ca_root)
        self._xds = Client(options.xds, Node(options.node, options.cluster), self._session, self._mesh.apply,
                           self._acknowledged, open_channel=plane.open, credentials=plane.metadata)
        self._certificates = Certificates(self._store, self._committer, self._events, trust_domain=options.trust_domain,
                                          access=replace(plane, target=options.ca or options.xds), lists=options.ca_crl)
        instance = str(options.run_dir)
        self._hooks = Hooks(instance, options.run_dir, self._events, self._again)
        capture = Capture(instance, options.capture, Reconciler(instance, backend=backend_of(options.capture)), self._hooks)
        self._dns = Dns(self._store.hosts.addresses, self._events, default=options.dns_capture)
        self._pods = Pods(node=options.node, cluster=options.cluster, trust_domain=options.trust_domain, store=self._store,
                          committer=self._committer, events=self._events, decide=enrol, capture=capture,
                          identities=self._certificates.identities, dns=self._dns)
        self._observation = Observation(options.observe, instance, options.run_dir, self._events, self._store, self._pods.decided,
                                        options.observe_pairs)
        self._tracking = Tracking(self._events, self._pods.captured)
        self._access_log = (AccessLog(str(options.run_dir / "access.log"), options.access_log)
                            if options.access_log != "off" else None)
        self._data_path = DataPath(self._store, self._access_log)
        self._source: PodSource = open_source(options.kubernetes, options.node, options.run_dir, self._events, self._pods.tracked)
        self._link: KeeperLink | None = None
        self._keeper_error = "not reached yet"
        self._restored = False
        self._informed = False  # the first list of workloads and services is in force, or was restored

    # -- life -------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve until stopped. Raises OSError when a port or the admin socket cannot be had."""
        options = self._options
        registry = CollectorRegistry()
        registry.register(DataPathCollector(self._data_path.series, self._data_path.headers, self._data_path.names,
                                            DURATION_BOUNDS_MS, SIZE_BOUNDS))
        registry.register(ProcessCollector(self._pids))
        registry.register(KeeperCollector(self._keeper_silent))
        registry.register(CaptureCollector(self._pods.figures))
        registry.register(CertificateCollector(self._certificates.figures))
        registry.register(ConntrackCollector(self._tracking.figures))
        if options.observe != OFF:
            registry.register(self._observation.collector)
        registry.register(DnsCollector(self._dns.figures))
        registry.register(KubernetesCollector(self._source.figures))
        async with AsyncExitStack() as stack:
            ports = Ports(registry, lambda: "; ".join(self.readiness()))
            await ports.start(options.metrics_address, options.metrics_port, options.readiness_port)
            stack.push_async_callback(ports.stop)
            admin = AdminServer(options.run_dir / "admin.sock", self)
            await admin.start()
            stack.push_async_callback(admin.stop)
            stack.callback(self._close_logs)
            self._signals()
            log.info("agent started", extra={"node": options.node, "run_dir": str(options.run_dir), "pid": os.getpid()})
            if EBPF in options.capture:
                self._hooks.begin()
            tasks = [asyncio.create_task(work, name=name) for name, work in (
                ("keeper", self._follow_keeper()),
                ("pods", self._follow_pods()),
                ("watch", self._pods.watch()),
                ("revocation", self._certificates.watch()),
                ("conntrack", self._tracking.watch()),
                ("observation", self._observation.watch()),
                ("access-log", self._data_path.drain()),
                ("use", self._data_path.watch_use(self._mesh.used, self._sweep)),
            )]
            stop = asyncio.create_task(self._stopping.wait(), name="stop")
            try:
                done, _ = await asyncio.wait([*tasks, stop], return_when=asyncio.FIRST_COMPLETED)
                for task in done - {stop}:
                    task.result()  # none of them ends: this raises
            finally:
                for task in [*tasks, stop]:
                    task.cancel()
                await asyncio.gather(*tasks, stop, return_exceptions=True)
                await self._pods.close()
                self._dns.close()
                await self._certificates.identities.close()
                if self._link is not None:
                    await self._link.close()
        log.info("agent ended; the data path serves on")

    def stop(self) -> None:
        self._stopping.set()

    def _signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        loop.add_signal_handler(signal.SIGUSR1, self._reopen)

    def _reload(self) -> None:
        """SIGHUP: look at everything again now, without waiting for the next retry or event."""
        log.info("reload")
        self._xds.hurry()
        self._hooks.again()
        self._observation.again()
        self._pods.again()

    def _reopen(self) -> None:
        """SIGUSR1: the logs were rotated."""
        if self._access_log is not None:
            self._access_log.reopen()

    def _close_logs(self) -> None:
        if self._access_log is not None:
            self._data_path.drain_once()
            self._access_log.close()

    def _sweep(self) -> None:
        self._mesh.sweep()
        settle_inheritance(self._store, self._mesh)
        if self._pods.settled:
            self._certificates.identities.settle()
        self._committer.nudge()

    # -- the keeper -------------------------------------------------------------------------------------------------

    async def _follow_keeper(self) -> None:
        delay = RETRY_FIRST
        xds: asyncio.Task[None] | None = None
        path = self._options.run_dir / "keeper.sock"
        try:
            while True:
                try:
                    link = await open_link(path)
                except OSError as error:
                    self._keeper_error = str(error)
                    log.log(logging.DEBUG if delay < RETRY_LAST else logging.WARNING,
                            "the keeper does not answer; trying again", extra={"reason": self._keeper_error})
                    await asyncio.sleep(delay)
                    delay = min(delay * 2, RETRY_LAST)
                    continue
                since = time.monotonic()
                try:
                    first = await self._sync(link)
                    if xds is None:
                        xds = asyncio.create_task(self._xds.run(), name="xds")
                    await self._serve(link, first, xds)
                except OSError as error:
                    self._keeper_error = str(error) or "it closed the connection"
                    self._events.add("KeeperLost", "keeper", f"the keeper is away: {self._keeper_error}", warning=True)
                    if time.monotonic() - since > RETRY_LAST:
                        delay = RETRY_FIRST
                    await asyncio.sleep(delay)
                    delay = min(delay * 2, RETRY_LAST)
                finally:
                    self._link = None
                    self._pods.detach()
                    self._certificates.identities.detach()
                    self._data_path.detach()
                    await link.close()
        finally:
            if xds is not None:
                xds.cancel()
                await asyncio.gather(xds, return_exceptions=True)

    async def _sync(self, link: KeeperLink) -> list[blobs.Entry]:
        """Learn what the keeper holds; returns what it lacks."""
        inventory = await link.inventory()
        if not self._restored:
            versions = self._mesh.restore(inventory.puts)
            inherit(self._store, self._mesh, inventory.puts)
            for type_url, held in versions.items():
                self._session.restore(type_url, held)
            self._mesh.connect(self._xds.want)
            self._restored = True
            if versions[TypeUrl.ADDRESS]:
                self._inform()
                log.info("restored what an earlier agent left in the keeper",
                         extra={"resources": sum(map(len, versions.values())), "pods": len(inventory.pods)})
        await self._certificates.attach(link, inventory.puts)
        self._data_path.attach(await link.readers())
        first = difference(self._store, inventory.puts)
        self._link = link
        self._pods.attach(link, inventory.pods)
        self._observation.keeper(link.peer)
        self._events.add("KeeperFound", "keeper", f"connected to keeper {link.pid}; {len(first)} of "
                         f"{len(inventory.puts)} entries differ, {len(inventory.pods)} pods attached")
        return first

    async def _serve(self, link: KeeperLink, first: list[blobs.Entry], xds: asyncio.Task[None]) -> None:
        """Until the keeper is away (raises OSError) or a task of ours broke (raises its error)."""
        commits = asyncio.create_task(self._committer.run(link, first), name="commits")
        lost = asyncio.create_task(link.listen(self._mesh.miss, self._worker_event), name="keeper-events")
        pulse = asyncio.create_task(link.pulse(), name="keeper-pulse")
        try:
            done, _ = await asyncio.wait([commits, lost, pulse, xds], return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in (commits, lost, pulse):
                task.cancel()
            await asyncio.gather(commits, lost, pulse, return_exceptions=True)

    def _worker_event(self, event: WorkerChange) -> None:
        died = event.state is WorkerState.DIED
        how = f" (status {event.status})" if died and event.status >= 0 else f" (signal {-event.status})" if died else ""
        if died and event.status == -signal.SIGSYS:
            how = f" (killed for a system call that workers may not make: {self._data_path.refused_call(event.index) or 'unknown'})"
        self._events.add(f"Worker{event.state.name.capitalize()}", f"worker {event.index}",
                         f"worker {event.index}, pid {event.pid}: {event.state.name.lower()}{how}", warning=died)

    def _acknowledged(self, type_url: str) -> None:
        """Who is in the mesh is of no use to a pod before it is known who may talk to it."""
        self._told.add(type_url)
        if self._told.issuperset(WHOLE):
            self._inform()

    def _inform(self) -> None:
        self._informed = True
        self._pods.informed()

    # -- pods -------------------------------------------------------------------------------------------------------

    async def _follow_pods(self) -> None:
        while True:
            try:
                async for event in self._source.events():
                    self._take(event)
                    del event  # it may hold a namespace
            except SourceError as error:
                self._events.add("PodsLost", "pods", f"{error}; trying again", warning=True)
                await asyncio.sleep(SOURCE_RETRY)

    def _take(self, event: Event) -> None:
        match event:
            case Upsert(pod):
                self._pods.put(pod)
            case Delete(pod):
                self._pods.remove(pod.uid)
            case Malformed(text, pod):
                self._events.add(self._source.refused, f"pod {pod.ref}" if pod else "pods", text, warning=True)
            case Synced():
                self._pods.synced()

    # -- what operators ask (agent.admin.server.Source) ---------------------------------------------------------------

    def readiness(self) -> list[str]:
        missing = []
        if self._link is None:
            missing.append(f"the keeper is away: {self._keeper_error}")
        elif self._link.hung:
            missing.append(f"the keeper (pid {self._link.pid}) has not answered for {self._link.silent:.0f} s: it hangs, or the machine is "
                           "out of CPU; what is in force serves on")
        if not self._informed:
            reason = self._xds.status.error or "no answer yet"
            missing.append(f"the control plane ({self._options.xds}) has not told who is in the mesh: {reason}")
        return missing + self._pods.missing() + self._certificates.problems()

    def server_info(self) -> dict[str, Any]:
        try:
            release = version("narrows")
        except PackageNotFoundError:
            release = "unknown"
        link, xds = self._link, self._xds.status
        return {
            "version": release,
            "node": self._options.node,
            "pid": os.getpid(),
            "started": self._started,
            "uptimeSeconds": round(time.time() - self._started, 3),
            "runDir": str(self._options.run_dir),
            "keeper": {"state": "hung" if link.hung else "connected", "silentSeconds": round(link.silent, 1),
                       "pid": link.pid, "instance": link.hello.instance, "started": link.hello.start_us / 1e6}
            if link else {"state": "away", "reason": self._keeper_error},
            "controlPlane": {"state": xds.state, "since": xds.since, "target": self._options.xds, "error": xds.error,
                             "streams": xds.streams, "responses": xds.responses, "rejected": xds.rejected},
            "seccomp": {str(index): state for index, state in sorted(self._data_path.seccomp().items())},
            "commits": self._committer.commits,
            "refused": [{"table": key[0].name.lower(), "key": key[1], "reason": reason}
                        for key, reason in self._committer.refused.items()],
            "misses": self._mesh.misses,
            "repairs": self._pods.repairs,
            "capture": self._pods.capture(),
            "observation": self._observation.shown(),
            "podSource": self._source.shown(),
            "accessLogLost": self._access_log.lost if self._access_log else 0,
        }

    def pods(self) -> list[dict[str, Any]]:
        return self._pods.shown()

    async def pod(self, namespace: str, name: str, seconds: float) -> dict[str, Any] | None:
        return await self._pods.wait(namespace, name, seconds)

    def events(self, since: int) -> list[dict[str, Any]]:
        return self._events.since(since)

    async def workers(self) -> list[dict[str, Any]]:
        """Raises ConnectionError while the keeper is away."""
        if self._link is None:
            raise ConnectionError(f"the keeper is away: {self._keeper_error}")
        if self._link.hung:
            raise ConnectionError(f"the keeper has not answered for {self._link.silent:.0f} s")
        seccomp = self._data_path.seccomp()
        return [worker | {"seccomp": seccomp.get(worker["index"], "unknown")} for worker in await self._link.workers()]

    def config_dump(self) -> dict[str, Any]:
        tree = self._mesh.tree
        destinations = [one for key in tree if (one := tree.published(key)) is not None]
        shape = dump.everything(self._store, destinations, tree.clusters().values())
        listeners = [{"kind": kind, "where": f"pod {pod.ref}", "address": f"*:{port}", "state": "listening"}
                     for pod in self._pods.captured() for kind, port in (("outbound", 15001), ("inbound", 15006), ("hbone", 15008))]
        for key in sorted(tree):
            scope, _, authority = key.partition("|")
            waiting = tree.missing(key)
            listeners.append({"kind": "api", "where": scope, "address": authority,
                              "state": f"waits for {', '.join(waiting)}" if waiting else "in force"})
        return shape | {
            "listeners": listeners,
            "certificates": self._certificates.shown(),
            "dns": [{"namespace": pod["namespace"], "pod": pod["name"], "captured": pod["dns"] is not None, **(pod["dns"] or {})}
                    for pod in self._pods.shown() if pod["captured"]],
            **dump.tunnels(self._data_path.tunnels(), self._pods.by_handle(), time.time()),
            "config": {"node": self._options.node, "clusterId": self._options.cluster,
                       "trustDomain": self._options.trust_domain, "xds": self._options.xds,
                       "runDir": str(self._options.run_dir)},
            "workloadState": {pod["uid"]: {"state": pod["state"], "info": {"name": pod["name"], "namespace":
                              pod["namespace"]}} for pod in self._pods.shown()},
            "held": {TypeUrl(url).name.lower(): len(self._session.held(url)) for url in TypeUrl},
        }

    def authorize(self, namespace: str, name: str, identity: str | None, source: str, destination: str, port: int) -> dict[str, Any]:
        """What workers say of a connection to a captured pod of this node. Raises LookupError, ValueError."""
        pod = next((pod for pod in self._pods.captured() if pod.ref == f"{namespace}/{name}"), None)
        put = self._store.entry((Table.POD, pod.uid)) if pod is not None else None
        if pod is None or not isinstance(put, PutPod):
            raise LookupError(f"pod {namespace}/{name} is not captured on this node")
        if not any(str(address) == destination for address in pod.addresses):
            raise ValueError(f"{destination} is no address of pod {pod.ref}; it has {', '.join(map(str, pod.addresses))}")
        workload = self._store.entry((Table.WORKLOAD, put.workload))
        entries = [put, *([workload] if workload is not None else []), *self._store.entries(Table.POLICY)]
        found = verdict([encode_put(one, self._store.service_index) for one in entries], put.handle, identity, source, destination, port)
        missing = [key for key in self._store.workloads[put.workload].policies if key not in self._store.policies]
        return found | {"missing": missing}

    def log_level(self) -> str:
        return logs.level()

    def set_log_level(self, level: str) -> None:
        logs.set_level(level)

    def quit(self) -> None:
        self.stop()

    # -- inside -----------------------------------------------------------------------------------------------------

    def _again(self) -> None:
        self._pods.again()

    def _keeper_silent(self) -> float | None:
        link = self._link
        return link.silent if link is not None else None

    def _pids(self) -> Mapping[str, int]:
        """Called from the thread that renders metrics."""
        found = {"agent": os.getpid()}
        link = self._link
        if link is not None:
            found["keeper"] = link.pid
            found.update({f"worker-{index}": pid for index, pid in dict(link.worker_pids).items()})
        return found


async def serve(options: Options) -> None:
    """Run an agent in this event loop until it is stopped."""
    with suppress(FileNotFoundError):
        os.chmod(options.run_dir, 0o700)
    await Agent(options).run()



