"""Where the agent has this node's pods from: files of its run directory, or Kubernetes' API server. One interface for both."""
from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from agent.app.events import Events
from agent.app.tracked import Tracked
from agent.telemetry.kubernetes import KindFigures
from agent.workloads.files import Event, FileSource
from protos.kubernetes.configuration import Configuration

if TYPE_CHECKING:
    from agent.workloads.cluster import ClusterSource

WATCH_SECONDS = 1.0  # between two looks whether the API server is followed


class PodSource(Protocol):
    @property
    def refused(self) -> str:
        """The kind of event that says that a pod cannot be read."""
        ...

    def events(self) -> AsyncIterator[Event]:
        """Every pod, Synced, then every change. Raises SourceError when it is to be called again later."""
        ...

    def shown(self) -> dict[str, Any]: ...

    def figures(self) -> list[KindFigures]: ...


def open_source(kubernetes: Configuration | None, node: str, run_dir: Path, events: Events,
                tracked: Callable[[], Iterable[Tracked]]) -> PodSource:
    return Files(run_dir / "pods") if kubernetes is None else Kubernetes(kubernetes, node, events, tracked)


class Files:
    refused = "PodFileRefused"

    def __init__(self, folder: Path) -> None:
        self._source = FileSource(folder)

    def events(self) -> AsyncIterator[Event]:
        return self._source.events()

    def shown(self) -> dict[str, Any]:
        return {"source": "files", "stale": None}

    def figures(self) -> list[KindFigures]:
        return []


class Kubernetes:
    """Follows one API server, and tells it what became of the pods. What was read stays while it is away."""

    refused = "PodRefused"

    def __init__(self, configuration: Configuration, node: str, events: Events, tracked: Callable[[], Iterable[Tracked]]) -> None:
        self._configuration, self._node, self._events, self._tracked = configuration, node, events, tracked
        self._source: ClusterSource | None = None
        self._stale = False

    async def events(self) -> AsyncIterator[Event]:
        from agent.app.report import Report
        from agent.workloads.cluster import ClusterSource  # with aiohttp's client: only where it is used
        from protos.kubernetes.client import Client

        async with Client(self._configuration, f"narrows-agent/{self._node}") as client:
            source = self._source = ClusterSource(client, self._node)
            report = Report(client, self._node, self._tracked, source.written, self._events)
            tasks = [asyncio.create_task(work, name=name) for name, work in (("staleness", self._watch(source)), ("report", report.run()))]
            try:
                async for event in source.events():
                    yield event
                    del event  # it may hold a namespace
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    def shown(self) -> dict[str, Any]:
        stale = self._source.stale() if self._source else None
        return {"source": "kubernetes", "server": self._configuration.server,
                "stale": {"seconds": round(time.monotonic() - stale[0], 1), "reason": stale[1]} if stale else None}

    def figures(self) -> list[KindFigures]:
        """For metrics; called from the thread that renders them."""
        now = time.monotonic()
        return [KindFigures(kind, 0.0 if state.stale_since is None else now - state.stale_since, state.objects, state.lists, state.failures)
                for kind, state in (self._source.states() if self._source else ())]

    async def _watch(self, source: ClusterSource) -> None:
        while True:
            stale = source.stale()
            failed = stale is not None and any(state.failures for _, state in source.states())
            if failed and stale is not None and not self._stale:
                self._events.add("PodsStale", "pods", f"the API server is not followed, pods stay as they are: {stale[1]}", warning=True)
            elif self._stale and stale is None:
                self._events.add("PodsFollowed", "pods", "the API server is followed again")
            self._stale = failed
            await asyncio.sleep(WATCH_SECONDS)
