"""A node with two pods that run an application each and a stand-in for the proxy; capture is each test's own."""
from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from agent import netlink
from agent.capture.plan import Plan, plan
from agent.capture.reconcile import Reconciler
from agent.capture.watch import Target, prints
from agent.model.pod import CaptureSettings
from tests.support.hidden import hide
from tests.support.netns import Namespaces, Netns, Node
from tests.support.wait import until

HERE = Path(__file__).parent
VIRTUAL = {4: "10.96.0.10", 6: "fd00:96::10"}  # a service's address: routed to nowhere
INSTANCE = "test"


@dataclass
class Pod:
    """A pod with its application (8080, 9090) and stand-in; `seen` is what the stand-in reported."""

    netns: Netns
    seen: list[dict[str, Any]] = field(default_factory=list)

    def address(self, family: int) -> str:
        return self.netns.ip6 if family == 6 else self.netns.ip

    def dial(self, address: str, port: int, source: str | None = None) -> socket.socket:
        """A connected socket that was made inside; the caller closes it."""
        return dial(self.netns, address, port, source)

    def start(self, *virtual: str) -> None:
        app = self.netns.start(sys.executable, str(HERE / "app.py"), "8080", "9090", stdout=subprocess.PIPE, text=True)
        proxy = self.netns.start(sys.executable, str(HERE / "standin.py"), *virtual, stdout=subprocess.PIPE, text=True)
        assert app.stdout is not None and proxy.stdout is not None
        assert {app.stdout.readline(), app.stdout.readline()} == {"8080\n", "9090\n"}
        assert {json.loads(proxy.stdout.readline())["listening"] for _ in range(2)} == {15001, 15006}
        threading.Thread(target=self._follow, args=(proxy.stdout,), daemon=True).start()

    def _follow(self, lines: Any) -> None:
        for line in lines:
            self.seen.append(json.loads(line))


@dataclass
class World:
    node: Netns
    a: Pod
    b: Pod

    def reset(self) -> None:
        self.a.seen.clear()
        self.b.seen.clear()


def dial(netns: Netns, address: str, port: int, source: str | None = None) -> socket.socket:
    def connect() -> socket.socket:
        made = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
        made.settimeout(5)
        try:
            if source:
                made.bind((source, 0))
            made.connect((address, port))
        except BaseException:
            made.close()
            raise
        return made

    return netlink.in_netns(netns.path, connect)


def talk(connection: socket.socket) -> str:
    """Whom the application sees; checks that bytes go both ways on the way."""
    peer = b""
    while not peer.endswith(b"\n"):
        data = connection.recv(100)
        assert data, f"closed after {peer!r}"
        peer += data
    echo(connection)
    return peer.decode().strip()


def echo(connection: socket.socket) -> None:
    said = bytes(range(256)) * 64
    connection.sendall(said)
    heard = b""
    while len(heard) < len(said):
        data = connection.recv(65536)
        assert data, f"closed after {len(heard)} bytes"
        heard += data
    assert heard == said


@pytest.fixture(scope="module")
def standing() -> Iterator[dict[str, World]]:
    """A world for each backend: a node's kernel has the legacy tables or not. Processes and links are shared by a module; rules are not."""
    made = {name: Namespaces() for name in ("iptables", "nftables")}
    try:
        yield {name: stand(namespaces) for name, namespaces in made.items()}
    finally:
        for namespaces in made.values():
            namespaces.close()


def stand(namespaces: Namespaces) -> World:
    node = Node(namespaces)
    world = World(node.netns, Pod(node.pod("a")), Pod(node.pod("b")))
    for pod in (world.a, world.b):
        pod.start(f"{VIRTUAL[4]}:80={pod.netns.ip}:8080", f"{VIRTUAL[6]}:80={pod.netns.ip6}:8080")
    return world


@pytest.fixture
async def world(standing: dict[str, World], backend: str) -> AsyncIterator[World]:
    this = standing[backend]
    before = [state(pod.netns) for pod in (this.a, this.b)]
    this.reset()
    yield this
    for pod, then in zip((this.a, this.b), before, strict=True):
        await Reconciler(INSTANCE).remove(pod.netns.path)
        assert tables(state(pod.netns)) == tables(then), "the test's capture was not removed without residue"


@pytest.fixture
def pod(namespaces: Namespaces) -> Netns:
    return namespaces.make("pod")


@pytest.fixture
async def backend(request: pytest.FixtureRequest) -> str:
    """What the test's Reconciler finds on this node: "nftables" hides the legacy tables from its threads and children."""
    name: str = getattr(request, "param", getattr(request.module, "BACKEND", "iptables"))
    if name == "nftables":
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(initializer=hide, thread_name_prefix="hidden"))
    return name


@pytest.fixture
async def reconciler(backend: str) -> AsyncIterator[Reconciler]:
    made = Reconciler(INSTANCE)
    assert (await made.backend()).name == backend
    yield made
    made.close()


def planned(settings: CaptureSettings = CaptureSettings()) -> Plan:  # noqa: B008 - frozen
    return plan(settings, (4, 6), INSTANCE)


def state(netns: Netns) -> list[str]:
    """Everything that capture may change, as iptables-save, nft and ip print it."""
    return [netns.iptables_save(4), netns.iptables_save(6), netns.run("nft", "-s", "list", "ruleset").stdout, *(
        netns.run("ip", flag, *what, check=False).stdout  # a table that never was is an error of `ip route show`
        for flag in ("-4", "-6") for what in (("rule",), ("route",), ("route", "show", "table", "100")))]


def print_of(netns: Netns, legacy: tuple[str, ...] = ()) -> bytes:
    """What the watch compares; `legacy`: the tables of iptables that it is to look at."""
    return prints({netns.path: Target((4, 6), legacy or None)}).get(netns.path, b"")


def tables(found: list[str]) -> list[str]:
    """Without tables that hold nothing: a table that was used once stays in its namespace, empty."""
    def kept(text: str) -> str:
        sections = [section for section in text.split("COMMIT") if "-A " in section or "\n:NARROWS" in section]
        return "COMMIT".join(sections)

    return [kept(text) for text in found[:2]] + found[2:]


def reported(pod: Pod, side: str, peer: str, to: str) -> None:
    """Waits until the stand-in has reported the connection."""
    wanted = {"side": side, "peer": peer, "to": to}
    until(lambda: wanted in pod.seen, f"{pod.netns.name} reports {wanted}; it has {pod.seen}", timeout=5)
