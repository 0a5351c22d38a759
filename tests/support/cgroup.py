"""Cgroups of a test: made under cgroup v2's root with the test's number in their names, ended and removed after it."""
from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.netns import Netns
from tests.support.wait import until


def cgroup2() -> Path:
    for line in Path("/proc/self/mounts").read_text().splitlines():
        if line.split()[2] == "cgroup2":
            return Path(line.split()[1])
    raise AssertionError("cgroup v2 is not mounted")


@contextmanager
def visited(cgroup: str) -> Iterator[None]:
    """This process is in it meanwhile: sockets that it makes belong to it."""
    home = cgroup2() / Path("/proc/self/cgroup").read_text().partition("0::/")[2].splitlines()[0]
    Path(cgroup, "cgroup.procs").write_text(str(os.getpid()))
    try:
        yield
    finally:
        (home / "cgroup.procs").write_text(str(os.getpid()))


def entering(cgroup: str, *argv: str) -> list[str]:
    """A command line that runs `argv` in it."""
    return ["sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', cgroup, *argv]


class Cgroup:
    """One directory. What is started in it is there before it runs the first instruction of its own."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        path.mkdir()

    @property
    def id(self) -> int:
        return os.stat(self.path).st_ino

    def command(self, netns: Netns | None, *argv: str) -> list[str]:
        enter = ["nsenter", f"--net={netns.path}", "--"] if netns else []
        return entering(self.path, *enter, *argv)

    def run(self, netns: Netns | None, *argv: str, timeout: float = 60, **more: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.command(netns, *argv), capture_output=True, text=True, timeout=timeout, check=False, **more)

    def python(self, netns: Netns | None, code: str, *argv: str, timeout: float = 60) -> str:
        """What the code prints; AssertionError with what it said when it fails."""
        done = self.run(netns, sys.executable, "-c", code, *argv, timeout=timeout)
        assert done.returncode == 0, done.stderr or done.stdout
        return done.stdout.strip()

    def start(self, netns: Netns | None, *argv: str, **more: Any) -> subprocess.Popen[Any]:
        return subprocess.Popen(self.command(netns, *argv), **more)

    def visited(self) -> AbstractContextManager[None]:
        return visited(self.path)

    def remove(self) -> None:
        if os.path.isdir(self.path):
            Path(self.path, "cgroup.kill").write_text("1")
            until(self._gone, f"{self.path} is empty")

    def _gone(self) -> bool:
        try:
            os.rmdir(self.path)
        except OSError:
            return False
        return True


class Cgroups:
    def __init__(self) -> None:
        self._made: list[Cgroup] = []

    def make(self, label: str) -> Cgroup:
        made = Cgroup(cgroup2() / f"t{os.getpid()}-{uuid.uuid4().hex[:4]}-{label}")
        self._made.append(made)
        return made

    def close(self) -> None:
        for made in self._made:
            made.remove()


@pytest.fixture
def cgroups() -> Iterator[Cgroups]:
    made = Cgroups()
    try:
        yield made
    finally:
        made.close()
