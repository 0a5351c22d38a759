"""Private keys of the keeper: what leaves it is a certificate request, and nothing but sealed memory holds the key."""
from __future__ import annotations

import fcntl
import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from agent.dataplane.client import KeeperClient, KeeperRefused, connect
from tests.support.keeper import Keeper, Raw, running
from tests.support.keys import NAME, SCALAR, held, where

IDENTITY = "spiffe://cluster.local/ns/default/sa/reviews"
SEALED = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


@pytest.fixture
def keeper(tmp_path: Path) -> Iterator[Keeper]:
    with running(tmp_path / "run", workers=1, puppets=True) as one:
        yield one


@pytest.fixture
async def client(keeper: Keeper) -> AsyncIterator[KeeperClient]:
    one = await connect(keeper.path)
    yield one
    await one.close()


def openssl(*words: str, stdin: bytes = b"") -> str:
    done = subprocess.run(["openssl", *words], input=stdin, capture_output=True, check=True, timeout=20)
    return done.stdout.decode() + done.stderr.decode()


async def test_the_request_is_what_an_authority_expects(client: KeeperClient) -> None:
    _, request = await client.make_key(IDENTITY)
    said = openssl("req", "-inform", "DER", "-noout", "-text", "-verify", "-nameopt", "RFC2253", stdin=request)
    lines = [line.strip() for line in said.splitlines()]
    assert "self-signature verify OK" in said
    assert "Subject:" in lines
    assert "ASN1 OID: prime256v1" in lines
    assert "Signature Algorithm: ecdsa-with-SHA256" in lines
    at = lines.index("Requested Extensions:")
    assert lines[at + 1 : at + 3] == ["X509v3 Subject Alternative Name: critical", f"URI:{IDENTITY}"]
    assert lines[at + 3].startswith("Signature Algorithm")


async def test_the_key_is_the_requests_and_is_readable_pkcs8(keeper: Keeper, client: KeeperClient) -> None:
    _, request = await client.make_key(IDENTITY)
    (key,) = held(keeper.pid)
    text = openssl("pkey", "-inform", "DER", "-noout", "-text", "-check", stdin=key)
    assert "Key is valid" in text
    public = openssl("pkey", "-inform", "DER", "-pubout", stdin=key)
    assert public == openssl("req", "-inform", "DER", "-noout", "-pubkey", stdin=request)
    again = openssl("pkcs8", "-inform", "DER", "-nocrypt", "-outform", "PEM", stdin=key)
    assert "BEGIN PRIVATE KEY" in again


async def test_the_secret_is_nowhere_but_in_sealed_memory_that_is_locked_and_not_dumped(keeper: Keeper, client: KeeperClient) -> None:
    for _ in range(2):
        await client.make_key(IDENTITY)
    keys = held(keeper.pid)
    assert len(keys) == 2
    for key in keys:
        found = where(keeper.pid, key[SCALAR])
        assert [(region.name, region.access) for region in found] == [(NAME, "r--s")]
        smaps = Path(f"/proc/{keeper.pid}/smaps").read_text()
        flags = smaps[smaps.index(f"{found[0].start:x}-{found[0].end:x}") :].partition("VmFlags:")[2].splitlines()[0].split()
        assert {"lo", "dd"} <= set(flags)
    for fd in os.listdir(f"/proc/{keeper.pid}/fd"):
        if os.readlink(path := f"/proc/{keeper.pid}/fd/{fd}") == NAME:
            one = os.open(path, os.O_RDONLY)
            assert fcntl.fcntl(one, fcntl.F_GET_SEALS) == SEALED
            os.close(one)


async def test_keys_outlive_the_agent_and_go_when_they_are_forgotten(keeper: Keeper, client: KeeperClient) -> None:
    first, _ = await client.make_key(IDENTITY)
    second, _ = await client.make_key(IDENTITY)
    other, _ = await client.make_key("spiffe://cluster.local/ns/x/sa/y")
    assert len({first, second, other, 0}) == 4
    await client.close()
    again = await connect(keeper.path)
    assert {(one.id, one.identity) for one in await again.keys()} == {
        (first, IDENTITY), (second, IDENTITY), (other, "spiffe://cluster.local/ns/x/sa/y")}
    await again.forget_key(first)
    await again.forget_key(first)
    assert {one.id for one in await again.keys()} == {second, other}
    assert len(held(keeper.pid)) == 2
    await again.close()


@pytest.mark.parametrize("identity", [
    "", "reviews", "spiffe://", "spiffe:///ns/a/sa/b", "spiffe://td/ns/a/sa/", "spiffe://td/ns//sa/b", "spiffe://td/ns/a/sa/b/c",
    "spiffe://td/sa/a/ns/b", "SPIFFE://td/ns/a/sa/b", "spiffe://TD/ns/a/sa/b", "spiffe://td/ns/a/sa/B", "spiffe://td/ns/a_b/sa/c",
    "spiffe://td/ns/a/sa/b,URI:spiffe://td/ns/c/sa/d", "spiffe://td/ns/a/sa/b\n", "spiffe://td/ns/a/sa/b\0", "spiffe://td/ns/\u00e4/sa/b",
    "spiffe://td:80/ns/a/sa/b"])
async def test_what_is_no_identity_gets_no_key(keeper: Keeper, client: KeeperClient, identity: str) -> None:
    with pytest.raises(KeeperRefused, match=r"no identity|characters"):
        await client.make_key(identity)
    assert await client.keys() == []
    assert held(keeper.pid) == set()


async def test_an_identity_that_is_too_long_is_malformed(keeper: Keeper, client: KeeperClient) -> None:
    with pytest.raises(KeeperRefused, match="at most 384"):
        await client.make_key("spiffe://td/ns/a/sa/" + "b" * 400)


async def test_keys_are_bounded_and_all_of_them_fit_one_answer(keeper: Keeper, client: KeeperClient) -> None:
    def identity(number: int) -> str:
        return f"spiffe://cluster.local/ns/a/sa/{number}-".ljust(384, "x")

    for number in range(256):
        first, _ = await client.make_key(identity(number))
        await client.make_key(identity(number))
    with pytest.raises(KeeperRefused, match="2 keys already"):
        await client.make_key(identity(7))
    with pytest.raises(KeeperRefused, match="256 identities"):
        await client.make_key(IDENTITY)
    assert len(await client.keys()) == 512
    await client.forget_key(first)
    await client.make_key(identity(255))
    assert len(held(keeper.pid)) == 512


async def test_only_the_agent_may_make_and_forget_keys_and_anybody_of_root_may_list_them(keeper: Keeper, client: KeeperClient) -> None:
    await client.make_key(IDENTITY)
    onlooker = await connect(keeper.path, hello=False)
    assert [one.identity for one in await onlooker.keys()] == [IDENTITY]
    with pytest.raises(KeeperRefused, match="HELLO"):
        await onlooker.make_key(IDENTITY)
    with pytest.raises(KeeperRefused, match="HELLO"):
        await onlooker.forget_key(1)
    await onlooker.close()


async def test_a_key_never_leaves_with_an_answer(keeper: Keeper, client: KeeperClient) -> None:
    """Every answer of the keeper to its agent, byte for byte, and no descriptor of a key."""
    await client.make_key(IDENTITY)
    (key,) = held(keeper.pid)
    await client.close()
    raw = Raw(keeper.path).hello()
    answers = b"".join(raw.ask(kind)[2] for kind in (4, 8, 9, 14))
    raw.close()
    assert answers
    assert key[SCALAR] not in answers
    assert held(os.getpid()) == set()
    assert where(os.getpid(), key[SCALAR]) != [], "the search finds what is there: the test itself has read it"


async def test_openssl_reads_no_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A configuration that is a pipe without a writer: whoever opens it waits for ever."""
    pipe = tmp_path / "openssl.cnf"
    os.mkfifo(pipe)
    monkeypatch.setenv("OPENSSL_CONF", str(pipe))
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run(["openssl", "rand", "1"], timeout=0.5, check=False, capture_output=True)
    with running(tmp_path / "run", workers=1, puppets=True) as keeper:
        client = await connect(keeper.path)
        await client.make_key(IDENTITY)
        await client.close()
