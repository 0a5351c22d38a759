"""The agent's admin interface: HTTP on a unix socket that only its owner may open. The one place that speaks it.

    GET  /                         what there is
    GET  /ready                    200 or 503, with what is missing
    GET  /server_info              who this is: version, node, pid, uptime, instance, control plane
    GET  /pods                     every pod of the node and whether it is captured
    GET  /pods/<ns>/<name>?wait=S  one pod; with `wait`, answered when the decision on it is final (at most S seconds)
    GET  /events[?since=N]         what happened to pods and workers, newest last
    GET  /workers                  the keeper's workers
    GET  /authz/<ns>/<name>?to=IP:PORT[&from=IDENTITY][&source=IP]  what policies say of a connection to that pod, and why
    GET  /config_dump              everything that is in force (ztunnel's shape, and routes, clusters, listeners)
    GET  /logging, POST ?level=L   the log level
    POST /quitquitquit             end the agent; the data path serves on

Everything is JSON. An error is `{"error": "..."}` with a status that fits. No answer waits without a bound.
"""
from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol

from aiohttp import web

WAIT_LIMIT = 120.0  # seconds that one request may wait for a pod
HEAD_LIMIT = 8192  # bytes of a request line or header
CLOSE_SECONDS = 2.0

Json = dict[str, Any]


class Source(Protocol):
    """What the admin interface shows and does. Each returns what JSON knows."""

    def readiness(self) -> list[str]:
        """What is missing, in words; empty when ready."""

    def server_info(self) -> Json: ...

    def pods(self) -> list[Json]: ...

    async def pod(self, namespace: str, name: str, seconds: float) -> Json | None:
        """One pod, or None if there is none after the wait. `final` says whether the decision on it stands."""

    def events(self, since: int) -> list[Json]: ...

    async def workers(self) -> list[Json]: ...

    def config_dump(self) -> Json: ...

    def authorize(self, namespace: str, name: str, identity: str | None, source: str, destination: str, port: int) -> Json:
        """Raises LookupError when there is no such pod, ValueError for what is no identity or address."""

    def log_level(self) -> str: ...

    def set_log_level(self, level: str) -> None:
        """Raises ValueError on an unknown level."""

    def quit(self) -> None: ...


class AdminServer:
    """Serves `source` at `path` (mode 0600) between `start` and `stop`. A stale socket at `path` is replaced."""

    def __init__(self, path: Path, source: Source) -> None:
        self._path = path
        self._source = source
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        """Raises OSError when the socket cannot be made."""
        app = web.Application(middlewares=[_errors])
        get, post = app.router.add_get, app.router.add_post
        get("/", self._index)
        get("/ready", self._ready)
        get("/server_info", self._value(self._source.server_info))
        get("/pods", self._value(self._source.pods))
        get("/pods/{namespace}/{name}", self._pod)
        get("/events", self._events)
        get("/workers", self._workers)
        get("/authz/{namespace}/{name}", self._authorize)
        get("/config_dump", self._value(self._source.config_dump))
        get("/logging", self._value(lambda: {"level": self._source.log_level()}))
        post("/logging", self._set_logging)
        post("/quitquitquit", self._quit)
        self._routes = sorted({f"{route.method} {route.resource.canonical}" for route in app.router.routes()
                               if route.resource and route.method != "HEAD"})
        self._runner = web.AppRunner(app, access_log=None, handle_signals=False, max_line_size=HEAD_LIMIT,
                                     max_field_size=HEAD_LIMIT, shutdown_timeout=CLOSE_SECONDS)
        await self._runner.setup()
        self._path.unlink(missing_ok=True)
        before = os.umask(0o177)  # the socket is 0600 from its first moment
        try:
            await web.UnixSite(self._runner, str(self._path)).start()
        finally:
            os.umask(before)

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None
            self._path.unlink(missing_ok=True)

    # -- handlers ---------------------------------------------------------------------------------------------------

    @staticmethod
    def _value(get: Callable[[], Any]) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def handle(_: web.Request) -> web.Response:
            return web.json_response(get())
        return handle

    async def _index(self, _: web.Request) -> web.Response:
        return web.json_response({"routes": self._routes})

    async def _ready(self, _: web.Request) -> web.Response:
        missing = self._source.readiness()
        return web.json_response({"ready": not missing, "missing": missing}, status=503 if missing else 200)

    async def _pod(self, request: web.Request) -> web.Response:
        seconds = _number(request, "wait", 0.0, WAIT_LIMIT)
        namespace, name = request.match_info["namespace"], request.match_info["name"]
        pod = await self._source.pod(namespace, name, seconds)
        if pod is None:
            raise web.HTTPNotFound(reason=f"no pod {namespace}/{name} on this node")
        return web.json_response(pod)

    async def _events(self, request: web.Request) -> web.Response:
        return web.json_response(self._source.events(int(_number(request, "since", 0, 2**63))))

    async def _workers(self, _: web.Request) -> web.Response:
        return web.json_response(await self._source.workers())

    async def _authorize(self, request: web.Request) -> web.Response:
        namespace, name = request.match_info["namespace"], request.match_info["name"]
        address, _, port = request.query.get("to", "").rpartition(":")
        address = address.removeprefix("[").removesuffix("]")
        source = request.query.get("source") or ("::" if ":" in address else "0.0.0.0")
        try:
            if not port.isdecimal() or int(port) > 65535:
                raise ValueError("to is not IP:PORT")
            answer = self._source.authorize(namespace, name, request.query.get("from") or None, source, address, int(port))
        except LookupError as error:
            raise web.HTTPNotFound(reason=str(error.args[0])) from None
        except ValueError as error:
            raise web.HTTPBadRequest(reason=str(error).replace("\n", " ")) from None
        return web.json_response(answer)

    async def _set_logging(self, request: web.Request) -> web.Response:
        level = request.query.get("level", "")
        try:
            self._source.set_log_level(level)
        except ValueError as error:
            raise web.HTTPBadRequest(reason=str(error)) from None
        return web.json_response({"level": self._source.log_level()})

    async def _quit(self, _: web.Request) -> web.Response:
        # after the answer is out
        asyncio.get_running_loop().call_later(0.05, self._source.quit)
        return web.json_response({"quitting": True})


def _number(request: web.Request, name: str, default: float, limit: float) -> float:
    text = request.query.get(name)
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= limit:
        raise web.HTTPBadRequest(reason=f"{name}={text} is no number between 0 and {limit:g}")
    return value


@web.middleware
async def _errors(request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
                  ) -> web.StreamResponse:
    try:
        return await handler(request)
    except web.HTTPException as error:
        return web.json_response({"error": error.reason}, status=error.status)
    except (OSError, TimeoutError) as error:
        return web.json_response({"error": f"{type(error).__name__}: {error}"}, status=503)
