"""Flow control of streams and tunnels against the `h2` package, and what a tunnel says for itself: PING, GOAWAY, its end."""
from __future__ import annotations

import errno
from pathlib import Path

import h2.events
from ext.tunnel.door import Tunnel

from tests.support.sessions import (
    CONNECT,
    DB,
    SEND,
    WEB,
    WIDE,
    WINDOW,
    client,
    dialled,
    opened,
    ours,
    run,
    run_raw,
    server,
)

# ---- flow control ------------------------------------------------------------------------------------------------------------------

def test_a_reader_that_sleeps_stops_its_peer_and_nobody_else(tmp_path: Path) -> None:
    mine, peer = server(tmp_path)
    asleep, awake = opened(mine, peer, 1), opened(mine, peer, 3)
    sent = 0
    while (room := min(peer.h2.local_flow_control_window(1), 16_384)) > 0:
        peer.h2.send_data(1, bytes(room))
        sent += room
        run(mine, peer)
    assert sent == WINDOW and mine.lane(asleep)["waiting"] == WINDOW
    assert mine.state["buffered"] <= 2 * WINDOW, "bounded: the window, and what chunks waste"
    for _ in range(40):
        peer.h2.send_data(3, bytes(16_384))
        run(mine, peer)
        assert mine.read(awake) == bytes(16_384)
        run(mine, peer)
    assert peer.h2.local_flow_control_window(1) == 0
    assert len(mine.read(asleep)) == WINDOW
    run(mine, peer)
    assert peer.h2.local_flow_control_window(1) >= WINDOW


def test_one_who_reads_much_gets_a_wider_window(tmp_path: Path) -> None:
    mine, peer = server(tmp_path)
    lane = opened(mine, peer)
    for _ in range(20):
        peer.h2.send_data(1, bytes(16_384))
        run(mine, peer)
        mine.read(lane)
    run(mine, peer)
    assert peer.h2.local_flow_control_window(1) > WINDOW
    sent = 0
    while (room := min(peer.h2.local_flow_control_window(1), 16_384)) > 0:
        peer.h2.send_data(1, bytes(room))
        sent += room
        run(mine, peer)
    assert WIDE - 2 * WINDOW <= sent <= WIDE and mine.state["buffered"] <= WIDE + 2 * WINDOW


def test_a_peer_that_does_not_read_stops_the_writer(tmp_path: Path) -> None:
    mine, peer = server(tmp_path)
    peer.reads = False
    lane = opened(mine, peer)
    written = 0
    while (n := mine.write(lane, bytes(20_000))) > 0:
        written += n
        run(mine, peer)
    assert n == -errno.EAGAIN and written == 65_535 + SEND and mine.state["buffered"] == SEND
    assert not mine.lane(lane)["writable"]
    mine.events.clear()
    peer.h2.acknowledge_received_data(65_535, 1)
    run(mine, peer)
    assert mine.lane(lane)["writable"] and ("wake", lane) in mine.events
    assert mine.write(lane, b"x") == 1


def test_bulk_passes_whole_in_both_directions_between_two_of_ours() -> None:
    near, far = Tunnel(ours(DB), False, [WEB.encode()]), Tunnel(ours(WEB), True)
    run(near, far)
    lane = near.open(b"10.0.0.7:80")
    run(near, far)
    far.answer(0, 200)
    data = bytes(range(256)) * 40_000
    for writer, out, reader, into in ((near, lane, far, 0), (far, 0, near, lane)):
        run(near, far)
        at, got = 0, bytearray()
        while len(got) < len(data):
            n = writer.write(out, data[at:at + 70_000])
            at += max(n, 0)
            run(near, far)
            part = reader.read(into)
            got += part if isinstance(part, bytes) else b""
        assert bytes(got) == data
    near.shut(lane)
    far.shut(0)
    run(near, far)
    assert near.read(lane) == far.read(0) == b""
    near.drop(lane)
    far.drop(0)
    for side in (near, far):
        assert (side.state["allocated"], side.state["buffered"], side.state["trouble"]) == (0, 0, "none")


def test_a_pod_without_buffers_loses_the_stream_not_the_tunnel(tmp_path: Path) -> None:
    mine, peer = server(tmp_path, limit=40_000)
    first, second = opened(mine, peer, 1), opened(mine, peer, 3)
    for _ in range(4):
        if not peer.of(h2.events.StreamReset):
            peer.h2.send_data(1, bytes(16_000))
        run(mine, peer)
    assert mine.lane(first)["error"] == -errno.ENOMEM
    kept = mine.read(first)
    assert isinstance(kept, bytes) and 0 < len(kept) < 64_000 and mine.read(first) == -errno.ENOMEM
    assert mine.state["buffered"] == 0
    peer.h2.send_data(3, b"x")
    run(mine, peer)
    assert mine.read(second) == b"x"


# ---- the tunnel's own -----------------------------------------------------------------------------------------------------------------

def test_pings_are_answered_both_ways(tmp_path: Path) -> None:
    mine, peer = client(tmp_path)
    mine.ping()
    assert mine.state["pinged"]
    run(mine, peer)
    assert not mine.state["pinged"]
    peer.h2.ping(b"12345678")
    run(mine, peer)
    assert peer.of(h2.events.PingAckReceived)


def test_a_goaway_leaves_what_is_open_and_takes_nothing_new(tmp_path: Path) -> None:
    mine, peer = client(tmp_path)
    lane = dialled(mine, peer)
    peer.h2.close_connection(last_stream_id=1)
    peer.raw(peer.h2.data_to_send())
    mine.feed(peer.wire.read())
    assert ("going",) in mine.events and mine.state["room"] == 0 and mine.open(b"x:1") is None
    assert mine.lane(lane)["failed"] == 0


def test_a_server_that_drains_says_so_twice_and_serves_what_is_open(tmp_path: Path) -> None:
    mine, peer = server(tmp_path)
    lane = opened(mine, peer)
    mine.leave()
    run(mine, peer)
    assert peer.of(h2.events.ConnectionTerminated)[0].last_stream_id == 2**31 - 1
    mine.leave()
    mine.flush()
    assert mine.write(lane, b"still") == 5 and mine.state["streams"] == 1


def test_an_idle_tunnel_ends_properly(tmp_path: Path) -> None:
    mine, peer = client(tmp_path)
    mine.end()
    run(mine, peer)
    assert peer.of(h2.events.ConnectionTerminated)[0].error_code == 0 and peer.ended and mine.state["over"]


def test_a_peer_that_opens_more_streams_than_allowed_ends_its_tunnel(tmp_path: Path) -> None:
    mine, peer = server(tmp_path)
    for number in range(200):
        peer.h2.send_headers(2 * number + 1, CONNECT)
    run(mine, peer)
    assert mine.state["streams"] == 200
    encoder = peer.h2.encoder
    block = encoder.encode(CONNECT)
    peer.raw(len(block).to_bytes(3, "big") + b"\x01\x04" + (401).to_bytes(4, "big") + block)
    run_raw(mine, peer)
    assert mine.state["streams"] == 200 and mine.state["trouble"] == "http2" and mine.state["over"]
