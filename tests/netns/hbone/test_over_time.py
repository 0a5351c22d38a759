"""What ends a tunnel that stands: a revocation list, a peer that is silent, nobody who uses it."""
from __future__ import annotations

import contextlib
import socket
import time
from pathlib import Path

import pytest

from agent.model.workload import Protocol
from tests.netns.hbone.test_peers import REMOTE_ID, Tunnel
from tests.support.hbone import SERVER_ID, configure, enrol, trust
from tests.support.mesh import TCP_PORT, Mesh, Web, echo, read_message, receive, request, response
from tests.support.pki import Authority, Issued
from tests.support.wait import until
from tests.support.worker import Worker

pytestmark = pytest.mark.netns
ROOT = Authority()


@pytest.fixture
def pair(mesh: Mesh) -> Mesh:
    enrol(mesh, ROOT)
    return mesh


def revoke(worker: Worker, *issued: Issued) -> None:
    worker.commit(trust(ROOT, crls=(ROOT.revoke(*issued),)))


def talk(mesh: Mesh, data: bytes = b"x") -> socket.socket:
    connection = mesh.dial(port=TCP_PORT)
    connection.sendall(data)
    assert receive(connection, len(data)) == data
    return connection


def ended(connection: socket.socket) -> bool:
    """A reset or an end comes within the socket's timeout."""
    with contextlib.suppress(ConnectionError):
        return connection.recv(1) == b""
    return True


# ---- revocation lists ---------------------------------------------------------------------------------------------------------

def test_a_list_ends_open_connections_to_whom_it_names(mesh: Mesh) -> None:
    issued = enrol(mesh, ROOT)
    configure(mesh, protocol=Protocol.TCP)
    mesh.origin(8080, echo)
    connection = talk(mesh)
    revoke(mesh.worker, ROOT.issue(REMOTE_ID))
    connection.sendall(b"still")
    assert receive(connection, 5) == b"still", "the list names somebody else"
    revoke(mesh.worker, issued[2])
    assert ended(connection)
    found = until(lambda: [one for one in mesh.worker.records() if one["reporter"] == "source"], "a record of the source")
    assert (found[0]["flag"], found[0]["details"]) == ("CERT_REVOKED", "peer_certificate_revoked")
    assert found[0]["failure"] == f"{SERVER_ID}: its certificate is revoked (certificate revoked)"
    until(lambda: mesh.worker.header["tunnels_open"] == 0, "both ends of it ended")
    assert mesh.worker.header["tunnels_revoked"] == 1
    failed = [key["flag"] for key, values in mesh.worker.series() if values["closed"] and key["reporter"] == "source"]
    assert failed == ["CERT_REVOKED"]
    with contextlib.suppress(ConnectionError, AssertionError):
        again = mesh.dial(port=TCP_PORT)
        again.sendall(b"x")
        assert receive(again, 1) == b"", "nor does it get a new one"
    mesh.quiet()


def test_a_list_ends_open_connections_from_whom_it_names(pair: Mesh, tmp_path: Path) -> None:
    configure(pair, protocol=Protocol.TCP)
    origin = pair.origin(8080, echo)
    good, bad = ROOT.issue(REMOTE_ID), ROOT.issue("spiffe://cluster.local/ns/default/sa/stolen")
    tunnels = []
    for issued in (good, bad):
        tunnels.append(Tunnel.dial(pair.pods.other, pair.pods.server.ip, issued, tmp_path, ROOT))
        assert tunnels[-1].ask(f"{pair.pods.server.ip}:8080") == "200"
        assert tunnels[-1].exchange(b"abc", 3) == b"abc"
    revoke(pair.worker, bad)
    record = pair.worker.record()
    assert record["failure"] == "spiffe://cluster.local/ns/default/sa/stolen: its certificate is revoked (certificate revoked)"
    assert (record["reporter"], record["flag"]) == ("destination", "CERT_REVOKED")
    until(lambda: origin.open == 1, "the application's connection ended too")
    with pytest.raises((OSError, AssertionError)):
        tunnels[1].turn()
        tunnels[1].turn()
    assert tunnels[0].exchange(b"def", 6) == b"abcdef"
    for one in tunnels:
        one.close()
    pair.quiet()


def test_a_tunnel_that_carries_nothing_ends_too_and_is_told_of(pair: Mesh, tmp_path: Path) -> None:
    configure(pair, protocol=Protocol.TCP)
    bad = ROOT.issue(REMOTE_ID)
    tunnel = Tunnel.dial(pair.pods.other, pair.pods.server.ip, bad, tmp_path, ROOT)
    until(lambda: pair.worker.header["tunnels_opened"] == 1, "it stands")
    revoke(pair.worker, bad)
    record = pair.worker.record()
    assert REMOTE_ID in record["failure"] and record["flag"] == "CERT_REVOKED"
    assert record["downstream_remote"].startswith(pair.pods.other.ip)
    tunnel.close()
    pair.quiet()


def test_a_dialled_tunnel_that_carries_nothing_ends_too_and_is_told_of(mesh: Mesh) -> None:
    issued = enrol(mesh, ROOT)
    configure(mesh, protocol=Protocol.TCP)
    mesh.origin(8080, echo)
    talk(mesh).close()
    until(lambda: [one for one in mesh.worker.records() if one["reporter"] == "source"], "its only connection ended")
    revoke(mesh.worker, issued[2])
    [record] = until(lambda: [one for one in mesh.worker.records() if one["reporter"] == "source"], "a record of it")
    until(lambda: mesh.worker.header["tunnels_open"] == 0, "the tunnel ended")
    assert record["failure"] == f"{SERVER_ID}: its certificate is revoked (certificate revoked)"
    assert (record["flag"], record["details"]) == ("CERT_REVOKED", "peer_certificate_revoked")
    assert record["downstream_local"] == f"{mesh.pods.server.ip}:15008"
    assert record["downstream_remote"].startswith(f"{mesh.pods.client.ip}:")
    mesh.quiet()


def test_a_request_through_a_tunnel_that_a_list_ends_gets_its_503(mesh: Mesh) -> None:
    issued = enrol(mesh, ROOT)
    configure(mesh)
    mesh.origin(8080, Web(response(b"one")))
    connection = mesh.dial()
    connection.sendall(request())
    assert read_message(connection).status == 200
    revoke(mesh.worker, issued[2])
    until(lambda: mesh.worker.header["tunnels_open"] == 0, "the tunnel ended")
    connection.sendall(request())
    assert read_message(connection).status == 503, "the client's connection lives, the server is not believed any more"
    connection.close()
    mesh.quiet()
    records = [one for one in mesh.worker.records() if one["reporter"] == "source"]
    assert [one["code"] for one in records] == [200, 0, 503], "the tunnel's own is between them: it carried no request when it ended"
    assert ["its certificate is revoked" in one["failure"] for one in records] == [False, True, True]


def test_many_tunnels_are_asked_about_and_only_the_listed_end(pair: Mesh, tmp_path: Path) -> None:
    configure(pair, protocol=Protocol.TCP)
    issued = [ROOT.issue(f"spiffe://cluster.local/ns/default/sa/r{number}") for number in range(12)]
    tunnels = [Tunnel.dial(pair.pods.other, pair.pods.server.ip, one, tmp_path, ROOT) for one in issued]
    until(lambda: pair.worker.header["tunnels_opened"] == 12, "all stand")
    revoke(pair.worker, *issued[::2])
    until(lambda: pair.worker.header["tunnels_open"] == 6, "half of them ended")
    assert pair.worker.header["tunnels_revoked"] == 6
    pair.origin(8080, echo)
    for one in tunnels[1::2]:
        assert one.ask(f"{pair.pods.server.ip}:8080") == "200"
    for one in tunnels:
        one.close()
    pair.quiet()


# ---- time -----------------------------------------------------------------------------------------------------------------------

def test_a_peer_that_is_silent_loses_its_tunnel(pair: Mesh, tmp_path: Path) -> None:
    configure(pair, protocol=Protocol.TCP)
    origin = pair.origin(8080, echo)
    pair.settings(tunnel_ping_ms=100, tunnel_pong_ms=3_000)
    tunnel = Tunnel.dial(pair.pods.other, pair.pods.server.ip, ROOT.issue(REMOTE_ID), tmp_path, ROOT)
    assert tunnel.ask(f"{pair.pods.server.ip}:8080") == "200"
    until(lambda: pair.worker.header["tunnels_silent"] == 1, "no answer to a PING", timeout=20)
    until(lambda: (origin.open, pair.worker.header["tunnels_open"]) == (0, 0), "its connection ended with it")
    tunnel.close()
    pair.quiet()


def test_a_peer_that_answers_keeps_its_tunnel(pair: Mesh) -> None:
    configure(pair, protocol=Protocol.TCP)
    pair.origin(8080, echo)
    pair.settings(tunnel_ping_ms=50, tunnel_pong_ms=30_000)
    connection = talk(pair)
    begun = pair.worker.header["loop_turns"]
    until(lambda: pair.worker.header["loop_turns"] > begun + 40, "many PINGs went and came", timeout=20)
    connection.sendall(b"y")
    assert receive(connection, 1) == b"y"
    assert pair.worker.header["tunnels_silent"] == 0
    connection.close()
    pair.quiet()


def test_a_tunnel_that_nobody_uses_ends_and_one_that_is_used_does_not(pair: Mesh) -> None:
    configure(pair, protocol=Protocol.TCP)
    pair.origin(8080, echo)
    pair.settings(tunnel_idle_ms=300)
    connection = talk(pair)
    begun = time.monotonic()
    until(lambda: time.monotonic() > begun + 1, "several times the bound has passed")
    assert (pair.worker.header["tunnels_open"], pair.worker.header["tunnels_idle"]) == (2, 0), "both ends of one"
    connection.close()
    until(lambda: (pair.worker.header["tunnels_open"], pair.worker.header["tunnels_idle"]) == (0, 1), "it ended", timeout=20)
    talk(pair).close()  # the next connection gets a new one
    pair.quiet()
