"""`narrows control-plane` as a process of its own, driven as a lab or a person would."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.logs import whole_lines
from tests.support.wait import until

START = [sys.executable, "-c", "from agent.cli.main import main; main()"]


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=5)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(5)
        self.sock.connect(str(self._path))


class ControlPlane:
    """A running control plane: `config` is its folder, `listen` where it serves ADS, `ports` where it does so over TLS (with the numbers
    that the kernel chose). `more` are options."""

    def __init__(self, folder: Path, listen: str = "", more: Sequence[str] = (), ports: Sequence[str] = ()) -> None:
        self.config = folder / "config"
        self.config.mkdir(exist_ok=True)
        self.socket, self.admin, self.log = folder / "xds.sock", folder / "admin.sock", folder / "log"
        self.listen = listen or f"unix:{self.socket}"
        self.ports, self.more = list(ports), list(more)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*START, "control-plane", *self.options()],
                stderr=log,
                stdout=log,
            )
        lines = self.logged("serving", 1 + len(self.ports))
        self.listen, *self.ports = [line["listen"] for line in lines]

    def options(self) -> list[str]:
        places = [item for place in (self.listen, *self.ports) for item in ("--listen", place)]
        return ["--config", str(self.config), *places, "--admin", f"unix:{self.admin}", *self.more]

    def logged(self, message: str, times: int = 1) -> list[dict[str, Any]]:
        """Waits until so many lines with this message are logged since the start; fails with the log when the process ends first."""

        def find() -> list[dict[str, Any]]:
            assert self.process is not None and self.process.poll() is None, self.log.read_text()
            found = [one for one in self.lines() if one["message"] == message and one["pid"] == self.process.pid]
            return found if len(found) >= times else []

        return until(find, f"the log says {message!r}", timeout=20)

    def lines(self) -> list[dict[str, Any]]:
        found, pid = [], self.process.pid if self.process else 0
        for line in whole_lines(self.log):
            try:
                found.append({"pid": pid, **json.loads(line)})
            except ValueError:
                continue
        return found

    def get(self, path: str) -> tuple[int, str]:
        connection = _UnixConnection(self.admin)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def debug(self, page: str) -> Any:
        return json.loads(self.get(f"/debug/{page}")[1])

    def apply(self, name: str, text: str) -> None:
        """Write a manifest as the lab does: beside, then renamed into place."""
        beside = self.config / f".{name}.tmp"
        beside.write_text(text)
        beside.rename(self.config / name)

    def end(self, number: int = signal.SIGTERM) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(timeout=10)


@contextmanager
def control_plane(
    folder: Path, manifests: str = "", listen: str = "", more: Sequence[str] = (), ports: Sequence[str] = ()
) -> Iterator[ControlPlane]:
    """Running before the body, gone after it."""
    made = ControlPlane(folder, listen, more, ports)
    if manifests:
        made.apply("all.yaml", manifests)
    try:
        made.start()
        yield made
    finally:
        if made.process is not None and made.process.poll() is None:
            os.kill(made.process.pid, signal.SIGKILL)
            made.process.wait(timeout=5)
