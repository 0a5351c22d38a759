"""The mesh's own processes: the control plane, and on each node a keeper and an agent, started again when they end."""
from __future__ import annotations

import asyncio
import contextlib
import http.client
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from agent import netlink
from agent.lab import cleanup, runtime
from agent.lab.place import Place

BACKOFF = (0.1, 0.5, 1.0, 2.0, 5.0)  # seconds before the n-th restart in a row
STEADY = 10.0  # seconds after which a process counts as running well
LOG_BYTES = 16 << 20  # of one log; then it starts anew
LOG_LOOK = 10.0  # seconds between two looks at the size of a log
ASK = 2.0  # seconds for an answer on an admin socket; it comes in milliseconds, or its process hangs
METRICS_PORT = 15020


@dataclass(slots=True)
class Process:
    """A process of the mesh that is kept running, in its own cgroup (its children too) and its node's namespace."""

    name: str
    argv: list[str]
    cgroup: Path
    log: Path
    netns: str
    event: Callable[[str, str], None]
    pid: int = 0
    restarts: int = 0
    ending: bool = False  # once it is gone it stays so
    _task: asyncio.Task[None] | None = None

    def begin(self) -> None:
        self._task = asyncio.create_task(self._keep(), name=self.name)

    async def end(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task], timeout=2)

    async def _keep(self) -> None:
        failures = 0
        while True:
            began = time.monotonic()
            try:
                status = await self._run()
            except OSError as error:
                status = f"{error.strerror or error}"
            self.pid = 0
            if self.ending:
                return
            # what it left: a keeper's workers must not serve beside those of the next keeper
            await asyncio.to_thread(cleanup.kill_tree, self.cgroup)
            failures = 0 if time.monotonic() - began > STEADY else failures + 1
            self.restarts += 1
            self.event(self.name, f"ended with {status}; see {self.log}")
            await asyncio.sleep(BACKOFF[min(failures, len(BACKOFF)) - 1] if failures else 0)

    async def _run(self) -> str:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        runtime.make_cgroup(self.cgroup)
        output = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            launch = runtime.Launch(argv=self.argv, env=dict(os.environ), cgroup=str(self.cgroup), netns=self.netns)
            running = await runtime.start(launch, output)
        finally:
            os.close(output)
        self.pid = running.process.pid
        while True:
            waiting = asyncio.ensure_future(running.wait())
            done, _ = await asyncio.wait([waiting], timeout=LOG_LOOK)
            if done:
                return str(waiting.result())
            waiting.cancel()
            with contextlib.suppress(OSError):
                if self.log.stat().st_size > LOG_BYTES:
                    os.truncate(self.log, 0)  # it is open for appending, so the next line starts the file


def control_plane(place: Place, lifetime: float, event: Callable[[str, str], None]) -> Process:
    argv = runtime.narrows("control-plane", "--config", str(place.config), "--listen", f"unix:{place.xds}",
                   "--admin", f"unix:{place.control_plane}", "--ca-dir", str(place.authority), "--node-tokens", str(place.tokens),
                   "--certificate-lifetime", str(lifetime))
    return Process("control plane", argv, place.system_cgroup("control-plane"), place.logs / "control-plane.log", "",
                   event)


def keeper(place: Place, node: str, workers: int | None, event: Callable[[str, str], None]) -> Process:
    argv = runtime.narrows("keeper", "--run-dir", str(place.node(node)), "--instance", f"lab.{place.name}.{node}")
    argv += ["--workers", str(workers)] if workers is not None else []
    return Process(f"keeper {node}", argv, place.system_cgroup(f"keeper.{node}"), place.node(node) / "keeper.log",
                   f"/run/netns/{place.node_netns(node)}", event)


def agent(place: Place, node: str, access_log: str, capture: str, same_node_tunnel: bool, observe: str,
          event: Callable[[str, str], None]) -> Process:
    argv = runtime.narrows("agent", "--run-dir", str(place.node(node)), "--node", node, "--xds", f"unix:{place.xds}",
                   "--access-log", access_log, "--capture", capture, "--observe", observe, "--ca-token", str(place.token(node)),
                   *(["--same-node-tunnel"] if same_node_tunnel else []))
    return Process(f"agent {node}", argv, place.system_cgroup(f"agent.{node}"), place.node(node) / "agent.log",
                   f"/run/netns/{place.node_netns(node)}", event)


class Admins:
    """Asks the admin sockets of agents and control plane."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._sessions: dict[str, aiohttp.ClientSession] = {}

    async def get(self, path: Path, url: str, seconds: float = ASK) -> tuple[int, Any]:
        """Status and JSON of an answer. OSError when nobody answers."""
        session = self._sessions.get(str(path))
        if session is None:
            connector = aiohttp.UnixConnector(str(path))
            session = self._sessions[str(path)] = aiohttp.ClientSession(connector=connector)
        try:
            async with session.get(f"http://lab{url}", timeout=aiohttp.ClientTimeout(total=seconds)) as answer:
                return answer.status, await answer.json(content_type=None)
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise OSError(f"{path}: {str(error) or type(error).__name__}") from error

    async def decision(self, node: str, namespace: str, name: str, seconds: float) -> dict[str, Any] | None:
        status, pod = await self.get(self._place.node(node) / "admin.sock",
                                     f"/pods/{namespace}/{name}?wait={seconds:g}", seconds + ASK)
        return pod if status == 200 and isinstance(pod, dict) else None

    async def pods(self, node: str) -> dict[tuple[str, str], dict[str, Any]]:
        """What a node's agent says of its pods; {} when it does not answer."""
        try:
            status, pods = await self.get(self._place.node(node) / "admin.sock", "/pods")
        except OSError:
            return {}
        return {(pod["namespace"], pod["name"]): pod for pod in pods} if status == 200 else {}

    async def events(self, node: str) -> list[dict[str, Any]]:
        """What happened on a node, as its agent tells; [] when it does not answer."""
        try:
            status, events = await self.get(self._place.node(node) / "admin.sock", "/events")
        except OSError:
            return []
        return events if status == 200 else []

    async def control_plane(self) -> str:
        """"" if the control plane has read its configuration, else why not."""
        try:
            status, _ = await self.get(self._place.control_plane, "/debug/problems")
        except OSError as error:
            return str(error)
        return "" if status == 200 else f"answered {status}"

    async def missing(self, node: str) -> str:
        """"" if the node's agent is ready, else what is missing."""
        try:
            status, answer = await self.get(self._place.node(node) / "admin.sock", "/ready")
        except OSError as error:
            return str(error)
        return "" if status == 200 else "; ".join(answer.get("missing", ["not ready"]))

    async def close(self) -> None:
        for session in self._sessions.values():
            await session.close()


def fetch_metrics(place: Place, node: str) -> str:
    """The metrics page of a node, asked for inside its namespace. OSError when nobody answers.

    An agent that starts again is waited for: it is away for half a second.
    """
    deadline = time.monotonic() + ASK
    while True:
        try:
            return _fetch(place, node)
        except ConnectionRefusedError as error:
            if time.monotonic() > deadline:
                raise OSError(f"the agent of {node} does not answer on port {METRICS_PORT} ({error.strerror}); see its log "
                              f"{place.node(node) / 'agent.log'}") from error
            time.sleep(0.1)


def _fetch(place: Place, node: str) -> str:
    def ask() -> str:
        connection = http.client.HTTPConnection("127.0.0.1", METRICS_PORT, timeout=ASK)
        try:
            connection.request("GET", "/metrics")
            answer = connection.getresponse()
            text = answer.read().decode()
        except http.client.HTTPException as error:
            raise OSError(f"no HTTP answer: {error}") from error
        finally:
            connection.close()
        if answer.status != 200:
            raise OSError(f"answered {answer.status}: {text[:200]}")
        return text

    return netlink.in_netns(f"/run/netns/{place.node_netns(node)}", ask)
