"""A pod whose egress eBPF captures, a server that iptables captures, and a real worker whose listeners live in the proxy's cgroup."""
from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

from agent.capture.egress import Egress
from agent.capture.pins import Pins
from agent.capture.plan import plan
from agent.capture.reconcile import Reconciler
from agent.model.pod import CaptureSettings
from agent.model.workload import Protocol
from tests.support.cgroup import Cgroup, Cgroups
from tests.support.hooks import Hooked, serving
from tests.support.mesh import TCP_PORT, Origin, Pods, echo, everything
from tests.support.netns import Namespaces, Netns, Node

# What runs in the pod. Connects as told, sends random bytes, half-closes, compares what came back, and tells what it saw.
TALK = """if True:
    import hashlib, json, os, select, socket, sys, threading
    address, port, size, family, how = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
    s = socket.socket(socket.AF_INET6 if family == 6 else socket.AF_INET, socket.SOCK_STREAM, 262 if how == "mptcp" else 0)
    s.settimeout(30)
    said, sent = os.urandom(size), 0
    if how == "non-blocking":
        s.setblocking(False)
        code = s.connect_ex((address, port))
        assert code in (0, 115), os.strerror(code)
        assert select.select([], [s], [], 30)[1], "nothing within 30 s"
        code = s.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        assert code == 0, os.strerror(code)
        s.settimeout(30)
    elif how == "fastopen":
        s.settimeout(None)
        sent = s.sendto(said, socket.MSG_FASTOPEN, (address, port))
    else:
        s.connect((address, port))
    seen = {"peer": s.getpeername()[:2], "own": s.getsockname()[0]}
    thread = threading.Thread(target=lambda: (s.sendall(said[sent:]), s.shutdown(socket.SHUT_WR)))
    thread.start()
    heard = hashlib.sha256()
    while data := s.recv(262144):
        heard.update(data)
    thread.join()
    print(json.dumps(seen | {"same": heard.digest() == hashlib.sha256(said).digest()}))"""

# Tells the error's name, or "connected".
TRY = """if True:
    import errno, socket, sys
    s = socket.socket(socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET)
    s.settimeout(10)
    code = s.connect_ex((sys.argv[1], int(sys.argv[2])))
    print(errno.errorcode[code] if code else "connected")"""


@dataclass
class Stage(Hooked):
    egress: Egress
    outside: Origin  # of a pod without capture, port 9000

    def capture(self, **settings: Any) -> None:
        self.egress.capture(self.client.path, self.app.path, (ip_address(self.client.ip), ip_address(self.client.ip6)),
                            CaptureSettings(**settings))

    def talk(self, address: str, port: int = TCP_PORT, size: int = 1000, *, family: int | None = None, how: str = "",
             cgroup: Cgroup | None = None, netns: Netns | None = None) -> dict[str, Any]:
        """From the pod, or from elsewhere. All that was sent must come back."""
        family = family or ip_address(address).version
        said: dict[str, Any] = json.loads((cgroup or self.app).python(netns or self.client, TALK, address, str(port), str(size),
                                                                      str(family), how))
        assert said.pop("same")
        return said

    def attempt(self, address: str, port: int) -> str:
        return self.app.python(self.client, TRY, address, str(port))


@contextmanager
def staged(namespaces: Namespaces, cgroups: Cgroups, loaded: Pins) -> Iterator[Stage]:
    node = Node(namespaces)
    pods = Pods(node.pod("client"), node.pod("server"), node.pod("other"))
    instance = uuid.uuid4().hex[:8]
    asyncio.run(Reconciler(instance).apply(pods.server.path, plan(CaptureSettings(), (4, 6), instance)))
    app, proxy = cgroups.make("app"), cgroups.make("proxy")
    capture = Egress(loaded)
    capture.serve(proxy.path)
    with serving(pods, proxy) as mesh:
        outside = mesh.origin(9000, echo, pods.other)
        mesh.attach()
        mesh.configure(*everything(mesh), protocol=Protocol.TCP)
        mesh.origin(8080, echo)
        yield Stage(mesh, loaded, app, proxy, capture, outside)
