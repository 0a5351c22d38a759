"""Pods as kubelet and a runtime leave them on a node: processes in cgroups of their forms (version 2), in namespaces of the test."""
from __future__ import annotations

import os
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cgroup import cgroup2, entering
from tests.support.netns import Netns
from tests.support.wait import until


def cgroupfs(uid: str, container: str) -> str:
    """Below kubelet's root, as its cgroupfs driver has it."""
    return f"kubepods/burstable/pod{uid}/{container}"


def systemd(uid: str, container: str, runtime: str = "cri-containerd") -> str:
    return f"kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{uid.replace('-', '_')}.slice/{runtime}-{container}.scope"


class KubePods:
    """A root of kubelet's, with this test's name, and the processes that were started below it."""

    def __init__(self) -> None:
        self.root = cgroup2() / f"t{os.getpid()}-{uuid.uuid4().hex[:4]}-kubelet"
        self.root.mkdir()
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self, path: str, netns: Netns | None, *argv: str) -> subprocess.Popen[bytes]:
        """A process in the cgroup `path` below the root, in a namespace (None: that of the test). It is there when this returns."""
        folder = self.root / path
        folder.mkdir(parents=True, exist_ok=True)
        enter = ["nsenter", f"--net={netns.path}", "--"] if netns else []
        command = argv or ("sh", "-c", "echo; exec sleep 600")
        process = subprocess.Popen(entering(str(folder), *enter, *command), stdout=subprocess.PIPE)
        self._processes.append(process)
        assert process.stdout is not None and process.stdout.readline()
        return process

    def end(self, process: subprocess.Popen[bytes]) -> None:
        process.kill()
        process.wait(timeout=10)
        if process.stdout is not None:
            process.stdout.close()

    def close(self) -> None:
        (self.root / "cgroup.kill").write_text("1")
        for process in self._processes:
            self.end(process)
        until(self._gone, f"{self.root} is empty")

    def _gone(self) -> bool:
        try:
            for folder, _, _ in os.walk(self.root, topdown=False):
                os.rmdir(folder)
        except OSError:
            return False
        return True

    def directory(self, path: str) -> Path:
        return self.root / path


@pytest.fixture
def kubepods() -> Iterator[KubePods]:
    made = KubePods()
    try:
        yield made
    finally:
        made.close()
