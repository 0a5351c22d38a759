"""By what this run of the tests captures pods, and capture by hand in the agent's order for tests that have no agent.

NARROWS_TEST_CAPTURE names a method as `narrows agent --capture` does: `ebpf`, or a mix of both as `ebpf+iptables` (what goes out by hooks,
what comes in by redirects). Without it redirects capture. A test that is about redirects, or chooses a method itself, carries the marker
`redirects` with the reason: it is left out of such a run, which lists it.
"""
from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest

from agent.capture import loader
from agent.capture.egress import LAYOUT, Egress
from agent.capture.ingress import Ingress
from agent.capture.pins import pins_of
from agent.capture.plan import INBOUND_PORT, plan
from agent.capture.reconcile import Reconciler
from agent.model.pod import CaptureSettings
from tests.support.cgroup import Cgroups, cgroup2, entering
from tests.support.netns import Netns

CAPTURE = os.environ.get("NARROWS_TEST_CAPTURE", "")
EGRESS, INGRESS = CAPTURE.partition("+")[0] == "ebpf", CAPTURE.rpartition("+")[2] == "ebpf"
_LEFT_OUT = pytest.StashKey[Counter[str]]()


class Maker:
    """Makes sockets in a process of the proxy's cgroup, as the keeper does: by it hooks tell the proxy's own from the pod's."""

    def __init__(self, cgroup: str) -> None:
        self._alone = threading.Lock()
        self._here, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            argv = entering(cgroup, sys.executable, "-m", "tests.support.maker", str(theirs.fileno()))
            self._process = subprocess.Popen(argv, pass_fds=[theirs.fileno()], cwd=Path(__file__).parents[2])

    def __call__(self, what: str, netns: Netns, *numbers: int) -> list[socket.socket]:
        """`listener` (port) or `upstream` (family, how many). Raises OSError as the kernel said it."""
        with self._alone:  # a worker's keeper asks from a thread
            self._here.sendall(json.dumps([what, netns.path, *numbers]).encode())
            answer, fds, _, _ = socket.recv_fds(self._here, 4096, 253)
        made = [socket.socket(fileno=fd) for fd in fds]
        if (number := int(answer)) != 0:
            raise OSError(number, os.strerror(number))
        return made

    def close(self) -> None:
        self._here.close()
        self._process.wait(timeout=10)


class ByHand:
    """Puts pods of a module into capture. With hooks this process moves to their cgroup: sockets that it makes inside are the pods'."""

    def __init__(self, folder: Path, compiled: Path) -> None:
        self._instance = uuid.uuid4().hex[:8]
        self._undo: list[Callable[[], object]] = []
        if not (EGRESS or INGRESS):
            return
        home = cgroup2() / Path("/proc/self/cgroup").read_text().partition("0::/")[2].splitlines()[0]
        subprocess.run(["mount", "-t", "bpf", "-o", "mode=0700", "bpf", str(folder)], check=True, timeout=20)
        self._undo.append(lambda: subprocess.run(["umount", str(folder)], check=True, timeout=20))
        try:
            self._cgroups = Cgroups()
            self._undo.append(self._cgroups.close)
            self._app, proxy = self._cgroups.make("app").path, self._cgroups.make("proxy").path
            self._maker = Maker(proxy)
            self._undo.append(self._maker.close)
            pins = pins_of(folder, f"test.{self._instance}", LAYOUT)
            loaded = loader.load(pins, compiled, hooks=(*loader.HOOKS, *loader.INGRESS))
            assert not any(loaded.hooks.values()), loaded.hooks
            self._egress, self._ingress = Egress(pins), Ingress(pins, loaded.lookup)
            self._egress.serve(proxy)
            self._ingress.serve(proxy)
            Path(self._app, "cgroup.procs").write_text(str(os.getpid()))
            self._undo.append(lambda: (home / "cgroup.procs").write_text(str(os.getpid())))
        except BaseException:
            self.close()
            raise

    def __call__(self, *pods: Netns) -> None:
        for pod in pods:
            wish = plan(CaptureSettings(), (4, 6), self._instance, redirect=not EGRESS, hooks=EGRESS, inbound=not INGRESS)
            asyncio.run(Reconciler(self._instance).apply(pod.path, wish))
            if not (EGRESS or INGRESS):
                continue
            pod.cgroup, pod.maker = self._app, self._maker
            addresses = ip_address(pod.ip), ip_address(pod.ip6)
            if EGRESS:
                self._egress.capture(pod.path, self._app, addresses, CaptureSettings())
            if INGRESS:
                for listener in self._maker("listener", pod, INBOUND_PORT):  # the agent, too, captures where a keeper listens
                    self._ingress.capture(pod.path, addresses, CaptureSettings())
                    listener.close()

    def close(self) -> None:
        while self._undo:
            self._undo.pop()()


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the compiler made of the BPF programs, once a run."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory: pytest.TempPathFactory, compiled: Path) -> Iterator[ByHand]:
    made = ByHand(tmp_path_factory.mktemp("bpf"), compiled)
    try:
        yield made
    finally:
        made.close()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Not a skip: in CI that is a failure, since something is missing there. Here nothing is."""
    if not (EGRESS or INGRESS):
        return
    out = config.stash[_LEFT_OUT] = Counter()
    left = []
    for item in items:
        if (marker := item.get_closest_marker("redirects")) is not None:
            out[f"{item.location[0]}: {marker.args[0]}"] += 1
            left.append(item)
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in set(left)]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for said, count in sorted(config.stash.get(_LEFT_OUT, Counter[str]()).items()):
        terminalreporter.write_line(f"left to the run by redirects: {count} of {said}")
