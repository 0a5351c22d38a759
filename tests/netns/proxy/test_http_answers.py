"""What the worker answers itself: status, flag and details of what cannot be routed, is malformed, or takes too long."""
from __future__ import annotations

import socket
import threading
from ipaddress import ip_address
from typing import Any

import pytest

from agent.model.routing import Endpoint, WeightedCluster
from tests.support.mesh import (
    AUTO_PORT,
    HOST,
    HTTP_PORT,
    Mesh,
    any_path,
    ask,
    cluster,
    destination,
    everything,
    read_message,
    receive_all,
    request,
    start,
)
from tests.support.wait import until

pytestmark = pytest.mark.netns


def outcome(mesh: Mesh, reporter: str = "source") -> tuple[int, str]:
    found = until(lambda: [record for record in mesh.worker.records() if record["reporter"] == reporter], "a record")
    assert len(found) == 1, found
    return found[0]["code"], found[0]["flag"]


def test_no_route_is_404_nr(mesh: Mesh) -> None:
    mesh.configure(cluster("all", mesh.endpoint()), destination(HTTP_PORT, http=()))
    connection = mesh.dial()
    for _ in range(2):  # and the connection lives on
        connection.sendall(request())
        assert read_message(connection).status == 404
        assert outcome(mesh) == (404, "NR")


def test_no_endpoint_is_503_uh(mesh: Mesh) -> None:
    mesh.configure(cluster("all"), destination(HTTP_PORT, http=(any_path(WeightedCluster("all", 1)),)))
    assert ask(mesh).status == 503
    assert outcome(mesh) == (503, "UH")


def test_an_unknown_destination_of_the_mesh_is_503_nc(mesh: Mesh) -> None:
    mesh.configure(destination(HTTP_PORT))
    assert ask(mesh).status == 503
    assert outcome(mesh) == (503, "NC")


@pytest.mark.parametrize("port", [HTTP_PORT, AUTO_PORT])
def test_configuration_that_never_comes_is_503_nc_after_one_hold(mesh: Mesh, port: int) -> None:
    mesh.configure()
    mesh.settings(hold_timeout_ms=600)
    connection = mesh.dial(port=port)
    connection.settimeout(1.1)
    connection.sendall(request())
    assert read_message(connection).status == 503
    assert outcome(mesh) == (503, "NC")


def test_a_missing_cluster_is_503_nc(mesh: Mesh) -> None:
    mesh.configure(destination(HTTP_PORT, http=(any_path(WeightedCluster("absent", 1)),)))
    assert ask(mesh).status == 503
    assert outcome(mesh) == (503, "NC")


def test_a_refused_connection_is_503_uf(mesh: Mesh) -> None:
    address = Endpoint(ip_address(mesh.pods.other.ip), 7999)
    mesh.configure(cluster("all", address), destination(HTTP_PORT, http=(any_path(WeightedCluster("all", 1)),)))
    assert ask(mesh, method="POST", body=b"abc").status == 503
    assert outcome(mesh) == (503, "UF")


def test_a_connect_that_nobody_answers_is_503_uf_after_the_clusters_timeout(mesh: Mesh) -> None:
    nobody = Endpoint(ip_address("10.244.1.250"), 80)
    mesh.configure(cluster("all", nobody, connect_timeout_ms=300),
                   destination(HTTP_PORT, http=(any_path(WeightedCluster("all", 1)),)))
    assert ask(mesh).status == 503
    assert outcome(mesh) == (503, "UF")


def test_a_slow_server_is_504_ut_after_the_routes_timeout(mesh: Mesh) -> None:
    done = threading.Event()

    def slow(connection: socket.socket) -> None:
        read_message(connection)
        done.wait(10)

    mesh.configure(*everything(mesh, timeout_ms=300))
    mesh.origin(8080, slow)
    assert ask(mesh).status == 504
    assert outcome(mesh) == (504, "UT")
    done.set()


def test_a_server_that_closes_without_an_answer_is_503_uc(mesh: Mesh) -> None:
    def rude(connection: socket.socket) -> None:
        read_message(connection)

    mesh.configure(*everything(mesh))
    mesh.origin(8080, rude)
    assert ask(mesh).status == 503
    both: list[dict[str, Any]] = []

    def collect() -> bool:
        both.extend(mesh.worker.records())
        return len(both) == 2

    until(collect, "records of both sides")
    assert {(record["reporter"], record["code"], record["flag"]) for record in both} == {
        ("destination", 503, "UC"), ("source", 503, "-")}  # the outbound side was given an answer


def test_a_server_that_speaks_garbage_is_502_upe(mesh: Mesh) -> None:
    start(mesh, b"220 smtp.example ESMTP\r\n\r\n")
    assert ask(mesh).status == 502
    assert outcome(mesh, "destination") == (502, "UPE")


@pytest.mark.parametrize("head", [b"content-length: 100\r\n", b"transfer-encoding: chunked\r\n"])
def test_a_response_cut_short_is_not_taken_for_complete(mesh: Mesh, head: bytes) -> None:
    def cut(connection: socket.socket) -> None:
        read_message(connection)
        connection.sendall(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n5\r\nabc")

    mesh.configure(*everything(mesh))
    mesh.origin(8080, cut)
    with pytest.raises((ConnectionError, ValueError)):
        ask(mesh)
    until(lambda: mesh.worker.header["downstream_open"] == 0, "both hops ended")
    assert {record["flag"] for record in mesh.worker.records()} == {"UC"}


@pytest.mark.parametrize(("raw", "status"), [
    (b"GET / HTTP/1.1\r\n\r\n", 400), (b"GET  / HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: x\r\nA : b\r\n\r\n", 400),
    (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n", 501),
    (b"GET / HTTP/2.0\r\nHost: x\r\n\r\n", 505),
    (b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"b" * 62_000 + b"\r\n\r\n", 431),
    (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
])
def test_malformed_requests_are_refused_with_dpe_and_reach_nobody(mesh: Mesh, raw: bytes, status: int) -> None:
    web = start(mesh)
    connection = mesh.dial()
    connection.sendall(raw)
    answer = read_message(connection)
    assert (answer.status, answer.one("connection")) == (status, "close")
    assert receive_all(connection) == b""
    assert outcome(mesh) == (status, "DPE")
    assert web.seen == []


def test_a_slow_head_is_408(mesh: Mesh) -> None:
    start(mesh)
    mesh.settings(request_head_timeout_ms=200)
    connection = mesh.dial()
    connection.sendall(b"GET / HT")
    assert read_message(connection).status == 408
    assert outcome(mesh) == (408, "SI")


def test_an_idle_connection_is_closed_cleanly(mesh: Mesh) -> None:
    start(mesh)
    mesh.settings(http_idle_timeout_ms=200)
    connection = mesh.dial()
    connection.sendall(request())
    assert read_message(connection).status == 200
    assert connection.recv(1) == b""


def test_a_stalled_body_ends_by_the_stream_idle_timeout(mesh: Mesh) -> None:
    start(mesh)
    mesh.settings(stream_idle_timeout_ms=300)
    connection = mesh.dial()
    connection.sendall(f"POST / HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: 10\r\n\r\nabc".encode())
    assert read_message(connection).status == 408
    assert outcome(mesh) == (408, "SI")
