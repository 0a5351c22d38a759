"""Tunnels of HTTP/2 CONNECT streams: ours against the `h2` package over Python's ssl, on both sides: the exchange, and its ends."""
from __future__ import annotations

import errno
from pathlib import Path

import h2.errors
import h2.events
import pytest

from tests.support.sessions import (
    CONNECT,
    DB,
    SEND,
    WINDOW,
    asked,
    client,
    dialled,
    opened,
    run,
    server,
)

# ---- the exchange -------------------------------------------------------------------------------------------------------------

def test_a_server_is_asked_answers_and_bytes_pass_both_ways(tmp_path: Path) -> None:
    mine, peer = server(tmp_path)
    assert mine.state["peer"] == DB
    settings = peer.h2.remote_settings
    assert (settings.max_concurrent_streams, settings.initial_window_size, settings.max_header_list_size) == (200, WINDOW, 65_536)
    fields = [("forwarded", 'for="10.0.0.1:4711";host=web.default.svc.cluster.local'), ("baggage", "k8s.namespace.name=default"),
              ("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"), ("x-other", "ignored")]
    peer.h2.send_headers(1, CONNECT + fields)
    run(mine, peer)
    facts = asked(mine)[0]
    assert {name: facts[name] for name, _ in fields[:3]} == dict(fields[:3])
    assert (facts["connect"], facts["authority"], facts["ended"]) == (True, "10.0.0.7:80", False)
    assert mine.lane(0)["state"] == "opening" and mine.write(0, b"x") == -errno.EAGAIN, "nothing is sent before the answer"
    mine.answer(0, 200, b"k8s.namespace.name=web")
    run(mine, peer)
    assert peer.of(h2.events.ResponseReceived)[0].headers == [(b":status", b"200"), (b"baggage", b"k8s.namespace.name=web")]
    peer.h2.send_data(1, b"question")
    run(mine, peer)
    assert mine.lane(0)["readable"] and mine.read(0) == b"question" and mine.read(0) == -errno.EAGAIN
    assert mine.write(0, b"answer") == 6
    run(mine, peer)
    assert peer.body(1) == b"answer"


def test_a_client_says_where_to_and_waits_for_200(tmp_path: Path) -> None:
    mine, peer = client(tmp_path)
    lane = mine.open(b"[fd00::7]:80", b"for=x", b"b=1", b"00-1-2-01")
    run(mine, peer)
    request = peer.of(h2.events.RequestReceived)[0]
    assert request.headers == [(b":method", b"CONNECT"), (b":authority", b"[fd00::7]:80"), (b"forwarded", b"for=x"), (b"baggage", b"b=1"),
                               (b"traceparent", b"00-1-2-01")]
    assert (mine.lane(lane)["state"], mine.lane(lane)["writable"]) == ("opening", 0)
    peer.h2.send_headers(1, [(":status", "200"), ("baggage", "x=y")])
    run(mine, peer)
    assert (mine.lane(lane)["state"], mine.lane(lane)["writable"], mine.lane(lane)["status"]) == ("open", 1, 200)
    assert ("wake", lane) in mine.events


@pytest.mark.parametrize("status", [400, 401, 404, 503])
def test_a_client_learns_of_a_refusal(tmp_path: Path, status: int) -> None:
    mine, peer = client(tmp_path)
    lane = mine.open(b"10.0.0.7:80")
    run(mine, peer)
    peer.h2.send_headers(1, [(":status", str(status))], end_stream=True)
    run(mine, peer)
    seen = mine.lane(lane)
    assert (seen["state"], seen["status"], seen["failed"], seen["error"]) == ("refused", status, 1, -errno.ECONNREFUSED)
    mine.drop(lane)
    run(mine, peer)
    assert (mine.state["streams"], mine.state["allocated"], mine.state["trouble"]) == (0, 0, "none")


@pytest.mark.parametrize("later", [False, True])
def test_a_server_refuses_with_a_status(tmp_path: Path, later: bool) -> None:
    mine, peer = server(tmp_path)
    mine.refuse_with = 0 if later else 401
    peer.h2.send_headers(1, CONNECT)
    run(mine, peer)
    if later:
        mine.answer(0, 401)
        run(mine, peer)
        mine.drop(0)
    response = peer.of(h2.events.ResponseReceived)[0]
    assert response.headers == [(b":status", b"401")] and response.stream_ended
    assert mine.state["streams"] == 0 and mine.state["allocated"] == 0


def test_what_is_no_connect_is_told_apart(tmp_path: Path) -> None:
    mine, peer = server(tmp_path)
    mine.refuse_with = 400
    peer.h2.send_headers(1, [(":method", "GET"), (":scheme", "https"), (":path", "/"), (":authority", "x")], end_stream=True)
    run(mine, peer)
    assert asked(mine)[0]["connect"] is False and peer.of(h2.events.ResponseReceived)[0].headers == [(b":status", b"400")]


def test_an_authority_that_is_too_long_is_none(tmp_path: Path) -> None:
    mine, peer = server(tmp_path)
    mine.refuse_with = 400
    peer.h2.send_headers(1, [(":method", "CONNECT"), (":authority", "a" * 281)])
    run(mine, peer)
    assert asked(mine)[0]["authority"] == ""


# ---- ends -----------------------------------------------------------------------------------------------------------------------

def test_each_side_ends_for_itself(tmp_path: Path) -> None:
    mine, peer = server(tmp_path)
    lane = opened(mine, peer)
    peer.h2.send_data(1, b"all I have", end_stream=True)
    run(mine, peer)
    assert mine.lane(lane)["hung"] and mine.read(lane) == b"all I have" and mine.read(lane) == b""
    assert mine.write(lane, b"still here") == 10
    run(mine, peer)
    assert peer.body(1) == b"still here"
    mine.shut(lane)
    run(mine, peer)
    assert peer.of(h2.events.StreamEnded) and not peer.of(h2.events.StreamReset)
    assert mine.lane(lane)["failed"] == 0 and mine.write(lane, b"x") == -errno.EPIPE
    mine.drop(lane)
    assert mine.state["allocated"] == 0


def test_an_end_comes_behind_what_was_written(tmp_path: Path) -> None:
    mine, peer = server(tmp_path)
    peer.reads = False
    lane = opened(mine, peer)
    assert mine.write(lane, b"a" * SEND) == SEND
    run(mine, peer)
    assert mine.write(lane, b"b" * (SEND - 1)) == SEND - 1  # h2's window of 65,535 is full: one byte was left
    mine.drop(lane)
    run(mine, peer)
    assert not peer.of(h2.events.StreamEnded) and mine.state["allocated"] == 1
    peer.h2.acknowledge_received_data(65_535, 1)
    run(mine, peer)
    peer.h2.acknowledge_received_data(65_535, 1)
    run(mine, peer)
    assert len(peer.body(1)) == 2 * SEND - 1 and peer.of(h2.events.StreamEnded)
    peer.h2.end_stream(1)
    run(mine, peer)
    assert mine.state["allocated"] == 0 and mine.state["buffered"] == 0


def test_a_reset_breaks_the_stream_alone(tmp_path: Path) -> None:
    mine, peer = server(tmp_path)
    first, second = opened(mine, peer, 1), opened(mine, peer, 3)
    peer.h2.send_data(1, b"before it")
    peer.h2.reset_stream(1, h2.errors.ErrorCodes.CANCEL)
    run(mine, peer)
    seen = mine.lane(first)
    assert (seen["failed"], seen["state"], seen["code"]) == (1, "broken", 8)
    assert mine.write(first, b"x") == -errno.ECONNRESET
    assert mine.read(first) == b"before it" and mine.read(first) == -errno.ECONNRESET, "in the order in which they came"
    assert mine.lane(second)["failed"] == 0 and mine.write(second, b"x") == 1
    mine.drop(first)
    assert mine.state["allocated"] == 1


@pytest.mark.parametrize("size", [0, 1, 20_000])
@pytest.mark.parametrize("shut", [False, True])
def test_an_abort_is_a_reset_behind_what_was_written(tmp_path: Path, size: int, shut: bool) -> None:
    mine, peer = server(tmp_path)
    lane = opened(mine, peer)
    data = bytes(range(250)) * 80
    assert size == 0 or mine.write(lane, data[:size]) == size
    if shut:
        mine.shut(lane)
    mine.abort(lane)
    mine.abort(lane)
    mine.drop(lane)
    run(mine, peer)
    assert peer.of(h2.events.StreamReset)[0].error_code == h2.errors.ErrorCodes.CANCEL and not peer.of(h2.events.StreamEnded)
    assert peer.body(1) == data[:size]
    assert (mine.state["allocated"], mine.state["buffered"], mine.state["trouble"]) == (0, 0, "none")


@pytest.mark.parametrize("window", [0, 1, 5_000])
def test_an_abort_does_not_wait_for_a_peers_window(tmp_path: Path, window: int) -> None:
    mine, peer = server(tmp_path)
    peer.reads = False
    lane = opened(mine, peer)
    sent = 65_535 - window
    for _ in range(2):
        sent -= mine.write(lane, bytes(sent))
        run(mine, peer)
    assert sent == 0
    mine.write(lane, bytes(20_000))
    mine.abort(lane)
    mine.drop(lane)
    run(mine, peer)
    assert peer.of(h2.events.StreamReset) and len(peer.body(1)) == 65_535
    assert (mine.state["allocated"], mine.state["buffered"], mine.state["trouble"]) == (0, 0, "none")


def test_who_is_gone_with_bytes_unread_resets(tmp_path: Path) -> None:
    mine, peer = server(tmp_path)
    lane = opened(mine, peer)
    peer.h2.send_data(1, b"unread")
    run(mine, peer)
    mine.drop(lane)
    run(mine, peer)
    assert peer.of(h2.events.StreamReset) and mine.state["allocated"] == 0 and mine.state["buffered"] == 0


def test_a_peer_that_goes_on_sending_to_nobody_is_reset(tmp_path: Path) -> None:
    mine, peer = server(tmp_path)
    lane = opened(mine, peer)
    mine.drop(lane)
    run(mine, peer)
    assert peer.of(h2.events.StreamEnded) and mine.state["allocated"] == 1
    peer.h2.send_data(1, b"hello?")
    run(mine, peer)
    assert peer.of(h2.events.StreamReset) and mine.state["allocated"] == 0


def test_a_peer_that_never_ends_is_reset_by_the_sweep(tmp_path: Path) -> None:
    mine, peer = server(tmp_path)
    mine.drop(opened(mine, peer))
    run(mine, peer)
    for _ in range(3):
        assert mine.state["allocated"] == 1
        mine.sweep()
        run(mine, peer)
    assert peer.of(h2.events.StreamReset) and mine.state["allocated"] == 0


def test_a_tunnel_that_ends_breaks_its_streams(tmp_path: Path) -> None:
    mine, peer = client(tmp_path)
    lanes = [dialled(mine, peer) for _ in range(3)]
    mine.close()
    assert {mine.lane(lane)["failed"] for lane in lanes} == {1} and mine.read(lanes[0]) == -errno.ECONNRESET
    assert mine.state["streams"] == 0 and mine.open(b"x:1") is None
