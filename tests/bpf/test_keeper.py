"""Egress capture with the real keeper and its confined workers: what lives on when a process of ours ends."""
from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

import pytest

from agent.capture.egress import Egress
from agent.capture.pins import Pins
from agent.dataplane.client import KeeperClient
from agent.dataplane.readers import Readers, seccomp
from agent.model.pod import CaptureSettings
from tests.support.cgroup import Cgroup, Cgroups
from tests.support.hooks import enrolled, keeping, replace_worker
from tests.support.mesh import Origin, echo
from tests.support.netns import Netns, Node
from tests.support.wait import until

pytestmark = pytest.mark.netns

TALK = """if True:
    import errno, socket, sys
    s = socket.socket()
    s.settimeout(30)
    code = s.connect_ex((sys.argv[1], 9000))
    if code:
        print(errno.errorcode[code], flush=True)
    else:
        s.sendall(b"x")
        print(s.recv(1).decode(), *s.getpeername(), flush=True)
        sys.stdin.read()"""


@dataclass
class Mesh:
    pod: Netns
    other: Netns
    app: Cgroup
    proxy: Cgroup
    origin: Origin

    @contextmanager
    def talking(self) -> Iterator[str]:
        """What the application says first; its connection stands meanwhile."""
        with self.app.start(self.pod, sys.executable, "-c", TALK, self.other.ip, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            text=True) as talker:
            assert talker.stdin is not None and talker.stdout is not None
            yield talker.stdout.readline().strip()
            talker.stdin.close()
            talker.wait(20)

    def through_the_proxy(self) -> bool:
        """By ss(8)."""
        with self.talking() as said:
            assert said == f"x {self.other.ip} 9000", said
            return bool(self.pod.run("ss", "-Htn", "state", "established", "sport", "=", ":15001").stdout)


@pytest.fixture
def mesh(node: Node, cgroups: Cgroups, loaded: Pins) -> Iterator[Mesh]:
    pod, other, app, proxy = node.pod("client"), node.pod("other"), cgroups.make("app"), cgroups.make("proxy")
    capture = Egress(loaded)
    capture.serve(proxy.path)
    capture.capture(pod.path, app.path, (ip_address(pod.ip), ip_address(pod.ip6)), CaptureSettings())
    origin = Origin(other, 9000, echo)
    try:
        yield Mesh(pod, other, app, proxy, origin)
    finally:
        origin.close()


@pytest.fixture
async def client(mesh: Mesh, tmp_path: Path) -> AsyncIterator[KeeperClient]:
    with keeping(mesh.proxy, tmp_path / "run") as keeper:
        one = await enrolled(keeper, mesh.pod, "w-client")
        yield one
        await one.close()


async def test_confined_workers_learn_where_a_connection_was_meant_to_go(mesh: Mesh, client: KeeperClient) -> None:
    readers = Readers(await client.shm())
    assert [seccomp(header) for header in readers.headers().values()] == ["on"]
    readers.close()
    assert mesh.through_the_proxy()
    assert mesh.origin.peers == [mesh.pod.ip]


async def test_a_killed_worker_is_replaced_and_capture_goes_on(mesh: Mesh, client: KeeperClient) -> None:
    assert mesh.through_the_proxy()
    await replace_worker(client)
    assert mesh.through_the_proxy()


async def test_a_keeper_that_went_is_a_refused_connect_until_the_next_one(mesh: Mesh, client: KeeperClient, tmp_path: Path) -> None:
    assert mesh.through_the_proxy()
    await client.shutdown()
    until(lambda: mesh.pod.run("ss", "-Hltn").stdout == "", "the listeners have gone")
    with mesh.talking() as said:
        assert said == "ECONNREFUSED"
    with keeping(mesh.proxy, tmp_path / "next") as keeper:
        again = await enrolled(keeper, mesh.pod, "w-client")
        assert mesh.through_the_proxy()
        await again.close()
    assert len(mesh.origin.peers) == 2
