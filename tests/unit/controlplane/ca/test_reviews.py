"""Callers by TokenReview: asked of a real HTTP server, once for all who wait, remembered no longer than it is true, and never guessed."""
from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from controlplane.ca import reviews
from controlplane.ca.reviews import TokenReviews
from controlplane.ca.tokens import Caller, Either, NodeTokens, TokenError, TokensUnavailableError
from controlplane.model.mesh import Mesh
from controlplane.model.objects import Pod
from controlplane.model.problems import ObjectKey
from protos.kubernetes.client import Client
from tests.support.authority import TOKENS, node_token, token_file
from tests.support.kubernetes.server import ApiServer
from tests.support.kubernetes.tokens import Token
from tests.support.manifests import mesh_of, pod

ACCOUNT = "narrows/agent"


def agent_pod(name: str = "agent-1", node: str = "n1", uid: str = "u1", account: str = "agent") -> str:
    return pod(name, "10.0.0.9", account, namespace="narrows", node=node, meta=f", uid: {uid}").replace("sa-agent", "agent")


@dataclass
class Desk:
    server: ApiServer
    source: TokenReviews
    mesh: Mesh
    now: list[float] = field(default_factory=lambda: [time.time()])

    def asked(self) -> int:
        return len(self.server.asked("create", "tokenreviews"))

    async def refused(self, token: str) -> str:
        with pytest.raises(TokenError) as told:
            await self.source.caller(token)
        assert not isinstance(told.value, TokensUnavailableError)
        return str(told.value)


@pytest.fixture
async def desk(server: ApiServer) -> AsyncIterator[Desk]:
    mesh, now = mesh_of(agent_pod()), [time.time()]

    def find(namespace: str, name: str) -> Pod | None:
        found = mesh.get(ObjectKey("Pod", namespace, name))
        return found if isinstance(found, Pod) else None

    async with Client(server.configuration()) as client:
        yield Desk(server, TokenReviews(client.review_token, find, frozenset({ACCOUNT}), lambda: now[0]), mesh, now)


async def test_a_token_says_its_pods_node_by_the_server_or_by_the_pod_that_is_followed(desk: Desk) -> None:
    new, old = node_token(desk.server, pod="agent-7", node="n7"), node_token(desk.server)
    assert await desk.source.caller(new) == Caller("n7", "node n7 (pod narrows/agent-7)")
    assert await desk.source.caller(old) == Caller("n1", "node n1 (pod narrows/agent-1)")
    assert desk.asked() == 2 and len(desk.source) == 2
    desk.mesh.apply([], [ObjectKey("Pod", "narrows", "agent-1")])
    assert "the pod narrows/agent-1 is not known here" in await desk.refused(old)


@pytest.mark.parametrize("there", [agent_pod(uid="u2"), agent_pod(account="other"), agent_pod(name="agent-2"),
                                   agent_pod().replace("Running", "Failed")])
async def test_a_pod_that_is_not_the_tokens_own_says_no_node(desk: Desk, there: str) -> None:
    desk.mesh.apply([], [ObjectKey("Pod", "narrows", "agent-1")])
    desk.mesh.apply(list(mesh_of(there).objects()))
    assert "is not known here" in await desk.refused(node_token(desk.server))


async def test_who_is_no_agent_of_a_node_is_refused_and_who_cannot_be_is_not_asked_about(desk: Desk) -> None:
    server = desk.server
    assert "service account default/web is none that agents" in await desk.refused(node_token(server, account="default/web"))
    assert "not bound to a pod" in await desk.refused(node_token(server, pod=""))
    person = node_token(server, pod="p")
    server.tokens[person] = Token("alice", audiences=("istio-ca",))
    assert "no service account's" in await desk.refused(person)
    unknown = node_token(server, pod="q")
    del server.tokens[unknown]
    assert "does not accept the token" in await desk.refused(unknown)
    asked = desk.asked()
    assert "is not for istio-ca" in await desk.refused(node_token(server, audience="https://kubernetes.default.svc"))
    for text in ("x", "a.b.c", "..", "a" * 3000, TOKENS["n1"]):
        assert "no projected one" in await desk.refused(text)
    assert desk.asked() == asked


async def test_a_server_that_knows_no_audiences_lets_nobody_in(desk: Desk) -> None:
    desk.server.audience_aware = False
    assert "not for istio-ca" in await desk.refused(node_token(desk.server))


async def test_an_answer_is_remembered_a_minute_and_never_past_the_tokens_end(desk: Desk) -> None:
    long, short = node_token(desk.server, seconds=3600), node_token(desk.server, pod="agent-7", node="n7", seconds=20)
    for step, asked in ((0.0, 2), (15.0, 2), (10.0, 3), (40.0, 5)):
        desk.now[0] += step
        await desk.source.caller(long)
        await desk.source.caller(short)
        assert desk.asked() == asked, step  # what the server says of one that has ended is its own
    del desk.server.tokens[short]
    assert "does not accept" in await desk.refused(short)
    asked = desk.asked()
    desk.now[0] += reviews.REFUSED_SECONDS - 1
    assert "does not accept" in await desk.refused(short) and desk.asked() == asked
    desk.now[0] += 2
    assert "does not accept" in await desk.refused(short) and desk.asked() == asked + 1


async def test_one_review_is_asked_for_all_who_wait_and_who_goes_harms_nobody(desk: Desk) -> None:
    token = node_token(desk.server)
    desk.server.chaos.add("create", "tokenreviews", seconds=0.5)
    waiting = [asyncio.create_task(desk.source.caller(token)) for _ in range(20)]
    await asyncio.sleep(0.1)
    waiting[0].cancel()
    found = await asyncio.gather(*waiting, return_exceptions=True)
    assert isinstance(found[0], asyncio.CancelledError) and found[1:] == [Caller("n1", "node n1 (pod narrows/agent-1)")] * 19
    assert desk.asked() == 1


async def test_what_cannot_be_reviewed_is_refused_as_unavailable_and_asked_again(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    token, chaos = node_token(desk.server), desk.server.chaos
    for wrong in ({"code": 503, "reason": "ServiceUnavailable"}, {"drop": True}, {"code": 403, "reason": "Forbidden"}, {"seconds": 30}):
        fault = chaos.add("create", "tokenreviews", **wrong)  # type: ignore[arg-type]
        if fault.seconds:
            monkeypatch.setattr(reviews, "REVIEW_SECONDS", 0.2)
        with pytest.raises(TokensUnavailableError, match="cannot be reviewed now; ask again"):
            await desk.source.caller(token)
        chaos.stop(fault)
    monkeypatch.undo()
    chaos.faults.clear()
    assert (await desk.source.caller(token)).node == "n1"
    desk.server.stop()
    assert (await desk.source.caller(token)).node == "n1"  # it was reviewed
    desk.now[0] += reviews.KEPT_SECONDS + 1
    with pytest.raises(TokensUnavailableError):
        await desk.source.caller(token)


async def test_too_many_at_once_are_put_off_and_what_is_remembered_is_bounded(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reviews, "UNDER_WAY", 4)
    monkeypatch.setattr(reviews, "KEPT", 3)
    tokens = [node_token(desk.server, pod=f"agent-{n}", node="n1") for n in range(6)]
    fault = desk.server.chaos.add("create", "tokenreviews", seconds=0.5)
    found = await asyncio.gather(*map(desk.source.caller, tokens), return_exceptions=True)
    assert [isinstance(one, TokensUnavailableError) for one in found] == [False] * 4 + [True] * 2
    assert len(desk.source) == 3
    desk.server.chaos.stop(fault)
    assert (await desk.source.caller(tokens[5])).node == "n1"


async def test_tokens_of_a_file_are_known_beside_those_of_a_cluster(desk: Desk, tmp_path: Path) -> None:
    both = Either(NodeTokens(token_file(tmp_path / "tokens")), desk.source)
    assert (await both.caller(TOKENS["n2"])).node == "n2" and (await both.caller(node_token(desk.server))).node == "n1"
    with pytest.raises(TokenError, match="no projected one"):
        await both.caller("x")
