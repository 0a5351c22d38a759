"""Policies through real connections: who is let in, what is logged and counted, and what becomes of open connections when they change."""
from __future__ import annotations

import socket
import time
from dataclasses import replace
from ipaddress import ip_address

import pytest

from agent.dataplane import blobs
from agent.model.policy import Action, Policy, Rule, Scope
from agent.model.workload import Protocol, spiffe
from tests.support.mesh import (
    SCOPE,
    SERVER,
    SERVICE_INDEX,
    TCP_PORT,
    Mesh,
    echo,
    everything,
    receive,
    receive_until,
    workload,
)
from tests.support.netns import Netns
from tests.support.policies import EMPTY, match, rule
from tests.support.wait import until

pytestmark = pytest.mark.netns

WHO = spiffe("cluster.local", "default", "client")
REQUEST = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def start(mesh: Mesh, protocol: Protocol = Protocol.TCP) -> None:
    """The client's pod is WHO; `other` is no pod of the mesh."""
    client, server = mesh.pods.client, mesh.pods.server
    mesh.configure(*everything(mesh), protocol=protocol)
    mesh.worker.commit(
        blobs.put_pod("pod-c", 1, "w-client", SCOPE, (ip_address(client.ip), ip_address(client.ip6)), WHO),
        blobs.put_pod("pod-s", 2, "w-server", SCOPE, (ip_address(server.ip), ip_address(server.ip6)),
                      spiffe("cluster.local", "default", "server")))


def put(action: Action, *rules: Rule, name: str = "p", scope: Scope = Scope.NAMESPACE, dry_run: bool = False) -> blobs.Put:
    return blobs.put_policy(Policy("default", name, scope, action, rules, dry_run))


def talks(mesh: Mesh, netns: Netns | None = None, address: str | None = None, port: int = 8080) -> bool:
    """Whether a byte comes back. False: a reset, and nothing else."""
    try:
        with mesh.dial(address or mesh.pods.server.ip, port, netns) as connection:
            connection.sendall(b"x")
            return receive(connection, 1) == b"x"
    except (ConnectionError, AssertionError):
        return False


def denied(mesh: Mesh) -> int:
    return int(mesh.worker.header["policy_denied"])


# each: the policies, whether the client's pod is let in, and whether somebody without identity is
CASES: list[tuple[str, list[blobs.Put], bool, bool]] = [
    ("none", [], True, True),
    ("allow nothing", [put(Action.ALLOW)], False, False),
    ("deny everything", [put(Action.DENY, EMPTY)], False, False),
    ("allow everybody", [put(Action.ALLOW, EMPTY)], True, True),
    ("strict", [put(Action.DENY, rule(not_principals=["*"]))], True, False),
    ("by namespace", [put(Action.ALLOW, rule(namespaces=["default"]))], True, False),
    ("by another namespace", [put(Action.ALLOW, rule(namespaces=["other"]))], False, False),
    ("by principal", [put(Action.ALLOW, rule(principals=["cluster.local/ns/default/sa/client"]))], True, False),
    ("by another principal", [put(Action.ALLOW, rule(principals=["cluster.local/ns/default/sa/server"]))], False, False),
    ("by service account", [put(Action.ALLOW, rule(service_accounts=[("default", "client")]))], True, False),
    ("by port", [put(Action.ALLOW, rule(ports=[8080]))], True, True),
    ("by another port", [put(Action.ALLOW, rule(ports=[80]))], False, False),
    ("strict but for the port", [put(Action.DENY, ((match(not_principals=["*"]),), (match(not_ports=[8080]),)))], True, True),
    ("for all", [put(Action.DENY, EMPTY, scope=Scope.GLOBAL)], False, False),
    ("not named", [put(Action.DENY, EMPTY, scope=Scope.WORKLOAD)], True, True),
    ("on trial", [put(Action.DENY, EMPTY, dry_run=True)], True, True),
]


@pytest.mark.parametrize("case", CASES, ids=[case[0].replace(" ", "-") for case in CASES])
def test_a_pod_of_the_node_is_known_by_its_identity_and_anybody_else_is_nobody(mesh: Mesh, case: tuple[str, list[blobs.Put], bool, bool]
                                                                                ) -> None:
    start(mesh)
    mesh.origin(8080, echo)
    mesh.worker.commit(*case[1])
    assert (talks(mesh), talks(mesh, mesh.pods.other)) == case[2:]
    assert denied(mesh) == [*case[2:]].count(False)


@pytest.mark.parametrize("family", [4, 6])
def test_addresses_of_clients_are_compared_as_they_are(mesh: Mesh, family: int) -> None:
    start(mesh)
    mesh.origin(8080, echo)
    client, other, server = (one.ip6 if family == 6 else one.ip for one in (mesh.pods.client, mesh.pods.other, mesh.pods.server))
    for sources, expected in (([other], (False, True)), ([client], (True, False)), ([client, other], (True, True)),
                              (["192.0.2.0/24"], (False, False)), (["0.0.0.0/0", "::/0"], (True, True))):
        mesh.worker.commit(put(Action.ALLOW, rule(sources=sources)))
        assert (talks(mesh, address=server), talks(mesh, mesh.pods.other, server)) == expected
    mesh.worker.commit(put(Action.DENY, rule(destinations=[server])))
    assert not talks(mesh, address=server)


def test_who_calls_through_a_service_is_judged_at_the_port_that_is_listened_on(mesh: Mesh) -> None:
    start(mesh)
    mesh.origin(8080, echo)
    mesh.worker.commit(put(Action.ALLOW, rule(ports=[8080], namespaces=["default"])))
    connection = mesh.dial(port=TCP_PORT)
    connection.sendall(b"x")
    assert receive(connection, 1) == b"x"


def test_a_denied_connection_is_reset_logged_with_the_policy_and_counted(mesh: Mesh) -> None:
    start(mesh)
    origin = mesh.origin(8080, echo)
    mesh.worker.commit(put(Action.DENY, rule(ports=[1]), rule(ports=[8080]), name="closed"))
    assert not talks(mesh, mesh.pods.other)
    record = mesh.worker.record()
    assert (record["reporter"], record["flag"], record["details"], record["failure"]) == (
        "destination", "DENY", "rbac_access_denied", "rbac_access_denied_matched_policy[ns[default]-policy[closed]-rule[1]]")
    assert record["downstream_remote"].startswith(f"{mesh.pods.other.ip}:") and record["destination"] == SERVER
    assert [(key["flag"], values["closed"], values["failed"]) for key, values in mesh.worker.series() if key["flag"] == "DENY"] == [
        ("DENY", 1, 1)]
    mesh.worker.commit(put(Action.ALLOW, name="closed"))
    assert not talks(mesh, mesh.pods.other)
    assert mesh.worker.record()["failure"] == "rbac_access_denied_matched_policy[none]"
    assert origin.peers == []  # the server heard of nobody


def test_an_http_port_is_closed_as_a_tcp_port_is(mesh: Mesh) -> None:
    start(mesh, Protocol.HTTP)
    mesh.worker.commit(put(Action.DENY, EMPTY))
    with pytest.raises(ConnectionError):
        connection = mesh.dial(mesh.pods.server.ip, 8080, mesh.pods.other)
        connection.sendall(REQUEST)
        if connection.recv(1) == b"":
            pytest.fail("ended in order, without an answer")


def test_what_a_policy_on_trial_would_deny_is_said_and_counted(mesh: Mesh) -> None:
    start(mesh)
    mesh.origin(8080, echo)
    mesh.worker.commit(put(Action.DENY, rule(not_principals=["*"]), name="soon", dry_run=True))
    assert talks(mesh, mesh.pods.other)
    record = mesh.worker.record()
    assert (record["flag"], record["failure"]) == ("-", "rbac_dry_run_access_denied_matched_policy[ns[default]-policy[soon]-rule[0]]")
    header = mesh.worker.header
    assert (header["policy_dry_denied"], header["policy_denied"]) == (1, 0)


# ---- open connections ------------------------------------------------------------------------------------------------

def opened(mesh: Mesh, netns: Netns) -> socket.socket:
    connection = mesh.dial(mesh.pods.server.ip, 8080, netns)
    connection.sendall(b"x")
    assert receive(connection, 1) == b"x"
    return connection


def is_reset(connection: socket.socket) -> bool:
    connection.settimeout(5)
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def lives(connection: socket.socket) -> bool:
    connection.sendall(b"y")
    return receive(connection, 1) == b"y"


def test_a_change_of_policy_cuts_those_open_connections_that_it_denies(mesh: Mesh) -> None:
    start(mesh)
    mesh.origin(8080, echo)
    stays, goes = opened(mesh, mesh.pods.client), opened(mesh, mesh.pods.other)
    mesh.worker.commit(put(Action.DENY, rule(not_principals=["*"]), name="strict"))
    assert is_reset(goes) and lives(stays)
    until(lambda: mesh.worker.header["policy_cut"] == 1, "it is counted", timeout=5)
    record = mesh.worker.record()
    assert (record["flag"], record["failure"]) == ("DENY", "rbac_access_denied_matched_policy[ns[default]-policy[strict]-rule[0]]")
    mesh.worker.commit(blobs.Delete(blobs.Kind.POLICY, "default/strict"))
    again = opened(mesh, mesh.pods.other)
    assert lives(again) and lives(stays)


def test_a_policy_that_a_workload_names_from_now_on_cuts_open_connections(mesh: Mesh) -> None:
    start(mesh)
    mesh.origin(8080, echo)
    mesh.worker.commit(put(Action.DENY, EMPTY, name="selected", scope=Scope.WORKLOAD))
    connection = opened(mesh, mesh.pods.client)
    named = replace(workload("w-server", mesh.pods.server), policies=("default/selected",))
    mesh.worker.commit(blobs.put_workload(SERVER, named, lambda _: SERVICE_INDEX))
    assert is_reset(connection)
    assert not talks(mesh)


def test_a_kept_alive_connection_without_a_request_is_cut_too(mesh: Mesh) -> None:
    def serve(connection: socket.socket) -> None:
        while receive_until(connection, b"\r\n\r\n"):
            connection.sendall(ANSWER)

    start(mesh, Protocol.HTTP)
    mesh.origin(8080, serve)
    connection = mesh.dial(mesh.pods.server.ip, 8080, mesh.pods.other)
    connection.sendall(REQUEST)
    assert receive_until(connection, b"ok").startswith(b"HTTP/1.1 200")
    mesh.worker.commit(put(Action.ALLOW, rule(namespaces=["default"])))
    assert is_reset(connection)


def test_hundreds_of_open_connections_are_asked_again_a_bounded_number_a_turn(mesh: Mesh) -> None:
    start(mesh)
    mesh.origin(8080, echo)
    connections = [opened(mesh, mesh.pods.other) for _ in range(400)]
    mesh.worker.commit(put(Action.DENY, EMPTY))
    assert all(map(is_reset, connections))
    header = mesh.worker.header
    assert (header["policy_cut"], header["policy_denied"]) == (400, 400)
    mesh.worker.commit(blobs.Delete(blobs.Kind.POLICY, "default/p"))
    assert talks(mesh)


# ---- who is not known ------------------------------------------------------------------------------------------------

def test_a_pod_whose_workload_is_not_known_waits_for_it(mesh: Mesh) -> None:
    start(mesh)
    mesh.origin(8080, echo)
    known = blobs.put_workload(SERVER, workload("w-server", mesh.pods.server), lambda _: SERVICE_INDEX)
    mesh.worker.commit(blobs.Delete(blobs.Kind.WORKLOAD, "w-server"))
    connection = mesh.dial(mesh.pods.server.ip, 8080, mesh.pods.other)
    connection.sendall(b"x")
    until(lambda: mesh.worker.header["held"] == 1, "it waits", timeout=5)
    mesh.worker.commit(known)
    assert receive(connection, 1) == b"x"


def test_and_is_closed_when_nobody_tells_it_in_time(mesh: Mesh) -> None:
    start(mesh)
    mesh.settings(hold_timeout_ms=300)
    origin = mesh.origin(8080, echo)
    mesh.worker.commit(blobs.Delete(blobs.Kind.WORKLOAD, "w-server"))
    begin = time.monotonic()
    assert not talks(mesh, mesh.pods.other)
    assert 0.2 < time.monotonic() - begin < 5
    record = mesh.worker.record()
    assert (record["flag"], record["details"]) == ("DENY", "workload_not_received") and origin.peers == []
