"""Between the control plane and the keeper: updates are decoded, put into store and tree, and committed.

One direction: xds Update -> decode -> store and tree -> commit -> names refused -> ACK or NACK. And the other: MISS
from a worker -> demand -> subscription. Single-threaded; every method returns at once but for the futures it gives.
"""
from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

from agent.app.commit import Committer, Refusals
from agent.dataplane import blobs
from agent.model.policy import Policy
from agent.model.workload import Service, Workload
from agent.state.entries import Key, Table
from agent.state.store import Store
from agent.xds.decode import Refused, decode
from agent.xds.session import Update
from agent.xds.tree import NAMED, ClusterPart, EndpointsPart, ListenerPart, RoutePart, Tree
from agent.xds.types import TypeUrl, parse_destination_key, parse_xdstp

DEMANDS = 10_000  # on-demand destinations of a node; the least recently used goes first
IDLE_SECONDS = 600.0  # a destination that nobody talked to for so long is dropped

log = logging.getLogger("narrows.mesh")

Want = Callable[[str, Iterable[str], Iterable[str]], None]  # type, names wanted too, names wanted no more


class Mesh:
    """See the head of this file. Call `restore`, then `connect`, then feed it."""

    def __init__(self, store: Store, committer: Committer, *, idle_seconds: float = IDLE_SECONDS,
                 demands: int = DEMANDS, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._committer = committer
        self._idle = idle_seconds
        self._bound = demands
        self._clock = clock
        self.tree = Tree()
        self._used: OrderedDict[str, float] = OrderedDict()  # destination -> last use, oldest first
        self._hosts: dict[str, set[str]] = {}  # host -> destinations
        self._want: Want = lambda _, __, ___: None
        self.misses = 0

    def connect(self, want: Want) -> None:
        """From now on subscriptions go to `want`."""
        self._want = want
        for type_url, names in self.tree.wanted().items():
            want(type_url, names, ())

    # -- from the control plane -------------------------------------------------------------------------------------

    def apply(self, update: Update) -> Awaitable[Mapping[str, str]]:
        """Take an update over; the result is done when the rest is in force and says which names were refused."""
        rejected: dict[str, str] = {}
        for name in update.removed:
            self._remove(update.type_url, name)
        for resource in update.changed:
            reason = self._put(resource.type_url, resource.name, resource.version, resource.body)
            if reason is not None:
                rejected[resource.name] = reason
        self._publish()
        return self._in_force(update, rejected, self._committer.in_force())

    def _in_force(self, update: Update, rejected: dict[str, str], commit: asyncio.Future[Refusals]
                  ) -> Awaitable[Mapping[str, str]]:
        async def wait() -> Mapping[str, str]:
            refused = await commit
            blamed = {resource.name: reason for resource in update.changed
                      if (reason := _blame(update.type_url, resource.name, refused)) is not None}
            for name in blamed:  # what is not in force is not to be restored by the next agent
                self._store.let_go(update.type_url, name)
            if blamed:
                self._committer.nudge()
            return {**blamed, **rejected}
        return asyncio.ensure_future(wait())

    def _put(self, type_url: str, name: str, version: str, body: bytes) -> str | None:
        """Take one resource over. Returns why not, in words."""
        try:
            value = decode(type_url, name, body)
        except Refused as error:
            return str(error)
        match value:
            case Workload():
                reason = self._store.put_workload(value)
            case Service():
                reason = self._store.put_service(value)
            case Policy():
                self._store.put_policy(value)
                reason = None
            case ListenerPart() | RoutePart() | ClusterPart() | EndpointsPart():
                self.tree.put(TypeUrl(type_url), name, value)
                reason = None
        if reason is None:
            self._store.hold(type_url, name, version, body)
        return reason

    def _remove(self, type_url: str, name: str) -> None:
        self._store.let_go(type_url, name)
        if type_url == TypeUrl.AUTHORIZATION:
            self._store.remove_policy(name)
        elif type_url != TypeUrl.ADDRESS:
            self.tree.remove(TypeUrl(type_url), name)
        elif name in self._store.services:
            self._store.remove_service(name)
        else:
            self._store.remove_workload(name)

    # -- from the workers -------------------------------------------------------------------------------------------

    def miss(self, key: str) -> None:
        """A connection waits for this destination. Workers ask again each second while it does."""
        self.misses += 1
        try:
            parse_destination_key(key)
        except ValueError as error:
            log.error("a worker asked for a destination that cannot be", extra={"reason": str(error)})
            return
        if key in self._used:
            self._touch(key)
            return
        while len(self._used) >= self._bound:
            oldest = next(iter(self._used))
            log.warning("more destinations in use than the bound; the least recently used is dropped",
                        extra={"destination": oldest, "bound": self._bound})
            self._drop(oldest)
        self._demand(key)
        self._publish()
        self._committer.nudge()

    def used(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Client namespace and host of a service between which there was traffic since the last call."""
        for namespace, host in pairs:
            scope = f"ns={namespace}|"
            for key in self._hosts.get(host, ()):
                if key.startswith(scope):
                    self._touch(key)

    def sweep(self) -> None:
        """Drop destinations that are idle, and what went long ago. Call it now and then."""
        now = self._clock()
        idle = []
        for key, last in self._used.items():
            if now - last < self._idle:
                break
            idle.append(key)
        for key in idle:
            log.info("destination is idle; dropped", extra={"destination": key})
            self._drop(key)
        if idle:
            self._publish()
        self._store.sweep()
        self._committer.nudge()

    # -- start ------------------------------------------------------------------------------------------------------

    def restore(self, entries: Sequence[blobs.Put]) -> dict[str, dict[str, str]]:
        """Take over what an earlier agent left in the keeper. Returns the versions held by type."""
        for complaint in self._store.restore_notes(
                (one.key, one.payload) for one in entries if one.kind == Table.NOTE):
            log.warning("restore: %s", complaint)
        versions: dict[str, dict[str, str]] = {url: {} for url in TypeUrl}
        for one in entries:
            if one.kind != Table.RESOURCE:
                continue
            try:
                type_url, name, version, body = blobs.decode_resource(one)
                reason = self._put(type_url, name, version, body)
            except ValueError as error:
                log.warning("restore: a resource of an earlier agent is not readable; the control plane sends it again",
                            extra={"resource": one.key, "reason": str(error)})
                continue
            if reason is None:
                versions[type_url][name] = version
            else:
                log.warning("restore: a resource is refused", extra={"resource": name, "reason": reason})
        for key in sorted(self._store.notes.destinations):
            try:
                self._demand(key)
            except ValueError as error:
                log.warning("restore: %s", error)
                self._store.notes.forget(key)
        self._publish()
        for type_url, name in self.tree.unused():
            self._store.let_go(type_url, name)
            versions[type_url].pop(name, None)
        return versions

    def incomplete(self) -> list[str]:
        """Destinations asked for that could not be put together (yet)."""
        return [key for key in self.tree if self.tree.published(key) is None]

    # -- inside -----------------------------------------------------------------------------------------------------

    def _demand(self, key: str) -> None:
        self.tree.demand(key)
        self._store.notes.use(key)
        self._used[key] = self._clock()
        self._hosts.setdefault(_host(key), set()).add(key)

    def _drop(self, key: str) -> None:
        self.tree.drop(key)
        self._store.notes.forget(key)
        del self._used[key]
        keys = self._hosts[_host(key)]
        keys.discard(key)
        if not keys:
            del self._hosts[_host(key)]

    def _touch(self, key: str) -> None:
        self._used[key] = self._clock()
        self._used.move_to_end(key)

    def _publish(self) -> None:
        found = self.tree.publish()
        self._store.publish(found.destinations, found.clusters, found.dropped_destinations, found.dropped_clusters)
        for type_url, name in found.unsubscribe:
            self._store.let_go(type_url, name)
        for type_url in NAMED:
            more = [name for kind, name in found.subscribe if kind is type_url]
            less = [name for kind, name in found.unsubscribe if kind is type_url]
            if more or less:
                self._want(type_url, more, less)


def _host(key: str) -> str:
    return key.partition("|")[2].rpartition(":")[0]


_BLAMES: dict[str, tuple[Table, ...]] = {
    TypeUrl.LISTENER: (Table.DESTINATION,),
    TypeUrl.ROUTE: (Table.DESTINATION,),
    TypeUrl.CLUSTER: (Table.CLUSTER,),
    TypeUrl.ENDPOINTS: (Table.CLUSTER,),
}


def _blame(type_url: str, name: str, refused: Mapping[Key, str]) -> str | None:
    """The reason if an entry made of this resource was refused by the data path."""
    if not refused:
        return None
    if type_url == TypeUrl.ADDRESS:
        return refused.get((Table.WORKLOAD, name)) or refused.get((Table.SERVICE, name))
    if type_url == TypeUrl.AUTHORIZATION:
        return refused.get((Table.POLICY, name))
    scope, short = parse_xdstp(TypeUrl(type_url), name)
    for table in _BLAMES.get(type_url, ()):
        if reason := refused.get((table, f"{scope}|{short}")):
            return f"the data path refuses it: {reason}"
    return None
