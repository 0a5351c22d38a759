"""What must be secure fails rather than going in plain text, and says why; what 15008 answers, and to whom."""
from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import h2.events
import pytest

from agent import netlink
from agent.dataplane import blobs
from agent.model.policy import Action, Policy, Rule, Scope
from agent.model.workload import Protocol, Service, ServicePort, WorkloadPort
from agent.model.workload import Tunnel as Reached
from tests.netns.hbone.test_pair import fails
from tests.netns.hbone.test_peers import REMOTE_ID, Tunnel
from tests.support.hbone import CLIENT_ID, UIDS, certificate, configure, enrol, give_key, workload
from tests.support.mesh import CLIENT, HOST, SCOPE, SERVER, SERVICE, SERVICE_INDEX, TCP_PORT, Mesh, echo, receive
from tests.support.netns import Netns
from tests.support.pki import Authority
from tests.support.policies import rule
from tests.support.wait import until

pytestmark = pytest.mark.netns
ROOT = Authority()
STRICT = rule(not_principals=["*"])
OTHER_SERVICE = 8


@pytest.fixture
def pair(mesh: Mesh) -> Mesh:
    enrol(mesh, ROOT)
    return mesh


@pytest.fixture
def dialled(pair: Mesh, tmp_path: Path) -> Iterator[Any]:
    made: list[Tunnel] = []

    def dial() -> Tunnel:
        made.append(Tunnel.dial(pair.pods.other, pair.pods.server.ip, ROOT.issue(REMOTE_ID), tmp_path, ROOT))
        return made[-1]

    yield dial
    for one in made:
        one.close()


def deny(*rules: Rule) -> blobs.Put:
    return blobs.put_policy(Policy("default", "closed", Scope.NAMESPACE, Action.DENY, rules, False))


def flags(mesh: Mesh, reporter: str) -> dict[str, bool]:
    """Response flag -> mutual TLS, of the series that say that something ended."""
    return {key["flag"]: key["mutual_tls"] for key, values in mesh.worker.series() if key["reporter"] == reporter and values["closed"]}


# ---- who dials -------------------------------------------------------------------------------------------------------------------

def test_an_expired_certificate_of_ours_dials_nobody(mesh: Mesh) -> None:
    enrol(mesh, ROOT, who=(SERVER,))
    old = ROOT.issue(CLIENT_ID, days=(-3, -1))
    give_key(mesh.worker, 101, CLIENT_ID, old.key)
    mesh.worker.commit(certificate(old, CLIENT_ID, 101))
    configure(mesh, protocol=Protocol.TCP)
    fails(mesh, "the certificate of its identity has expired")
    assert flags(mesh, "source") == {"UF": True}, "connection_security_policy says what it would have been"


def test_a_pod_of_whom_nobody_has_told_an_identity_dials_nobody(pair: Mesh) -> None:
    configure(pair, blobs.put_pod("pod-c", 1, UIDS[CLIENT], SCOPE, (ip_address(pair.pods.client.ip),)), protocol=Protocol.TCP)
    fails(pair, "this pod has no identity")
    assert flags(pair, "source") == {"UF": True}


def test_where_nothing_listens_on_15008_the_reason_says_so(pair: Mesh) -> None:
    pair.pods = replace(pair.pods, server=pair.pods.other)
    configure(pair, protocol=Protocol.TCP)
    fails(pair, "15008 of the destination refused the connection")
    assert flags(pair, "source") == {"UF": True}


@contextlib.contextmanager
def deaf(netns: Netns, port: int) -> Iterator[None]:
    """A listener whose queue is full: the kernel answers no SYN, as where a firewall drops them."""
    with contextlib.ExitStack() as stack:
        def full() -> None:
            server = stack.enter_context(socket.socket())
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(("0.0.0.0", port))
            server.listen(0)
            for _ in range(4):
                one = stack.enter_context(socket.socket())
                one.setblocking(False)
                one.connect_ex(("127.0.0.1", port))

        netlink.in_netns(netns.path, full)
        until(lambda: netns.run("ss", "-Htn", "state", "syn-sent", f"dport = :{port}").stdout.strip(), "its queue is full")
        yield


def test_no_answer_on_15008_is_told_as_what_it_looks_like(pair: Mesh) -> None:
    pair.pods = replace(pair.pods, server=pair.pods.other)
    configure(pair, protocol=Protocol.TCP)
    with deaf(pair.pods.other, 15008):
        with contextlib.suppress(ConnectionError):
            connection = pair.dial(port=TCP_PORT)
            connection.sendall(b"secret")
            assert connection.recv(1) == b""
        records = until(lambda: [one for one in pair.worker.records() if one["reporter"] == "source"], "a record")
    assert "no answer on 15008" in records[0]["failure"] and "NetworkPolicy" in records[0]["failure"]
    assert (records[0]["flag"], "connection_timeout" in records[0]["details"]) == ("UF", True)


# ---- who is dialled ----------------------------------------------------------------------------------------------------------------

def test_strict_takes_nothing_in_plain_text(pair: Mesh) -> None:
    configure(pair, deny(STRICT), protocol=Protocol.TCP)
    origin = pair.origin(8080, echo)
    with contextlib.suppress(ConnectionError):
        connection = pair.dial(pair.pods.server.ip, 8080, pair.pods.other)
        connection.sendall(b"secret")
        assert connection.recv(1) == b""
    record = pair.worker.record()
    assert (record["reporter"], record["flag"], record["details"]) == ("destination", "DENY", "rbac_access_denied")
    assert record["failure"] == "rbac_access_denied_matched_policy[ns[default]-policy[closed]-rule[0]]"
    assert origin.peers == [] and flags(pair, "destination") == {"DENY": False}


def test_strict_is_not_dialled_in_plain_text_with_success(pair: Mesh) -> None:
    """A source that is told no tunnel for the destination, and whose pod has no identity, gets nowhere."""
    configure(pair, blobs.put_pod("pod-c", 1, UIDS[CLIENT], SCOPE, (ip_address(pair.pods.client.ip),)), deny(STRICT),
              protocol=Protocol.TCP, tunnel=Reached.NONE)
    origin = pair.origin(8080, echo)
    with contextlib.suppress(ConnectionError):
        connection = pair.dial(port=TCP_PORT)
        connection.sendall(b"secret")
        assert connection.recv(1) == b""
    until(lambda: flags(pair, "destination") == {"DENY": False}, "the destination's proxy says so")
    assert origin.peers == []


def test_strict_takes_what_comes_by_a_tunnel(pair: Mesh, dialled: Any) -> None:
    configure(pair, deny(STRICT), protocol=Protocol.TCP)
    pair.origin(8080, echo)
    tunnel = dialled()
    assert tunnel.ask(f"{pair.pods.server.ip}:8080") == "200"
    assert tunnel.exchange(b"abc", 3) == b"abc"
    tunnel.close()
    until(lambda: flags(pair, "destination"), "its end is counted")
    assert list(flags(pair, "destination").values()) == [True]


def test_whom_the_policy_denies_gets_401(pair: Mesh, dialled: Any) -> None:
    configure(pair, deny(rule(principals=["cluster.local/ns/default/sa/remote"])), protocol=Protocol.TCP)
    origin = pair.origin(8080, echo)
    assert dialled().ask(f"{pair.pods.server.ip}:8080") == "401"
    record = pair.worker.record()
    assert (record["flag"], record["details"]) == ("DENY", "rbac_access_denied")
    assert origin.peers == [] and flags(pair, "destination") == {"DENY": True}


def test_a_change_of_policy_cuts_a_stream_and_not_its_tunnel(pair: Mesh, dialled: Any) -> None:
    configure(pair, protocol=Protocol.TCP)
    origin = pair.origin(8080, echo)
    tunnel = dialled()
    assert tunnel.ask(f"{pair.pods.server.ip}:8080") == "200"
    assert tunnel.exchange(b"abc", 3) == b"abc"
    pair.worker.commit(deny(rule(principals=["cluster.local/ns/default/sa/remote"])))
    while not tunnel.ended:
        tunnel.turn()
    until(lambda: origin.open == 0, "the application's connection ended")
    record = pair.worker.record()
    assert record["flag"] == "DENY" and pair.worker.header["policy_cut"] == 1
    assert pair.worker.header["tunnels_open"] == 1
    pair.worker.commit(blobs.Delete(blobs.Kind.POLICY, "default/closed"))
    tunnel.status = ""
    tunnel.h2.send_headers(3, [(":method", "CONNECT"), (":authority", f"{pair.pods.server.ip}:8080")])
    while not tunnel.status:
        tunnel.turn()
    assert tunnel.status == "200"


# ---- what CONNECT says ---------------------------------------------------------------------------------------------------------------

def asks(tunnel: Tunnel, authority: str, **more: str) -> dict[str, str]:
    """The answer's head."""
    tunnel.h2.send_headers(1, [(":method", "CONNECT"), (":authority", authority), *more.items()])
    while True:
        tunnel.socket.sendall(tunnel.h2.data_to_send())
        data = tunnel.socket.recv(65536)
        assert data
        for event in tunnel.h2.receive_data(data):
            if isinstance(event, h2.events.ResponseReceived):
                return {name.decode(): value.decode() for name, value in event.headers}


def two_services(mesh: Mesh) -> None:
    """The server's 8080 is a port of two services."""
    second = Service("default", "second.default.svc.cluster.local", "second", (ip_address("10.96.0.11"),),
                     (ServicePort(7000, 8080, Protocol.TCP),))
    indexes = {SERVICE: SERVICE_INDEX, "default/second.default.svc.cluster.local": OTHER_SERVICE}
    ports = (WorkloadPort(SERVICE, TCP_PORT, 8080, Protocol.TCP), WorkloadPort(second.key, 7000, 8080, Protocol.TCP))
    configure(mesh, blobs.put_service(OTHER_SERVICE, second),
              blobs.put_workload(SERVER, workload(SERVER, mesh.pods.server, "server", *ports), indexes.__getitem__), protocol=Protocol.TCP)


def test_the_answer_says_who_we_are(pair: Mesh, dialled: Any) -> None:
    configure(pair, protocol=Protocol.TCP)
    pair.origin(8080, echo)
    assert asks(dialled(), f"{pair.pods.server.ip}:8080") == {
        ":status": "200", "baggage": "k8s.cluster.name=Kubernetes,k8s.namespace.name=default,k8s.pod.name=server-0"}


@pytest.mark.parametrize(("authority", "status", "service"), [
    (f"{HOST}:{TCP_PORT}", "200", SERVICE_INDEX),
    (f"{HOST.upper()}:{TCP_PORT}", "200", SERVICE_INDEX),
    ("second.default.svc.cluster.local:7000", "200", OTHER_SERVICE),
    (f"{HOST}:7000", "400", 0),  # not a port of that service
    (f"{HOST}:8080", "400", 0),  # the workload's port, not the service's
    ("third.default.svc.cluster.local:7000", "400", 0),
    (f"{HOST}:", "400", 0),
    (f"{HOST}:0", "400", 0),
    (f":{TCP_PORT}", "400", 0),
])
def test_a_service_of_the_workload_may_be_named(pair: Mesh, dialled: Any, authority: str, status: str, service: int) -> None:
    two_services(pair)
    origin = pair.origin(8080, echo)
    tunnel = dialled()
    assert asks(tunnel, authority)[":status"] == status
    tunnel.close()
    if status == "200":
        assert pair.worker.record()["service"] == service
        until(lambda: origin.peers, "the server has its connection")
    else:
        assert origin.peers == []


@pytest.mark.parametrize(("forwarded", "service"), [
    ('for="1.2.3.4:5";host=second.default.svc.cluster.local', OTHER_SERVICE),
    ('for=1.2.3.4; Host="SECOND.default.svc.cluster.local"', OTHER_SERVICE),
    ("host=second.default.svc.cluster.local", OTHER_SERVICE),
    ('for="1.2.3.4:5"', SERVICE_INDEX),
    ("host=third.default.svc.cluster.local", SERVICE_INDEX),
    ("for=a,host=second.default.svc.cluster.local", SERVICE_INDEX),  # of another hop
    ('host="second.default.svc.cluster.local', SERVICE_INDEX),
    (";;=;host", SERVICE_INDEX),
])
def test_forwarded_says_which_of_its_services_was_meant_and_nothing_else(pair: Mesh, dialled: Any, forwarded: str, service: int) -> None:
    two_services(pair)
    origin = pair.origin(8080, echo)
    tunnel = dialled()
    assert asks(tunnel, f"{pair.pods.server.ip}:8080", forwarded=forwarded)[":status"] == "200"
    tunnel.close()
    record = pair.worker.record()
    assert record["service"] == service
    assert record["downstream_remote"].startswith(pair.pods.other.ip), "`for` is not believed"
    assert until(lambda: origin.peers, "the server has its connection") == [pair.pods.other.ip]


# ---- what is listed --------------------------------------------------------------------------------------------------------------------

def test_tunnels_are_listed_for_the_operator(pair: Mesh) -> None:
    from ext.core import roster

    configure(pair, protocol=Protocol.TCP)
    pair.origin(8080, echo)
    connection = pair.dial(port=TCP_PORT)
    connection.sendall(b"hello")
    assert receive(connection, 5) == b"hello"

    def listed() -> dict[str, dict[str, Any]]:
        rows, total = roster.read_roster(pair.worker.stats)
        assert total >= len(rows)
        return {row["direction"]: row for row in rows if row["state"] == "open" and row["bytes"]}

    found = until(lambda: listed() if len(listed()) == 2 else None, "both ends are listed")
    assert found["outbound"]["pod"] == 1 and found["inbound"]["pod"] == 2
    assert found["outbound"]["peer"] == "spiffe://cluster.local/ns/default/sa/server" and found["inbound"]["peer"] == CLIENT_ID
    assert found["outbound"]["address"] == f"{pair.pods.server.ip}:15008"
    assert found["inbound"]["address"].startswith(f"{pair.pods.client.ip}:")
    assert {(row["streams"], row["streams_ever"], row["bytes"]) for row in found.values()} == {(1, 1, 10)}
    assert found["outbound"]["peer_until"] == found["inbound"]["until"] and found["outbound"]["until"] == found["inbound"]["peer_until"]
    connection.close()
    pair.quiet()
    until(lambda: roster.read_roster(pair.worker.stats) == ([], 0), "and no more when they have ended")


def test_a_pod_that_leaves_while_somebody_shakes_hands_is_forgotten_once(pair: Mesh) -> None:
    """It was given back twice: the worker went round in circles in its list of what to free, and died."""
    configure(pair, protocol=Protocol.TCP)
    pair.origin(8080, echo)
    to = pair.pods.server.ip
    for _ in range(2):
        stalled = netlink.in_netns(pair.pods.other.path, lambda: socket.create_connection((to, 15008), timeout=10))
        until(lambda: pair.worker.header["tunnels_open"] == 1, "the worker waits for a handshake")
        pair.worker.detach(2)
        until(lambda: pair.worker.header["tunnels_open"] == 0, "which nobody is there for any more")
        stalled.close()
        pair.attach_one(2)
    connection = pair.dial(port=TCP_PORT)
    connection.sendall(b"hello")
    assert receive(connection, 5) == b"hello"
    assert not pair.worker.ended()
