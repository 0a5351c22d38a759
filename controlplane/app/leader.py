"""Who of several replicas writes: a Lease (coordination.k8s.io/v1), by the rules and durations of client-go's leader election.

    get --absent--> create ------------------------------> leading until RENEW_SECONDS after this try began
     |                                                          ^
     +--ours, given up, or unchanged for its duration--> update -+     (by resourceVersion: of two who try, one gets a Conflict)
     +--another's, and changed since we looked--> wait

Theory. A holder changes its Lease every RETRY_SECONDS and stops writing RENEW_SECONDS after its last change began; others take it only when
they have not seen it change for LEASE_SECONDS on their own clock (which goes on while a machine sleeps). Times of other machines are never
compared, so skew does not matter; that clocks run at one speed, within a third, does. What it does not give: the API server does not look
at the Lease when it takes another write, so one that was sent in time and is held up for LEASE_SECONDS - RENEW_SECONDS on the way, or by a
process that is stopped between its look at `leading` and its send, may come after the next leader's. What is written under it must bear
that.
"""
from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from protos.kubernetes.client import Client
from protos.kubernetes.errors import ApiError, Conflict, NotFound
from protos.kubernetes.resources import LEASES

LEASE_SECONDS, RENEW_SECONDS, RETRY_SECONDS = 15.0, 10.0, 2.0  # client-go's defaults
WRITE_SECONDS = 4.0  # of one write of a leader; below LEASE_SECONDS - RENEW_SECONDS

log = logging.getLogger("narrows.controlplane")


def _now() -> float:
    """s, also while the machine sleeps: others' time goes on then."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Election:
    """`run` until cancelled, then `release`. `identity` is this process's alone."""

    def __init__(self, client: Client, namespace: str, name: str, identity: str, clock: Callable[[], float] = _now) -> None:
        self.identity = identity
        self.holder = ""  # as far as is known
        self.problem = ""
        self._client, self._namespace, self._name, self._clock = client, namespace, name, clock
        self._until = float("-inf")
        self._seen: tuple[object, ...] | None = None
        self._seen_at = 0.0
        self._told = False

    @property
    def leading(self) -> bool:
        """Whether this process may begin a write, now."""
        return self._clock() < self._until

    async def run(self) -> None:
        while True:
            await self.attempt()
            await asyncio.sleep(RETRY_SECONDS * (1.0 if self.leading else 1.0 + 0.2 * random.random()))

    async def attempt(self) -> None:
        """Take or renew it, if that may be."""
        begin = self._clock()
        try:
            async with asyncio.timeout(RENEW_SECONDS / 2):
                if await self._take():
                    self._until = begin + RENEW_SECONDS
            self.problem = ""
        except Conflict:
            pass  # another was first; what it wrote is looked at next time
        except (ApiError, TimeoutError) as error:
            why = str(error) or "no answer in time"
            if why != self.problem:
                self.problem = why
                log.warning("the leader's Lease cannot be read or written", extra={"lease": self._lease, "reason": why})
        self._tell()

    async def release(self) -> None:
        """Give it up, at a clean end: the next one need not wait. Nothing is written by this process after that."""
        if not self.leading:
            return
        self._until = float("-inf")
        try:
            async with asyncio.timeout(RETRY_SECONDS):
                found: dict[str, Any] = await self._client.get(LEASES, self._name, self._namespace)
                if (found.get("spec") or {}).get("holderIdentity") == self.identity:
                    await self._client.update(LEASES, {**found, "spec": {**found["spec"], "holderIdentity": "", "leaseDurationSeconds": 1,
                                                                         "renewTime": _micro()}})
        except (ApiError, TimeoutError) as error:
            log.warning("the leader's Lease was not given up; it ends by itself", extra={"lease": self._lease, "reason": str(error)})
        self._tell()

    # -- inside -----------------------------------------------------------------------------------------------------

    @property
    def _lease(self) -> str:
        return f"{self._namespace}/{self._name}"

    async def _take(self) -> bool:
        """Whether it is ours now. Raises ApiError."""
        now = _micro()
        fresh: dict[str, Any] = {"holderIdentity": self.identity, "leaseDurationSeconds": int(LEASE_SECONDS), "renewTime": now}
        try:
            found: dict[str, Any] = await self._client.get(LEASES, self._name, self._namespace)
        except NotFound:
            body = {"metadata": {"name": self._name, "namespace": self._namespace}, "spec": {**fresh, "acquireTime": now,
                                                                                             "leaseTransitions": 0}}
            await self._client.create(LEASES, body, self._namespace)
            self.holder = self.identity
            return True
        spec = found.get("spec") or {}
        holder = spec.get("holderIdentity") or ""
        if self._seen != (seen := (holder, spec.get("renewTime"), spec.get("leaseTransitions"), found["metadata"].get("uid"))):
            self._seen, self._seen_at, self.holder = seen, self._clock(), holder
        if holder not in ("", self.identity) and self._clock() < self._seen_at + (spec.get("leaseDurationSeconds") or LEASE_SECONDS):
            return False
        if holder != self.identity:
            fresh |= {"acquireTime": now, "leaseTransitions": (spec.get("leaseTransitions") or 0) + 1}
        await self._client.update(LEASES, {**found, "spec": {**spec, **fresh}})
        self.holder = self.identity
        return True

    def _tell(self) -> None:
        if self.leading is not self._told:
            self._told = self.leading
            log.info("this replica leads" if self._told else "this replica does not lead any more",
                     extra={"lease": self._lease, "identity": self.identity})


def _micro() -> str:
    """MicroTime (meta/v1)."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
