"""TLS of the tunnels: what is believed, and what is refused for which reason. The peer is Python's ssl wherever it can play the part."""
from __future__ import annotations

import datetime
import ssl
from pathlib import Path

import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID
from ext.tunnel.door import Connection, Identity

from tests.support.pki import SPIFFE, Authority, Issued
from tests.support.wait import until

WEB, DB = f"{SPIFFE}web", f"{SPIFFE}db"
ELSEWHERE = "spiffe://other.example/ns/default/sa/web"
ROOT = Authority("root")
STRANGER = Authority("stranger")


def ours(issued: Issued, *, root: Authority = ROOT, crls: tuple[bytes, ...] = (), domain: bytes = b"cluster.local") -> Identity:
    return Identity(issued.key, issued.chain, [root.der], crls, domain)


def server(**more: object) -> Connection:
    return Connection(ours(ROOT.issue(WEB), **more), True)


class Peer:
    """Python's ssl on memory BIOs, as a client (no name, no check of names, as SPIFFE has it) or as a server."""

    def __init__(self, folder: Path, issued: Issued | None, *, serves: bool = False, root: Authority = ROOT,
                 alpn: tuple[str, ...] = ("h2",), version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if serves else ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(root.pem(folder))
        context.minimum_version = context.maximum_version = version
        if alpn:
            context.set_alpn_protocols(list(alpn))
        if issued is not None:
            context.load_cert_chain(issued.pem(folder))
        self.into, self.out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.into, self.out, server_side=serves)
        self.done = False
        self.error: ssl.SSLError | None = None

    def feed(self, data: bytes = b"") -> tuple[bytes, bytes]:
        if data:
            self.into.write(data)
        plain = b""
        try:
            if not self.done:
                self.tls.do_handshake()
                self.done = True
            while True:
                part = self.tls.read(65536)
                if not part:
                    break
                plain += part
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as error:
            self.error = error
        return self.out.read(), plain

    def write(self, data: bytes) -> bytes:
        self.tls.write(data)
        return self.out.read()


def exchange(a: Connection | Peer, b: Connection | Peer, at_a_time: int = 1 << 20) -> None:
    """`a` speaks first; until neither has anything to say."""
    pending = [(b, a.feed()[0])]
    while pending:
        to, data = pending.pop(0)
        other = a if to is b else b
        for at in range(0, len(data), at_a_time):
            said = to.feed(data[at:at + at_a_time])[0]
            if said:
                pending.append((other, said))


def test_python_as_client_and_we_agree_and_know_each_other(tmp_path: Path) -> None:
    mine, peer = server(), Peer(tmp_path, ROOT.issue(DB))
    exchange(peer, mine)
    assert mine.state == (True, False, "fine", "", DB)
    assert peer.done and peer.error is None
    assert (peer.tls.version(), peer.tls.selected_alpn_protocol(), peer.tls.cipher()[0]) == ("TLSv1.3", "h2", "TLS_AES_128_GCM_SHA256")
    assert not peer.tls.session_reused and peer.tls.session is not None and not peer.tls.session.has_ticket
    assert mine.feed(peer.write(b"hello" * 9000))[1] == b"hello" * 9000
    assert peer.feed(mine.write(b"world" * 9000))[1] == b"world" * 9000


def test_python_as_server_and_we_agree(tmp_path: Path) -> None:
    mine, peer = Connection(ours(ROOT.issue(DB)), False, [WEB.encode(), b"spiffe://x/y"]), Peer(tmp_path, ROOT.issue(WEB), serves=True)
    exchange(mine, peer)
    assert mine.state == (True, False, "fine", "", WEB)
    assert peer.feed(mine.write(b"x" * 100_000))[1] == b"x" * 100_000
    assert mine.feed(peer.write(b"y" * 100_000))[1] == b"y" * 100_000


def test_no_name_is_sent(tmp_path: Path) -> None:
    mine, peer = Connection(ours(ROOT.issue(DB)), False, [WEB.encode()]), Peer(tmp_path, ROOT.issue(WEB), serves=True)
    seen: list[object] = []
    peer.tls.context.sni_callback = lambda _socket, name, _context: seen.append(name)
    exchange(mine, peer)
    assert mine.state[0] and seen == [None]


@pytest.mark.parametrize("size", [1, 2, 7, 100])
def test_it_does_not_matter_how_the_bytes_come(size: int) -> None:
    client, mine = Connection(ours(ROOT.issue(DB)), False, [WEB.encode()]), server()
    exchange(client, mine, size)
    assert client.state[0] and mine.state[0] and (client.state[4], mine.state[4]) == (WEB, DB)
    sent = client.write(b"payload" * 3000)
    got = b"".join(mine.feed(sent[at:at + size])[1] for at in range(0, len(sent), size))
    assert got == b"payload" * 3000


def test_an_intermediate_is_sent_and_followed(tmp_path: Path) -> None:
    middle = Authority("middle", ROOT)
    mine, peer = Connection(ours(middle.issue(WEB)), True), Peer(tmp_path, middle.issue(DB))
    exchange(peer, mine)
    assert mine.state[:3] == (True, False, "fine") and peer.done


def test_the_end_is_said_and_heard() -> None:
    client, mine = Connection(ours(ROOT.issue(DB)), False, [WEB.encode()]), server()
    exchange(client, mine)
    mine.feed(client.end())
    assert mine.state[1]


REFUSED_BY_THE_SERVER = {
    "no certificate": (None, "no_certificate", "showed no certificate"),
    "wrong root": (STRANGER.issue(DB), "untrusted", "does not chain to a root"),
    "wrong trust domain": (ROOT.issue(ELSEWHERE), "trust_domain", "another trust domain"),
    "expired": (ROOT.issue(DB, days=(-2, -1)), "expired", "has expired"),
    "not yet valid": (ROOT.issue(DB, days=(1, 2)), "not_yet", "not valid yet"),
    "no SAN": (ROOT.issue(), "no_identity", "exactly one URI"),
    "two SANs": (ROOT.issue(DB, WEB), "no_identity", "exactly one URI"),
    "only a DNS name": (ROOT.issue(dns=("db.example",)), "no_identity", "exactly one URI"),
    "no SPIFFE ID": (ROOT.issue("https://cluster.local/ns/default/sa/db"), "no_identity", "exactly one URI"),
    "an identity too long": (ROOT.issue(f"{SPIFFE}{'x' * 600}"), "no_identity", "exactly one URI"),
    "for servers alone": (ROOT.issue(DB, usages=(ExtendedKeyUsageOID.SERVER_AUTH,)), "purpose", "not for a client"),
}


@pytest.mark.parametrize("case", REFUSED_BY_THE_SERVER)
def test_the_server_refuses(tmp_path: Path, case: str) -> None:
    issued, fault, text = REFUSED_BY_THE_SERVER[case]
    mine, peer = server(), Peer(tmp_path, issued)
    exchange(peer, mine)
    done, _, why, said, _ = mine.state
    assert (done, why) == (False, fault) and text in said
    assert peer.error is not None, "the peer was not told"
    if issued is not None and case not in {"no SAN", "only a DNS name", "an identity too long"}:
        assert said.startswith(("spiffe://", "https://")), "the text names who it was"


REFUSED_BY_THE_CLIENT = {
    "wrong root": (STRANGER.issue(WEB), "untrusted", "does not chain to a root"),
    "another identity": (ROOT.issue(DB), "other_identity", "not the identity that the destination must have"),
    "another trust domain": (ROOT.issue(ELSEWHERE), "other_identity", "not the identity"),
    "expired": (ROOT.issue(WEB, days=(-2, -1)), "expired", "has expired"),
    "not yet valid": (ROOT.issue(WEB, days=(1, 2)), "not_yet", "not valid yet"),
    "two SANs": (ROOT.issue(WEB, DB), "no_identity", "exactly one URI"),
    "for clients alone": (ROOT.issue(WEB, usages=(ExtendedKeyUsageOID.CLIENT_AUTH,)), "purpose", "not for a server"),
}


@pytest.mark.parametrize("case", REFUSED_BY_THE_CLIENT)
def test_the_client_refuses(tmp_path: Path, case: str) -> None:
    issued, fault, text = REFUSED_BY_THE_CLIENT[case]
    mine, peer = Connection(ours(ROOT.issue(DB)), False, [WEB.encode()]), Peer(tmp_path, issued, serves=True)
    exchange(mine, peer)
    done, _, why, said, who = mine.state
    assert (done, why) == (False, fault) and text in said and said.startswith(who) and who.startswith("spiffe://")
    assert peer.error is not None


def test_a_server_of_which_no_identity_is_expected_is_refused(tmp_path: Path) -> None:
    mine, peer = Connection(ours(ROOT.issue(DB)), False, []), Peer(tmp_path, ROOT.issue(WEB), serves=True)
    exchange(mine, peer)
    assert mine.state[2] == "other_identity"


@pytest.mark.parametrize("serves", [False, True])
def test_tls_1_2_is_refused(tmp_path: Path, serves: bool) -> None:
    mine = Connection(ours(ROOT.issue(WEB)), not serves, [WEB.encode()] if serves else [])
    peer = Peer(tmp_path, ROOT.issue(WEB), serves=serves, version=ssl.TLSVersion.TLSv1_2)
    exchange(*((mine, peer) if serves else (peer, mine)))
    assert mine.state[:3] == (False, False, "version") and peer.error is not None


@pytest.mark.parametrize("serves", [False, True])
@pytest.mark.parametrize("alpn", [(), ("http/1.1",), ("h2c", "h3"), ("h2 ", "h")], ids=lambda a: ",".join(a) or "none")
def test_another_alpn_is_refused(tmp_path: Path, serves: bool, alpn: tuple[str, ...]) -> None:
    mine = Connection(ours(ROOT.issue(WEB)), not serves, [WEB.encode()] if serves else [])
    exchange(*((mine, Peer(tmp_path, ROOT.issue(WEB), serves=True, alpn=alpn)) if serves
               else (Peer(tmp_path, ROOT.issue(WEB), alpn=alpn), mine)))
    assert mine.state[:3] == (False, False, "alpn")


def test_h2_is_found_among_others(tmp_path: Path) -> None:
    mine, peer = server(), Peer(tmp_path, ROOT.issue(DB), alpn=("http/1.1", "h2"))
    exchange(peer, mine)
    assert mine.state[0] and peer.tls.selected_alpn_protocol() == "h2"


def test_what_is_no_tls_is_refused() -> None:
    too_long = b"\x16\x03\x01\xff\xff" + bytes(70000)
    for said in (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", bytes(64), too_long):
        mine = server()
        mine.feed(said)
        assert mine.state[2] in ("version", "broken"), said[:8]


def test_a_peer_that_refuses_us_is_told_apart() -> None:
    """In TLS 1.3 a client is done before the server has looked at its certificate: the refusal comes as an alert behind."""
    client, mine = Connection(ours(ROOT.issue(ELSEWHERE), domain=b"other.example"), False, [WEB.encode()]), server()
    exchange(client, mine)
    assert mine.state[2] == "trust_domain"
    assert client.state[2] == "alert" and "the peer refused us" in client.state[3]


def test_a_revoked_certificate_is_refused_and_unknown_revocation_is_not(tmp_path: Path) -> None:
    bad, good = ROOT.issue(DB), ROOT.issue(DB)
    lists = (ROOT.revoke(bad),)
    for issued, crls, fault in ((bad, lists, "revoked"), (good, lists, "fine"), (bad, (STRANGER.revoke(bad),), "fine"),
                                (bad, (ROOT.revoke(bad, days=(-2, -1)),), "revoked"), (good, (ROOT.revoke(bad, days=(-2, -1)),), "fine")):
        mine = server(crls=crls)
        exchange(Peer(tmp_path, issued), mine)
        assert mine.state[2] == fault


def test_credentials_that_cannot_work_are_refused_with_the_reason() -> None:
    one, other = ROOT.issue(WEB), ROOT.issue(DB)
    cases = {
        "the key cannot be read": lambda: Identity(b"no key", one.chain, [ROOT.der]),
        "or is not the certificate's": lambda: Identity(other.key, one.chain, [ROOT.der]),
        "certificate 0 of the chain": lambda: Identity(one.key, [b"x"], [ROOT.der]),
        "certificate 1 of the chain": lambda: Identity(one.key, [one.chain[0], b"x"], [ROOT.der]),
        "root 1 of the trust domain": lambda: Identity(one.key, one.chain, [ROOT.der, ROOT.der + b"x"]),
        "revocation list 0": lambda: Identity(one.key, one.chain, [ROOT.der], [b"x"]),
        "there are 1 and 0": lambda: Identity(one.key, one.chain, []),
        "there are 0 and 1": lambda: Identity(one.key, [], [ROOT.der]),
        "exactly one URI": lambda: ours(ROOT.issue(WEB, DB)),
        "not of the trust domain other": lambda: ours(one, domain=b"other"),
    }
    for text, make in cases.items():
        with pytest.raises(ValueError, match=text):
            make()


def test_credentials_say_who_and_how_long_and_are_held_by_connections() -> None:
    issued = ROOT.issue(WEB)
    made = ours(issued)
    leaf = issued.certificates[0]
    assert made.facts == (WEB, int(leaf.not_valid_before_utc.timestamp()), int(leaf.not_valid_after_utc.timestamp()), 1)
    assert leaf.not_valid_after_utc > datetime.datetime.now(datetime.UTC)
    connections = [Connection(made, True), Connection(made, False)]
    assert made.facts[3] == 3
    del connections
    assert made.facts[3] == 1


@pytest.mark.parametrize("we_serve", [True, False], ids=["server", "client"])
@pytest.mark.parametrize("deep", [False, True], ids=["root signs", "an intermediate signs"])
def test_a_peer_that_is_revoked_while_its_connection_is_open_is_found_by_the_new_list_and_nobody_else(we_serve: bool, deep: bool) -> None:
    root = Authority("own")
    signer = Authority("between", above=root) if deep else root
    mine, theirs, other = signer.issue(WEB), signer.issue(DB), signer.issue(DB)
    here, there = ours(mine, root=root), ours(theirs, root=root)
    a = Connection(here, we_serve, () if we_serve else (DB.encode(),))
    b = Connection(there, not we_serve, (WEB.encode(),) if we_serve else ())
    exchange(*((b, a) if we_serve else (a, b)))
    assert a.state[0] and b.state[0]
    lists = {"other": signer.revoke(other), "none": signer.revoke(), "old": signer.revoke(theirs, days=(-3, -1)),
             "elsewhere": STRANGER.revoke(theirs), "hit": signer.revoke(other, theirs)}
    for name in ("other", "none", "elsewhere"):
        assert not a.revoked(ours(mine, root=root, crls=(lists[name],))), name
    assert not a.revoked(ours(mine, root=STRANGER)), "a root that went is no reason"
    assert a.feed(b.write(b"alive"))[1] == b"alive"
    assert a.revoked(ours(mine, root=root, crls=(lists["old"], lists["elsewhere"], lists["hit"])))
    assert a.state[2] == "revoked" and DB in a.state[3]
    if deep:
        fresh = Connection(here, we_serve, () if we_serve else (DB.encode(),))
        again = Connection(there, not we_serve, (WEB.encode(),) if we_serve else ())
        exchange(*((again, fresh) if we_serve else (fresh, again)))
        assert fresh.revoked(ours(mine, root=root, crls=(root.revoke(Issued(signer.private, (signer.certificate,))),)))


def test_a_connection_outlives_its_peers_certificate() -> None:
    brief = ROOT.issue(DB, days=(-1, 2 / 86400))
    mine = ROOT.issue(WEB)
    a, b = Connection(ours(mine), True), Connection(ours(brief), False, (WEB.encode(),))
    exchange(b, a)
    assert a.state[0]
    end = brief.certificates[0].not_valid_after_utc
    until(lambda: datetime.datetime.now(datetime.UTC) > end, "the certificate has expired")
    assert not a.revoked(ours(mine))
    assert a.revoked(ours(mine, crls=(ROOT.revoke(brief),)))
