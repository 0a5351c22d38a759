"""The processes that work on tables for the agent: warm while there is work, gone when there is none.

libiptc and libnftables read and write the namespace of the thread that calls them, leak a little and may hang; so they live in
children (child.py) that enter one namespace per order. Starting one costs 40 ms of CPU and 15 MiB; enrolling a pod with a warm
one 10 ms, the agent's part included. A child ends when it was idle for IDLE_SECONDS, when it was too slow (it is killed), or
when this process is gone.
"""
from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import socket
import struct
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

CHILDREN = 2  # at a time: each is a core's worth while it works, and a node that enrols 50 pods has other work too
DEADLINE = 5.0  # s for one order; it takes 0.01, so this is a machine in trouble
IDLE_SECONDS = 20.0  # until an idle child ends
ANSWER_LIMIT = 1 << 20  # bytes

_CHILD = str(Path(__file__).with_name("child.py"))


class HelperError(Exception):
    """No answer; the text says why."""


class Helpers:
    """Children for one user of them. `ask` may be called for many namespaces at once."""

    def __init__(self, *, children: int = CHILDREN, deadline: float = DEADLINE) -> None:
        self._slots = asyncio.Semaphore(children)
        self._deadline = deadline
        self._idle: list[tuple[float, _Child]] = []

    async def ask(self, netns: int | None, order: dict[str, Any]) -> Any:
        """The answer to one order, worked on in the namespace of that descriptor (None: in no namespace at all).

        Raises HelperError. When the caller is cancelled, the order is finished first: cut off between two tables it would
        leave half of a plan.
        """
        async with self._slots:
            work = asyncio.create_task(asyncio.to_thread(self._ask, netns, json.dumps(order).encode()))
            try:
                answer = await asyncio.shield(work)
            except asyncio.CancelledError:
                await asyncio.wait([work])
                work.exception()  # seen: nobody is left to hear it, and the next order repairs
                raise
            finally:
                asyncio.get_running_loop().call_later(IDLE_SECONDS + 1, self._retire)
        if "error" in answer:
            raise HelperError(answer["error"])
        return answer["result"]

    def close(self) -> None:
        """End the idle children."""
        self._retire(0.0)

    def _ask(self, netns: int | None, order: bytes) -> dict[str, Any]:
        child = self._idle.pop()[1] if self._idle else _Child()
        try:
            answer = child.ask(netns, order, self._deadline)
        except TimeoutError as error:
            child.end()
            raise HelperError(f"work on the rules took longer than {self._deadline} s; is the machine overloaded?") from error
        except (OSError, ValueError) as error:
            raise HelperError(f"the capture child ended with {child.end()} and no answer: {child.said() or error}") from error
        self._idle.append((time.monotonic(), child))
        return answer

    def _retire(self, seconds: float = IDLE_SECONDS) -> None:
        now = time.monotonic()
        gone = [pair for pair in self._idle if now - pair[0] >= seconds]
        self._idle = [pair for pair in self._idle if pair not in gone]
        for _, child in gone:
            child.end()


class _Child:
    """One process. Blocking; used by one thread at a time."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        self._noise = os.memfd_create("narrows-capture", os.MFD_CLOEXEC)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-S", "-E", _CHILD, str(theirs.fileno()), *_import_path()], pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL, stdout=self._noise, stderr=self._noise)

    def ask(self, netns: int | None, order: bytes, seconds: float) -> dict[str, Any]:
        end = time.monotonic() + seconds
        self._socket.settimeout(seconds)
        # the descriptor travels with the length alone: a stream may cut a longer message anywhere
        socket.send_fds(self._socket, [struct.pack("=I", len(order))], [] if netns is None else [netns])
        self._socket.sendall(order)
        (length,) = struct.unpack("=I", self._receive(4, end))
        if length > ANSWER_LIMIT:
            raise ValueError(f"an answer of {length} bytes")
        answer: dict[str, Any] = json.loads(self._receive(length, end))
        return answer

    def _receive(self, count: int, end: float) -> bytes:
        data = b""
        while len(data) < count:
            self._socket.settimeout(max(end - time.monotonic(), 0.0001))
            more = self._socket.recv(count - len(data))
            if not more:
                raise OSError("it closed the connection")
            data += more
        return data

    def said(self) -> str:
        """The end of what it wrote for people."""
        return os.pread(self._noise, 1 << 16, 0).decode(errors="replace").strip()[-500:]

    def end(self) -> int:
        """Its exit status."""
        self._socket.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(0.05)
        self._process.kill()
        return self._process.wait()

    def __del__(self) -> None:
        self._socket.close()
        self._process.kill()
        self._process.wait()
        os.close(self._noise)


def _import_path() -> list[str]:
    """Where the child finds `agent` and `iptc`, found without importing iptc here."""
    spec = importlib.util.find_spec("iptc")
    if spec is None or spec.origin is None:
        raise HelperError("python-iptables is not installed in this environment: pip install python-iptables")
    return [str(Path(__file__).parents[2]), str(Path(spec.origin).parents[1])]
