"""One commit at a time, of everything that changed meanwhile: whoever waits is told when it is in force.

When the keeper refuses a transaction it is cut in halves until the entries that it refuses are alone; the others are in
force. That costs log(n) commits and happens only when agent and worker disagree about a value, which is a fault worth its
log line, but not worth the update of everything else.
"""
from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import Protocol

from agent.app.encode import encode
from agent.dataplane import blobs
from agent.state.entries import Entry, Key, Table
from agent.state.store import Store

log = logging.getLogger("narrows.commit")

Refusals = Mapping[Key, str]


class Refused(Exception):
    """The keeper did not take a transaction; nothing of it is in force. The text is the worker's."""


class Sink(Protocol):
    async def commit(self, entries: Sequence[blobs.Entry]) -> None:
        """Returns when every worker has it in force. Raises Refused, or ConnectionError when the keeper is away."""


class Committer:
    """`in_force()` gives a future of the refusals; `run(sink)` serves one connection to a keeper."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._wake = asyncio.Event()
        self._waiters: list[asyncio.Future[Refusals]] = []
        self.commits = 0
        self.refused: dict[Key, str] = {}  # what is wanted and not in force, until it changes

    def in_force(self) -> asyncio.Future[Refusals]:
        """Done when all that the store holds now is in force; its result names what was refused in that commit.

        It stays open while there is no keeper: what cannot be put in force must not be acknowledged.
        """
        future: asyncio.Future[Refusals] = asyncio.get_running_loop().create_future()
        self._waiters.append(future)
        self._wake.set()
        return future

    def nudge(self) -> None:
        """Commit what changed; nobody waits for it."""
        if self._store:
            self._wake.set()

    async def run(self, sink: Sink, first: Sequence[blobs.Entry] = ()) -> None:
        """Commits `first` (the difference to what the keeper holds), then what changes, until the keeper is away.

        Then it raises ConnectionError, and keeps changes and waiters for the next connection.
        """
        refused: dict[Key, str] = {}
        await self._halves(sink, first, refused)
        self.refused = refused
        self._wake.set()
        while True:
            await self._wake.wait()
            self._wake.clear()
            entries = self._store.take()
            waiters, self._waiters = self._waiters, []
            try:
                refused = await self._commit(sink, entries) if entries else {}
            except BaseException:
                self._store.give_back(entry.key for entry in entries)
                self._waiters = waiters + self._waiters
                self._wake.set()
                raise
            for entry in entries:
                self.refused.pop(entry.key, None)
            self.refused.update(refused)
            for future in waiters:
                if not future.done():
                    future.set_result(refused)

    async def _commit(self, sink: Sink, entries: Sequence[Entry]) -> dict[Key, str]:
        refused: dict[Key, str] = {}
        encoded: list[blobs.Entry] = []
        for entry in entries:
            try:
                encoded.append(encode(entry, self._store.service_index))
            except blobs.BlobError as error:
                refused[entry.key] = str(error)
        await self._halves(sink, encoded, refused)
        for key, reason in refused.items():
            log.error("the data path refuses an entry; its last version stays in force",
                      extra={"table": key[0].name.lower(), "key": key[1], "reason": reason})
        return refused

    async def _halves(self, sink: Sink, entries: Sequence[blobs.Entry], refused: dict[Key, str]) -> None:
        if not entries:
            return
        try:
            self.commits += 1
            await sink.commit(entries)
        except Refused as error:
            if len(entries) == 1:
                refused[Table(entries[0].kind), entries[0].key] = str(error)
                return
            middle = len(entries) // 2
            await self._halves(sink, entries[:middle], refused)
            await self._halves(sink, entries[middle:], refused)
