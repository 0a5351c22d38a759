"""Tells Kubernetes what became of this node's pods: two annotations on a pod, and events.

    narrows.mesh/status                  {"captured":true,"method":"iptables"} or {"captured":false,"reason":"..."}, JSON
    ambient.istio.io/redirection         "enabled" while it is captured: what makes Istio's control plane tell others to tunnel to it

A pod that does not ask for capture has neither. Nothing here is on the way of a capture: what cannot be told is told later, or is not.
"""
from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from agent.app.events import Events
from agent.app.tracked import State, Tracked
from agent.workloads.cluster import REDIRECTION, STATUS
from agent.workloads.enrol import asks
from protos.kubernetes.client import Client
from protos.kubernetes.errors import ApiError, BadRequest, Conflict, Forbidden, NotFound
from protos.kubernetes.resources import PODS

LOOK_SECONDS = 0.5
AGAIN_FIRST, AGAIN_LAST = 1.0, 300.0  # seconds between two patches of one pod, doubling: somebody may undo each of them
CALM_SECONDS = 60.0  # without a difference, after which it begins anew
PAUSE_FIRST, PAUSE_LAST = 1.0, 60.0  # seconds without any request after a failure that is not of one object
PATCHES = 50  # in one look, one after the other
REASON_LIMIT = 256  # characters
TOLD = {"Captured": "Capture", "Released": "Release", "Repaired": "Repair", "AnnotationRefused": "Capture", "CaptureFailed": "Capture",
        "CaptureFallback": "Capture", "DnsUnavailable": "Capture"}  # kinds of events about pods that are told, and the action of each
EVENTS_BURST, EVENTS_SECONDS = 25, 1.0  # at once; seconds for one more
SAME_SECONDS = 300.0  # until the same kind about the same pod is told again
WAITING = 256  # events
CONTROLLER = "narrows.mesh/agent"

log = logging.getLogger("narrows.report")


def outcome(one: Tracked) -> dict[str, str] | None:
    """The annotations that a pod should have; None while that is not decided."""
    pod = one.pod
    if one.deleted or one.state in (State.NEW, State.GONE) or pod.waits:
        return None
    if one.state is State.CAPTURED:
        said: dict[str, Any] = {"captured": True}
        if one.way is not None:
            said["method"] = one.way.name
        return {STATUS: json.dumps(said, separators=(",", ":")), REDIRECTION: "enabled"}
    if pod.ended or not asks(pod):
        return {}
    if not one.final:
        return None
    return {STATUS: json.dumps({"captured": False, "reason": one.reason[:REASON_LIMIT]}, separators=(",", ":"))}


@dataclass(slots=True)
class _Sent:
    due: float
    delay: float = field(default_factory=lambda: AGAIN_FIRST)


class Report:
    """`written`: our annotations by the uid of a pod, as the API server has them. `run` never ends by itself."""

    def __init__(self, client: Client, node: str, tracked: Callable[[], Iterable[Tracked]],
                 written: Callable[[], Mapping[str, dict[str, str]]], events: Events) -> None:
        self._client, self._node, self._tracked, self._written, self._events = client, node, tracked, written, events
        self._sent: dict[str, _Sent] = {}
        self._number = 0  # of the last event that was looked at
        self._waiting: deque[tuple[dict[str, str], dict[str, Any]]] = deque(maxlen=WAITING)
        self._last: dict[tuple[str, str], float] = {}
        self._tokens, self._filled = float(EVENTS_BURST), time.monotonic()
        self._paused, self._pause = 0.0, PAUSE_FIRST

    async def run(self) -> None:
        while True:
            try:
                await self.look()
            except Exception:
                log.exception("a fault of ours while telling Kubernetes what became of pods")
            await asyncio.sleep(LOOK_SECONDS)

    async def look(self) -> None:
        """Tell what is not told yet."""
        tracked, written = list(self._tracked()), self._written()
        self._gather(tracked, written)
        if time.monotonic() < self._paused:
            return
        try:
            await self._annotate(tracked, written)
            await self._tell()
        except ApiError as error:
            self._failed(error)
        else:
            self._pause = PAUSE_FIRST

    # -- annotations ------------------------------------------------------------------------------------------------

    async def _annotate(self, tracked: list[Tracked], written: Mapping[str, dict[str, str]]) -> None:
        """Raises ApiError for what is not the fault of one pod."""
        patches = 0
        for one in tracked:
            uid, wish = one.pod.uid, outcome(one)
            have, sent, now = written.get(uid), self._sent.get(uid), time.monotonic()
            if wish is None or have is None:
                continue
            if have == wish:
                if sent is not None and now > sent.due + CALM_SECONDS:
                    del self._sent[uid]
                continue
            if patches >= PATCHES or (sent is not None and now < sent.due):
                continue
            patches += 1
            sent = self._sent.setdefault(uid, _Sent(0.0))
            sent.due, sent.delay = now + sent.delay, min(sent.delay * 2, AGAIN_LAST)
            change = {name: wish.get(name) for name in (STATUS, REDIRECTION) if wish.get(name) != have.get(name)}
            try:
                # the uid: a pod that was made again under the name is another, and refused (422: a uid does not change). By pods/status,
                # which takes annotations too: who may patch pods may change what every node runs
                body = {"metadata": {"uid": uid, "annotations": change}}
                await self._client.merge(PODS, one.pod.name, one.pod.namespace, body, subresource="status")
            except (BadRequest, Conflict, NotFound) as error:
                log.info("a pod is not told what became of it: %s", error, extra={"about": one.about})
        for uid in self._sent.keys() - written.keys():
            del self._sent[uid]

    # -- events -----------------------------------------------------------------------------------------------------

    def _gather(self, tracked: list[Tracked], written: Mapping[str, dict[str, str]]) -> None:
        """Take what happened since the last look, as far as it is news to who reads the pod."""
        pods, now = {one.about: one.pod for one in tracked}, time.monotonic()
        for event in self._events.since(self._number):
            self._number = event["number"]
            pod = pods.get(event["about"])
            if pod is None or event["kind"] not in TOLD:
                continue
            if event["kind"] == "Captured" and REDIRECTION in written.get(pod.uid, {}):
                continue  # it was already, by the agent before this one
            key = (pod.uid, event["kind"])
            if key in self._last and now - self._last[key] < SAME_SECONDS:
                continue
            self._last[key] = now
            self._waiting.append(({"apiVersion": "v1", "kind": "Pod", "name": pod.name, "namespace": pod.namespace, "uid": pod.uid}, event))
        self._last = {key: at for key, at in self._last.items() if now - at < SAME_SECONDS}

    async def _tell(self) -> None:
        """Raises ApiError; what was not told is told after the pause."""
        now = time.monotonic()
        self._tokens = min(EVENTS_BURST, self._tokens + (now - self._filled) / EVENTS_SECONDS)
        self._filled = now
        while self._waiting and self._tokens >= 1:
            regarding, event = self._waiting[0]
            self._tokens -= 1
            try:
                await self._client.tell(regarding, reason=event["kind"], note=event["message"], action=TOLD[event["kind"]],
                                        controller=CONTROLLER, instance=self._node, warning=event["warning"])
            except (Conflict, NotFound) as error:  # its namespace has gone
                log.info("an event is not told: %s", error, extra={"about": event["about"]})
            except Forbidden:
                self._waiting.popleft()  # of a namespace that ends, or RBAC: no second try
                raise
            self._waiting.popleft()

    def _failed(self, error: ApiError) -> None:
        wait = max(self._pause, error.retry_after or 0.0)
        self._paused, self._pause = time.monotonic() + wait, min(self._pause * 2, PAUSE_LAST)
        self._events.add("ReportFailed", "report", f"what became of pods is not told to Kubernetes: {error}; it is tried again",
                         warning=True)
