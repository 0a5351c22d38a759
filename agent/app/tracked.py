"""One pod of this node as the agent works on it: how far it is, and which steps are legal."""
from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from agent.app.commit import Refusals
from agent.app.method import Way
from agent.model.pod import CaptureSettings, LocalPod


class State(StrEnum):
    NEW = "new"  # no decision yet
    OUT = "out"  # not captured
    ENTERING = "entering"  # on the way in: nothing is redirected yet
    CAPTURED = "captured"
    LEAVING = "leaving"  # nothing is redirected any more, live connections finish
    GONE = "gone"


TRANSITIONS: dict[State, frozenset[State]] = {
    State.NEW: frozenset({State.OUT, State.ENTERING, State.GONE}),
    State.OUT: frozenset({State.ENTERING, State.GONE}),
    State.ENTERING: frozenset({State.CAPTURED, State.LEAVING, State.OUT, State.GONE}),
    State.CAPTURED: frozenset({State.LEAVING, State.ENTERING, State.GONE}),  # ENTERING: the keeper lost it
    State.LEAVING: frozenset({State.ENTERING, State.OUT, State.GONE}),
    State.GONE: frozenset(),
}


class KeeperAway(Exception):
    """Nothing can be decided now."""


class MeshUnknown(KeeperAway):
    """Nobody has told yet who is in the mesh: what is captured now would pass by every route."""


class Superseded(Exception):
    """A newer wish came while this one was worked on."""


class PodKeeper(Protocol):
    """What the keeper does for pods. Each raises ConnectionError when it is away, and an OSError when it refuses."""

    @property
    def peer(self) -> int: ...

    async def add_pod(self, handle: int, uid: str, families: tuple[int, ...], netns: int, identity: str) -> None: ...

    async def leave_pod(self, handle: int) -> None: ...

    async def delete_pod(self, handle: int) -> None: ...

    async def dns_sockets(self, handle: int) -> list[int]: ...


class PodNames(Protocol):
    """Who answers pods' DNS questions, by the sockets that the keeper holds."""

    def wanted(self, settings: CaptureSettings) -> bool: ...

    async def serve(self, pod: LocalPod, sockets: Callable[[], Awaitable[list[int]]]) -> bool:
        """Whether the pod's questions are answered from now on; raises ConnectionError when the keeper is away."""
        ...

    def drop(self, uid: str) -> None: ...

    def drop_all(self) -> None: ...

    def shown(self, uid: str) -> dict[str, Any] | None: ...


class PodIdentities(Protocol):
    """Who sees to certificates. Enrolment does not wait for them; connections do."""

    def hold(self, owner: str, identity: str) -> None: ...

    def release(self, owner: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Attached:
    """A pod that the keeper holds listeners for."""

    handle: int
    netns: int  # inode


@dataclass(slots=True)
class Tracked:
    """One pod and how far it is. `final`: the decision on the newest wish stands (or its first attempt failed)."""

    pod: LocalPod
    state: State = State.NEW
    final: bool = False
    reason: str = "not looked at yet"
    way: Way | None = None  # in force
    moving: bool = False  # its capture is being changed: whoever repairs it would put the old one back
    repairs: int = 0
    seen: bytes = b""  # print of the namespace with which it was last found as planned; empty: not compared yet
    looked: float = 0.0  # monotonic time of that comparison, or of the last look that found the same print
    wanted: bool = False  # its annotations ask for capture
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None
    deleted: bool = False
    old: bool = False  # it was there before this agent: an earlier one may have left its rules

    @property
    def about(self) -> str:
        return f"pod {self.pod.ref}"

    def step(self, state: State, reason: str) -> None:
        if state is not self.state and state not in TRANSITIONS[self.state]:
            raise RuntimeError(f"{self.about}: {self.state} -> {state} is not legal")
        self.state, self.reason = state, reason

    def shown(self) -> dict[str, Any]:
        """What operators are told of it, as far as it is known here. The keys are API."""
        pod, way = self.pod, self.way if self.state is State.CAPTURED else None
        return {
            "namespace": pod.namespace,
            "name": pod.name,
            "uid": pod.uid,
            "ips": [str(address) for address in pod.addresses],
            "captured": self.state is State.CAPTURED,
            "reason": self.reason,
            "method": way.name if way else None,
            "egress": way.egress if way else None,
            "ingress": way.ingress if way else None,
            "fallback": way.choice.why if way else "",
            "state": str(self.state),
            "final": self.final,
            "repairs": self.repairs,
        }

    def stands(self, way: Way) -> bool:
        """Whether it is captured so, and nobody is changing that."""
        return self.way is way and self.state is State.CAPTURED and not self.moving

    async def unless_changed(self, future: asyncio.Future[Refusals]) -> Refusals:
        """What comes of `future`. Superseded when a newer wish comes first."""
        change: asyncio.Future[Any] = asyncio.ensure_future(self.changed.wait())
        try:
            await asyncio.wait([change, future], return_when=asyncio.FIRST_COMPLETED)
        finally:
            change.cancel()
        if not future.done():
            raise Superseded
        return future.result()
