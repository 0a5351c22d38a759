"""What tests of capture by eBPF share, in either direction: pods with a worker, clients that compare, and a keeper's worker."""
from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from agent import netlink
from agent.capture.pins import Pins
from agent.dataplane import blobs
from agent.dataplane.client import KeeperClient, connect
from agent.dataplane.protocol import WorkerChange, WorkerState
from agent.model.settings import ProxySettings
from tests.support.cgroup import Cgroup
from tests.support.keeper import Keeper, running
from tests.support.mesh import SCOPE, Mesh, Pods, receive_all
from tests.support.netns import Netns
from tests.support.wait import until
from tests.support.worker import Worker

# Each of 16 threads goes round the places ("address port") after the number of turns. At port 9002 the digest of what was said is heard.
MANY = """if True:
    import hashlib, os, socket, sys, threading
    turns, places = int(sys.argv[1]), [place.split() for place in sys.argv[2:]]
    wrong = []
    def work(number):
        for turn in range(turns):
            address, port = places[(number + turn) % len(places)]
            try:
                with socket.create_connection((address, int(port)), timeout=60) as s:
                    said = os.urandom(3000)
                    s.sendall(said)
                    s.shutdown(socket.SHUT_WR)
                    heard = b""
                    while data := s.recv(65536):
                        heard += data
                if heard != (hashlib.sha256(said).digest() if port == "9002" else said):
                    wrong.append((port, len(heard)))
            except OSError as error:
                wrong.append((port, str(error)))
    threads = [threading.Thread(target=work, args=(n,)) for n in range(16)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    print(wrong)"""

# Keeps one connection to the first address and makes others to all of them in turn, until the file `stop` is there; tells how many.
CONNECTING = """if True:
    import socket, sys
    from pathlib import Path
    stop, told, port, *addresses = sys.argv[1:]
    kept = socket.create_connection((addresses[0], int(port)), timeout=30)
    done = 0
    while not Path(stop).exists():
        for s in (kept, socket.create_connection((addresses[done % len(addresses)], int(port)), timeout=30)):
            s.sendall(b"x")
            assert s.recv(1) == b"x"
        s.close()
        done += 1
        Path(told).write_text(str(done))
    print(done)"""


@dataclass
class Hooked:
    """Three pods and a worker of the proxy's cgroup; `app` is the cgroup of the pod that is captured."""

    mesh: Mesh
    pins: Pins
    app: Cgroup
    proxy: Cgroup

    @property
    def client(self) -> Netns:
        return self.mesh.pods.client

    @property
    def server(self) -> Netns:
        return self.mesh.pods.server

    @property
    def other(self) -> Netns:
        return self.mesh.pods.other

    def taken_out(self) -> int:
        """Connections that the worker took at an outbound listener, so far."""
        return self._opened("source")

    def taken_in(self) -> int:
        """At an inbound one."""
        return self._opened("destination")

    def _opened(self, reporter: str) -> int:
        return sum(values["opened"] for key, values in self.mesh.worker.series() if key["reporter"] == reporter)


def digest(connection: socket.socket) -> None:
    """A behaviour for MANY's port 9002."""
    connection.sendall(hashlib.sha256(receive_all(connection)).digest())


class Connecting:
    """A client that connects all the time (CONNECTING)."""

    def __init__(self, process: subprocess.Popen[str], told: Path) -> None:
        self._process = process
        self._told = told
        self.done = 0  # once it has ended; without the one that it kept

    def more(self) -> None:
        """Ten connections have been made since."""
        before = self._count()
        until(lambda: self._count() >= before + 10, "connects go on", timeout=30)

    def _count(self) -> int:
        assert self._process.poll() is None, self._process.stderr and self._process.stderr.read()
        return int(self._told.read_text() or 0) if self._told.exists() else 0


@contextmanager
def connecting(start: Callable[..., subprocess.Popen[str]], folder: Path, port: int, *addresses: str) -> Iterator[Connecting]:
    """`start` runs a command where the client is to be. None of its connects may fail."""
    stop, told = folder / "stop", folder / "told"
    process = start(sys.executable, "-c", CONNECTING, str(stop), str(told), str(port), *addresses, stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE, text=True)
    made = Connecting(process, told)
    try:
        yield made
    finally:
        stop.touch()
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    made.done = int(out)


@contextmanager
def serving(pods: Pods, proxy: Cgroup) -> Iterator[Mesh]:
    """A worker in the proxy's cgroup, alive to the end, where this process is meanwhile."""
    with proxy.visited(), Worker() as worker:
        mesh = Mesh(pods, worker)
        worker.commit(blobs.put_settings(ProxySettings()))
        try:
            yield mesh
            assert not worker.ended(), f"the worker died: status {worker.status}"
        finally:
            for one in (*mesh.sockets, *mesh.origins):
                one.close()


# ---- with a keeper -----------------------------------------------------------------------------------------------------

@contextmanager
def keeping(proxy: Cgroup, run_dir: Path) -> Iterator[Keeper]:
    """A keeper of one worker, in that cgroup."""
    with proxy.visited():
        context = running(run_dir, workers=1)
        keeper = context.__enter__()
    try:
        yield keeper
    finally:
        context.__exit__(None, None, None)


async def enrolled(keeper: Keeper, pod: Netns, workload: str, *more: Any) -> KeeperClient:
    """As an agent does it: the pod is known and has listeners. `more`: what else to commit."""
    made = await connect(keeper.path)
    await made.commit([blobs.put_settings(ProxySettings()), blobs.put_pod("pod", 1, workload, SCOPE, (ip_address(pod.ip),)), *more])
    fd = netlink.open_namespace(pod.path)
    try:
        await made.add_pod(1, "pod", (4, 6), fd)
    finally:
        os.close(fd)
    return made


async def replace_worker(client: KeeperClient) -> None:
    """Kills the only one, and waits for the next."""
    (worker,) = await client.workers()
    os.kill(worker.pid, signal.SIGKILL)
    async with asyncio.timeout(60):
        async for event in client.events():
            if isinstance(event, WorkerChange) and event.state is WorkerState.REPLACED:
                return
