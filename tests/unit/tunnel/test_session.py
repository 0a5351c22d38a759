"""Tunnels of HTTP/2 CONNECT streams: ours against the `h2` package over Python's ssl, on both sides; and what a bad peer cannot do."""
from __future__ import annotations

import errno
import ssl
from pathlib import Path
from typing import Any

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h2.settings
import pytest
from ext.tunnel.door import Identity, Tunnel

from tests.support.pki import SPIFFE, Authority, Issued

ROOT = Authority("root")
WEB, DB = f"{SPIFFE}web", f"{SPIFFE}db"
WINDOW, WIDE, SEND = 131_072, 1_048_576, 65_536
CONNECT = [(":method", "CONNECT"), (":authority", "10.0.0.7:80")]


def ours(name: str) -> Identity:
    issued = ROOT.issue(name)
    return Identity(issued.key, issued.chain, [ROOT.der])


class Peer:
    """h2 over Python's ssl. Flow control is the test's: nothing is acknowledged unless `reads`."""

    def __init__(self, folder: Path, issued: Issued, *, serves: bool) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if serves else ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(ROOT.pem(folder))
        context.set_alpn_protocols(["h2"])
        context.load_cert_chain(issued.pem(folder))
        self.into, self.wire = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.into, self.wire, server_side=serves)
        config = h2.config.H2Configuration(client_side=not serves, validate_outbound_headers=False, normalize_outbound_headers=False)
        self.h2 = h2.connection.H2Connection(config)
        self.events: list[Any] = []
        self.done = self.ended = False
        self.reads = True

    def feed(self, data: bytes) -> None:
        if data:
            self.into.write(data)
        try:
            if not self.done:
                self.tls.do_handshake()
                self.done = True
                self.h2.initiate_connection()
            while not self.ended:
                plain = self.tls.read(65536)
                if not plain:
                    self.ended = True
                    return
                for event in self.h2.receive_data(plain):
                    self.events.append(event)
                    if isinstance(event, h2.events.DataReceived) and self.reads:
                        self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        except ssl.SSLWantReadError:
            pass

    def out(self) -> bytes:
        data = self.h2.data_to_send() if self.done else b""
        if data:
            self.raw(data)
        return self.wire.read()

    def raw(self, data: bytes) -> None:
        self.tls.write(data)

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    def body(self, stream: int) -> bytes:
        return b"".join(e.data for e in self.of(h2.events.DataReceived) if e.stream_id == stream)


def run(mine: Tunnel, peer: Peer | Tunnel) -> None:
    """Until neither has anything to say."""
    if isinstance(peer, Peer):
        peer.feed(b"")
    while True:
        mine.flush()
        if isinstance(peer, Tunnel):
            peer.flush()
            theirs, peer.out = peer.out, b""
        else:
            theirs = peer.out()
        said, mine.out = mine.out, b""
        if not said and not theirs:
            return
        if said:
            peer.feed(said)
        if theirs:
            mine.feed(theirs)


def server(folder: Path, **more: Any) -> tuple[Tunnel, Peer]:
    """We serve, h2 is the client; connected."""
    mine, peer = Tunnel(ours(WEB), True, **more), Peer(folder, ROOT.issue(DB), serves=False)
    run(mine, peer)
    return mine, peer


def client(folder: Path, **more: Any) -> tuple[Tunnel, Peer]:
    mine, peer = Tunnel(ours(DB), False, [WEB.encode()], **more), Peer(folder, ROOT.issue(WEB), serves=True)
    run(mine, peer)
    return mine, peer


def asked(mine: Tunnel) -> list[dict[str, Any]]:
    return [event[1] for event in mine.events if event[0] == "asks"]


def opened(mine: Tunnel, peer: Peer, stream: int = 1) -> int:
    """A stream that h2 opened to us and that is answered: its number here."""
    peer.h2.send_headers(stream, CONNECT)
    run(mine, peer)
    lane: int = asked(mine)[-1]["lane"]
    mine.answer(lane, 200)
    run(mine, peer)
    return lane


def dialled(mine: Tunnel, peer: Peer) -> int:
    """A stream that we opened to h2, answered with 200."""
    lane = mine.open(b"10.0.0.7:80")
    run(mine, peer)
    stream = peer.of(h2.events.RequestReceived)[-1].stream_id
    peer.h2.send_headers(stream, [(":status", "200")])
    run(mine, peer)
    assert mine.lane(lane)["state"] == "open"
    return int(lane)


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
    peer.h2.send_data(1, b"lost")
    peer.h2.reset_stream(1, h2.errors.ErrorCodes.CANCEL)
    run(mine, peer)
    seen = mine.lane(first)
    assert (seen["failed"], seen["state"], seen["code"]) == (1, "broken", 8)
    assert mine.read(first) == -errno.ECONNRESET and mine.write(first, b"x") == -errno.ECONNRESET
    assert mine.lane(second)["failed"] == 0 and mine.write(second, b"x") == 1
    mine.drop(first)
    assert mine.state["allocated"] == 1


def test_an_abort_is_a_reset_there(tmp_path: Path) -> None:
    mine, peer = server(tmp_path)
    lane = opened(mine, peer)
    mine.write(lane, b"not to be taken for complete")
    mine.abort(lane)
    mine.drop(lane)
    run(mine, peer)
    assert peer.of(h2.events.StreamReset)[0].error_code == h2.errors.ErrorCodes.CANCEL and peer.body(1) == b""
    assert mine.state["allocated"] == 0


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
    assert mine.lane(first)["error"] == -errno.ENOMEM and mine.read(first) == -errno.ENOMEM
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


def run_raw(mine: Tunnel, peer: Peer) -> None:
    """What the peer's h2 would not believe itself of is fed; what we answer is kept in `mine.out`."""
    mine.feed(peer.wire.read())
    mine.flush()


# ---- a bad peer ----------------------------------------------------------------------------------------------------------------------

def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


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


def test_a_header_list_without_end_is_refused(tmp_path: Path) -> None:
    mine, peer = server(tmp_path)
    block = peer.h2.encoder.encode([*CONNECT, *((f"x-{n}", "y" * 4000) for n in range(20))])
    parts = [block[at:at + 16_000] for at in range(0, len(block), 16_000)]
    data = frame(1, 0, 1, parts[0]) + b"".join(frame(9, 4 if part is parts[-1] else 0, 1, part) for part in parts[1:])
    peer.raw(data)
    run_raw(mine, peer)
    assert asked(mine) == [] and mine.state["streams"] == 0


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
