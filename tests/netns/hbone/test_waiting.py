"""Certificates that are not there yet: connections wait for them, a bounded number and a bounded time, and fail with the reason."""
from __future__ import annotations

import contextlib
import threading
from pathlib import Path

import pytest

from agent.model.workload import Protocol
from tests.netns.hbone.test_peers import REMOTE_ID, Tunnel
from tests.support.hbone import configure, enrol
from tests.support.mesh import AUTO_PORT, CLIENT, SERVER, TCP_PORT, Mesh, Web, echo, read_message, receive, receive_all, request, response
from tests.support.pki import Authority
from tests.support.wait import until

pytestmark = pytest.mark.netns
ROOT = Authority()


def sources(mesh: Mesh) -> list[dict[str, object]]:
    return [one for one in mesh.worker.records() if one["reporter"] == "source"]


def test_a_connection_waits_for_its_certificate(mesh: Mesh) -> None:
    enrol(mesh, ROOT, who=(SERVER,))
    configure(mesh, protocol=Protocol.TCP)
    mesh.settings(hold_timeout_ms=30_000)
    mesh.origin(8080, echo)
    connection = mesh.dial(port=TCP_PORT)
    connection.sendall(b"early")
    until(lambda: mesh.worker.header["held"] == 1, "it waits")
    assert mesh.worker.header["tunnels_open"] == 0
    enrol(mesh, ROOT, who=(CLIENT,))
    assert receive(connection, 5) == b"early"
    assert mesh.worker.header["held"] == 0
    connection.close()
    mesh.quiet()


def test_nothing_of_its_trust_domain_is_known_yet(mesh: Mesh) -> None:
    configure(mesh, protocol=Protocol.TCP)
    mesh.settings(hold_timeout_ms=30_000)
    mesh.origin(8080, echo)
    connection = mesh.dial(port=TCP_PORT)
    connection.sendall(b"early")
    until(lambda: mesh.worker.header["held"] == 1, "it waits")
    enrol(mesh, ROOT)
    assert receive(connection, 5) == b"early"
    connection.close()
    mesh.quiet()


def test_requests_wait_too(mesh: Mesh) -> None:
    enrol(mesh, ROOT, who=(SERVER,))
    configure(mesh)
    mesh.settings(hold_timeout_ms=30_000)
    mesh.origin(8080, Web(response(b"late"), response(b"later")))
    connections = [mesh.dial(), mesh.dial(port=AUTO_PORT)]
    for connection in connections:
        connection.sendall(request())
    until(lambda: mesh.worker.header["held"] == 2, "both wait")
    enrol(mesh, ROOT, who=(CLIENT,))
    for connection in connections:
        assert read_message(connection).status == 200
        connection.close()
    mesh.quiet()


def test_a_request_whose_time_is_over_gets_its_503_and_the_next_waits_again(mesh: Mesh) -> None:
    enrol(mesh, ROOT, who=(SERVER,))
    configure(mesh)
    mesh.settings(hold_timeout_ms=200)
    mesh.origin(8080, Web(response(b"now")))
    connection = mesh.dial()
    connection.sendall(request())
    assert read_message(connection).status == 503
    record = until(lambda: sources(mesh), "a record")[0]
    assert (record["flag"], record["failure"]) == ("UF", "no certificate was signed for its identity (yet)")
    mesh.settings(hold_timeout_ms=30_000)
    connection.sendall(request())
    until(lambda: mesh.worker.header["held"] == 1, "it waits")
    enrol(mesh, ROOT, who=(CLIENT,))
    assert read_message(connection).status == 200
    connection.close()
    mesh.quiet()


def test_no_more_wait_than_may(mesh: Mesh) -> None:
    enrol(mesh, ROOT, who=(SERVER,))
    configure(mesh, protocol=Protocol.TCP)
    mesh.settings(hold_timeout_ms=30_000, hold_connections=4)
    mesh.origin(8080, echo)
    connections = []
    for _ in range(8):
        with contextlib.suppress(ConnectionError):  # a reset may come before connect returns
            connections.append(mesh.dial(port=TCP_PORT))
    until(lambda: mesh.worker.header["held"] + mesh.worker.header["refused_held"] >= 8, "all are decided")
    waiting = mesh.worker.header["held"]
    assert 1 <= waiting <= 4
    assert all("no certificate was signed" in str(one["failure"]) for one in sources(mesh))
    enrol(mesh, ROOT, who=(CLIENT,))
    answered = 0
    for connection in connections:
        with contextlib.suppress(ConnectionError, AssertionError):
            connection.sendall(b"x")
            answered += receive(connection, 1) == b"x"
        connection.close()
    assert answered == waiting
    mesh.quiet()


def test_a_client_that_goes_while_it_waits_is_let_go(mesh: Mesh) -> None:
    enrol(mesh, ROOT, who=(SERVER,))
    configure(mesh, protocol=Protocol.TCP)
    mesh.settings(hold_timeout_ms=1_000)
    connection = mesh.dial(port=TCP_PORT)
    until(lambda: mesh.worker.header["held"] == 1, "it waits")
    connection.close()
    until(lambda: mesh.worker.header["downstream_open"] == 0, "it is gone")
    mesh.quiet()


# ---- at 15008 -------------------------------------------------------------------------------------------------------------------

def test_a_tunnel_from_elsewhere_waits_in_the_backlog(mesh: Mesh, tmp_path: Path) -> None:
    enrol(mesh, ROOT, who=(CLIENT,))
    configure(mesh, protocol=Protocol.TCP)
    mesh.settings(hold_timeout_ms=30_000)
    mesh.origin(8080, echo)
    made: list[Tunnel] = []
    dialling = threading.Thread(target=lambda: made.append(
        Tunnel.dial(mesh.pods.other, mesh.pods.server.ip, ROOT.issue(REMOTE_ID), tmp_path, ROOT)))
    dialling.start()
    until(lambda: mesh.pods.server.run("ss", "-Htn", "state", "established", "sport = :15008").stdout.strip(), "it is in the backlog")
    assert not made and mesh.worker.header["tunnels_open"] == 0
    enrol(mesh, ROOT, who=(SERVER,))
    dialling.join(10)
    assert made[0].ask(f"{mesh.pods.server.ip}:8080") == "200"
    made[0].close()
    mesh.quiet()


def test_after_its_time_a_tunnel_from_elsewhere_is_reset_with_the_reason(mesh: Mesh) -> None:
    enrol(mesh, ROOT, who=(CLIENT,))
    configure(mesh, protocol=Protocol.TCP)
    mesh.settings(hold_timeout_ms=200)
    for _ in range(2):  # the first has waited; who comes later need not
        with pytest.raises(ConnectionError):
            receive_all(mesh.dial(mesh.pods.server.ip, 15008, mesh.pods.other))
        record = mesh.worker.record()
        assert (record["flag"], record["details"]) == ("DPE", "peer_not_trusted")
        assert record["failure"] == "no certificate was signed for its identity (yet)"
    mesh.quiet()
