"""The two ports that the cluster asks: metrics (15020) and readiness (15021)."""
from __future__ import annotations

import asyncio
import gzip
from collections.abc import Callable

from aiohttp import web
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import CollectorRegistry

READY_PATH = "/healthz/ready"
METRICS_PATHS = ("/metrics", "/stats/prometheus")


def metrics_app(registry: CollectorRegistry) -> web.Application:
    """Text or OpenMetrics by `Accept`, gzip by `Accept-Encoding`. Rendering happens in a thread: it may take a while."""

    def render(accept: str, squeeze: bool) -> tuple[bytes, str]:
        encoder, content_type = choose_encoder(accept)
        body = encoder(registry)
        return (gzip.compress(body, compresslevel=1) if squeeze else body), content_type

    async def metrics(request: web.Request) -> web.Response:
        squeeze = "gzip" in request.headers.get("Accept-Encoding", "")
        body, content_type = await asyncio.to_thread(render, request.headers.get("Accept", ""), squeeze)
        headers = {"Content-Type": content_type, "Vary": "Accept, Accept-Encoding"}
        if squeeze:
            headers["Content-Encoding"] = "gzip"
        return web.Response(body=body, headers=headers)

    app = web.Application()
    for path in METRICS_PATHS:
        app.router.add_get(path, metrics)
    return app


def readiness_app(reason_not_ready: Callable[[], str]) -> web.Application:
    """`reason_not_ready` returns "" when the node can serve, else what it waits for (answered with 503)."""

    async def ready(_: web.Request) -> web.Response:
        reason = reason_not_ready()
        return web.Response(status=503 if reason else 200, text=(reason or "ready") + "\n")

    app = web.Application()
    app.router.add_get(READY_PATH, ready)
    return app


class Ports:
    """Both servers; `start` binds (OSError names the port), `stop` closes within a second."""

    def __init__(self, registry: CollectorRegistry, reason_not_ready: Callable[[], str]) -> None:
        self._apps = (metrics_app(registry), readiness_app(reason_not_ready))
        self._runners: list[web.AppRunner] = []

    async def start(self, address: str | None, metrics_port: int, readiness_port: int) -> None:
        for app, port, what in zip(self._apps, (metrics_port, readiness_port), ("metrics", "readiness"), strict=True):
            runner = web.AppRunner(app, access_log=None)
            await runner.setup()
            self._runners.append(runner)
            site = web.TCPSite(runner, address, port, shutdown_timeout=1.0, reuse_address=True)
            try:
                await site.start()
            except OSError as error:
                await self.stop()
                raise OSError(error.errno, f"cannot listen on {address or '*'}:{port} for {what}: {error.strerror}; "
                              f"another program holds the port, or set another with --{what}-port") from error

    async def stop(self) -> None:
        for runner in self._runners:
            await runner.cleanup()
        self._runners.clear()
