"""HTTP/1.1 through both hops of the worker: what the origin receives, what the client receives, and what is counted."""
from __future__ import annotations

import hashlib
import os
import re
import socket
import threading
from typing import Any

import pytest

from agent.model.routing import HeaderEdit, MatchKind, NamedMatch, Route, RouteMatch, StringMatch, WeightedCluster
from tests.support.mesh import (
    AUTO_PORT,
    CLIENT,
    HOST,
    HTTP_PORT,
    SERVER,
    SERVICE_INDEX,
    VIP,
    VIP6,
    Mesh,
    Web,
    any_path,
    ask,
    cluster,
    destination,
    everything,
    read_message,
    receive,
    receive_all,
    receive_until,
    request,
    response,
    start,
)
from tests.support.wait import until

pytestmark = pytest.mark.netns


@pytest.mark.parametrize("port", [HTTP_PORT, AUTO_PORT])
def test_a_request_reaches_the_server_and_its_answer_the_client(mesh: Mesh, port: int) -> None:
    web = start(mesh, response(b"hello", "200 Fine", "X-Own: 1"))
    connection = mesh.dial(port=port)
    connection.sendall(request("/a?b=c", "X-Mine: 2"))
    answer = read_message(connection)
    assert (answer.first, answer.body, answer.one("x-own")) == ("HTTP/1.1 200 Fine", b"hello", "1")
    (seen,) = web.seen
    assert (seen.first, seen.one("host"), seen.one("x-mine")) == ("GET /a?b=c HTTP/1.1", HOST, "2")
    assert re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", seen.one("x-request-id"))


def test_a_request_to_a_services_ipv6_address_goes_on_over_ipv6(mesh: Mesh) -> None:
    start(mesh)  # the endpoint is the server's IPv4 address
    for address, wanted in ((VIP6, f"[{mesh.pods.server.ip6}]:8080"), (VIP, f"{mesh.pods.server.ip}:8080")):
        connection = mesh.dial(address)
        connection.sendall(request("/"))
        assert read_message(connection).first == "HTTP/1.1 200 OK"
        connection.close()
        records: list[dict[str, Any]] = []

        def both(records: list[dict[str, Any]] = records) -> bool:
            records += mesh.worker.records()
            return len(records) == 2

        until(both, "a record of each hop")
        assert {record["upstream_remote"] for record in records} == {wanted}


def test_both_sides_count_and_log_a_request(mesh: Mesh) -> None:
    start(mesh)
    ask(mesh, "/path?x=1", "User-Agent: test/1", "X-Request-Id: id-1", method="POST", body=b"12345")

    def found() -> dict[str, tuple[int, int]]:
        return {key["reporter"]: (key["code"], sum(values["duration"])) for key, values in mesh.worker.series()
                if (key["protocol"], key["source"], key["destination"], key["service"]) ==
                ("http", CLIENT, SERVER, SERVICE_INDEX)}

    until(lambda: found() == {"source": (200, 1), "destination": (200, 1)}, "both counted")
    records = until(lambda: mesh.worker.records(), "records")
    assert sorted(record["reporter"] for record in records) == ["destination", "source"]
    for record in records:
        wanted = {"method": "POST", "path": "/path?x=1", "authority": HOST, "user_agent": "test/1", "request_id": "id-1",
                  "code": 200, "flag": "-", "received": 5, "sent": 2, "details": "via_upstream"}
        assert {name: record[name] for name in wanted} == wanted


def test_requests_share_a_connection_on_both_sides(mesh: Mesh) -> None:
    web = start(mesh)
    connection = mesh.dial()
    for _ in range(20):
        connection.sendall(request())
        assert read_message(connection).body == b"ok"
    assert len(web.seen) == 20
    assert len(mesh.origins[0].peers) == 1
    assert mesh.worker.header["accepted"] == 2  # outbound and inbound


def test_pipelined_requests_are_answered_in_order(mesh: Mesh) -> None:
    start(mesh, *(response(str(n).encode()) for n in range(50)))
    connection = mesh.dial()
    connection.sendall(b"".join(request(f"/{n}") for n in range(50)))
    assert [read_message(connection).body for _ in range(50)] == [str(n).encode() for n in range(50)]


@pytest.mark.parametrize("size", [0, 1, 16_384, 1_000_003, 16 << 20])
def test_bodies_of_known_length_pass_both_ways(mesh: Mesh, size: int) -> None:
    def mirror(connection: socket.socket) -> None:
        connection.sendall(response(read_message(connection).body))

    mesh.configure(*everything(mesh))
    mesh.origin(8080, mirror)
    said = os.urandom(size)
    connection = mesh.dial()
    sender = threading.Thread(target=connection.sendall, args=(request(method="POST", body=said) if size else request(),))
    sender.start()
    heard = read_message(connection).body
    sender.join()
    assert hashlib.sha256(heard).digest() == hashlib.sha256(said).digest()
    connection.close()
    mesh.quiet()


def test_chunked_bodies_and_trailers_pass_both_ways(mesh: Mesh) -> None:
    web = start(mesh, b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntrailer: x-sum\r\n\r\n"
                b"3\r\nabc\r\n10\r\n0123456789abcdef\r\n0\r\nx-sum: 9\r\n\r\n")
    connection = mesh.dial()
    for _ in range(2):
        connection.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nwxyz\r\n0\r\nx-t: 1\r\n\r\n")
        answer = read_message(connection)
        assert (answer.body, answer.trailers) == (b"abc0123456789abcdef", [("x-sum", "9")])
    assert [(seen.body, seen.trailers) for seen in web.seen] == [(b"wxyz", [("x-t", "1")])] * 2
    assert len(mesh.origins[0].peers) == 1


def test_a_body_until_close_ends_with_the_connection(mesh: Mesh) -> None:
    def old(connection: socket.socket) -> None:
        read_message(connection)
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n" + b"d" * 100_000)

    mesh.configure(*everything(mesh))
    mesh.origin(8080, old)
    answer = ask(mesh)
    assert (answer.body, answer.one("connection")) == (b"d" * 100_000, "close")


def test_head_204_and_304_have_no_body_and_keep_the_connection(mesh: Mesh) -> None:
    start(mesh, b"HTTP/1.1 200 OK\r\ncontent-length: 500\r\n\r\n", b"HTTP/1.1 204 No Content\r\n\r\n",
          b"HTTP/1.1 304 Not Modified\r\ncontent-length: 7\r\n\r\n", response(b"end"))
    connection = mesh.dial()
    connection.sendall(request(method="HEAD"))
    assert read_message(connection, head_only=True).one("content-length") == "500"
    for wanted in (204, 304, 200):
        connection.sendall(request())
        assert read_message(connection).status == wanted


def test_an_http_1_0_client_gets_its_answer_and_the_connection_ends(mesh: Mesh) -> None:
    start(mesh)
    connection = mesh.dial()
    connection.sendall(b"GET / HTTP/1.0\r\nHost: x\r\n\r\n")
    assert receive_all(connection).endswith(b"\r\n\r\nok")


def test_a_client_that_closed_its_side_still_gets_the_answer(mesh: Mesh) -> None:
    start(mesh)
    connection = mesh.dial()
    connection.sendall(request())
    connection.shutdown(socket.SHUT_WR)
    assert receive_all(connection).endswith(b"\r\n\r\nok")
    mesh.quiet()


def test_expect_100_continue_goes_all_the_way(mesh: Mesh) -> None:
    def careful(connection: socket.socket) -> None:
        head = receive_until(connection, b"\r\n\r\n")
        assert b"100-continue" in head.lower()
        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        assert receive(connection, 5) == b"hello"
        connection.sendall(response(b"thanks"))

    mesh.configure(*everything(mesh))
    mesh.origin(8080, careful)
    connection = mesh.dial()
    connection.sendall(f"POST / HTTP/1.1\r\nHost: {HOST}\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n".encode())
    assert read_message(connection).status == 100
    connection.sendall(b"hello")
    assert read_message(connection).body == b"thanks"


def test_an_early_answer_ends_both_connections(mesh: Mesh) -> None:
    def refuse(connection: socket.socket) -> None:
        receive_until(connection, b"\r\n\r\n")
        connection.sendall(response(b"too big", "413 Content Too Large"))
        receive_all(connection)

    mesh.configure(*everything(mesh))
    mesh.origin(8080, refuse)
    connection = mesh.dial()
    connection.sendall(f"POST / HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: 1000000\r\n\r\n".encode() + b"x" * 10_000)
    answer = read_message(connection)
    assert (answer.status, answer.body, answer.one("connection")) == (413, b"too big", "close")
    assert receive_all(connection) == b""
    connection.close()
    mesh.quiet()


def test_an_upgraded_connection_is_a_tunnel(mesh: Mesh) -> None:
    def upgrade(connection: socket.socket) -> None:
        head = receive_until(connection, b"\r\n\r\n").lower()
        assert b"upgrade: chat" in head
        connection.sendall(b"HTTP/1.1 101 Switching Protocols\r\nupgrade: chat\r\nconnection: upgrade\r\n\r\nfirst")
        while data := connection.recv(100):
            connection.sendall(data.upper())

    mesh.configure(*everything(mesh))
    mesh.origin(8080, upgrade)
    connection = mesh.dial()
    connection.sendall(request("/", "Connection: Upgrade", "Upgrade: chat"))
    answer = read_message(connection)
    assert (answer.status, answer.one("upgrade")) == (101, "chat")
    assert receive(connection, 5) == b"first"
    for _ in range(3):
        connection.sendall(b"abc")
        assert receive(connection, 3) == b"ABC"
    connection.shutdown(socket.SHUT_WR)
    assert connection.recv(10) == b""
    mesh.quiet()
    assert {record["code"] for record in mesh.worker.records()} == {101}


# ---- routing ----------------------------------------------------------------------------------------------------------

def test_routes_decide_by_header_path_and_weight(mesh: Mesh) -> None:
    def named(name: bytes) -> Web:
        return Web(response(name))

    special = Route("jason", RouteMatch(StringMatch(MatchKind.PREFIX, "/"), headers=(
        NamedMatch("end-user", StringMatch(MatchKind.EXACT, "jason")),)), (WeightedCluster("v2", 1),))
    split = Route("split", RouteMatch(StringMatch(MatchKind.PREFIX, "/split")),
                  (WeightedCluster("v1", 50), WeightedCluster("v2", 50)))
    rest = Route("rest", RouteMatch(StringMatch(MatchKind.EXACT, "/v1")), (WeightedCluster("v1", 1),))
    mesh.configure(cluster("v1", mesh.endpoint(8081)), cluster("v2", mesh.endpoint(8082)),
                   destination(HTTP_PORT, http=(special, split, rest)))
    mesh.origin(8081, named(b"v1"))
    mesh.origin(8082, named(b"v2"))
    assert ask(mesh, "/v1").body == b"v1"
    assert ask(mesh, "/v1", "End-User: jason").body == b"v2"
    assert ask(mesh, "/elsewhere").status == 404
    connection = mesh.dial()
    bodies = []
    for _ in range(200):
        connection.sendall(request("/split"))
        bodies.append(read_message(connection).body)
    assert 60 < bodies.count(b"v1") < 140


def test_headers_are_edited_both_ways(mesh: Mesh) -> None:
    web = Web(response(b"x", "200 OK", "x-gone: 1", "x-old: 1"))
    one = WeightedCluster("all", 1)
    route = any_path(one, request=HeaderEdit(remove=("x-secret",), set=(("x-set", "new"),), add=(("x-add", "more"),)),
                     response=HeaderEdit(remove=("x-gone",), set=(("x-old", "2"),)))
    mesh.configure(cluster("all", mesh.endpoint()), destination(HTTP_PORT, http=(route,)))
    mesh.origin(8080, web)
    answer = ask(mesh, "/", "X-Secret: 1", "X-Set: old", "X-Add: some")
    assert (answer.all("x-gone"), answer.one("x-old")) == ([], "2")
    (seen,) = web.seen
    assert (seen.all("x-secret"), seen.one("x-set"), seen.all("x-add")) == ([], "new", ["some", "more"])


def test_a_new_route_acts_on_the_next_request_of_a_live_connection(mesh: Mesh) -> None:
    start(mesh)
    other = Web(response(b"second"))
    mesh.origin(8081, other)
    connection = mesh.dial()
    connection.sendall(request())
    assert read_message(connection).body == b"ok"
    mesh.worker.commit(cluster("b", mesh.endpoint(8081)), destination(HTTP_PORT, http=(any_path(WeightedCluster("b", 1)),)))
    connection.sendall(request())
    assert read_message(connection).body == b"second"


def test_a_request_is_held_until_its_configuration_comes(mesh: Mesh) -> None:
    mesh.configure()
    mesh.origin(8080, Web())
    connection = mesh.dial()
    connection.sendall(request())
    until(lambda: mesh.worker.header["held"] == 1, "held")
    until(lambda: mesh.worker.misses, "the worker asks")
    assert mesh.worker.misses == [f"ns=default|{HOST}:{HTTP_PORT}"]
    mesh.worker.commit(*everything(mesh))
    assert read_message(connection).body == b"ok"
