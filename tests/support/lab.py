"""Drives `narrows lab` as a user would: the command line in, what it prints out."""
from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.support.capture import CAPTURE
from tests.support.hidden import hide

COUNTED = {"istio_requests_total": "http", "istio_tcp_connections_opened_total": "tcp"}
NARROWS = str(Path(sys.executable).with_name("narrows"))


class LabError(AssertionError):
    """A lab command ended otherwise than it should; carries its output."""


def narrows(*argv: str, timeout: float = 90, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([NARROWS, *argv], capture_output=True, text=True, timeout=timeout, check=False,
                          env={**os.environ, "NO_COLOR": "1", "COLUMNS": "200"})
    if check and done.returncode != 0:
        raise LabError(f"narrows {' '.join(argv)} ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


class Lab:
    """One running lab, by name."""

    def __init__(self, name: str, paths: Sequence[Path | str] = ()) -> None:
        self.name, self.paths = name, tuple(Path(path) for path in paths)

    def run(self, *argv: str, timeout: float = 90, check: bool = True) -> subprocess.CompletedProcess[str]:
        """`narrows lab ARGV... --name NAME`; the name goes right behind the subcommand."""
        return narrows("lab", argv[0], "--name", self.name, *argv[1:], timeout=timeout, check=check)

    def exec(self, pod: str, *argv: str, timeout: float = 90, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.run("exec", pod, "--", *argv, timeout=timeout, check=check)

    def apply(self, path: Path) -> None:
        self.run("apply", str(path))

    def status(self) -> list[dict[str, Any]]:
        found = json.loads(self.run("status", "-o", "json").stdout)
        pods: list[dict[str, Any]] = found["pods"] if isinstance(found, dict) else found
        return pods

    def pod(self, prefix: str) -> dict[str, Any]:
        """The pod of that name, or the one pod whose name starts so."""
        found = [pod for pod in self.status() if pod["name"].startswith(prefix)]
        found = [pod for pod in found if pod["name"] == prefix] or found
        assert len(found) == 1, f"{prefix}: {[pod['name'] for pod in found]}"
        return found[0]

    def processes(self, role: str) -> list[int]:
        """Process ids of this lab whose command line holds `role`, from /proc: the lab itself is not asked."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                ours = f"/{self.name}/" in (entry / "cgroup").read_text()
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                if ours and command and role in command:  # without a command line: dead, and not collected yet
                    found.append(int(entry.name))
            except OSError:
                continue
        return sorted(found)

    def nodes(self) -> list[str]:
        return sorted({pod["node"] for pod in self.status()})

    def samples(self) -> Iterator[tuple[str, dict[str, str], float]]:
        """Every sample of every node: name, labels, value."""
        for node in self.nodes():
            for family in text_string_to_metric_families(self.run("metrics", node).stdout):
                for sample in family.samples:
                    yield sample.name, dict(sample.labels), sample.value

    def total(self, name: str, **labels: str) -> float:
        """Sum over all nodes of the samples of `name` whose labels agree."""
        return sum(value for sample, have, value in self.samples()
                   if sample == name and all(have.get(key) == want for key, want in labels.items()))

    def counts(self, **labels: str) -> dict[tuple[str, str], float]:
        """Requests and opened connections so far by (`http` or `tcp`, reporter), of the series that have these labels."""
        found: dict[tuple[str, str], float] = {}
        for name, have, value in self.samples():
            if name in COUNTED and all(have.get(key) == want for key, want in labels.items()):
                key = COUNTED[name], have["reporter"]
                found[key] = found.get(key, 0) + value
        return found

    def manifest(self, kind: str, name: str, namespace: str = "default") -> dict[str, Any]:
        """An object as the lab was brought up with it, to be changed and applied."""
        for path in self.paths:
            for body in yaml.safe_load_all(path.read_text()):
                if body and body["kind"] == kind and body["metadata"]["name"] == name and (
                        kind == "Namespace" or body["metadata"].get("namespace", "default") == namespace):
                    return dict(body)
        raise AssertionError(f"{kind} {namespace}/{name} is in none of {self.paths}")


def more(before: dict[tuple[str, str], float], after: dict[tuple[str, str], float]) -> dict[tuple[str, str], float]:
    """What was counted between two `counts`."""
    return {key: value - before.get(key, 0) for key, value in after.items() if value != before.get(key, 0)}


@contextmanager
def lab(*paths: Path | str, options: Sequence[str] = (), prefix: str = "t", hidden: bool = False) -> Iterator[Lab]:
    """A lab of its own, up before the body and down after it, whatever happens in between. `hidden`: without legacy tables."""
    capture = ["--capture", CAPTURE] if CAPTURE and not {"--capture", "--no-mesh"} & set(options) else []
    this = Lab(f"{prefix}{os.getpid()}-{uuid.uuid4().hex[:4]}", paths)
    try:
        with ThreadPoolExecutor(1, initializer=hide if hidden else None) as starter:
            starter.submit(this.run, "up", *(str(path) for path in paths), "--detach", *options, *capture, timeout=120).result()
        yield this
    finally:
        this.run("down", timeout=60)
