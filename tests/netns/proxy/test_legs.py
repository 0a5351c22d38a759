"""What a log record says of the TCP connections on both sides, held against what `ss` says of the same sockets."""
from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from agent.dataplane import blobs
from agent.model.settings import ProxySettings
from agent.model.workload import Protocol
from tests.netns.proxy.test_near import start as start_near
from tests.support.hbone import configure, enrol
from tests.support.mesh import TCP_PORT, Mesh, Web, ask, echo, everything, read_message, receive, request, response, start
from tests.support.netns import Netns
from tests.support.pki import Authority
from tests.support.wait import until

pytestmark = pytest.mark.netns


@pytest.fixture
def asked(mesh: Mesh) -> Mesh:
    mesh.worker.commit(blobs.put_settings(ProxySettings(access_log_tcp=True)))
    return mesh


class Records:
    """Those of one worker, by reporter."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh, self._found = mesh, list[dict[str, Any]]()

    def next(self, reporter: str) -> dict[str, Any]:
        def there() -> dict[str, Any] | None:
            self._found += self._mesh.worker.records()
            return next((one for one in self._found if one["reporter"] == reporter), None)

        found: dict[str, Any] = until(there, f"a record of the {reporter}")
        self._found.remove(found)
        return found


def by_ss(netns: Netns, local: str) -> tuple[int, int, int]:
    """Smoothed and least round trip in us, retransmitted segments: of the socket with that local `ip:port`."""
    said = netns.run("ss", "-Htin", f"sport = :{local.rpartition(':')[2]}").stdout
    rtt, least = re.search(r"\brtt:([\d.]+)/", said), re.search(r"\bminrtt:([\d.]+)", said)
    assert rtt and least, said
    again = re.search(r"\bretrans:\d+/(\d+)", said)  # left out while there are none
    return round(float(rtt[1]) * 1000), round(float(least[1]) * 1000), int(again[1]) if again else 0


@contextmanager
def losing_one(mesh: Mesh) -> Iterator[None]:
    """The server never gets the next segment with data that comes by the network from the client."""
    rule = ["INPUT", "!", "-i", "lo", "-s", mesh.pods.client.ip, "-p", "tcp", "--tcp-flags", "PSH", "PSH", "-m", "statistic", "--mode",
            "nth", "--every", "1000000", "--packet", "0", "-j", "DROP"]
    mesh.pods.server.run("iptables-legacy", "-I", *rule)
    try:
        yield
    finally:
        mesh.pods.server.run("iptables-legacy", "-D", *rule)


def test_of_a_request_it_is_what_ss_says_of_the_pooled_connection_at_its_end(asked: Mesh) -> None:
    start(asked, response(b"one"), response(b"two"))
    records = Records(asked)
    connection = asked.dial()
    for body in (b"one", b"two"):
        connection.sendall(request("/x"))
        assert read_message(connection).body == body
        source, destination = records.next("source"), records.next("destination")
        assert source["upstream_leg"] == ("socket", *by_ss(asked.pods.client, source["upstream_local"]))
        for record in (source, destination):
            for leg in ("downstream_leg", "upstream_leg"):
                kind, rtt, least, _ = record[leg]
                assert (kind, 0 < least <= rtt * 8) == ("socket", True), record


def test_a_segment_that_was_lost_is_told_of_the_connection_that_lost_it_and_of_no_other(asked: Mesh) -> None:
    asked.configure(*everything(asked), protocol=Protocol.TCP)
    asked.origin(8080, echo)
    records = Records(asked)
    connection = asked.dial(port=TCP_PORT)
    connection.sendall(b"a" * 100)
    assert receive(connection, 100) == b"a" * 100
    with losing_one(asked):
        connection.sendall(b"b" * 100)
        assert receive(connection, 100) == b"b" * 100
    said = asked.pods.client.run("ss", "-Htin", "dst", asked.pods.server.ip).stdout
    assert re.search(r"retrans:\d+/[1-9]", said), said
    connection.close()
    source, destination = records.next("source"), records.next("destination")
    assert source["upstream_leg"][0] == "socket"
    assert source["upstream_leg"][3] >= 1
    assert source["downstream_leg"][3] == 0, "the application's own connection, which stays in the pod"
    assert destination["upstream_leg"][3] == 0, "likewise the server's"


def test_retransmissions_are_the_connections_not_the_requests(asked: Mesh) -> None:
    start(asked)
    records = Records(asked)
    ask(asked)
    assert records.next("source")["upstream_leg"][3] == 0
    with losing_one(asked):
        ask(asked)
    lost = records.next("source")
    assert lost["upstream_leg"] == ("socket", *by_ss(asked.pods.client, lost["upstream_local"]))
    assert lost["upstream_leg"][3] >= 1
    ask(asked)
    following = records.next("source")
    assert following["upstream_local"] == lost["upstream_local"], "the pooled connection"
    assert following["upstream_leg"][3] >= lost["upstream_leg"][3]


def test_of_pods_that_are_joined_nothing_is_measured_between_them(asked: Mesh) -> None:
    start_near(asked)
    asked.origin(8080, Web())
    ask(asked)
    records = Records(asked)
    source, destination = records.next("source"), records.next("destination")
    assert source["upstream_leg"] == destination["downstream_leg"] == ("node", 0, 0, 0)
    assert source["downstream_leg"][0] == destination["upstream_leg"][0] == "socket"


def test_of_a_stream_it_is_what_ss_says_of_its_tunnel(asked: Mesh) -> None:
    asked.worker.commit(blobs.put_settings(ProxySettings(access_log_tcp=True, same_node_tunnel=True)))
    enrol(asked, Authority())
    configure(asked)
    asked.origin(8080, Web())
    ask(asked)
    records = Records(asked)
    source, destination = records.next("source"), records.next("destination")
    kind, rtt, least, _ = source["upstream_leg"]
    assert (kind, destination["downstream_leg"][0]) == ("tunnel", "tunnel")
    listed = asked.pods.client.run("ss", "-Htin", "state", "established", "dport = :15008").stdout
    assert 0 < round(float(re.findall(r"\bminrtt:([\d.]+)", listed)[0]) * 1000) <= least <= rtt * 8
    assert source["downstream_leg"][0] == destination["upstream_leg"][0] == "socket"


def test_of_a_connect_that_failed_nothing_was_measured(asked: Mesh) -> None:
    asked.configure(*everything(asked), protocol=Protocol.TCP)  # and nobody listens
    with suppress(ConnectionResetError):  # maybe as early as in connect
        assert asked.dial(port=TCP_PORT).recv(1) == b""
    destination = Records(asked).next("destination")
    assert destination["flag"] == "UF"
    assert (destination["downstream_leg"][0], destination["upstream_leg"]) == ("socket", ("socket", 0, 0, 0))


def test_of_a_request_that_went_nowhere_there_is_no_leg(asked: Mesh) -> None:
    start(asked, prefix="/here")
    assert ask(asked, "/there").status == 404
    source = Records(asked).next("source")
    assert (source["downstream_leg"][0], source["upstream_leg"]) == ("socket", (None, 0, 0, 0))


def test_a_log_that_does_not_ask_has_records_without(mesh: Mesh) -> None:
    start(mesh)
    ask(mesh)
    assert "upstream_leg" not in Records(mesh).next("source")
    mesh.worker.commit(blobs.put_settings(ProxySettings(access_log_tcp=True)))
    ask(mesh)
    assert Records(mesh).next("source")["upstream_leg"][0] == "socket"
