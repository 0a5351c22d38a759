"""Key, certificate and roots become credentials: which, when they change, and who keeps the old ones. Certificates by `cryptography`."""
from __future__ import annotations

import fcntl
import gc
import os
import time
from collections.abc import Callable, Iterator

import pytest

from agent.dataplane import blobs
from agent.model.identity import Certificate, Trust
from ext.proxy import keys_door
from ext.route import door
from tests.support.pki import SPIFFE, Authority, Issued

WEB = SPIFFE + "web"
ROOT = Authority()


@pytest.fixture(autouse=True)
def no_block_is_lost() -> Iterator[None]:
    gc.collect()
    before, descriptors = door.live_blocks(), len(os.listdir("/proc/self/fd"))
    yield
    gc.collect()
    assert (door.live_blocks(), len(os.listdir("/proc/self/fd"))) == (before, descriptors)


def give(keys: keys_door.Keys, number: int, one: Issued, identity: str = WEB) -> None:
    """As the keeper does: a sealed memfd."""
    fd = os.memfd_create("narrows-key", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.write(fd, one.key)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    if not keys.put(number, identity.encode(), fd):
        os.close(fd)


def signed(one: Issued, number: int, identity: str = WEB) -> blobs.Put:
    leaf = one.certificates[0]
    begin, end = int(leaf.not_valid_before_utc.timestamp()), int(leaf.not_valid_after_utc.timestamp())
    return blobs.put_certificate(Certificate(identity, number, begin, end, tuple(one.chain)))


def trusting(*roots: Authority, lists: tuple[bytes, ...] = ()) -> blobs.Put:
    return blobs.put_trust(Trust("cluster.local", tuple(root.der for root in roots), lists))


def load(keys: keys_door.Keys, *entries: blobs.Entry) -> None:
    keys.load(blobs.encode_transaction(1, entries))


def test_credentials_are_there_as_soon_as_key_certificate_and_root_are_in_any_order() -> None:
    one = ROOT.issue(WEB)
    parts: dict[str, Callable[[keys_door.Keys], None]] = {
        "key": lambda keys: give(keys, 7, one),
        "certificate": lambda keys: load(keys, signed(one, 7)),
        "trust": lambda keys: load(keys, trusting(ROOT)),
    }
    for order in (("key", "certificate", "trust"), ("certificate", "trust", "key"), ("trust", "key", "certificate")):
        keys = keys_door.Keys()
        for part in order:
            assert isinstance(keys.of(WEB.encode()), str), f"not before {part}"
            parts[part](keys)
        held = keys.of(WEB.encode())
        assert held.facts[0] == WEB


def test_what_is_missing_is_said() -> None:
    keys = keys_door.Keys()
    one = ROOT.issue(WEB)
    assert "no certificate was signed" in keys.of(WEB.encode())
    load(keys, signed(one, 7))
    assert "no root of its trust domain" in keys.of(WEB.encode())
    load(keys, trusting(ROOT))
    assert "gave no private key" in keys.of(WEB.encode())
    give(keys, 8, one)
    assert "gave no private key" in keys.of(WEB.encode()), "another key's number"
    give(keys, 7, one, SPIFFE + "other")
    assert "gave no private key" in keys.of(WEB.encode()), "another identity's key"


def test_the_same_credentials_serve_until_something_changes() -> None:
    keys = keys_door.Keys()
    one = ROOT.issue(WEB)
    give(keys, 7, one)
    load(keys, signed(one, 7), trusting(ROOT))
    first, second = keys.of(WEB.encode()), keys.of(WEB.encode())
    assert (first.facts[3], second.facts[3]) == (3, 3), "one for the table, two held"
    load(keys, blobs.put_trust(Trust("other.domain", (ROOT.der,))))
    assert keys.of(WEB.encode()).facts[3] == 4
    load(keys, trusting(ROOT, Authority("next")))
    third = keys.of(WEB.encode())
    assert (first.facts[3], third.facts[3]) == (2, 2), "connections keep those that they began with"


def test_a_rotation_replaces_and_the_old_ones_live_as_long_as_they_are_held() -> None:
    keys = keys_door.Keys()
    old, new = ROOT.issue(WEB, days=(-1, 1)), ROOT.issue(WEB, days=(-0.5, 2))
    give(keys, 1, old)
    load(keys, signed(old, 1), trusting(ROOT))
    before = keys.of(WEB.encode())
    give(keys, 2, new)
    assert keys.of(WEB.encode()).facts[2] == before.facts[2], "the key alone changes nothing"
    load(keys, signed(new, 2))
    assert keys.of(WEB.encode()).facts[2] > before.facts[2]
    keys.forget(1)
    assert before.facts[3] == 1
    assert keys.of(WEB.encode()).facts[2] > before.facts[2]


def test_the_last_good_ones_serve_when_the_next_cannot_be_made_until_they_expire() -> None:
    keys = keys_door.Keys()
    good, other = ROOT.issue(WEB, days=(-1, 3 / 86400)), ROOT.issue(WEB)
    give(keys, 1, good)
    load(keys, signed(good, 1), trusting(ROOT))
    assert keys.of(WEB.encode()).facts[0] == WEB
    give(keys, 2, good)
    load(keys, signed(other, 2))            # its key is not the certificate's
    assert keys.of(WEB.encode()).facts[0] == WEB
    deadline = time.monotonic() + 10
    while not isinstance(said := keys.of(WEB.encode()), str):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert "do not fit each other" in said


def test_an_expired_certificate_is_none() -> None:
    keys = keys_door.Keys()
    one = ROOT.issue(WEB, days=(-2, -1))
    give(keys, 1, one)
    load(keys, signed(one, 1), trusting(ROOT))
    assert "has expired" in keys.of(WEB.encode())


@pytest.mark.parametrize(("what", "said"), [("key", "key"), ("identity", "URI"), ("other", "another identity"), ("domain", "trust domain"),
                                              ("garbage", "certificate")])
def test_what_libssl_refuses_is_said_in_its_words(what: str, said: str) -> None:
    keys = keys_door.Keys()
    one = ROOT.issue(WEB)
    certificate = signed(one, 1)
    if what == "key":
        certificate = signed(ROOT.issue(WEB), 1)
    elif what == "identity":
        one = ROOT.issue(WEB, WEB + "2")
        certificate = signed(one, 1)
    elif what == "other":
        one = ROOT.issue(SPIFFE + "other")
        certificate = signed(one, 1)
    elif what == "domain":
        one = ROOT.issue("spiffe://other.domain/ns/default/sa/web")
        certificate = signed(one, 1)
    else:
        certificate = blobs.put_certificate(Certificate(WEB, 1, 1, 2**40, (b"\x30\x00",)))
    give(keys, 1, one)
    load(keys, certificate, trusting(ROOT))
    text = keys.of(WEB.encode())
    assert "do not fit each other: " in text and said.lower() in text.partition(": ")[2].lower(), text


def test_an_identity_that_is_gone_has_no_credentials() -> None:
    keys = keys_door.Keys()
    one = ROOT.issue(WEB)
    give(keys, 1, one)
    load(keys, signed(one, 1), trusting(ROOT))
    held = keys.of(WEB.encode())
    load(keys, blobs.Delete(blobs.Kind.CERTIFICATE, WEB))
    assert "no certificate" in keys.of(WEB.encode())
    assert held.facts[0] == WEB


def test_what_is_no_key_is_not_taken() -> None:
    keys = keys_door.Keys()
    read, write = os.pipe()
    assert not keys.put(0, WEB.encode(), read)
    assert not keys.put(1, b"", read)
    assert not keys.put(1, b"x" * 385, read)
    assert keys.put(1, WEB.encode(), read)
    assert not keys.put(1, WEB.encode(), write), "there already"
    one = ROOT.issue(WEB)
    load(keys, signed(one, 1), trusting(ROOT))
    assert "cannot be read" in keys.of(WEB.encode())
    os.close(write)
