"""The core of a reflector: one resource, listed once and then followed. Sans-I/O: told what came, it says what to do next.

    LIST ---last page---> WATCH ---end---> WATCH again from the last resourceVersion
      ^                     |  ^
      |                     |  +--- no ---+
      |                     +---cut, failed, or told nothing---> is the server's past shorter than ours? a list of one object says
      +--- 410, or yes                                                          a failure of any: WAIT, then the same again

Theory. A list is a snapshot at its resourceVersion, and a watch from there tells all that follows (API concepts, "Efficient detection of
changes"), so what was listed and told is the truth, late at most. Four things break that, and have a rule each:
- the server forgot where we were (410): list again, and what we held and the list has not was deleted meanwhile;
- the list is older than what we know (a replica that lags, an etcd restored from a backup): it is refused, and taken only when
  STALE_LISTS in a row say so, since then the past is the truth. A watch does not tell: from a resourceVersion of the future it is silent
  (seen with kube-apiserver 1.20; later ones may refuse it), so before the next one the server is asked where it is;
- an object cannot be read: its last good version stays in force, and the problem is told until it can be; when not even its name is known,
  nothing is taken for deleted by that list;
- nobody answers: the state stays, and says since when and why it is stale.
It holds keys, uids and versions only: objects are the consumer's.
"""
from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Generic, TypeVar

from protos.kubernetes.errors import ApiError, BadRequest, Gone, NotFound, NotServed, TooLarge, Unavailable
from protos.kubernetes.objects import Item, Key, Page
from protos.kubernetes.stream import Bookmark, Changed, Event, Failed, Skipped

T = TypeVar("T")
BACKOFF_FIRST = 0.8  # seconds; with BACKOFF_MOST what client-go's reflectors wait
BACKOFF_MOST = 30.0
PAGE_LIMIT = 500  # objects a page, as kubectl asks for
WATCH_SECONDS = (300, 600)  # a watch's timeoutSeconds is drawn from here, so that a fleet does not come back all at once
WATCH_SHORT = 1.0  # seconds; a watch that tells nothing and ends sooner counts as a failure, else list and watch would spin
STALE_LISTS = 5
PROBLEMS_BOUND = 1_000  # objects that cannot be read and are told by name


class Phase(Enum):
    LIST = "list"
    WATCH = "watch"
    ABSENT = "absent"  # the kind is not served: no CRD


@dataclass(frozen=True, slots=True)
class List:
    """Ask for a page. `limit` 0: all at once."""

    limit: int
    continue_: str


@dataclass(frozen=True, slots=True)
class Watch:
    resource_version: str
    seconds: int


@dataclass(frozen=True, slots=True)
class Wait:
    seconds: float


@dataclass(slots=True)
class Batch(Generic[T]):
    """What differs from the batch before. `synced` is True once: in the batch that completes the first list."""

    puts: dict[Key, T] = field(default_factory=dict)
    deletes: set[Key] = field(default_factory=set)
    synced: bool = False

    def __bool__(self) -> bool:
        return bool(self.puts or self.deletes or self.synced)


@dataclass(frozen=True, slots=True)
class State:
    """For status and metrics. `stale_since` is on the clock that the core was given, None while the state is followed."""

    phase: Phase
    synced: bool
    objects: int
    resource_version: str
    stale_since: float | None
    reason: str
    lists: int
    watches: int
    events: int
    failures: int
    unreadable: dict[Key, str]
    unnamed: int


@dataclass(frozen=True, slots=True)
class _Held:
    uid: str
    resource_version: str


class Reflector(Generic[T]):
    """`next` says what to do; what came of it goes to `page`, `opened`, `event`, `ended` or `failed`; `take` gives what differs."""

    def __init__(self, now: float, *, optional: bool = False, limit: int = PAGE_LIMIT, draw: Callable[[], float] = random.random) -> None:
        """`optional`: a kind that is not served is an empty one, and looked for again. `draw` gives from 0 to 1, for jitter."""
        self._optional, self._limit_asked, self._draw = optional, limit, draw
        self._phase, self._synced = Phase.LIST, False
        self._held: dict[Key, _Held] = {}
        self._version = ""
        self._stale_since: float | None = now
        self._reason = "not listed yet"
        self._failures, self._wait = 0, 0.0
        self._batch: Batch[T] = Batch()
        self._unreadable: dict[Key, str] = {}
        self._unnamed = 0
        self._limit, self._stale_lists = limit, 0
        self._opened, self._told, self._asked = now, 0, 0
        self._look = False  # ask where the server is, before the next watch
        self._lists = self._watches = self._events = self._all_failures = 0
        self._continue, self._list_version = "", ""
        self._seen: set[Key] = set()
        self._listed_unnamed = 0

    # -- what to do -------------------------------------------------------------------------------------------------

    def next(self) -> List | Watch | Wait:
        if self._wait:
            seconds, self._wait = self._wait, 0.0
            return Wait(seconds)
        if self._phase is Phase.WATCH and self._look:
            return List(1, "")
        if self._phase is Phase.WATCH:
            low, high = WATCH_SECONDS
            self._asked = low + int(self._draw() * (high - low))
            return Watch(self._version, self._asked)
        return List(self._limit, self._continue)

    def take(self) -> Batch[T]:
        """What was told since the last call: a key is put or deleted, never both; the last word counts."""
        taken, self._batch = self._batch, Batch()
        return taken

    def state(self) -> State:
        return State(self._phase, self._synced, len(self._held), self._version, self._stale_since, self._reason, self._lists,
                     self._watches, self._events, self._all_failures, dict(self._unreadable), self._unnamed)

    # -- what came --------------------------------------------------------------------------------------------------

    def page(self, page: Page[T], now: float) -> None:
        """The answer to List."""
        if self._phase is Phase.WATCH:
            self._look = False
            if _older(page.resource_version, self._version):
                self._phase = Phase.LIST
            return
        if not self._continue and not self._fresh(page, now):
            return
        if not self._continue:
            self._list_version = page.resource_version
        for one in page.items:
            if one.key is None:
                self._listed_unnamed += 1
            else:
                self._seen.add(one.key)
            self._put(one)
        self._continue = page.continue_
        if page.continue_:
            return
        if not self._listed_unnamed:
            for key in self._held.keys() - self._seen:
                self._delete(key)
            for key in self._unreadable.keys() - self._seen:
                del self._unreadable[key]
        self._unnamed = self._listed_unnamed
        self._version, self._phase, self._look = self._list_version, Phase.WATCH, False
        self._lists += 1
        self._limit, self._stale_lists = self._limit_asked, 0
        self._sync()
        self._restart_list()
        # not yet `_well`: a server whose lists succeed and whose watches fail must not be listed in a loop
        self._stale_since, self._reason = None, ""

    def opened(self, now: float) -> None:
        """The server accepted the watch."""
        self._watches += 1
        self._opened, self._told = now, 0
        self._stale_since, self._reason = None, ""

    def event(self, event: Event[T], now: float) -> bool:
        """One event of the watch. False when the rest of the stream must not be read."""
        if isinstance(event, Failed):
            self.failed(event.error, now)
            return False
        self._told += 1
        self._failures = 0
        if isinstance(event, Bookmark):
            self._version = event.resource_version or self._version
        elif isinstance(event, Skipped):
            self._unnamed += 1
        else:
            self._change(event)
        return True

    def ended(self, now: float) -> None:
        """The watch ended, by its timeout or by a cut: it goes on where it was."""
        self._look = not self._told or now - self._opened < self._asked - WATCH_SHORT
        if not self._told and now - self._opened < WATCH_SHORT:
            self._fail("watches end at once, without an event", now)
        else:
            self._failures = 0

    def failed(self, error: ApiError, now: float) -> None:
        """A list or a watch was refused, or got no answer."""
        if isinstance(error, NotServed) and self._phase is not Phase.WATCH:
            self._absent(error, now)
            return
        listing = self._phase is not Phase.WATCH
        self._look = not listing
        if isinstance(error, Gone):
            self._gone(listing, now, str(error))
            return
        if listing and isinstance(error, TooLarge) and self._limit != 1:
            self._limit = max(1, (self._limit or PAGE_LIMIT) // 4)
            self._restart_list()
        elif listing and isinstance(error, BadRequest):
            self._restart_list()  # a `continue` that a restarted server does not understand
        elif not listing and _unknown_version(error):
            self._phase = Phase.LIST
        elif not listing and isinstance(error, NotFound):
            self._phase = Phase.LIST  # the CRD went: the list will tell
        self._fail(str(error), now, error.retry_after)

    # -- inside -----------------------------------------------------------------------------------------------------

    def _restart_list(self) -> None:
        self._continue, self._list_version = "", ""
        self._seen = set()
        self._listed_unnamed = 0

    def _fresh(self, page: Page[T], now: float) -> bool:
        """False for a list that is older than what we know, unless it keeps being so."""
        if not _older(page.resource_version, self._version):
            return True
        self._stale_lists += 1
        if self._stale_lists >= STALE_LISTS:
            return True
        self._fail(f"a list of resourceVersion {page.resource_version} is older than {self._version}, which is known already", now)
        return False

    def _gone(self, listing: bool, now: float, why: str) -> None:
        if not listing:
            self._phase = Phase.LIST
            if self._failures:  # a server that remembers less than a list takes must not be listed in a loop
                self._fail(why, now)
            else:
                self._failures = 1  # the first time it is listed at once, and nothing is stale yet
            return
        expired = bool(self._continue)
        self._restart_list()
        if expired:
            self._limit = 0  # pages took longer than the server remembers: all at once, as client-go falls back
        self._fail(why, now)

    def _absent(self, error: ApiError, now: float) -> None:
        self._restart_list()
        if self._optional and not self._held:
            self._phase = Phase.ABSENT
            self._sync()
            self._stale_since, self._reason = None, str(error)
            self._wait = BACKOFF_MOST * (0.5 + self._draw() / 2)
        else:
            self._fail(str(error), now)

    def _sync(self) -> None:
        if not self._synced:
            self._synced = self._batch.synced = True

    def _fail(self, why: str, now: float, retry_after: float | None = None) -> None:
        self._failures += 1
        self._all_failures += 1
        self._reason = why
        if self._stale_since is None:
            self._stale_since = now
        most = min(BACKOFF_MOST, BACKOFF_FIRST * 2.0 ** min(self._failures - 1, 10))
        wait = most * (0.5 + self._draw() / 2)
        self._wait = max(wait, (retry_after or 0.0) * (1.0 + self._draw() / 4))

    def _change(self, event: Changed[T]) -> None:
        one = event.item
        self._events += 1
        self._version = one.resource_version or self._version
        if one.key is None:
            self._unnamed += 1
        elif event.deleted:
            self._unreadable.pop(one.key, None)
            self._delete(one.key)
        else:
            self._put(one)

    def _put(self, one: Item[T]) -> None:
        if one.key is None:
            return
        if one.value is None:
            if one.key in self._unreadable or len(self._unreadable) < PROBLEMS_BOUND:
                self._unreadable[one.key] = one.problem
            return
        self._unreadable.pop(one.key, None)
        held = _Held(one.uid, one.resource_version)
        if self._held.get(one.key) == held:
            return
        self._held[one.key] = held
        self._batch.puts[one.key] = one.value
        self._batch.deletes.discard(one.key)

    def _delete(self, key: Key) -> None:
        if self._held.pop(key, None) is None:
            return
        self._batch.puts.pop(key, None)
        self._batch.deletes.add(key)


def _older(version: str, than: str) -> bool:
    """Of two resourceVersions. They are opaque in name; those of etcd are decimal and grow (KEP-5504). Others are never older."""
    return version.isdecimal() and than.isdecimal() and int(version) < int(than)


def _unknown_version(error: ApiError) -> bool:
    """504 for a resourceVersion of the future: this server's etcd has lost what we saw, or its cache lags."""
    return isinstance(error, Unavailable) and "resource version" in error.message.lower()
