"""What a peer that is no h2 package says, and what it cannot do by it: floods, resets, headers without end, bytes beyond a window."""
from __future__ import annotations

import ssl
from pathlib import Path

import pytest
from ext.tunnel.door import Tunnel

from tests.support.pki import Authority
from tests.support.sessions import (
    CONNECT,
    DB,
    ROOT,
    WEB,
    WINDOW,
    Peer,
    asked,
    frame,
    opened,
    ours,
    run,
    run_raw,
    server,
)

FLOODS = {
    "PING": frame(6, 0, 0, bytes(8)),
    "SETTINGS": frame(4, 0, 0, b"\x00\x03\x00\x00\x00\x64"),
    "PRIORITY": frame(2, 0, 5, b"\x00\x00\x00\x00\x10"),
    "empty DATA": frame(0, 0, 1),
    "WINDOW_UPDATE": frame(8, 0, 1, (1).to_bytes(4, "big")) * 10,
}


@pytest.mark.parametrize("kind", FLOODS)
def test_a_flood_ends_the_tunnel_and_costs_no_memory(tmp_path: Path, kind: str) -> None:
    mine, peer = server(tmp_path)
    opened(mine, peer)
    over = False
    for _ in range(100):
        peer.raw(FLOODS[kind] * 100)
        if not mine.feed(peer.wire.read()):
            over = True
            break
    mine.flush()
    assert over and mine.state["trouble"] in ("flood", "http2") and mine.state["over"]
    assert len(mine.out) < 300_000 and mine.state["text"]


def test_what_a_busy_second_needs_is_no_flood(tmp_path: Path) -> None:
    mine, peer = server(tmp_path)
    opened(mine, peer)
    for second in range(5):
        mine.now_ns = second * 1_000_000_000 + 1
        peer.raw(FLOODS["PING"] * 900)
        assert mine.feed(peer.wire.read())
        mine.flush()


def test_rapid_resets_end_the_tunnel(tmp_path: Path) -> None:
    """CVE-2023-44487."""
    mine, peer = server(tmp_path)
    over, number = False, 1
    while not over and number < 20_000:
        block = peer.h2.encoder.encode(CONNECT)
        peer.raw(frame(1, 4, number, block) + frame(3, 0, number, (8).to_bytes(4, "big")))
        number += 2
        over = not mine.feed(peer.wire.read()) or mine.state["trouble"] != "none"
        mine.flush()
        over = over or mine.state["over"]
        for event in mine.events:
            if event[0] == "asks":
                mine.drop(event[1]["lane"])     # its user sees at once that it was reset
        mine.events.clear()
    assert over and number <= 2 * 4000


def test_a_peer_that_asks_on_and_reads_nothing_ends(tmp_path: Path) -> None:
    """It never acknowledges SETTINGS, so streams beyond the limit are refused one by one, and each refusal waits to be sent."""
    mine, peer = Tunnel(ours(WEB), True), Peer(tmp_path, ROOT.issue(DB), serves=False)
    peer.h2.receive_data = lambda data: []  # type: ignore[method-assign]
    run(mine, peer)
    mine.refuse_with = 503
    said = 0
    while said < 10_000:
        mine.now_ns += 1_000_000_000
        for _ in range(500):
            peer.raw(frame(1, 4, 2 * said + 1, peer.h2.encoder.encode(CONNECT)))
            said += 1
        if not mine.feed(peer.wire.read()):
            break
    assert said <= 3_000 and mine.state["trouble"] == "flood"


def test_what_makes_us_reset_streams_ends_the_tunnel(tmp_path: Path) -> None:
    """CVE-2025-8671: the peer resets nothing itself."""
    mine, peer = server(tmp_path)
    over, number = False, 1
    while not over and number < 20_000:
        peer.raw(frame(1, 4, number, peer.h2.encoder.encode(CONNECT)) + frame(8, 0, number, b"\x7f\xff\xff\xff"))
        number += 2
        over = not mine.feed(peer.wire.read())
        mine.flush()
        for event in mine.events:
            if event[0] == "asks":
                mine.drop(event[1]["lane"])
        mine.events.clear()
    assert over and number <= 2 * 2_500 and mine.state["trouble"] == "flood"


def test_a_header_list_without_end_ends_the_tunnel(tmp_path: Path) -> None:
    """Refused with its stream alone, 100 a second of 30 MB each made another pod's p99 20 times as long."""
    mine, peer = server(tmp_path)
    block = peer.h2.encoder.encode([*CONNECT, *((f"x-{n}", "y" * 4000) for n in range(20))])
    parts = [block[at:at + 16_000] for at in range(0, len(block), 16_000)]
    data = frame(1, 0, 1, parts[0]) + b"".join(frame(9, 4 if part is parts[-1] else 0, 1, part) for part in parts[1:])
    peer.raw(data)
    run_raw(mine, peer)
    assert asked(mine) == [] and mine.state["streams"] == 0
    assert mine.state["trouble"] == "flood" and mine.state["over"]


def test_continuations_without_end_end_the_tunnel(tmp_path: Path) -> None:
    """CVE-2024-28182."""
    mine, peer = server(tmp_path)
    peer.raw(frame(1, 0, 1, peer.h2.encoder.encode(CONNECT)))
    over = False
    for _ in range(200):
        peer.raw(frame(9, 0, 1, b""))
        over = over or not mine.feed(peer.wire.read())
    assert over and mine.state["trouble"] == "http2"


def test_bytes_beyond_the_window_end_the_tunnel(tmp_path: Path) -> None:
    mine, peer = server(tmp_path)
    lane = opened(mine, peer)
    for _ in range(WINDOW // 16_384 + 1):
        peer.raw(frame(0, 0, 1, bytes(16_384)))
        mine.feed(peer.wire.read())
    mine.flush()
    assert mine.lane(lane)["failed"] == 1 and mine.state["buffered"] <= 2 * WINDOW


def test_what_is_not_http2_ends_the_tunnel(tmp_path: Path) -> None:
    mine, peer = Tunnel(ours(WEB), True), Peer(tmp_path, ROOT.issue(DB), serves=False)
    peer.h2.initiate_connection = lambda: None  # type: ignore[method-assign]
    run(mine, peer)
    peer.raw(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    run_raw(mine, peer)
    assert mine.state["trouble"] == "http2" and mine.state["over"] and "broke HTTP/2" in mine.state["text"]


def test_a_refused_peer_is_told_why_to_the_operator(tmp_path: Path) -> None:
    mine, peer = Tunnel(ours(WEB), True), Peer(tmp_path, Authority("stranger").issue(DB), serves=False)
    with pytest.raises(ssl.SSLError):
        run(mine, peer)
    assert mine.state["trouble"] == "tls" and mine.state["text"].startswith(f"{DB}: its certificate does not chain")


@pytest.mark.parametrize("size", [1, 3, 17, 1000])
def test_it_does_not_matter_how_the_bytes_come(size: int) -> None:
    near, far = Tunnel(ours(DB), False, [WEB.encode()]), Tunnel(ours(WEB), True)

    def trickle() -> None:
        while True:
            near.flush()
            far.flush()
            forth, near.out, back, far.out = near.out, b"", far.out, b""
            if not forth and not back:
                return
            for data, to in ((forth, far), (back, near)):
                for at in range(0, len(data), size):
                    to.feed(data[at:at + size])

    trickle()
    lane = near.open(b"10.0.0.7:80")
    trickle()
    far.answer(0, 200)
    trickle()
    near.write(lane, b"abc" * 1000)
    near.shut(lane)
    trickle()
    assert far.read(0) == b"abc" * 1000 and far.read(0) == b""
