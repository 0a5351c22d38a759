"""Seven back ends that tell what they read, in one namespace; Narrows in front of each, and the corpus sent through it or to them.

    client pod (captured) -> 10.96.0.10:9101 ... -> worker -> back ends' pod: h11, node, gunicorn, nginx, haproxy, envoy
                                                 \\-> worker again (server pod, captured) -> h11           "narrows"

nginx, HAProxy, Envoy and Narrows itself pass on to the h11 recorder: what comes out is what they understood.
"""
from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from agent import netlink
from agent.dataplane import blobs
from agent.model.routing import Balancer, Cluster, Destination, Endpoint, VirtualHost, WeightedCluster
from agent.model.settings import ProxySettings
from agent.model.workload import Protocol, Service, ServicePort, WorkloadPort
from tests.support.capture import ByHand
from tests.support.mesh import CLIENT, SCOPE, SERVER, SERVICE_INDEX, VIP, any_path, half_close, workload
from tests.support.netns import Namespaces, Netns, Node
from tests.support.smuggling import Sent
from tests.support.wait import until
from tests.support.worker import Worker

PEERS = Path(__file__).resolve().parent.parent / "netns" / "strict" / "peers"
NAMES = ("h11", "node", "gunicorn", "nginx", "haproxy", "envoy", "narrows")
REACHED = (*NAMES, "origin")  # "origin": a server of the test's own
FRONT = {name: 9101 + at for at, name in enumerate(REACHED)}  # ports of the service, where Narrows answers
BACK = {name: 8101 + at for at, name in enumerate(REACHED)}  # where the back end itself listens
BEHIND = {name: 8201 + at for at, name in enumerate(NAMES)}  # the recorder behind those that pass on
HOST, SERVICE = "strict.default.svc.cluster.local", "default/strict.default.svc.cluster.local"


def program(name: str) -> str:
    """A back end that is missing is a failure."""
    if name == "envoy":  # the binary itself: the package's wrapper would stay as a parent
        spec = find_spec("envoy")
        found = str(Path(spec.origin).parent / "_bin" / "envoy") if spec is not None and spec.origin is not None else None
    else:
        found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    assert found is not None, f"{name} is not installed: run `make setup`"
    return found


def in_reach(netns: Netns, port: int) -> bool:
    def connect() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    return bool(netlink.in_netns(netns.path, connect))


@dataclass
class Backends:
    """The programs, and what they told. `told` grows while they run."""

    netns: Netns
    folder: Path
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, server: Netns) -> None:
        """`server`: the pod of the recorder that Narrows itself passes on to."""
        passed = [f"{name}={BEHIND[name]}" for name in ("nginx", "haproxy", "envoy")]
        self._run("h11", sys.executable, str(PEERS / "recorder.py"), f"h11={BACK['h11']}", *passed)
        self._run("node", program("node"), str(PEERS / "node.js"), str(BACK["node"]))
        self._run("gunicorn", sys.executable, "-m", "gunicorn", "--worker-class", "gthread", "--threads", "64", "--keep-alive", "90",
                  "--bind", f"[::]:{BACK['gunicorn']}", "--chdir", str(PEERS), "--worker-tmp-dir", "/dev/shm",
                  "--log-level", "critical", "--no-control-socket", "wsgi")
        self._run("nginx", program("nginx"), "-p", str(self.folder), "-c", self._fill("nginx", "conf"), "-g", "daemon off;")
        self._run("haproxy", program("haproxy"), "-db", "-q", "-f", self._fill("haproxy", "cfg"))
        self._run("envoy", program("envoy"), "-c", self._fill("envoy", "yaml"), "--concurrency", "1", "--log-level", "error",
                  "--disable-hot-restart")
        self._run("narrows", sys.executable, str(PEERS / "recorder.py"), f"narrows={BACK['narrows']}", netns=server)
        for name, process in self.processes.items():
            netns = server if name == "narrows" else self.netns
            until(lambda p=process, n=netns, port=BACK[name]: p.poll() is not None or in_reach(n, port),
                  f"{name} listens", timeout=30)
            assert process.poll() is None, f"{name} ended with {process.returncode}: {(self.folder / f'{name}.err').read_text()}"

    def told(self) -> dict[str, list[Sent]]:
        """By back end: the requests that it read, in the order in which they were complete."""
        found: dict[str, list[Sent]] = defaultdict(list)
        for path in self.folder.glob("*.out"):
            for line in path.read_text().splitlines():
                one = json.loads(line)
                found[one["at"]].append(Sent(*(one[key].encode("latin-1") for key in ("method", "target", "body", "host"))))
        return found

    def stop(self) -> None:
        """By SIGTERM, so that those with workers of their own end them."""
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            process.wait(10)

    def _fill(self, name: str, suffix: str) -> str:
        text = (PEERS / f"{name}.{suffix}").read_text()
        for key, value in (("LISTEN", BACK[name]), ("PORT", BEHIND[name]), ("DIR", self.folder)):
            text = text.replace(f"@{key}@", str(value))
        path = self.folder / f"{name}.{suffix}"
        path.write_text(text)
        return str(path)

    def _run(self, name: str, *argv: str, netns: Netns | None = None) -> None:
        with open(self.folder / f"{name}.out", "wb") as out, open(self.folder / f"{name}.err", "wb") as err:
            self.processes[name] = (netns or self.netns).start(*argv, stdin=subprocess.DEVNULL, stdout=out, stderr=err)


@dataclass
class Stage:
    """The worker in front of the back ends. Every connection has a local port of its own, by which the log's records are known."""

    backends: Backends
    worker: Worker
    client: Netns
    outside: Netns
    # below those that the kernel gives to the worker's own connections
    _ports: Iterator[int] = field(default_factory=lambda: iter(range(2_000, 32_000)))
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _records: dict[int, list[dict[str, Any]]] = field(default_factory=lambda: defaultdict(list))

    def say(self, name: str, data: bytes, *, direct: bool = False, hang_up: bool = False, patience: float = 10) -> tuple[int, bytes]:
        """(local port, all that came back). `hang_up`: close the sending side behind the bytes; else it is closed when nothing
        has come for `patience` seconds. AssertionError where Narrows is spoken to: it ends a connection that is over."""
        netns, port = (self.outside, BACK[name]) if direct else (self.client, FRONT[name])
        address = "127.0.0.1" if direct else VIP
        with self._lock:
            local = next(self._ports)
        connection = netlink.in_netns(netns.path, lambda: socket.create_connection(
            (address, port), timeout=patience, source_address=("127.0.0.1" if direct else netns.ip, local)))
        with connection:
            return local, self._talk(connection, data, direct, hang_up)

    @staticmethod
    def _talk(connection: socket.socket, data: bytes, direct: bool, hang_up: bool) -> bytes:
        got = []
        with suppress(ConnectionError, BrokenPipeError):
            connection.sendall(data)
            if hang_up:
                half_close(connection)
            while True:
                try:
                    if not (part := connection.recv(65536)):
                        break
                    got.append(part)
                except TimeoutError:
                    assert direct, f"silence after {b''.join(got)!r}"
                    if hang_up:
                        break
                    hang_up = True
                    half_close(connection)
        return b"".join(got)

    def records(self, local: int) -> list[dict[str, Any]]:
        """The worker's log of a connection, in order; by the side that sends."""
        self.drain()
        return self._records[local]

    def drain(self) -> None:
        with self._lock:
            for one in self.worker.records():
                if one["reporter"] == "source":
                    self._records[int(one["downstream_remote"].rpartition(":")[2])].append(one)

    def settle(self) -> None:
        """Everything that was said has been read, answered and told."""
        until(lambda: self.worker.header["downstream_open"] <= self.worker.header["upstream_idle"], "the worker is done with all")
        self.drain()


def configure(worker: Worker, client: Netns, server: Netns, outside: Netns) -> None:
    one = WeightedCluster
    service = Service("default", HOST, "strict", (ip_address(VIP),),
                      tuple(ServicePort(FRONT[name], BACK[name], Protocol.HTTP) for name in REACHED))
    declared = WorkloadPort(SERVICE, FRONT["narrows"], BACK["narrows"], Protocol.HTTP)
    worker.commit(
        blobs.put_settings(ProxySettings()),
        blobs.put_pod("pod-c", 1, "w-client", SCOPE, (ip_address(client.ip),)),
        blobs.put_pod("pod-s", 2, "w-server", SCOPE, (ip_address(server.ip),)),
        blobs.put_service(SERVICE_INDEX, service),
        blobs.put_workload(CLIENT, workload("w-client", client), lambda _: SERVICE_INDEX),
        blobs.put_workload(SERVER, workload("w-server", server, declared), lambda _: SERVICE_INDEX),
        *(blobs.put_cluster(Cluster(SCOPE, name, SERVICE, Balancer.ROUND_ROBIN, 2000, (
            Endpoint(ip_address(server.ip if name == "narrows" else outside.ip), BACK[name]),)), lambda _: SERVICE_INDEX)
          for name in REACHED),
        *(blobs.put_destination(Destination(SCOPE, f"{HOST}:{FRONT[name]}", (
            VirtualHost("v", ("*",), (any_path(one(name, 1)),)),), None)) for name in REACHED))


@contextmanager
def stage(namespaces: Namespaces, by_hand: ByHand, folder: Path, with_backends: bool = True) -> Iterator[Stage]:
    node = Node(namespaces)
    client, server, outside = node.pod("client"), node.pod("server"), node.pod("backends")
    by_hand(client, server)
    backends = Backends(outside, folder)
    try:
        if with_backends:
            backends.start(server)
        with Worker() as worker:
            configure(worker, client, server, outside)
            worker.attach(1, client)
            worker.attach(2, server)
            yield Stage(backends, worker, client, outside)
            assert not worker.ended(), f"the worker died: status {worker.status}"
    finally:
        backends.stop()
