"""Who may reach whom between two pods of one worker, as with two proxies."""
from __future__ import annotations

from collections.abc import Callable

import pytest

from agent.dataplane import blobs
from agent.model.policy import Action, Policy, Scope
from agent.model.workload import Protocol
from tests.netns.proxy.near import BOTH, counted, ended, opened, put, records, start, talks
from tests.support.mesh import (
    Mesh,
    Web,
    echo,
    read_message,
    request,
)
from tests.support.policies import EMPTY, rule
from tests.support.wait import until

pytestmark = pytest.mark.netns

CASES: list[tuple[str, Callable[[Mesh], blobs.Put], bool]] = [
    ("strict", lambda _: put(Action.DENY, rule(not_principals=["*"])), True),
    ("by principal", lambda _: put(Action.ALLOW, rule(principals=["cluster.local/ns/default/sa/client"])), True),
    ("by another principal", lambda _: put(Action.ALLOW, rule(principals=["cluster.local/ns/default/sa/server"])), False),
    ("by address", lambda mesh: put(Action.ALLOW, rule(sources=[mesh.pods.client.ip])), True),
    ("by another address", lambda mesh: put(Action.ALLOW, rule(sources=[mesh.pods.other.ip])), False),
    ("by port", lambda _: put(Action.ALLOW, rule(ports=[8080])), True),
    ("by another port", lambda _: put(Action.DENY, rule(ports=[8080])), False),
    ("by destination", lambda mesh: put(Action.DENY, rule(destinations=[mesh.pods.server.ip])), False),
    ("nobody", lambda _: put(Action.ALLOW), False),
]


@pytest.mark.parametrize(("policy", "allowed"), [(one[1], one[2]) for one in CASES], ids=[one[0] for one in CASES])
def test_the_destinations_policies_decide(mesh: Mesh, policy: Callable[[Mesh], blobs.Put], allowed: bool) -> None:
    start(mesh, Protocol.TCP)
    origin = mesh.origin(8080, echo)
    mesh.worker.commit(policy(mesh))
    assert talks(mesh) == allowed
    assert len(origin.peers) == allowed
    assert mesh.worker.header["policy_denied"] == (not allowed)


def test_a_denied_connection_is_told_of_at_both_ends(mesh: Mesh) -> None:
    start(mesh, Protocol.TCP)
    mesh.worker.commit(put(Action.DENY, EMPTY))
    assert not talks(mesh)
    destination, source = records(mesh, 2)
    assert (destination["flag"], destination["failure"]) == ("DENY", "rbac_access_denied_matched_policy[ns[default]-policy[p]-rule[0]]")
    assert (source["flag"], source["failure"]) == ("UF", "the destination's policy denies this identity")
    assert counted(mesh, "failed") == dict.fromkeys(BOTH, 1)


def test_a_denied_request_is_answered_by_the_clients_proxy(mesh: Mesh) -> None:
    start(mesh)
    origin = mesh.origin(8080, Web())
    mesh.worker.commit(put(Action.DENY, EMPTY))
    connection = mesh.dial()
    connection.sendall(request())
    assert read_message(connection).status == 503
    assert origin.peers == []
    mesh.worker.commit(put(Action.ALLOW, EMPTY))
    connection.sendall(request())
    assert read_message(connection).status == 200


def test_what_a_policy_on_trial_would_deny_is_said(mesh: Mesh) -> None:
    start(mesh, Protocol.TCP)
    mesh.origin(8080, echo)
    mesh.worker.commit(put(Action.DENY, rule(principals=["*"]), dry_run=True))
    assert talks(mesh)
    destination, _ = records(mesh, 2)
    assert destination["failure"] == "rbac_dry_run_access_denied_matched_policy[ns[default]-policy[p]-rule[0]]"
    assert (mesh.worker.header["policy_dry_denied"], mesh.worker.header["policy_denied"]) == (1, 0)


def test_a_change_of_policy_cuts_open_connections(mesh: Mesh) -> None:
    start(mesh, Protocol.TCP)
    origin = mesh.origin(8080, echo)
    connections = [opened(mesh) for _ in range(20)]
    mesh.worker.commit(put(Action.ALLOW, rule(principals=["cluster.local/ns/default/sa/other"])))
    assert all(map(ended, connections))
    assert mesh.worker.header["policy_cut"] == 20
    until(lambda: origin.open == 0, "the server's ends are gone too")
    mesh.quiet()


def test_and_pooled_ones_between_requests(mesh: Mesh) -> None:
    start(mesh)
    mesh.origin(8080, Web())
    connection = mesh.dial()
    connection.sendall(request())
    assert read_message(connection).status == 200
    mesh.worker.commit(put(Action.DENY, EMPTY))
    until(lambda: mesh.worker.header["policy_cut"] == 1, "the kept connection is cut")
    connection.sendall(request())
    assert read_message(connection).status == 503




def test_policies_are_of_the_destination_even_when_each_pod_has_its_own(mesh: Mesh) -> None:
    start(mesh, Protocol.TCP)
    mesh.origin(8080, echo)
    mesh.worker.commit(blobs.put_policy(Policy("elsewhere", "q", Scope.NAMESPACE, Action.DENY, (EMPTY,), False)))
    assert talks(mesh)
