"""The lab's socket: HTTP with JSON on `lab.sock` (0600), between the subcommands and the supervisor.

    GET  /status            pods, nodes, services, processes
    GET  /pod?ref=NS/NAME   one pod with its containers: how to exec into them, where their logs are
    GET  /metrics/NODE      the node's metrics page (text)
    GET  /events            what happened, in the lab and on its nodes, oldest first
    POST /apply             {"paths": [...]}: read, check and apply files
    POST /delete            {"kind", "namespace", "name"}
    POST /wait?seconds=S    until nothing is missing; answers what still is
    POST /down              end the lab

An error is `{"error": text}` with status 400, 404 or 503.
"""
from __future__ import annotations

import asyncio
import dataclasses
import os
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

from aiohttp import web

from agent.lab import manifest, objects, overview
from agent.lab.manifest import Problem, Source
from agent.lab.objects import Found
from agent.lab.spec import key_of
from agent.lab.supervisor import Refused, Supervisor
from agent.lab.system import fetch_metrics
from agent.lab.validate import validate

MAX_BODY = 1 << 20  # bytes of a request
WAIT_LIMIT = 600.0  # seconds
MAX_FILES = 2000


class BadFiles(Refused):
    """Files that are refused, with every problem in them."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = problems


async def load(paths: Iterable[Path], config: Path | None = None) -> tuple[list[Found], list[Problem]]:
    """Read and check files and folders. Returns their objects and the warnings; BadFiles if anything is an error."""
    files = [file for path in paths for file in manifest.find(path)]
    if not files:
        raise Refused("no *.yaml, *.yml or *.json is there")
    if len(files) > MAX_FILES:
        raise Refused(f"{len(files)} files are more than {MAX_FILES}; name a smaller folder")
    sources: list[Source] = [manifest.read(file) for file in files]
    found = [item for source in sources for item in objects.objects(source)]
    problems = [problem for source in sources for problem in source.problems]
    problems += _twice(found)
    if not any(problem.error for problem in problems):
        problems += await validate(sources, config)
    if any(problem.error for problem in problems):
        raise BadFiles(problems)
    return found, problems


def _twice(found: list[Found]) -> list[Problem]:
    first: dict[Any, Found] = {}
    problems = []
    for item in found:
        before = first.setdefault(key_of(item.thing), item)
        if before is not item:
            kind, namespace, name = key_of(item.thing)
            label = f"{kind} {namespace}/{name}" if namespace else f"{kind} {name}"
            problems.append(Problem(item.path, item.line, f"{label} is defined already in {before.path}:{before.line}"))
    return problems


class Control:
    """Serves the lab's socket. `down` is called when someone asks for the end."""

    def __init__(self, supervisor: Supervisor, down: Callable[[], None]) -> None:
        self._lab, self._down = supervisor, down
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        app = web.Application(middlewares=[_errors], client_max_size=MAX_BODY)
        app.router.add_get("/status", self._status)
        app.router.add_get("/pod", self._pod)
        app.router.add_get("/metrics/{node}", self._metrics)
        app.router.add_get("/events", self._events)
        app.router.add_post("/apply", self._apply)
        app.router.add_post("/delete", self._delete)
        app.router.add_post("/wait", self._wait)
        app.router.add_post("/down", self._end)
        self._runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=1.0)
        await self._runner.setup()
        before = os.umask(0o177)
        try:
            await web.UnixSite(self._runner, str(self._lab.place.socket)).start()
        finally:
            os.umask(before)

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def _status(self, _: web.Request) -> web.Response:
        return web.json_response(await overview.status(self._lab))

    async def _pod(self, request: web.Request) -> web.Response:
        pod = overview.find(self._lab, request.query.get("ref", ""))
        containers = [{"name": container.spec.name, "pid": container.pid, "state": container.text,
                       "log": str(pod.files / f"{container.spec.name}.log"),
                       "launch": dataclasses.asdict(container.launch) if container.launch else None}
                      for container in pod.containers]
        return web.json_response({"namespace": pod.namespace.name, "name": pod.name, "node": pod.node,
                                  "netns": pod.netns, "state": pod.state(), "containers": containers})

    async def _metrics(self, request: web.Request) -> web.Response:
        node = request.match_info["node"]
        if node not in self._lab.nodes:
            raise Refused(f"there is no node {node}; there are {', '.join(self._lab.nodes)}")
        if not self._lab.options.mesh:
            raise Refused("this lab runs without a mesh, so nobody counts")
        return web.Response(text=await asyncio.to_thread(fetch_metrics, self._lab.place, node))

    async def _events(self, _: web.Request) -> web.Response:
        return web.json_response(await overview.all_events(self._lab))

    async def _apply(self, request: web.Request) -> web.Response:
        body = await request.json()
        found, problems = await load([Path(path) for path in body["paths"]], self._lab.place.config)
        lines = await self._lab.apply(found)
        return web.json_response({"changes": lines, "warnings": [str(problem) for problem in problems]})

    async def _delete(self, request: web.Request) -> web.Response:
        body = await request.json()
        line = self._lab.delete(str(body["kind"]), str(body["namespace"]), str(body["name"]))
        return web.json_response({"changes": [line]})

    async def _wait(self, request: web.Request) -> web.Response:
        seconds = min(float(request.query.get("seconds", "60")), WAIT_LIMIT)
        return web.json_response({"missing": await self._lab.wait(seconds)})

    async def _end(self, _: web.Request) -> web.Response:
        self._down()
        return web.json_response({})


@web.middleware
async def _errors(request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
                  ) -> web.StreamResponse:
    try:
        return await handler(request)
    except web.HTTPException as error:
        return web.json_response({"error": error.reason}, status=error.status)
    except Refused as error:
        return web.json_response({"error": str(error)}, status=400)
    except (KeyError, TypeError, ValueError) as error:
        return web.json_response({"error": f"a request that is not understood: {error}"}, status=400)
    except OSError as error:
        return web.json_response({"error": str(error)}, status=503)
