"""Watches the kernel's tables of tracked connections: that of every captured pod, and the node's own.

A full table is no fault of ours and nothing that we can repair, but its sign (new connections that time out) looks like one. So it
is told before and while it happens, with the cause and what to do.
"""
from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum

from agent.app.events import Events
from agent.model.pod import LocalPod
from agent.netlink import conntrack
from agent.telemetry.capture import ConntrackFigures

WATCH_SECONDS = 2.5
NEARLY, FREE = 0.9, 0.8  # of the limit: from where it is told, and below which it is over
NODE = "/proc/self/ns/net"  # the agent's own
_U32 = 1 << 32


class Fill(Enum):
    FREE = 0
    NEARLY = 1
    FULL = 2


@dataclass(slots=True)
class _Seen:
    """The last look at one namespace."""

    table: conntrack.Table
    fill: Fill = Fill.FREE
    lost: int = 0  # packets, since it became full


class Tracking:
    """`captured`: the pods to look at. `figures` may be called from the thread that renders metrics."""

    def __init__(self, events: Events, captured: Callable[[], Iterable[LocalPod]]) -> None:
        self._events = events
        self._captured = captured
        self._seen: dict[str, _Seen] = {}  # by path
        self._dropped = self._evicted = 0

    async def watch(self) -> None:
        """For ever."""
        while True:
            await self.look()
            await asyncio.sleep(WATCH_SECONDS)

    async def look(self) -> None:
        """One look at every table."""
        about = {NODE: "node", **{pod.netns: f"pod {pod.ref}" for pod in self._captured()}}
        found = await asyncio.to_thread(conntrack.tables, about)
        self._seen = {path: self._compare(about[path], self._seen.get(path), table) for path, table in found.items()}

    def figures(self) -> ConntrackFigures:
        tables = [one.table for one in list(self._seen.values())]
        fullest = max(tables, key=lambda table: table.entries, default=conntrack.Table(0, 0, 0, 0))
        return ConntrackFigures(fullest.entries, fullest.limit, self._dropped, self._evicted)

    def _compare(self, about: str, before: _Seen | None, table: conntrack.Table) -> _Seen:
        dropped = (table.dropped - before.table.dropped) % _U32 if before else 0
        self._dropped += dropped
        self._evicted += (table.evicted - before.table.evicted) % _U32 if before else 0
        fill, lost = (before.fill, before.lost) if before else (Fill.FREE, 0)
        lost += dropped
        counts = f"{table.entries} of {table.limit} (net.netfilter.nf_conntrack_max)"
        if table.used >= NEARLY and dropped and fill is not Fill.FULL:
            self._events.add("ConntrackFull", about, f"{about}: the kernel's table of tracked connections is full, {counts}; {lost} "
                             "packets of new connections were dropped: these wait or time out, none passes by the proxy, and those that "
                             f"live go on. {_TO_DO}", warning=True)
            return _Seen(table, Fill.FULL, lost)
        if table.used >= NEARLY and fill is Fill.FREE:
            self._events.add("ConntrackNearlyFull", about, f"{about}: the kernel's table of tracked connections has {counts}; when it is "
                             f"full, new connections time out. {_TO_DO}", warning=True)
            return _Seen(table, Fill.NEARLY, lost)
        if table.used < FREE and not dropped and fill is not Fill.FREE:
            self._events.add("ConntrackFree", about, f"{about}: the kernel's table of tracked connections has room again, {counts}; "
                             f"{lost} packets were dropped meanwhile")
            return _Seen(table)
        return _Seen(table, fill, lost)


_TO_DO = ("Who opens so many: `conntrack -L` in that namespace; more room: sysctl -w net.netfilter.nf_conntrack_max on the node "
          "(it counts for each namespace)")
