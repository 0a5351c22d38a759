"""Egress captured by socket hooks, against a real worker: what an application sees, and what the kernel says."""
from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

import pytest

from agent.capture.egress import Egress
from agent.capture.pins import Pins
from agent.capture.plan import plan
from agent.capture.reconcile import Reconciler
from agent.dataplane import blobs
from agent.model.pod import CaptureSettings
from agent.model.settings import ProxySettings
from agent.model.workload import Protocol
from tests.support import conntrack
from tests.support.cgroup import Cgroup, Cgroups
from tests.support.mesh import TCP_PORT, VIP, VIP6, Mesh, Pods, echo, everything
from tests.support.netns import Namespaces, Node
from tests.support.worker import Worker

pytestmark = pytest.mark.netns

# What runs in the pod: connects as told, sends a payload with its checksum, half-closes, and tells what came back and what it sees.
TALK = """if True:
    import hashlib, json, os, select, socket, sys
    address, port, size, family, blocking = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5] == "True"
    s = socket.socket(socket.AF_INET6 if family == 6 else socket.AF_INET)
    s.settimeout(30)
    if not blocking:
        s.setblocking(False)
        code = s.connect_ex((address, port))
        assert code in (0, 115), os.strerror(code)
        assert select.select([], [s], [], 30)[1]
        code = s.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        assert code == 0, os.strerror(code)
        s.settimeout(30)
    else:
        s.connect((address, port))
    seen = {"peer": s.getpeername()[:2], "own": s.getsockname()[0]}
    import threading
    said = os.urandom(size)
    t = threading.Thread(target=lambda: (s.sendall(said), s.shutdown(socket.SHUT_WR)))
    t.start()
    heard = hashlib.sha256()
    while data := s.recv(262144):
        heard.update(data)
    t.join()
    print(json.dumps(seen | {"same": heard.digest() == hashlib.sha256(said).digest()}))"""


@dataclass
class Stage:
    """`client` captured by eBPF, `server` by iptables (ingress), and the worker, whose listeners live in the proxy's cgroup."""

    mesh: Mesh
    egress: Egress
    pins: Pins
    app: Cgroup
    proxy: Cgroup

    def capture(self, settings: CaptureSettings | None = None) -> None:
        client = self.mesh.pods.client
        self.egress.capture(client.path, self.app.path, (ip_address(client.ip), ip_address(client.ip6)),
                            settings or CaptureSettings())

    def talk(self, address: str, port: int = TCP_PORT, size: int = 1000, *, family: int | None = None,
             blocking: bool = True) -> dict[str, Any]:
        family = family or ip_address(address).version
        said: dict[str, Any] = json.loads(self.app.python(self.mesh.pods.client, TALK, address, str(port), str(size), str(family),
                                                          str(blocking)))
        assert said["same"]
        return said

    def captured(self) -> int:
        """Connections that the worker took at the client's outbound listener, so far."""
        return sum(values["opened"] for key, values in self.mesh.worker.series() if key["reporter"] == "source")


@pytest.fixture
def stage(namespaces: Namespaces, cgroups: Cgroups, loaded: Pins) -> Iterator[Stage]:
    node = Node(namespaces)
    pods = Pods(node.pod("client"), node.pod("server"), node.pod("other"))
    instance = uuid.uuid4().hex[:8]
    asyncio.run(Reconciler(instance).apply(pods.server.path, plan(CaptureSettings(), (4, 6), instance)))
    app, proxy = cgroups.make("app"), cgroups.make("proxy")
    capture = Egress(loaded)
    capture.serve(proxy.path)
    with proxy.visited(), Worker() as worker:
        made = Stage(Mesh(pods, worker), capture, loaded, app, proxy)
        worker.commit(blobs.put_settings(ProxySettings()))
        made.mesh.attach()
        made.mesh.configure(*everything(made.mesh), protocol=Protocol.TCP)
        made.mesh.origin(8080, echo)
        try:
            yield made
            assert not worker.ended(), f"the worker died: status {worker.status}"
        finally:
            for one in (*made.mesh.sockets, *made.mesh.origins):
                one.close()


@pytest.mark.parametrize("size", [1, 65_537, 16 << 20])
@pytest.mark.parametrize("family", [4, 6])
def test_bytes_arrive_unchanged_through_the_proxy_and_no_connection_is_tracked(stage: Stage, family: int, size: int) -> None:
    stage.capture()
    client, server = stage.mesh.pods.client, stage.mesh.pods.server
    seen = stage.talk(VIP6 if family == 6 else VIP, size=size)  # routed to nowhere: only the mesh answers there
    assert seen["peer"] == [VIP6 if family == 6 else VIP, TCP_PORT]
    assert seen["own"] == (client.ip6 if family == 6 else client.ip)
    assert stage.mesh.origins[0].peers == [client.ip6 if family == 6 else client.ip]
    assert stage.captured() == 1
    assert conntrack.count(client) == 0
    assert conntrack.count(server) > 0  # what would be counted, where iptables captures
