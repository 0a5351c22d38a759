"""What an operator sees of the data path: names for numbers, the access log, and which destinations are in use.

Readers of shared memory come with a keeper connection and go with it; counters live in the keeper, so nothing is lost.
"""
from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping

from agent.dataplane.readers import Readers, refused_call, seccomp
from agent.model.telemetry import SeriesKey, SeriesValues, TunnelRow
from agent.model.workload import Service, Workload
from agent.state.store import Store
from agent.telemetry.accesslog import AccessLog

DRAIN_SECONDS = 0.15  # a worker logs 1 MiB, some 3,000 records, in this time at 20,000 requests a second
DRAIN_RECORDS = 4000  # per turn and worker, so that logging does not keep the loop for long
USE_SECONDS = 30.0  # between two looks at which destinations are used


class StoreNames:
    """Who stands behind a number, for labels."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def workload(self, index: int) -> Workload | None:
        found = self._store.by_index(index)
        return found if isinstance(found, Workload) else None

    def service(self, index: int) -> Service | None:
        found = self._store.by_index(index)
        return found if isinstance(found, Service) else None


class DataPath:
    """The shared memory of all workers, and what is read from it. `series` and `headers` may be called from a thread."""

    def __init__(self, store: Store, access_log: AccessLog | None) -> None:
        self._names = StoreNames(store)
        self._access_log = access_log
        self._readers: Readers | None = None
        self._counted: dict[SeriesKey, int] = {}

    @property
    def names(self) -> StoreNames:
        return self._names

    def attach(self, readers: Readers) -> None:
        self._readers = readers

    def detach(self) -> None:
        """The memory is unmapped with the last use of it: a scrape may be under way."""
        self._readers = None

    def series(self) -> Iterable[tuple[SeriesKey, SeriesValues]]:
        readers = self._readers
        return readers.series().items() if readers is not None else ()

    def headers(self) -> Mapping[int, Mapping[str, int]]:
        readers = self._readers
        return readers.headers() if readers is not None else {}

    def tunnels(self) -> Mapping[int, tuple[list[TunnelRow], int]]:
        """Worker index -> the tunnels that it lists, and how many it has."""
        readers = self._readers
        return readers.tunnels() if readers is not None else {}

    def seccomp(self) -> dict[int, str]:
        """Worker index -> `on`, or `off` and why."""
        return {index: seccomp(header) for index, header in self.headers().items()}

    def refused_call(self, index: int) -> str:
        """What the last worker of this index that made a forbidden system call called; empty: none did."""
        header = self.headers().get(index)
        return refused_call(header) if header is not None else ""

    async def drain(self) -> None:
        """For ever: move finished requests from the rings to the access log."""
        while True:
            await asyncio.sleep(DRAIN_SECONDS)
            self.drain_once()

    def drain_once(self) -> int:
        """One bounded turn. Returns how many records it moved. Without an access log they are read and dropped."""
        if self._readers is None:
            return 0
        records = self._readers.drain_log(DRAIN_RECORDS)
        if self._access_log is not None and records:
            self._access_log.write(records)
        return len(records)

    def used(self) -> set[tuple[str, str]]:
        """(client namespace, service host) between which something was opened or closed since the last call."""
        found = set()
        before, self._counted = self._counted, {}
        for key, counts in self.series():
            if key.reporter != "source":
                continue
            total = self._counted[key] = counts.opened + counts.closed + counts.failed
            if before.get(key) == total:
                continue
            client, service = self._names.workload(key.source), self._names.service(key.service)
            if client is not None and service is not None:
                found.add((client.namespace, service.hostname))
        return found

    async def watch_use(self, tell: Callable[[set[tuple[str, str]]], None], sweep: Callable[[], None]) -> None:
        """For ever: tell which destinations are in use, then let the idle ones be swept."""
        while True:
            await asyncio.sleep(USE_SECONDS)
            tell(self.used())
            sweep()
