"""Network namespaces for tests, and the check that every `netns` test leaves nothing behind.

`namespaces` makes namespaces of unique names and deletes them; `node` adds a bridge and pods on it, both families.
`leaks` runs by itself around every test marked `netns`: what is there after the test, was not there before it and is
the test's own is a failure. A namespace, link or cgroup is the test's own when its name holds this process's number, a
process when it descends from this one or carries the token that is put into the environment; so other runs on the
machine do not disturb. With CI=true the machine is ours alone: every new namespace, link and cgroup counts, and
every new process in a namespace other than this one.
"""
from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from agent import netlink
from tests.support.wait import PATIENCE

_TOKEN = f"NARROWS_TEST_RUN={os.getpid()}-{uuid.uuid4().hex}"
_SETTLE = 5.0 * PATIENCE  # s; the kernel takes namespaces, links and cgroups down in the background


@dataclass
class Netns:
    """A namespace of a test: its name for `ip -n`, its path for everything else."""

    name: str
    path: str
    ip: str = ""
    ip6: str = ""
    cgroup: str = ""  # directory of cgroup v2; what is run or started inside is in it, too
    maker: Callable[..., list[socket.socket]] | None = None  # of the proxy's sockets inside, where hooks tell them by their cgroup
    started: list[subprocess.Popen[Any]] = field(default_factory=list)

    def command(self, *argv: str) -> list[str]:
        """`argv` inside."""
        enter = ["sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', self.cgroup] if self.cgroup else []
        return [*enter, "nsenter", f"--net={self.path}", "--", *argv]

    def run(self, *argv: str, check: bool = True, timeout: float = 20, **more: Any) -> subprocess.CompletedProcess[str]:
        """Run a command inside; its output is captured as text."""
        done = subprocess.run(self.command(*argv), capture_output=True, text=True,
                              timeout=timeout, check=False, **more)
        if check and done.returncode != 0:
            said = f"{done.stdout}{done.stderr}"
            raise AssertionError(f"{self.name}: {' '.join(argv)} ended with {done.returncode}: {said}")
        return done

    def start(self, *argv: str, **more: Any) -> subprocess.Popen[Any]:
        """Start a command inside; it is killed when the test ends."""
        process = subprocess.Popen(self.command(*argv), **more)
        self.started.append(process)
        return process

    def python(self, code: str, *argv: str, **more: Any) -> subprocess.CompletedProcess[str]:
        """Run Python code inside."""
        return self.run(sys.executable, "-c", code, *argv, **more)

    def iptables_save(self, family: int = 4) -> str:
        """Legacy tables as iptables-save prints them, without counters and comments; the oracle of capture tests."""
        text = self.run("ip6tables-legacy-save" if family == 6 else "iptables-legacy-save").stdout
        return "\n".join(line.split(" [")[0] for line in text.splitlines() if not line.startswith("#"))

    def ip_json(self, *argv: str) -> Any:
        """`ip -json ...` inside, parsed."""
        return json.loads(self.run("ip", "-json", *argv).stdout or "[]")

    def stop(self) -> None:
        for process in self.started:
            process.kill()
            process.wait(timeout=5)
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()
        self.started.clear()


class Namespaces:
    """Makes namespaces named after the test process; `close` stops what was started in them and deletes them."""

    def __init__(self) -> None:
        self._made: list[Netns] = []
        self._prefix = f"t{os.getpid()}-{uuid.uuid4().hex[:4]}"

    def make(self, label: str) -> Netns:
        name = f"{self._prefix}-{label}"
        made = Netns(name, netlink.create_namespace(name))
        self._made.append(made)
        return made

    def close(self) -> None:
        for made in reversed(self._made):
            made.stop()
            netlink.delete_namespace(made.name)
        self._made.clear()


class Node:
    """A node namespace with a bridge, `10.244.1.1/24` and `fd00:244:1::1/64` on it (for `number` 1), that routes between its pods."""

    def __init__(self, namespaces: Namespaces, number: int = 1) -> None:
        self._namespaces, self.number = namespaces, number
        self.netns = namespaces.make("node" if number == 1 else f"node{number}")
        self.pods: dict[str, Netns] = {}
        netlink.add_bridge(self.netns.path, "br0")
        self.netns.ip, self.netns.ip6 = f"10.244.{number}.1", f"fd00:244:{number}::1"
        netlink.add_address(self.netns.path, "br0", f"{self.netns.ip}/24")
        netlink.add_address(self.netns.path, "br0", f"{self.netns.ip6}/64")
        netlink.write_sysctl(self.netns.path, "net.ipv4.ip_forward", 1)
        netlink.write_sysctl(self.netns.path, "net.ipv6.conf.all.forwarding", 1)

    def pod(self, label: str, number: int | None = None) -> Netns:
        """A pod namespace with eth0 on the bridge and a default route through the node. `number`: the address's end."""
        number = number or len(self.pods) + 10
        pod = self._namespaces.make(label)
        pod.ip, pod.ip6 = f"10.244.{self.number}.{number}", f"fd00:244:{self.number}::{number}"
        port = f"p{number}"
        netlink.add_veth(pod.path, "eth0", port, self.netns.path)
        netlink.set_link(self.netns.path, port, master="br0", up=True)
        netlink.set_link(pod.path, "eth0", up=True)
        netlink.add_address(pod.path, "eth0", f"{pod.ip}/24")
        netlink.add_address(pod.path, "eth0", f"{pod.ip6}/64")
        netlink.add_route(pod.path, "0.0.0.0/0", gateway=self.netns.ip)
        netlink.add_route(pod.path, "::/0", gateway=self.netns.ip6)
        self.pods[label] = pod
        return pod


@pytest.fixture
def namespaces() -> Iterator[Namespaces]:
    made = Namespaces()
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def node(namespaces: Namespaces) -> Node:
    return Node(namespaces)


@pytest.fixture(scope="module")
def module_namespaces() -> Iterator[Namespaces]:
    """The same for a whole module of tests that only read or that put back what they change."""
    made = Namespaces()
    try:
        yield made
    finally:
        made.close()


@dataclass(frozen=True)
class State:
    """What a test could leave behind."""

    namespaces: frozenset[str]
    links: frozenset[str]
    cgroups: frozenset[str]
    processes: frozenset[int]
    pins: frozenset[str]  # directories of instances in bpffs

    def beyond(self, before: State) -> list[str]:
        """What is here, was not there before and is the test's own."""
        found = [f"namespace {name}" for name in sorted(self.namespaces - before.namespaces) if _own(name)]
        found += [f"link {name}" for name in sorted(self.links - before.links) if _own(name)]
        found += [f"cgroup {path}" for path in sorted(self.cgroups - before.cgroups) if _own(path)]
        found += [f"pins {path}" for path in sorted(self.pins - before.pins) if _own(path)]
        found += [f"process {pid}: {_command(pid)}" for pid in sorted(self.processes - before.processes)]
        return found


def observe() -> State:
    """Reads the machine without the code under test."""
    return State(frozenset(os.listdir("/run/netns")) if os.path.isdir("/run/netns") else frozenset(),
                 frozenset(os.listdir("/sys/class/net")), frozenset(_cgroups()), frozenset(_processes()), frozenset(_pins()))


@pytest.fixture(autouse=True)
def leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.node.get_closest_marker("netns") is None:
        yield
        return
    os.environ["NARROWS_TEST_RUN"] = _TOKEN.partition("=")[2]
    before = observe()
    yield
    deadline = time.monotonic() + _SETTLE
    while found := observe().beyond(before):
        if time.monotonic() > deadline:
            pytest.fail("left behind:\n  " + "\n  ".join(found), pytrace=False)
        time.sleep(0.02)


def _own(name: str) -> bool:
    return os.environ.get("CI") == "true" or str(os.getpid()) in name


def _mounted(wanted: str) -> list[str]:
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    return [path for _, path, kind, *_ in mounts if kind == wanted]


def _cgroups() -> Iterator[str]:
    for mount in _mounted("cgroup2")[:1]:
        for folder, _, _ in os.walk(mount):
            yield folder


def _pins() -> Iterator[str]:
    for mount in _mounted("bpf"):
        with suppress(OSError):
            yield from map(str, Path(mount).glob("narrows/*"))


def _processes() -> Iterator[int]:
    """Living processes of this run: by descent, by the token, and with CI=true by a namespace that is not ours."""
    parents: dict[int, int] = {}
    token, home, alone = _TOKEN.encode(), os.readlink("/proc/self/ns/net"), os.environ.get("CI") == "true"
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        try:
            state, parent = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[:2]
            if state in "ZX":
                continue
            if b"/narrows.lab/" in Path(f"/proc/{entry}/cgroup").read_bytes():
                continue  # a lab's processes come and go while its fixture lives; a lab that is left has its cgroup left
            parents[int(entry)] = int(parent)
            if token in Path(f"/proc/{entry}/environ").read_bytes().split(b"\0") or \
                    (alone and os.readlink(f"/proc/{entry}/ns/net") != home):
                yield int(entry)
        except OSError:  # it ended while being looked at
            continue
    for pid in parents:
        ancestor = pid
        while ancestor in parents:
            ancestor = parents[ancestor]
        if ancestor == os.getpid():
            yield pid


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return "ended"
