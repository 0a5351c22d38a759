"""A lab without mesh, shared by tests that only look or put back what they change; and two nodes with tunnels between them."""
from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from agent.cli.admin_client import ask
from agent.cli.main import CommandError
from agent.lab.place import Place
from agent.lab.system import fetch_metrics
from tests.support.lab import NARROWS, Lab, lab
from tests.support.wait import PATIENCE, until

HERE = Path(__file__).parent
PYTHON = "/usr/bin/python3"
TALK = [PYTHON, str(HERE / "talk.py")]

PODS = """\
apiVersion: v1
kind: Namespace
metadata: {name: default, annotations: {narrows.mesh/intercept: enabled}}
---
apiVersion: v1
kind: Service
metadata: {name: server}
spec: {selector: {app: server}, ports: [{name: http, port: 8080}]}
"""
POD = """\
---
apiVersion: v1
kind: Pod
metadata: {name: %s, labels: {app: %s}, annotations: {%s}}
spec: {nodeName: %s, serviceAccountName: %s, containers: [{name: m, image: x, command: [%s]}]}
"""
SERVER = ", ".join([*TALK, "serve"])


def pod(name: str, node: str, account: str, command: str = "sleep, infinity", annotations: str = "") -> str:
    return POD % (name, name, annotations, node, account, command)


@contextmanager
def two_nodes(path: Path, options: Sequence[str] = ()) -> Iterator[Lab]:
    """`a` and `b` on n1 have one service account, `server` on n2 another."""
    path.write_text(PODS + pod("a", "n1", "client") + pod("b", "n1", "client") + pod("server", "n2", "server", SERVER))
    with lab(path, options=options) as running:
        yield running


class Talk:
    """`talk.py ask` in a pod, beside the test; `lines` as they come."""

    def __init__(self, mesh: Lab, who: str, *words: str) -> None:
        argv = [NARROWS, "lab", "exec", "--name", mesh.name, who, "--", *TALK, "ask", *words]
        self.lines: list[str] = []
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._reader = threading.Thread(target=self._read)

    def __enter__(self) -> Talk:
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.close()
            self.process.wait(timeout=120 * PATIENCE)
        finally:
            self.process.kill()
            self._reader.join()
            self.process.stdout.close()
            self.process.wait()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.strip())

    @property
    def failures(self) -> list[str]:
        return [line for line in self.lines if line.startswith("failed ")]

    @property
    def good(self) -> int:
        return len(self.lines) - len(self.failures)

    def goes_on(self, much: int = 20) -> None:
        before = self.good
        until(lambda: self.good >= before + much, f"{much} more requests are answered (failures: {self.failures[-3:]})", 60)


def dump(mesh: Lab, node: str) -> dict[str, Any]:
    """What the agent of a node has in force; {} while it does not answer."""
    try:
        found: dict[str, Any] = ask(Place(mesh.name).node(node) / "admin.sock", "/config_dump")
    except CommandError:
        return {}
    return found


def told(mesh: Lab, protocol: str, *names: str) -> None:
    """Waits until both nodes know that these pods are reached so."""
    def known() -> bool:
        return all({one["name"]: one["protocol"] for one in dump(mesh, node).get("workloads", [])}.get(name) == protocol
                   for node in ("n1", "n2") for name in names)
    until(known, f"{names} are known to be reached by {protocol}", 60, 0.1)


def requests(mesh: Lab, node: str) -> dict[tuple[tuple[str, str], ...], float]:
    """`istio_requests_total` of a node, by labels."""
    return {tuple(sorted(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(fetch_metrics(Place(mesh.name), node)) for sample in family.samples
            if sample.name == "istio_requests_total"}


@pytest.fixture(scope="module")
def plain() -> Iterator[Lab]:
    with lab(HERE / "plain.yaml", options=("--no-mesh",)) as running:
        yield running
