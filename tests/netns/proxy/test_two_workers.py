"""Two pods of one node that two workers serve: no tunnel, the identity by the address, and policy where the connection comes in."""
from __future__ import annotations

from collections.abc import Iterator

import pytest

from agent.dataplane import blobs
from agent.model.policy import Action, Policy, Scope
from agent.model.settings import ProxySettings
from agent.model.workload import Protocol, Tunnel
from tests.netns.proxy.test_near import CLIENT_ID, opened, start, talks
from tests.support.mesh import CLIENT, HTTP_PORT, SERVER, Mesh, Pods, Web, echo, entered, read_message, request, response
from tests.support.policies import rule
from tests.support.wait import until
from tests.support.worker import Worker

pytestmark = pytest.mark.netns


class Both(Worker):
    """What is committed to the client's worker is committed to the server's too."""

    other: Worker

    def commit(self, *entries: blobs.Entry) -> None:
        super().commit(*entries)
        self.other.commit(*entries)


@pytest.fixture
def mesh(pods: Pods) -> Iterator[Mesh]:
    with Both() as ours, Worker(index=1) as theirs:
        ours.other = theirs
        made = Mesh(pods, ours)
        ours.commit(blobs.put_settings(ProxySettings()))
        ours.attach(CLIENT, pods.client)
        theirs.attach(SERVER, pods.server)
        try:
            yield made
            assert not ours.ended() and not theirs.ended()
        finally:
            for one in made.sockets:
                one.close()
            for origin in made.origins:
                origin.close()


def other(mesh: Mesh) -> Worker:
    assert isinstance(mesh.worker, Both)
    return mesh.worker.other


def through(mesh: Mesh) -> list[int]:
    return entered(mesh.pods.server, other(mesh))


def policy(action: Action, *principals: str) -> blobs.Put:
    return blobs.put_policy(Policy("default", "p", Scope.NAMESPACE, action, (rule(principals=list(principals)),), False))


def test_a_workload_with_tunnels_is_reached_on_15006_and_knows_who_comes(mesh: Mesh) -> None:
    start(mesh, Protocol.TCP, tunnel=Tunnel.HBONE)
    origin = mesh.origin(8080, echo)
    connection = opened(mesh)
    assert through(mesh) == [15006]
    assert origin.peers == [mesh.pods.client.ip]
    connection.close()
    records = until(other(mesh).records, "a record of the destination")
    assert (records[0]["reporter"], records[0]["source"], records[0]["flag"]) == ("destination", CLIENT, "-")
    assert mesh.worker.header["tunnels_open"] == other(mesh).header["tunnels_open"] == 0


@pytest.mark.parametrize(("action", "who", "let_in"), [
    (Action.ALLOW, "client", True), (Action.ALLOW, "server", False), (Action.DENY, "client", False), (Action.DENY, "server", True)])
def test_a_policy_that_names_principals_decides_at_the_destination(mesh: Mesh, action: Action, who: str, let_in: bool) -> None:
    start(mesh, Protocol.TCP, tunnel=Tunnel.HBONE)
    origin = mesh.origin(8080, echo)
    mesh.worker.commit(policy(action, CLIENT_ID.removeprefix("spiffe://").replace("client", who)))
    assert talks(mesh) is let_in
    assert (origin.peers != []) is let_in
    assert other(mesh).header["policy_denied"] == (0 if let_in else 1)
    assert mesh.worker.header["policy_denied"] == 0


def test_a_request_and_an_open_connection_are_asked_about_as_with_one_worker(mesh: Mesh) -> None:
    start(mesh, tunnel=Tunnel.HBONE)
    mesh.origin(8080, Web(response(b"one"), response(b"two")))
    connection = mesh.dial(port=HTTP_PORT)
    connection.sendall(request())
    assert read_message(connection).body == b"one"
    mesh.worker.commit(policy(Action.DENY, CLIENT_ID.removeprefix("spiffe://")))
    until(lambda: other(mesh).header["policy_cut"] == 1, "the open connection is cut")
    connection.sendall(request())
    assert read_message(connection).status == 503


@pytest.mark.parametrize("excluded", [None, (8080,)], ids=["it leaves", "the port is excluded"])
def test_who_is_not_captured_there_is_not_reached_in_plain_text(mesh: Mesh, excluded: tuple[int, ...] | None) -> None:
    start(mesh, Protocol.TCP, excluded=excluded, tunnel=Tunnel.HBONE)
    origin = mesh.origin(8080, echo)
    assert not talks(mesh) and origin.peers == [], "there is no certificate, and nothing but a tunnel will do"


def test_the_setting_asks_for_a_tunnel(mesh: Mesh) -> None:
    start(mesh, Protocol.TCP, tunnel=Tunnel.HBONE)
    origin = mesh.origin(8080, echo)
    mesh.worker.commit(blobs.put_settings(ProxySettings(same_node_tunnel=True, hold_timeout_ms=200)))
    assert not talks(mesh) and origin.peers == []


def test_with_the_setting_an_address_is_no_identity(mesh: Mesh) -> None:
    start(mesh, Protocol.TCP)
    origin = mesh.origin(8080, echo)
    mesh.worker.commit(policy(Action.ALLOW, CLIENT_ID.removeprefix("spiffe://")))
    assert talks(mesh)
    mesh.worker.commit(blobs.put_settings(ProxySettings(same_node_tunnel=True)))
    assert not talks(mesh) and len(origin.peers) == 1, "who claims to be the client has to prove it by a certificate"
