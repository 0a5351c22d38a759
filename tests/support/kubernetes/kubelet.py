"""A hollow kubelet: a Node of the real API server whose pods are real namespaces, cgroups and processes, without containers.

    with Cluster(controllers=True) as cluster, Kubelet(cluster, namespaces, "n1") as kubelet:
        cluster.apply(a_deployment)
        pod = kubelet.pod("default", "web-...")     waits until it runs: its namespace, cgroups, address

It binds pods that nobody has bound (there is no scheduler), runs each container's `command` and `args` on this machine's own files in the
pod's network namespace, with a sandbox process beside (without a command: only that), tells status, follows readiness probes (httpGet,
tcpSocket, from the node's namespace), and ends pods within their grace. Cgroups are where kubelet has them, by either driver, below one
of the test's own (`kubelet --cgroup-root`). A container that ends is not started again: its pod has failed. No volumes.
"""
from __future__ import annotations

import asyncio
import os
import secrets
import subprocess
import threading
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

from agent import netlink
from protos.kubernetes.client import Client
from protos.kubernetes.errors import ApiError, Conflict, NotFound
from protos.kubernetes.follow import Follower
from protos.kubernetes.objects import Key
from protos.kubernetes.reflector import Batch
from protos.kubernetes.resources import NODES, PODS, Resource
from tests.support.cgroup import cgroup2, entering
from tests.support.kubernetes.real import Cluster
from tests.support.netns import Namespaces, Netns, Node
from tests.support.wait import until

BINDINGS = Resource("", "v1", "bindings", "Binding")
TICK = 0.1  # s between looks at processes and probes
GRACE = 30  # s at most that a pod has to end in
SANDBOX = ("sleep", "infinity")
Body = dict[str, Any]


@dataclass
class Pod:
    """One that runs here. `cgroup` is the pod's; those of its containers are in it."""

    key: Key
    uid: str
    body: Body
    netns: Netns
    cgroup: Path
    containers: dict[str, str] = field(default_factory=dict)  # name -> id
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)  # the sandbox's is ""
    ready: bool = False
    phase: str = "Running"
    told: tuple[object, ...] = ()  # what the API server was told last

    @property
    def ip(self) -> str:
        return self.netns.ip

    @property
    def inode(self) -> int:
        """Of its network namespace."""
        return os.stat(self.netns.path).st_ino


class Kubelet:
    def __init__(self, cluster: Cluster, namespaces: Namespaces, name: str, *, number: int = 1, systemd: bool = False,
                 labels: Mapping[str, str] | None = None) -> None:
        """`number` is of the node's part of the pods' addresses; `systemd`: cgroups as by that driver, else by cgroupfs."""
        self.name, self.systemd, self._labels = name, systemd, dict(labels or {})
        self.node = Node(namespaces, number)
        self.root = cgroup2() / f"t{os.getpid()}-{uuid.uuid4().hex[:4]}"
        self._cluster, self._namespaces = cluster, namespaces
        self._wanted: dict[Key, Body] = {}
        self._pods: dict[Key, Pod] = {}
        self._number = 10  # the next pod's
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._main, name=f"kubelet-{name}", daemon=True)
        self._ready, self._stop = threading.Event(), asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._error: BaseException | None = None

    def __enter__(self) -> Kubelet:
        self._thread.start()
        assert self._ready.wait(60), "the kubelet did not register its node"
        self._check()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(60)
        assert not self._thread.is_alive()
        self._check()

    def pod(self, namespace: str, name: str, seconds: float = 30.0) -> Pod:
        """Waits until it runs and is ready."""
        key = Key(namespace, name)

        def find() -> Pod | None:
            self._check()
            one = self._pods.get(key)
            return one if one is not None and one.ready else None

        return until(find, f"pod {key} runs on {self.name}", seconds)  # type: ignore[return-value]

    def pods(self) -> dict[Key, Pod]:
        """Those that have a sandbox now."""
        self._check()
        return dict(self._pods)

    def recreate(self, namespace: str, name: str) -> None:
        """A new sandbox under the same pod, as after a crash: other namespace, other address, other containers."""
        async def again() -> None:
            one = self._pods[Key(namespace, name)]
            self._remove(one)
            self._run(one.key, one.body)
        asyncio.run_coroutine_threadsafe(again(), self._loop).result(60)

    # -- the loop ---------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        if self._error is not None:
            raise AssertionError(f"kubelet {self.name} failed") from self._error

    def _main(self) -> None:
        try:
            self._loop.run_until_complete(self._live())
        except BaseException as error:
            self._error = error
        finally:
            self._ready.set()
            for one in list(self._pods.values()):
                self._remove(one)
            _remove_tree(self.root)
            self._loop.close()

    async def _live(self) -> None:
        async with Client(self._cluster.configuration(), f"kubelet-{self.name}") as self._client:
            await self._register()
            mine = Follower(self._client, PODS, Body, self._take, fields=f"spec.nodeName={self.name}")
            others = Follower(self._client, PODS, Body, self._bind_all, fields="spec.nodeName=")
            self._tasks |= {asyncio.create_task(one) for one in (mine.run(), others.run(), self._look())}
            self._ready.set()
            stop = asyncio.create_task(self._stop.wait())
            while not stop.done():
                done, _ = await asyncio.wait({stop, *self._tasks}, return_when=asyncio.FIRST_COMPLETED)
                for one in done - {stop}:
                    self._tasks.discard(one)  # type: ignore[arg-type]
                    if (error := one.exception()) is not None:
                        raise error
            for one in self._tasks:
                one.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _begin(self, work: Any) -> None:
        self._tasks.add(asyncio.ensure_future(work))

    async def _register(self) -> None:
        labels = {"kubernetes.io/hostname": self.name, "kubernetes.io/os": "linux", **self._labels}
        await self._client.create(NODES, {"metadata": {"name": self.name, "labels": labels}, "spec": {
            "podCIDR": f"10.244.{self.node.number}.0/24"}})
        room = {"cpu": "8", "memory": "16Gi", "pods": "200"}
        await self._client.merge(NODES, self.name, "", {"status": {
            "addresses": [{"type": "InternalIP", "address": self.node.netns.ip}, {"type": "Hostname", "address": self.name}],
            "capacity": room, "allocatable": room, "conditions": [_condition("Ready", True)]}}, subresource="status")

    # -- pods that are nobody's yet ---------------------------------------------------------------------------------

    def _bind_all(self, batch: Batch[Body]) -> None:
        for key, body in batch.puts.items():
            if self._fits(body["spec"]) and "deletionTimestamp" not in body["metadata"]:
                self._begin(self._bind(key, body))

    def _fits(self, spec: Body) -> bool:
        labels = {"kubernetes.io/hostname": self.name, **self._labels}
        if any(labels.get(key) != value for key, value in (spec.get("nodeSelector") or {}).items()):
            return False
        required = (((spec.get("affinity") or {}).get("nodeAffinity") or {}).get("requiredDuringSchedulingIgnoredDuringExecution") or {})
        names = [value for term in required.get("nodeSelectorTerms") or () for one in term.get("matchFields") or ()
                 for value in one["values"] if one["key"] == "metadata.name"]  # how a DaemonSet says its node
        return not names or self.name in names

    async def _bind(self, key: Key, body: Body) -> None:
        target = {"apiVersion": "v1", "kind": "Node", "name": self.name}
        with suppress(Conflict, NotFound):  # another node had it first, or it is gone
            await self._client.create(BINDINGS, {"metadata": {"name": key.name, "uid": body["metadata"]["uid"]}, "target": target},
                                      key.namespace)

    # -- pods that are ours -----------------------------------------------------------------------------------------

    def _take(self, batch: Batch[Body]) -> None:
        for key in batch.deletes:
            self._wanted.pop(key, None)
            if (one := self._pods.get(key)) is not None:
                self._remove(one)  # deleted by force
        for key, body in batch.puts.items():
            before = self._wanted.get(key)
            self._wanted[key] = body
            one = self._pods.get(key)
            if one is not None and one.uid != body["metadata"]["uid"]:
                self._remove(one)
                one = before = None
            if one is not None:
                one.body = body
            ending = "deletionTimestamp" in body["metadata"]
            if ending and not (before and "deletionTimestamp" in before["metadata"]):
                self._begin(self._finish(key, body))
            elif one is None and not ending and body["status"].get("phase") == "Pending":
                self._run(key, body)

    def _run(self, key: Key, body: Body) -> None:
        uid, spec = body["metadata"]["uid"], body["spec"]
        if spec.get("hostNetwork"):
            netns = self.node.netns
        else:
            self._number += 1
            netns = self.node.pod(f"{key.name[:40]}-{uid[:8]}-{self._number}", self._number)
        one = Pod(key, uid, body, netns, self.root / self._cgroup(uid, body["status"].get("qosClass", "BestEffort")))
        self._pods[key] = one
        self._start(one, "", SANDBOX, {})
        for container in spec["containers"]:
            argv = [*(container.get("command") or ()), *(container.get("args") or ())] or list(SANDBOX)
            self._start(one, container["name"], argv, {each["name"]: self._value(one, each) for each in container.get("env") or ()})

    def _start(self, one: Pod, name: str, argv: Any, env: dict[str, str]) -> None:
        one.containers[name] = secrets.token_hex(32)
        cgroup = one.cgroup / (f"cri-containerd-{one.containers[name]}.scope" if self.systemd else one.containers[name])
        cgroup.mkdir(parents=True)
        inside = ["nsenter", f"--net={one.netns.path}", "--", *argv]
        one.processes[name] = subprocess.Popen(["setpriv", "--pdeathsig", "KILL", *entering(str(cgroup), *inside)],
                                               stdin=subprocess.DEVNULL, env={**os.environ, **env})

    def _cgroup(self, uid: str, quality: str) -> Path:
        """Relative to our root: kubelet's pkg/kubelet/cm, names of pods' cgroups by driver and quality of service."""
        below = "" if quality == "Guaranteed" else quality.lower()
        if not self.systemd:
            return Path("kubepods", *filter(None, [below]), f"pod{uid}")
        stem = f"kubepods-{below}" if below else "kubepods"
        return Path("kubepods.slice", *([f"{stem}.slice"] if below else []), f"{stem}-pod{uid.replace('-', '_')}.slice")

    def _value(self, one: Pod, each: Body) -> str:
        if "valueFrom" not in each:
            return str(each.get("value", ""))
        path = ((each["valueFrom"].get("fieldRef")) or {}).get("fieldPath", "")
        known = {"metadata.name": one.key.name, "metadata.namespace": one.key.namespace, "metadata.uid": one.uid, "status.podIP": one.ip,
                 "spec.nodeName": self.name, "status.hostIP": self.node.netns.ip}
        if path not in known:
            raise AssertionError(f"the hollow kubelet knows no {each['valueFrom']} for {each['name']}")
        return known[path]

    async def _look(self) -> None:
        """Tells of each pod what changed."""
        while True:
            for one in list(self._pods.values()):
                ended = {name: code for name, process in one.processes.items() if (code := process.poll()) is not None}
                if one.phase == "Running" and ended.keys() - {""}:
                    one.phase = "Succeeded" if not any(ended.values()) and ended.keys() >= one.processes.keys() - {""} else "Failed"
                one.ready = one.phase == "Running" and await self._probed(one)
                now = (one.netns.path, one.phase, one.ready)
                if one.told != now and self._pods.get(one.key) is one:
                    try:
                        await self._client.merge(PODS, one.key.name, one.key.namespace, {"status": self._status(one, ended)},
                                                 subresource="status")
                        one.told = now
                    except ApiError as error:
                        if not isinstance(error, NotFound) and self._pods.get(one.key) is one:
                            raise
            await asyncio.sleep(TICK)

    async def _probed(self, one: Pod) -> bool:
        if not all(_entered(process, one.inode) for process in one.processes.values()):
            return False
        for each in one.body["spec"]["containers"]:
            if "readinessProbe" in each:
                probe = partial(_probe, one, each["readinessProbe"])
                if not await asyncio.to_thread(netlink.in_netns, self.node.netns.path, probe):
                    return False
        return True

    def _status(self, one: Pod, ended: dict[str, int]) -> Body:
        now = _now()
        states = [{"name": each["name"], "image": each["image"], "imageID": "", "restartCount": 0,
                   "containerID": f"containerd://{one.containers[each['name']]}", "ready": one.ready, "started": each["name"] not in ended,
                   "state": {"terminated": {"exitCode": ended[each["name"]]}} if each["name"] in ended else {"running": {"startedAt": now}}}
                  for each in one.body["spec"]["containers"]]
        ips = [{"ip": ip} for ip in (one.netns.ip, one.netns.ip6) if ip]
        return {"phase": one.phase, "podIP": one.ip, "podIPs": ips, "hostIP": self.node.netns.ip, "startTime": now,
                "containerStatuses": states, "conditions": [
                    *(_condition(kind, True) for kind in ("PodScheduled", "Initialized")),
                    *(_condition(kind, one.ready) for kind in ("ContainersReady", "Ready"))]}

    async def _finish(self, key: Key, body: Body) -> None:
        """What kubelet does with a pod that is to go: TERM, its grace, KILL, and the API server may forget it."""
        one, meta = self._pods.get(key), body["metadata"]
        if one is not None and one.uid == meta["uid"]:
            for name, process in one.processes.items():
                if name:
                    process.terminate()
            end = self._loop.time() + min(GRACE, meta.get("deletionGracePeriodSeconds") or 0)
            while self._loop.time() < end and any(process.poll() is None for name, process in one.processes.items() if name):
                await asyncio.sleep(TICK)
            if self._pods.get(key) is one:
                self._remove(one)
        with suppress(Conflict, NotFound):
            await self._client.delete(PODS, key.name, key.namespace, uid=meta["uid"], grace_seconds=0)

    def _remove(self, one: Pod) -> None:
        self._pods.pop(one.key, None)
        for process in one.processes.values():
            process.kill()
        if (one.cgroup / "cgroup.kill").exists():
            (one.cgroup / "cgroup.kill").write_text("1")  # what they started, too
        for process in one.processes.values():
            process.wait(10)
        _remove_tree(one.cgroup)
        if one.netns is not self.node.netns:
            netlink.delete_namespace(one.netns.name)


def _entered(process: subprocess.Popen[bytes], namespace: int) -> bool:
    """It is in the pod, which is the last thing before it becomes the program that it is for, or has ended already."""
    try:
        return process.poll() is not None or os.stat(f"/proc/{process.pid}/ns/net").st_ino == namespace
    except OSError:
        return True


def _probe(one: Pod, probe: Body) -> bool:
    how = probe.get("httpGet") or probe.get("tcpSocket") or {}
    port = how.get("port")
    if isinstance(port, str):
        port = next(each["containerPort"] for container in one.body["spec"]["containers"] for each in container.get("ports") or ()
                    if each.get("name") == port)
    connection = HTTPConnection(one.ip, int(port), timeout=1)
    try:
        if "httpGet" not in probe:
            connection.connect()
            return True
        connection.request("GET", how.get("path") or "/", headers={"User-Agent": "kube-probe/1.20"})
        return 200 <= connection.getresponse().status < 400
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


def _condition(kind: str, holds: bool) -> Body:
    return {"type": kind, "status": "True" if holds else "False", "lastTransitionTime": _now()}


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _remove_tree(path: Path) -> None:
    """Cgroups from the leaves up; those who were in them have just been killed, and take a moment to be gone."""
    def gone() -> bool:
        for folder, _, _ in os.walk(path, topdown=False):
            with suppress(OSError):
                os.rmdir(folder)
        return not path.exists()
    until(gone, f"{path} is empty")
