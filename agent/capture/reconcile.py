"""Brings a pod's namespace to its plan and back: read, diff, apply, verify, each in order and within a deadline.

Rules and routes are made here over netlink (they do nothing until a packet is marked); the tables in a child, so that
neither libiptc nor a hang in it is in the agent. Work on one namespace is never concurrent with itself.
"""
from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from agent import netlink
from agent.capture.helper import CHILDREN, DEADLINE, HelperError, Helpers
from agent.capture.plan import Plan, chain_prefix
from agent.capture.plan import plan as plan_of
from agent.capture.rules import CHAIN_PREFIX, Table
from agent.model.pod import CaptureSettings
from agent.netlink import NetlinkError

T = TypeVar("T")

BACKENDS = ("auto", "iptables", "nftables")
MARK_TABLES, REDIRECT_TABLES = ("mangle", "filter", "raw"), ("nat",)
SAMPLE = plan_of(CaptureSettings(exclude_outbound_ports=(1,)), (4,), "probe")


class CaptureError(Exception):
    """Capture of one pod could not be brought to its plan. The text names namespace, object and likely cause."""


@dataclass(frozen=True, slots=True)
class Backend:
    """`iptables` (legacy tables) or `nftables`, and why."""

    name: str
    reason: str


def choose(lacks: Mapping[str, str]) -> Backend:
    """Of what each backend lacks ("" for nothing). iptables first: it is what other programs in pods use and look at."""
    if not lacks["iptables"]:
        return Backend("iptables", "the kernel has the legacy tables")
    if not lacks["nftables"]:
        return Backend("nftables", f"no legacy tables ({lacks['iptables']})")
    raise CaptureError(f"neither iptables nor nftables works here: {lacks['iptables']}; {lacks['nftables']}")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was done. `changed` names what was written (empty: everything was in place); `seconds` is the duration."""

    changed: tuple[str, ...]
    seconds: float


class Reconciler:
    """Capture of the pods of one instance. Safe to call for many pods at once; each call may raise CaptureError.

    Without an instance it means the chains of all of them: for looking and removing, not for `apply`.
    """

    def __init__(self, instance: str | None, *, backend: str = "auto", children: int = CHILDREN,
                 deadline: float = DEADLINE) -> None:
        self._prefix = CHAIN_PREFIX if instance is None else chain_prefix(instance)
        self._helpers = Helpers(children=children, deadline=deadline)
        self._asked = backend
        self._chosen: Backend | None = None
        self._choosing = asyncio.Lock()
        self._busy: dict[tuple[int, int], tuple[asyncio.Lock, int]] = {}

    async def backend(self) -> Backend:
        """What rules are written with, found out once by writing a plan in a namespace made for that. Raises CaptureError."""
        async with self._choosing:
            if self._chosen is None:
                if self._asked == "auto":
                    try:
                        lacks = await self._helpers.ask(None, {"action": "probe", "prefix": "", "tables": SAMPLE.tables})
                    except HelperError as error:
                        raise CaptureError(str(error)) from error
                    self._chosen = choose(lacks)
                else:
                    self._chosen = Backend(self._asked, "as asked by --capture")
            return self._chosen

    @property
    def chosen(self) -> Backend | None:
        """The same without finding it out."""
        return self._chosen

    def close(self) -> None:
        """End the children that wait for work."""
        self._helpers.close()

    async def apply(self, namespace: str, plan: Plan) -> Outcome:
        """Bring the namespace to the plan and verify it. Twice is a no-op. On an error no connection is redirected."""
        if plan.prefix != self._prefix:
            raise ValueError(f"the plan is of instance {plan.instance!r}, not of this one")
        started = time.monotonic()
        async with self._namespace(namespace) as fd:
            changed = await _blocking(lambda: _add_ways(fd, plan))
            try:
                changed += await self._tables(fd, namespace, "apply", plan.tables)
            except CaptureError as error:
                raise CaptureError(f"{error}; {await self._take_back(fd, namespace)}") from error
        return Outcome(tuple(changed), time.monotonic() - started)

    async def repair(self, namespace: str, plan: Plan, still: Callable[[], bool] = lambda: True) -> tuple[str, ...]:
        """What was not as planned and now is again; empty when all was well. On an error no connection is redirected.

        `still` is asked when the namespace is ours alone, whether the plan is still the one: nothing is done if not.
        """
        async with self._namespace(namespace) as fd:
            if not still():
                return ()
            missing = [f"{text} is missing" for text in await _blocking(lambda: _add_ways(fd, plan))]
            try:
                return tuple(missing + await self._tables(fd, namespace, "repair", plan.tables))
            except CaptureError as error:
                raise CaptureError(f"{error}; {await self._take_back(fd, namespace)}") from error

    async def verify(self, namespace: str, plan: Plan) -> tuple[str, ...]:
        """How the namespace differs from the plan; empty when it does not. Changes nothing."""
        async with self._namespace(namespace) as fd:
            return tuple(await self._verify(fd, namespace, plan))

    async def release(self, namespace: str) -> Outcome:
        """Un-enrol, first step: new connections go past us; live ones keep what they need until `remove`."""
        started = time.monotonic()
        async with self._namespace(namespace) as fd:
            changed = await self._tables(fd, namespace, "remove", names=REDIRECT_TABLES)
        return Outcome(tuple(changed), time.monotonic() - started)

    async def remove(self, namespace: str) -> Outcome:
        """Remove everything of this instance. Connections it took on end with it: `release` first, then wait."""
        started = time.monotonic()
        async with self._namespace(namespace) as fd:
            changed = await self._tables(fd, namespace, "remove", names=REDIRECT_TABLES + MARK_TABLES)
            left = await self._chains(fd, namespace, CHAIN_PREFIX)
            if not any("mangle" in label for label in left):  # another instance's marks would need the same ways
                changed += await _blocking(lambda: _delete_ways(fd))
        return Outcome(tuple(changed), time.monotonic() - started)

    async def chains(self, namespace: str) -> dict[str, list[str]]:
        """Chains of this instance by table, as the kernel has them."""
        async with self._namespace(namespace) as fd:
            return await self._chains(fd, namespace, self._prefix)

    async def _verify(self, fd: int, namespace: str, plan: Plan) -> list[str]:
        missing = await _blocking(lambda: _missing_ways(fd, plan))
        return missing + await self._tables(fd, namespace, "verify", plan.tables)

    async def _chains(self, fd: int, namespace: str, prefix: str) -> dict[str, list[str]]:
        found: dict[str, list[str]] = await self._child(fd, namespace, "chains", prefix=prefix)
        return found

    async def _take_back(self, fd: int, namespace: str) -> str:
        """A pod with one family redirected and the other not would be half captured: after a failure none is."""
        try:
            await self._tables(fd, namespace, "remove", names=REDIRECT_TABLES)
        except CaptureError as error:
            return f"and its redirects could not be taken back: {error}; `narrows capture clean --netns {namespace}`"
        return "the pod is not captured"

    async def _tables(self, fd: int, namespace: str, action: str, tables: Sequence[Table] = (), *,
                      names: Sequence[str] = ()) -> list[str]:
        if not tables and not names:  # a plan without: what an earlier one left for its connections stays until `remove`
            return []
        done: list[str] = await self._child(fd, namespace, action, prefix=self._prefix, tables=tables, names=names)
        return done

    async def _child(self, fd: int, namespace: str, action: str, *, prefix: str, tables: Sequence[Table] = (),
                     names: Sequence[str] = ()) -> Any:
        backend = (await self.backend()).name if tables else ""
        order = {"action": action, "prefix": prefix, "tables": tables, "names": names, "backend": backend}
        try:
            return await self._helpers.ask(fd, order)
        except HelperError as error:
            raise CaptureError(f"namespace {namespace}: {error}") from error

    @asynccontextmanager
    async def _namespace(self, path: str) -> AsyncIterator[int]:
        """The namespace, opened and ours alone until the end of the block."""
        try:
            fd = netlink.open_namespace(path)
        except NetlinkError as error:
            raise CaptureError(str(error)) from error
        try:
            key = netlink.namespace_id(fd)
            lock, users = self._busy.get(key, (asyncio.Lock(), 0))
            self._busy[key] = (lock, users + 1)
            try:
                async with lock:
                    yield fd
            except NetlinkError as error:
                raise CaptureError(f"namespace {path}: {error}") from error
            finally:
                lock, users = self._busy.pop(key)
                if users > 1:
                    self._busy[key] = (lock, users - 1)
        finally:
            os.close(fd)


async def _blocking(work: Callable[[], T]) -> T:
    return await asyncio.to_thread(work)


def _missing_ways(namespace: int, plan: Plan) -> list[str]:
    present = [rule for family in {rule.family for rule in plan.rules} for rule in netlink.rules(namespace, family)]
    routes = netlink.routes(namespace, plan.routes[0].table)
    missing: list[netlink.Route | netlink.Rule] = [rule for rule in plan.rules if rule not in present]
    missing += [route for route in plan.routes if route not in routes]
    return [f"{_named(way)} is missing" for way in missing]


def _add_ways(namespace: int, plan: Plan) -> list[str]:
    return [_named(way) for way in netlink.add_missing(namespace, plan.routes, plan.rules)]


def _named(way: netlink.Route | netlink.Rule) -> str:
    if isinstance(way, netlink.Rule):
        return f"IPv{way.family} rule {way.priority} (fwmark {hex(way.mark)}/{hex(way.mask)}, table {way.table})"
    return f"route {way.type} {way.destination} dev {way.link} table {way.table}"


def _delete_ways(namespace: int) -> list[str]:
    whole = plan_of(CaptureSettings(), (4, 6), "")
    routes = netlink.routes(namespace, whole.routes[0].table)
    gone = []
    for rule in whole.rules:
        if rule in netlink.rules(namespace, rule.family):
            netlink.delete_rule(namespace, rule)
            gone.append(f"IPv{rule.family} rule {rule.priority}")
    for route in whole.routes:
        if route in routes:
            netlink.delete_route(namespace, route.destination, link=route.link, table=route.table, type=route.type)
            gone.append(f"route {route.destination} table {route.table}")
    return gone
