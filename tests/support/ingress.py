"""A pod whose incoming connections sk_lookup captures, a client without capture, and a real worker of the proxy's cgroup."""
from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

from agent.capture.ingress import Ingress
from agent.capture.loader import Loaded
from agent.capture.pins import Pins
from agent.capture.plan import plan
from agent.capture.reconcile import Reconciler
from agent.model.pod import CaptureSettings
from agent.model.workload import Protocol
from tests.support.cgroup import Cgroups
from tests.support.egress import TALK, TRY
from tests.support.hooks import Hooked, serving
from tests.support.mesh import Origin, Pods, echo
from tests.support.netns import Namespaces, Netns, Node


@dataclass
class Inward(Hooked):
    ingress: Ingress
    loaded: Loaded
    own: Origin  # the captured pod's application, port 8080
    instance: str

    def rules(self, *, backend: str = "iptables", **how: bool) -> None:
        """Of the captured pod."""
        made = plan(CaptureSettings(), (4, 6), self.instance, **how)
        asyncio.run(Reconciler(self.instance, backend=backend).apply(self.server.path, made))

    def no_redirects(self) -> None:
        """The rules for live connections stay."""
        asyncio.run(Reconciler(self.instance).release(self.server.path))

    def capture(self, *, redirected: bool = False, **settings: Any) -> int:
        addresses = ip_address(self.server.ip), ip_address(self.server.ip6)
        return self.ingress.capture(self.server.path, addresses, CaptureSettings(**settings), redirected=redirected)

    def talk(self, address: str = "", port: int = 8080, size: int = 1000, *, netns: Netns | None = None) -> dict[str, Any]:
        """From the client's namespace, or another. All that was sent must come back."""
        address = address or self.server.ip
        said: dict[str, Any] = json.loads((netns or self.client).python(TALK, address, str(port), str(size),
                                                                        str(ip_address(address).version), "").stdout)
        assert said.pop("same")
        return said

    def attempt(self, address: str, port: int, netns: Netns | None = None) -> str:
        return (netns or self.client).python(TRY, address, str(port)).stdout.strip()

    def via_proxy(self, address: str, port: int, netns: Netns | None = None) -> bool:
        before = self.taken_in()
        self.talk(address, port, netns=netns)
        return self.taken_in() > before


@contextmanager
def staged_inward(namespaces: Namespaces, cgroups: Cgroups, pins: Pins, loaded: Loaded) -> Iterator[Inward]:
    node = Node(namespaces)
    pods = Pods(node.pod("client"), node.pod("server"), node.pod("other"))
    app, proxy = cgroups.make("app"), cgroups.make("proxy")
    assert loaded.lookup is not None
    ingress = Ingress(pins, loaded.lookup)
    ingress.serve(proxy.path)
    with serving(pods, proxy) as mesh:
        with app.visited():
            own = mesh.origin(8080, echo)
        made = Inward(mesh, pins, app, proxy, ingress, loaded, own, uuid.uuid4().hex[:8])
        mesh.attach()
        mesh.configure(protocol=Protocol.TCP)
        made.rules(redirect=False, hooks=True, inbound=False)
        yield made
