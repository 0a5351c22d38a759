"""Answers of one pod's resolvers, kept by their TTL and bounded in bytes; the least recently used goes first."""
from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from agent.dns import wire

CACHE_BYTES = 131_072  # of one pod: some 300 answers
LONGEST = 300  # seconds that anything is kept, whatever its TTL says: the resolver keeps it longer and is near
_OVERHEAD = 300  # bytes of an entry beside its question and its answer

Key = tuple[tuple[str, int], bytes]  # the resolver asked, and the question from behind its id


@dataclass(frozen=True, slots=True)
class _Entry:
    answer: bytes
    places: tuple[int, ...]
    since: float
    until: float
    bytes: int


class Cache:
    """`now`: monotonic seconds."""

    def __init__(self, now: Callable[[], float], limit: int = CACHE_BYTES) -> None:
        self._now, self._limit = now, limit
        self._entries: OrderedDict[Key, _Entry] = OrderedDict()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Key) -> bytes | None:
        """An answer whose TTLs are what is left of them. Its id is not the asker's."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        now = self._now()
        if now >= entry.until:
            self._drop(key)
            return None
        self._entries.move_to_end(key)
        return wire.aged(entry.answer, entry.places, int(now - entry.since))

    def put(self, key: Key, answer: bytes) -> None:
        """Keep an answer if its TTLs allow it."""
        life = wire.lifetime(answer)
        if life is None:
            return
        size = len(answer) + len(key[1]) + 8 * len(life.places) + _OVERHEAD
        if size > self._limit // 4:
            return
        self._drop(key)
        now = self._now()
        self._entries[key] = _Entry(answer, life.places, now, now + min(life.seconds, LONGEST), size)
        self.bytes += size
        while self.bytes > self._limit:
            self._drop(next(iter(self._entries)))

    def _drop(self, key: Key) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.bytes -= entry.bytes
