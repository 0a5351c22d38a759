"""Kubernetes' API server -> changes of objects, beside `folder`: one reflector a kind, and what is refused keeps its last good version.

A kind that cannot be followed (no right to list it, its definition gone) keeps what is known of it, says so among the problems, and holds
up no other. Istio's kinds may be absent.
"""
from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from controlplane.model.mesh import Object
from controlplane.model.problems import ObjectKey, Place, Problem, Severity, error
from controlplane.sources.folder import KEPT, Changes
from controlplane.sources.follow_endpoints import EndpointsFollower
from controlplane.sources.kinds import CLUSTER_KINDS, read
from controlplane.sources.text import DEPTH_BOUND, Items, Map
from protos.kubernetes import resources
from protos.kubernetes.client import Client
from protos.kubernetes.follow import Follower
from protos.kubernetes.objects import Key
from protos.kubernetes.reflector import Batch, State
from protos.kubernetes.resources import Resource

ALWAYS = (resources.NAMESPACES, resources.NODES, resources.SERVICE_ACCOUNTS, resources.SERVICES, resources.PODS)
OPTIONAL = (resources.VIRTUAL_SERVICES, resources.DESTINATION_RULES, resources.PEER_AUTHENTICATIONS, resources.AUTHORIZATION_POLICIES)
FILE = "kubernetes"  # stands where a problem of a file has the file's name
QUIET = 0.01  # s without a change before changes are handed over, and
LONGEST = 0.1  # s after which they are all the same; as `watch` does for files
ACCEPTED = "narrows.mesh/Accepted"  # the type of our condition in a status
Body = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Mark:
    """An object of Istio's as the API server has it: `status` is what of its status is ours; empty: nothing."""

    resource: Resource
    status: Body


class Cluster:
    """`run` until cancelled; after each `changes`, `refresh` gives what differs. Nothing is given before every kind was listed once:
    half a cluster would take from agents what they have."""

    def __init__(self, client: Client) -> None:
        self._followers: list[Follower[Body] | EndpointsFollower] = [
            *(Follower(client, one, Body, partial(self._take, one), optional=one in OPTIONAL) for one in ALWAYS + OPTIONAL),
            EndpointsFollower(client, self._take)]
        self._pending: dict[ObjectKey, tuple[Resource, Body | None]] = {}
        self._current: dict[ObjectKey, Object] = {}
        self._refused: dict[ObjectKey, list[Problem]] = {}
        self.marks: dict[ObjectKey, Mark] = {}
        self._event = asyncio.Event()
        self._told: list[Problem] = []

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for one in self._followers:
                group.create_task(one.run(), name=f"follow {one.resource.kind}")
            group.create_task(self._look(), name="look at followers")

    def states(self) -> list[tuple[str, State]]:
        """Of each kind, by its name."""
        return [(one.resource.kind, one.state()) for one in self._followers]

    @property
    def synced(self) -> bool:
        return all(one.state().synced for one in self._followers)

    async def changes(self) -> None:
        """Returns when there is something to `refresh`: objects, or other problems than before."""
        await self._event.wait()
        loop = asyncio.get_running_loop()
        latest = loop.time() + LONGEST
        while self._event.is_set() and loop.time() < latest:
            self._event.clear()
            await asyncio.sleep(QUIET)
        self._event.clear()

    def refresh(self) -> Changes:
        changes = Changes()
        if not self.synced:
            return changes
        pending, self._pending = self._pending, {}
        for key, (resource, body) in sorted(pending.items()):
            if body is None:
                self._refused.pop(key, None)
                self.marks.pop(key, None)
                if self._current.pop(key, None) is not None:
                    changes.deletes.append(key)
                continue
            changes.documents += 1
            self._read(key, resource, body, changes)
        return changes

    def problems(self) -> list[Problem]:
        """What is wrong with single objects, and the kinds that are not followed."""
        return sorted([one for found in self._refused.values() for one in found] + self._stale())

    # -- inside -----------------------------------------------------------------------------------------------------

    def _take(self, resource: Resource, batch: Batch[Body]) -> None:
        for key in batch.deletes:
            self._pending[_named(resource, key)] = (resource, None)
        for key, body in batch.puts.items():
            self._pending[_named(resource, key)] = (resource, body)
        self._event.set()

    def _read(self, key: ObjectKey, resource: Resource, body: Body, changes: Changes) -> None:
        # items of typed lists come without kind and apiVersion; a status is no configuration, and managedFields are large
        body = {**body, "kind": resource.kind, "apiVersion": resource.api_version,
                "metadata": {name: value for name, value in body["metadata"].items() if name != "managedFields"}}
        if resource in OPTIONAL:
            self.marks[key] = Mark(resource, _ours(body.pop("status", None)))
        try:
            found = read(FILE, as_map(body), CLUSTER_KINDS)
        except RecursionError:
            self._refused[key] = [error(Place(FILE), str(key), f"nested deeper than {DEPTH_BOUND} levels", KEPT)]
            return
        problems = list(found.problems)
        if found.object is None and key in self._current:
            problems = [replace(one, hint=f"{one.hint}; {KEPT}" if one.hint else KEPT) if one.severity is Severity.ERROR else one
                        for one in problems]
        if problems:
            self._refused[key] = problems
        else:
            self._refused.pop(key, None)
        if found.object is not None and found.object != self._current.get(key):
            self._current[key] = found.object
            changes.puts.append(found.object)

    def _stale(self) -> list[Problem]:
        found = []
        for one in self._followers:
            state, kind = one.state(), one.resource.kind
            if state.stale_since is not None and state.failures:
                found.append(Problem(Place(FILE), kind, Severity.WARNING, f"is not followed: {state.reason}",
                                     "what was known stays in force"))
            found += [error(Place(FILE), str(_named(one.resource, key)), why, KEPT) for key, why in state.unreadable.items()]
            if state.unnamed:
                found.append(error(Place(FILE), kind, f"{state.unnamed} of its objects could not be read",
                                   "look for objects without a name, or larger than an API server allows"))
        return found

    async def _look(self) -> None:
        """Kinds become stale without a change of objects."""
        while True:
            await asyncio.sleep(1.0)
            if (now := self._stale()) != self._told:
                self._told = now
                self._event.set()


class Together:
    """Sources side by side: an object that two of them have is that of the lower rank, until that one gives it up."""

    def __init__(self) -> None:
        self._held: dict[ObjectKey, dict[int, Object]] = {}
        self._twice: set[ObjectKey] = set()

    def take(self, rank: int, changes: Changes) -> Changes:
        """What differs for all of them when this differs for one."""
        found = Changes(documents=changes.documents)
        for key, one in [*((one.meta.key, one) for one in changes.puts), *((key, None) for key in changes.deletes)]:
            held = self._held.setdefault(key, {})
            before = held[min(held)] if held else None
            held.pop(rank, None) if one is None else held.update({rank: one})
            after = held[min(held)] if held else None
            (self._twice.add if len(held) > 1 else self._twice.discard)(key)
            if not held:
                del self._held[key]
            if after is None:
                found.deletes.append(key)
            elif after != before:
                found.puts.append(after)
        return found

    def problems(self, names: tuple[str, ...]) -> list[Problem]:
        return [Problem(held[rank].meta.place, str(key), Severity.WARNING, f"is also in {names[min(held)]}, whose version is in force",
                        "remove one of them")
                for key in self._twice for held in (self._held[key],) for rank in held if rank != min(held)]


def _ours(status: object) -> Body:
    conditions = status.get("conditions") if isinstance(status, dict) else None
    found = [one for one in conditions if isinstance(one, dict) and one.get("type") == ACCEPTED] if isinstance(conditions, list) else []
    return {"conditions": found, "validationMessages": status.get("validationMessages") or []} if found and isinstance(status, dict) else {}


def _named(resource: Resource, key: Key) -> ObjectKey:
    return ObjectKey(resource.kind, key.namespace, key.name)


def as_map(value: Body, depth: int = 0) -> Map:
    """JSON as `text.documents` gives YAML; nothing has a line. Raises RecursionError beyond DEPTH_BOUND."""
    found = Map()
    for key, one in value.items():
        found[key] = _value(one, depth + 1)
    return found


def _value(value: Any, depth: int) -> Any:
    if depth > DEPTH_BOUND:
        raise RecursionError
    if isinstance(value, dict):
        return as_map(value, depth)
    if isinstance(value, list):
        items = Items()
        for one in value:
            items.append(_value(one, depth + 1))
            items.lines.append(0)
        return items
    return value


