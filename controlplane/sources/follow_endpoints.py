"""Endpoints by the newest of three resources that the server has: EndpointSlice v1, its v1beta1 (gone since Kubernetes 1.25), Endpoints.

    ASK which are served ---answer---> FOLLOW the first of them ---it is served no more---> ASK
     ^ failure: again in RETRY_SECONDS                    |
     +---- nobody is told of what is not listed yet ------+

What was known stays until the next one was listed whole, and what is missing from that is deleted then. A server that refuses us one of
them (403) is no reason to follow an older one: that would be other endpoints, in silence.
"""
from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from protos.kubernetes import resources
from protos.kubernetes.client import Client
from protos.kubernetes.errors import ApiError
from protos.kubernetes.follow import Follower
from protos.kubernetes.objects import Key
from protos.kubernetes.reflector import Batch, State
from protos.kubernetes.resources import Resource

CHOICES = (resources.ENDPOINT_SLICES, resources.ENDPOINT_SLICES_V1BETA1, resources.ENDPOINTS)  # the best first
RETRY_SECONDS = 2.0  # between two questions which are served, when there was no answer
LOOK_SECONDS = 2.0  # between looks whether the one that is followed fails, and so may be gone
Body = dict[str, Any]

log = logging.getLogger("narrows.controlplane")


class EndpointsFollower:
    """As `protos.kubernetes.follow.Follower`; `deliver` is told of which resource a batch is. `resource` is the one that is followed, or
    would be."""

    def __init__(self, client: Client, deliver: Callable[[Resource, Batch[Body]], None]) -> None:
        self._client, self._deliver = client, deliver
        self._known: dict[tuple[str, Key], Resource] = {}
        self._unseen: set[tuple[str, Key]] = set()  # known by the one before, and not told by this one yet
        self._synced = False
        self._since, self._failures, self._problem = time.monotonic(), 0, "not asked yet which endpoints are served"
        self._start(CHOICES[0])

    def state(self) -> State:
        found = self._follower.state()
        if not self._problem:
            return replace(found, synced=self._synced or found.synced, failures=found.failures + self._failures)
        return replace(found, synced=self._synced, stale_since=self._since, reason=self._problem, failures=found.failures + self._failures)

    async def run(self) -> None:
        while True:
            chosen = await self._choose()
            log.info("endpoints are followed", extra={"resource": str(chosen), "version": chosen.version})
            self._start(chosen)
            following = asyncio.create_task(self._follower.run(), name=f"follow {chosen}")
            try:
                await self._until_gone(following)
            finally:
                following.cancel()
                await asyncio.gather(following, return_exceptions=True)

    # -- inside -----------------------------------------------------------------------------------------------------

    def _start(self, resource: Resource) -> None:
        self.resource = resource
        self._unseen = set(self._known)
        self._follower: Follower[Body] = Follower(self._client, resource, Body, self._take)

    async def _choose(self) -> Resource:
        while True:
            try:
                for one in CHOICES:
                    if await self._client.serves(one):
                        self._problem = ""
                        return one
                self._fail("the server has neither EndpointSlices nor Endpoints")
            except ApiError as error:
                self._fail(str(error))
            await asyncio.sleep(RETRY_SECONDS)

    def _fail(self, why: str) -> None:
        if not self._problem:
            self._since = time.monotonic()
        self._failures += 1
        self._problem = why

    async def _until_gone(self, following: asyncio.Task[None]) -> None:
        """Returns when the server says that it has the resource no more; no answer is no such word."""
        while True:
            done, _ = await asyncio.wait({following}, timeout=LOOK_SECONDS)
            if done:
                following.result()  # it never returns: this raises
            state = self._follower.state()
            if state.stale_since is None or not state.failures:
                continue
            try:
                if not await self._client.serves(self.resource):
                    return
            except ApiError:
                continue  # the follower says the same

    def _take(self, batch: Batch[Body]) -> None:
        resource = self.resource
        told = {(resource.kind, key) for key in batch.puts}
        self._known.update(dict.fromkeys(told, resource))
        self._unseen -= told
        for key in batch.deletes:
            self._known.pop((resource.kind, key), None)
        self._deliver(resource, batch)
        if batch.synced:
            self._synced = True
            for kind, key in self._unseen:
                self._deliver(self._known.pop((kind, key)), Batch(deletes={key}))
            self._unseen = set()
