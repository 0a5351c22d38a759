"""A tunnel of ours (ext/tunnel/door) beside the `h2` package over Python's ssl, both without sockets: what one says the other is fed."""
from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

import h2.config
import h2.connection
import h2.events
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


def run_raw(mine: Tunnel, peer: Peer) -> None:
    """What the peer's h2 would not believe itself of is fed; what we answer is kept in `mine.out`."""
    mine.feed(peer.wire.read())
    mine.flush()


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload
