"""Runs the control plane until SIGTERM or SIGINT."""
from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Iterable
from contextlib import AsyncExitStack
from pathlib import Path

import uvloop

from controlplane.app.admin import Admin
from controlplane.app.metrics import Metrics
from controlplane.app.plane import Plane
from controlplane.server.grpc_server import Server
from controlplane.sources.watch import Watch

log = logging.getLogger("narrows.controlplane")


def run(config: Iterable[Path], listen: str, admin: str | None, version: str) -> None:
    """Returns when it was told to end. Raises ListenError when a place to listen at is taken."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_run(tuple(config), listen, admin, version))


async def _run(config: tuple[Path, ...], listen: str, admin: str | None, version: str) -> None:
    loop = asyncio.get_running_loop()
    end = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end.set)
    plane = Plane(config)
    metrics = Metrics(plane, version)
    async with AsyncExitStack() as stack:
        watch = Watch(config)  # before reading: what changes meanwhile is seen
        stack.callback(watch.close)
        if admin is not None:
            door = Admin(plane, metrics)
            await door.start(Path(admin.removeprefix("unix:")))
            stack.push_async_callback(door.stop)
        plane.load()
        server = Server(plane.hub, f"narrows {version}")
        where = await server.start(listen)
        stack.push_async_callback(server.stop)
        log.info("serving", extra={"listen": where, "admin": admin or "", "config": [str(path) for path in config]})
        following = asyncio.create_task(_follow(plane, watch), name="follow")
        ending = asyncio.create_task(end.wait(), name="end")
        try:
            await asyncio.wait({following, ending}, return_when=asyncio.FIRST_COMPLETED)
            if following.done():
                following.result()  # it never returns: this raises
        finally:
            for task in (following, ending):
                task.cancel()
            await asyncio.gather(following, ending, return_exceptions=True)
        log.info("ending", extra={"clients": len(plane.hub)})


async def _follow(plane: Plane, watch: Watch) -> None:
    while True:
        plane.follow(await watch.changes())
