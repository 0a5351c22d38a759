"""What Kubernetes is told of pods: an API server over HTTP that refuses, forgets and is away."""
from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from ipaddress import ip_address
from typing import Any

import pytest

from agent.app import report
from agent.app.events import Events
from agent.app.report import Report, outcome
from agent.app.tracked import State, Tracked
from agent.model.pod import LocalPod
from agent.workloads.cluster import REDIRECTION, STATUS, ClusterSource
from protos.kubernetes.client import Client
from tests.support.kubelet import ON, Board
from tests.support.kubernetes.server import ApiServer
from tests.support.wait import until_async

CAPTURED = {STATUS: '{"captured":true}', REDIRECTION: "enabled"}


def tracked(uid: str = "u", state: State = State.CAPTURED, reason: str = "", name: str = "web", **more: Any) -> Tracked:
    pod = LocalPod(**{"uid": uid, "namespace": "default", "name": name, "service_account": "default", "netns": "/x", "cgroup": "",
                      "addresses": (ip_address("10.0.0.1"),), "host_network": False, "annotations": ON, **more})
    return Tracked(pod, state=state, final=True, reason=reason)


@pytest.mark.parametrize(("one", "wanted"), [
    (tracked(), CAPTURED),
    (tracked(state=State.NEW), None),
    (tracked(state=State.GONE), None),
    (tracked(state=State.OUT, waits="no network"), None),
    (tracked(state=State.OUT, reason="uses the node's network"), {STATUS: '{"captured":false,"reason":"uses the node\'s network"}'}),
    (tracked(state=State.OUT, reason="x" * 999), {STATUS: '{"captured":false,"reason":"%s"}' % ("x" * 256)}),
    (tracked(state=State.OUT, annotations={}), {}),  # it does not ask
    (tracked(state=State.LEAVING, annotations={"narrows.mesh/intercept": "disabled"}), {}),
    (tracked(state=State.OUT, annotations={"narrows.mesh/intercept": "yes"}, reason="refused"),
     {STATUS: '{"captured":false,"reason":"refused"}'}),
    (tracked(state=State.OUT, ended="it has ended"), {}),
])
def test_what_a_pod_is_told(one: Tracked, wanted: dict[str, str] | None) -> None:
    assert outcome(one) == wanted


class Told:
    """A report that runs, on what a real source says is written."""

    def __init__(self, client: Client, board: Board) -> None:
        self.board, self.events, self.pods = board, Events(), list[Tracked]()
        self.source = ClusterSource(client, "n1")
        self.report = Report(client, "n1", lambda: self.pods, self.source.written, self.events)
        self.tasks = [asyncio.create_task(self._follow()), asyncio.create_task(self.report.run())]

    async def _follow(self) -> None:
        async with contextlib.aclosing(self.source.events()) as events:  # type: ignore[type-var]
            async for _ in events:
                continue

    def pod(self, name: str = "web", **more: Any) -> Tracked:
        one = tracked(self.board.pod(name, annotations=ON), name=name, **more)
        self.pods.append(one)
        return one

    def ours(self, name: str = "web") -> dict[str, str]:
        return {key: value for key, value in self.board.annotations(name).items() if key in CAPTURED}

    async def until(self, wanted: dict[str, str], name: str = "web") -> None:
        await until_async(lambda: self.ours(name) == wanted, f"{name} says {wanted}", timeout=30)

    def patches(self) -> int:
        return len(self.board.server.asked("patch", "pods"))

    def told(self) -> list[str]:
        served = self.board.served("events")
        items = self.board.server.store.page(served, "", lambda _: True, 0, "", None)["items"]
        return sorted(f"{one['regarding']['name']} {one['reason']}" for one in items)


@pytest.fixture
def board() -> Iterator[Board]:
    with ApiServer() as server:
        yield Board(server)


@pytest.fixture
async def told(board: Board, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Told]:
    monkeypatch.setattr(report, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(report, "AGAIN_FIRST", 0.05)
    async with Client(board.server.configuration()) as client:
        one = Told(client, board)
        yield one
        for task in one.tasks:
            task.cancel()
        await asyncio.gather(*one.tasks, return_exceptions=True)


async def test_the_annotations_follow_the_pod_and_leave_others_alone(told: Told) -> None:
    one = told.pod()
    await told.until(CAPTURED)
    one.state, one.reason = State.OUT, "it failed"
    await told.until({STATUS: '{"captured":false,"reason":"it failed"}'})
    one.pod = tracked(one.pod.uid, annotations={}).pod
    await told.until({})
    assert told.board.annotations("web") == ON
    requests = told.board.server.asked("patch", "pods")
    assert len(requests) == 3 and {(one.name, one.subresource) for one in requests} == {("web", "status")}


async def test_what_is_written_already_is_not_written_again(told: Told) -> None:
    told.pod()
    await told.until(CAPTURED)
    await until_async(lambda: CAPTURED in told.source.written().values(), "the source has it")
    before = told.patches()
    for _ in range(10):
        await told.report.look()
    assert told.patches() == before == 1


async def test_another_pod_of_the_name_is_not_touched(told: Told) -> None:
    """What was captured has gone, and the source has not heard yet."""
    one = told.pod()
    await told.until(CAPTURED)
    told.board.server.chaos.silent = True
    told.board.delete("web")
    told.board.pod("web")
    one.state, one.reason = State.OUT, "it failed"
    await until_async(lambda: told.patches() >= 2, "tried", timeout=30)
    await asyncio.sleep(0.3)
    assert told.ours() == {} and told.patches() < 8  # 0.05 s, doubling
    assert not list(told.events.since()), "it is no failure that would hold up what others are to be told"


async def test_who_undoes_it_each_time_is_answered_less_and_less_often(told: Told) -> None:
    told.pod()
    await told.until(CAPTURED)

    async def undo() -> None:
        while True:
            told.board.annotate("web", **dict.fromkeys(CAPTURED))
            await asyncio.sleep(0.01)

    began = time.monotonic()
    task = asyncio.create_task(undo())
    await until_async(lambda: told.patches() >= 5, "answered", timeout=60)  # after 0.05, 0.1, 0.2, 0.4 s, and not each look
    task.cancel()
    assert time.monotonic() - began > 0.5


@pytest.mark.parametrize(("code", "reason"), [(403, "Forbidden"), (429, "TooManyRequests"), (500, "InternalError")])
async def test_a_refusal_is_no_loop_and_is_said_once(told: Told, code: int, reason: str) -> None:
    told.report._pause = 3600.0  # seconds
    fault = told.board.server.chaos.add("patch", "pods", code=code, reason=reason)
    told.pod()
    await until_async(lambda: [one["kind"] for one in told.events.since()] == ["ReportFailed"], "tried, and said", timeout=30)
    for _ in range(10):
        await told.report.look()
    assert told.patches() == 1 and len(told.events.since()) == 1
    told.board.server.chaos.stop(fault)
    told.report._paused = 0.0
    await told.until(CAPTURED)


async def test_events_are_told_once_and_not_of_other_things(told: Told) -> None:
    one = told.pod()
    for _ in range(3):
        told.events.add("Captured", one.about, "captured by iptables in 9 ms: 5 changes")
        told.events.add("Repaired", one.about, "somebody changed it")
    told.events.add("KeeperFound", "keeper", "connected")
    told.events.add("Captured", "pod default/unknown", "captured")
    await until_async(lambda: told.told() == ["web Captured", "web Repaired"], "told", timeout=30)
    served = told.board.served("events")
    for body in told.board.server.store.page(served, "", lambda _: True, 0, "", None)["items"]:
        assert body["regarding"]["uid"] == one.pod.uid and body["reportingInstance"] == "n1" and body["action"]
    await told.until(CAPTURED)


async def test_an_agent_that_starts_again_does_not_tell_it_again(told: Told) -> None:
    one = told.pod()
    await told.until(CAPTURED)
    await until_async(lambda: CAPTURED in told.source.written().values(), "the source has it")
    told.events.add("Captured", one.about, "captured by iptables in 1 ms: 0 changes")
    told.events.add("Released", one.about, "not captured any more")
    await until_async(lambda: told.told(), "something is told", timeout=30)
    assert told.told() == ["web Released"]


async def test_a_flood_of_events_is_bounded(told: Told) -> None:
    pods = [told.pod(f"p{number}", state=State.OUT, reason="r") for number in range(60)]
    for one in pods:
        told.events.add("CaptureFailed", one.about, "it failed", warning=True)
    await until_async(lambda: len(told.told()) >= report.EVENTS_BURST, "a burst", timeout=30)
    assert len(told.told()) < 60
