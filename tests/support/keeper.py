"""A keeper of a test: the real process in a run directory of its own, with real workers or with puppets."""
from __future__ import annotations

import array
import contextlib
import itertools
import os
import socket
import struct
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from agent.dataplane.cli import command_line
from agent.dataplane.protocol import HEAD, Fields, Message, text
from tests.support.wait import until

_NUMBERS = itertools.count()
SUPPORT = Path(__file__).resolve().parent
PUPPETS = ("--worker-path", str(SUPPORT), "--worker-module", "puppet")


class Keeper:
    """Starts a keeper and waits until it listens. `stop` ends it; `text` is what it logged."""

    def __init__(self, run_dir: Path, *options: str, netns: str | None = None, puppets: bool = False,
                 env: Mapping[str, str] | None = None) -> None:
        """`env` is added to the environment."""
        self.run_dir = run_dir
        self.path = run_dir / "keeper.sock"
        self.log = run_dir.parent / f"{run_dir.name}-{next(_NUMBERS)}.log"
        argv = command_line(run_dir, *options, *(PUPPETS if puppets else ()))
        enter = ["nsenter", f"--net={netns}", "--"] if netns else []
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen([*enter, *argv], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                            env={**os.environ, **(env or {})})

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def text(self) -> str:
        return self.log.read_text()

    def wait(self) -> Keeper:
        until(lambda: '"keeper is up"' in self.text or self.process.poll() is not None, f"the keeper is up: {self.log}")
        assert self.process.poll() is None, self.text
        return self

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def stop(self) -> int:
        """The exit status after SIGTERM, at most after 10 s."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(5)
            raise


@contextlib.contextmanager
def running(run_dir: Path, *options: str, workers: int = 2, puppets: bool = False) -> Iterator[Keeper]:
    """A keeper whose workers are all ready; stopped at the end."""
    one = Keeper(run_dir, "--workers", str(workers), *options, puppets=puppets).wait()
    try:
        until(lambda: one.text.count("is ready") >= workers, "every worker is ready")
        yield one
    finally:
        one.stop()


class Raw:
    """A connection that may say anything."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(5)
        self.socket.connect(str(path))

    def say(self, data: bytes, fds: Sequence[int] = ()) -> None:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.socket.sendmsg([data], ancillary)

    def ask(self, kind: int, payload: bytes = b"", fds: Sequence[int] = (), sequence: int = 7) -> tuple[int, int, bytes]:
        self.say(HEAD.pack(kind, 1, sequence) + payload, fds)
        return self.hear()

    def hear(self) -> tuple[int, int, bytes]:
        """(type, sequence, payload) of the next message that is no event; descriptors are closed. b"" at the end."""
        while True:
            data, fds, _, _ = socket.recv_fds(self.socket, 262144, 253)
            for fd in fds:
                os.close(fd)
            if not data:
                return 0, 0, b""
            kind, _, sequence = HEAD.unpack_from(data)
            if kind not in (Message.MISS, Message.WORKER):
                return kind, sequence, data[HEAD.size :]

    def hello(self) -> Raw:
        assert self.ask(Message.HELLO, struct.pack("<HH", 1, 1))[0] == Message.HELLO
        return self

    def close(self) -> None:
        self.socket.close()


def error(answer: tuple[int, int, bytes]) -> tuple[int, str]:
    """Reason and text of an ERROR."""
    kind, _, payload = answer
    assert kind == Message.ERROR, answer
    fields = Fields(payload)
    return fields.u8(), fields.text()


def pod_payload(handle: int, uid: str, families: int = 3, identity: str = "") -> bytes:
    return struct.pack("<I", handle) + text(uid) + bytes((families,)) + text(identity)
