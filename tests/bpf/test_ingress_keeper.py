"""Ingress capture with the real keeper and its confined workers: what lives on when a process of ours ends."""
from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

import pytest

from agent import netlink
from agent.capture.egress import netns_cookie
from agent.capture.ingress import Ingress, IngressError
from agent.capture.loader import INGRESS, load
from agent.capture.pins import Pins
from agent.capture.plan import plan
from agent.capture.reconcile import Reconciler
from agent.dataplane import blobs
from agent.dataplane.client import KeeperClient
from agent.model.pod import CaptureSettings
from tests.support.cgroup import Cgroup, Cgroups
from tests.support.egress import TRY
from tests.support.hooks import enrolled, keeping, replace_worker
from tests.support.keeper import Keeper
from tests.support.mesh import Origin, echo, receive, workload
from tests.support.netns import Netns, Node
from tests.support.wait import until

pytestmark = pytest.mark.netns


@dataclass
class Mesh:
    pod: Netns
    other: Netns
    proxy: Cgroup
    ingress: Ingress
    origin: Origin

    def capture(self) -> None:
        self.ingress.capture(self.pod.path, (ip_address(self.pod.ip), ip_address(self.pod.ip6)), CaptureSettings())

    def attempt(self) -> str:
        return self.other.python(TRY, self.pod.ip, "9000").stdout.strip()

    def through_the_proxy(self) -> bool:
        """By ss(8): the application's side is on lo, with the client's address."""
        with netlink.in_netns(self.other.path, lambda: socket.create_connection((self.pod.ip, 9000), timeout=30)) as one:
            one.sendall(b"x")
            assert receive(one, 1) == b"x"
            port = one.getsockname()[1]
            peers = self.pod.run("ss", "-Htn", "state", "established", "sport", "=", ":9000").stdout
            ends = {line.split()[-1] for line in peers.splitlines()}
            client = {end for end in ends if end.endswith(f":{port}")}
            return len(client) == 1 and len(ends) > 1 and all(self.other.ip in end for end in ends)


async def known(keeper: Keeper, pod: Netns) -> KeeperClient:
    return await enrolled(keeper, pod, "w-server",
                          blobs.put_workload(1, workload("w-server", pod), lambda _: 0))  # nobody else's connections are let in


@pytest.fixture
def mesh(node: Node, cgroups: Cgroups, pins: Pins, cache: Path) -> Iterator[Mesh]:
    pod, other, proxy = node.pod("server"), node.pod("other"), cgroups.make("proxy")
    found, instance = load(pins, cache, hooks=INGRESS), uuid.uuid4().hex[:8]
    assert found.lookup is not None
    asyncio.run(Reconciler(instance).apply(pod.path, plan(CaptureSettings(), (4, 6), instance, redirect=False, hooks=True, inbound=False)))
    origin = Origin(pod, 9000, echo)
    try:
        yield Mesh(pod, other, proxy, Ingress(pins, found.lookup), origin)
    finally:
        origin.close()


@pytest.fixture
async def client(mesh: Mesh, tmp_path: Path) -> AsyncIterator[KeeperClient]:
    mesh.ingress.serve(mesh.proxy.path)
    with keeping(mesh.proxy, tmp_path / "run") as keeper:
        one = await known(keeper, mesh.pod)
        mesh.capture()
        yield one
        await one.close()


async def test_a_killed_worker_is_replaced_and_capture_goes_on(mesh: Mesh, client: KeeperClient) -> None:
    assert mesh.through_the_proxy()
    await replace_worker(client)
    assert mesh.through_the_proxy()


async def test_a_keeper_that_went_is_a_refused_connect_until_the_next_one_listens(mesh: Mesh, client: KeeperClient, tmp_path: Path) -> None:
    """Nobody tells the kernel of the next one's listener."""
    assert mesh.through_the_proxy()
    seen = len(mesh.origin.peers)
    await client.shutdown()
    until(lambda: ":15006" not in mesh.pod.run("ss", "-Hltn").stdout, "the listeners have gone")
    assert mesh.attempt() == "ECONNREFUSED"
    assert len(mesh.origin.peers) == seen
    with keeping(mesh.proxy, tmp_path / "next") as keeper:
        again = await known(keeper, mesh.pod)
        assert mesh.through_the_proxy()
        await again.close()


async def test_listeners_of_a_keeper_that_was_there_first_are_taken_over(mesh: Mesh, tmp_path: Path) -> None:
    with keeping(mesh.proxy, tmp_path / "run") as keeper:
        one = await known(keeper, mesh.pod)
        mesh.ingress.serve(mesh.proxy.path)
        with pytest.raises(IngressError, match="no listener on port 15006 is known"):
            mesh.capture()
        assert mesh.ingress.adopt(keeper.process.pid) == [netns_cookie(mesh.pod.path)]
        mesh.capture()
        assert mesh.through_the_proxy()
        shown = subprocess.run(["bpftool", "link", "show"], capture_output=True, text=True, check=True, timeout=20).stdout
        assert f"netns_ino {os.stat(mesh.pod.path).st_ino}" in shown
        await one.close()
