"""The admin socket: who may open it, what it answers, and that nothing waits without a bound."""
from __future__ import annotations

import asyncio
import os
import socket
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from agent.admin.server import AdminServer


class Node:
    """What an agent would answer."""

    def __init__(self) -> None:
        self.missing: list[str] = ["pod default/a is not captured: being captured"]
        self.decided = asyncio.Event()
        self.level = "info"
        self.ended = asyncio.Event()

    def readiness(self) -> list[str]:
        return self.missing

    def server_info(self) -> dict[str, Any]:
        return {"node": "n1"}

    def pods(self) -> list[dict[str, Any]]:
        return [{"namespace": "default", "name": "a"}]

    async def pod(self, namespace: str, name: str, seconds: float) -> dict[str, Any] | None:
        if name != "a":
            return None
        with suppress(TimeoutError):
            await asyncio.wait_for(self.decided.wait(), seconds)
        return {"name": name, "captured": self.decided.is_set(), "final": self.decided.is_set()}

    def events(self, since: int) -> list[dict[str, Any]]:
        return [{"number": number} for number in (1, 2, 3) if number > since]

    async def workers(self) -> list[dict[str, Any]]:
        raise ConnectionError("the keeper is away")

    def config_dump(self) -> dict[str, Any]:
        return {"workloads": []}

    def log_level(self) -> str:
        return self.level

    def set_log_level(self, level: str) -> None:
        if level != "debug":
            raise ValueError(f"{level!r} is no log level; use one of debug")
        self.level = level

    def quit(self) -> None:
        self.ended.set()


@asynccontextmanager
async def serving(path: Path, node: Node) -> AsyncIterator[aiohttp.ClientSession]:
    server = AdminServer(path, node)
    await server.start()
    try:
        async with aiohttp.ClientSession("http://localhost", connector=aiohttp.UnixConnector(str(path))) as client:
            yield client
    finally:
        await server.stop()


async def test_the_socket_is_its_owners_alone_and_replaces_one_that_a_crash_left(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(path))
    stale.close()
    mask = os.umask(0)
    os.umask(mask)
    async with serving(path, Node()):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert os.umask(mask) == mask
    assert not path.exists()


@pytest.mark.parametrize(("method", "where", "status", "body"), [
    ("GET", "/server_info", 200, {"node": "n1"}),
    ("GET", "/pods", 200, [{"namespace": "default", "name": "a"}]),
    ("GET", "/events?since=2", 200, [{"number": 3}]),
    ("GET", "/config_dump", 200, {"workloads": []}),
    ("GET", "/logging", 200, {"level": "info"}),
    ("POST", "/logging?level=debug", 200, {"level": "debug"}),
    ("POST", "/logging?level=loud", 400, {"error": "'loud' is no log level; use one of debug"}),
    ("GET", "/workers", 503, {"error": "ConnectionError: the keeper is away"}),
    ("GET", "/pods/default/b", 404, {"error": "no pod default/b on this node"}),
    ("GET", "/pods/default/a?wait=x", 400, {"error": "wait=x is no number between 0 and 120"}),
    ("GET", "/pods/default/a?wait=1e9", 400, {"error": "wait=1e9 is no number between 0 and 120"}),
    ("GET", "/pods/default/a?wait=nan", 400, {"error": "wait=nan is no number between 0 and 120"}),
    ("GET", "/events?since=-1", 400, {"error": "since=-1 is no number between 0 and 9.22337e+18"}),
    ("GET", "/nothing", 404, {"error": "Not Found"}),
    ("GET", "/quitquitquit", 405, {"error": "Method Not Allowed"}),
])
async def test_answers(tmp_path: Path, method: str, where: str, status: int, body: Any) -> None:
    async with serving(tmp_path / "s", Node()) as client, client.request(method, where) as answer:
        assert (answer.status, await answer.json()) == (status, body)


async def test_readiness_says_what_is_missing(tmp_path: Path) -> None:
    node = Node()
    async with serving(tmp_path / "s", node) as client:
        async with client.get("/ready") as answer:
            assert answer.status == 503 and (await answer.json())["missing"] == node.missing
        node.missing = []
        async with client.get("/ready") as answer:
            assert answer.status == 200 and (await answer.json()) == {"ready": True, "missing": []}


async def test_waiting_for_a_pod_ends_with_the_decision_or_with_the_time(tmp_path: Path) -> None:
    node = Node()
    async with serving(tmp_path / "s", node) as client:
        async with client.get("/pods/default/a?wait=0.01") as answer:
            assert (await answer.json())["final"] is False
        waiting = asyncio.ensure_future(client.get("/pods/default/a?wait=60"))
        await asyncio.sleep(0)
        node.decided.set()
        async with await asyncio.wait_for(waiting, 10) as answer:
            assert (await answer.json())["captured"] is True


async def test_quitting_answers_first(tmp_path: Path) -> None:
    node = Node()
    async with serving(tmp_path / "s", node) as client:
        async with client.post("/quitquitquit") as answer:
            assert await answer.json() == {"quitting": True}
        await asyncio.wait_for(node.ended.wait(), 10)


async def test_the_index_names_every_route(tmp_path: Path) -> None:
    async with serving(tmp_path / "s", Node()) as client, client.get("/") as answer:
        routes = (await answer.json())["routes"]
        assert "GET /pods/{namespace}/{name}" in routes and "POST /quitquitquit" in routes
