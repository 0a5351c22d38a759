"""Our agent's calls against a real control plane over TLS: ADS and certificates, with and without what each needs."""
from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Iterator, Mapping
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from agent.app.access import Access
from agent.app.certificates import OPTIONS
from agent.identity.authority import Authority, SignError
from agent.xds.client import Client, Node
from agent.xds.session import Session, Update
from agent.xds.tree import NAMED
from agent.xds.types import TypeUrl
from tests.support.authority import IDENTITY, TOKENS, authority, token_file
from tests.support.controlplane import ControlPlane, control_plane
from tests.support.manifests import REVIEWS


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    folder = tmp_path_factory.mktemp("plane")
    token_file(folder / "tokens")
    more = ["--ca-dir", str(folder / "ca"), "--node-tokens", str(folder / "tokens")]
    with control_plane(folder, REVIEWS, more=more, ports=["127.0.0.1:0"]) as made:
        yield made


@pytest.fixture
def access(plane: ControlPlane, tmp_path: Path) -> Access:
    (tmp_path / "token").write_text(TOKENS["n1"])
    return Access(plane.ports[0], "Kubernetes", tmp_path / "token", plane.config.parent / "ca" / "current" / "root-cert.pem")


def request() -> bytes:
    made = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).add_extension(
        x509.SubjectAlternativeName([x509.UniformResourceIdentifier(IDENTITY)]), critical=True)
    return made.sign(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def asking(access: Access) -> Authority:
    return Authority(access.target, lambda: access.open(OPTIONS), access.metadata)


async def test_a_certificate_is_signed_over_tls(access: Access) -> None:
    signed = await asking(access).sign(IDENTITY, request(), time.time())
    assert access.root is not None
    root = x509.load_pem_x509_certificate(access.root.read_bytes())
    assert signed.roots == (root.public_bytes(serialization.Encoding.DER),)
    x509.load_der_x509_certificate(signed.chain[0]).verify_directly_issued_by(root)
    assert 86_000 < signed.not_after - time.time() < 87_000


async def test_who_has_no_token_a_wrong_one_or_other_roots_gets_none_and_is_told_why(access: Access, tmp_path: Path) -> None:
    assert access.token is not None
    with pytest.raises(SignError, match="PERMISSION_DENIED") as denied:
        await asking(access).sign(IDENTITY.replace("sa-reviews", "nobody"), request(), time.time())
    assert not denied.value.unanswered
    access.token.write_text("another")
    with pytest.raises(SignError, match="UNAUTHENTICATED"):
        await asking(access).sign(IDENTITY, request(), time.time())
    access.token.unlink()
    with pytest.raises(SignError, match=r"cannot be asked: .*token"):
        await asking(access).sign(IDENTITY, request(), time.time())
    access.token.write_text(TOKENS["n1"])
    stranger = tmp_path / "stranger.pem"
    stranger.write_bytes(authority("stranger").pem)
    with pytest.raises(SignError, match="UNAVAILABLE") as away:
        await asking(Access(access.target, "c", access.token, stranger)).sign(IDENTITY, request(), time.time())
    assert away.value.unanswered


async def test_ads_is_followed_over_tls_with_the_token_of_the_node(access: Access) -> None:
    got: asyncio.Queue[Update] = asyncio.Queue()

    def apply(update: Update) -> Awaitable[Mapping[str, str]]:
        got.put_nowait(update)
        done: asyncio.Future[Mapping[str, str]] = asyncio.get_running_loop().create_future()
        done.set_result({})
        return done

    assert access.token is not None
    access.token.write_text("another")
    client = Client(access.target, Node("n1"), Session([TypeUrl.ADDRESS], NAMED), apply, open_channel=access.open,
                    credentials=access.metadata)
    running = asyncio.create_task(client.run())
    try:
        async with asyncio.timeout(30):
            while "UNAUTHENTICATED" not in client.status.error:
                await asyncio.sleep(0.02)
            access.token.unlink()
            while "cannot be called" not in client.status.error:
                await asyncio.sleep(0.02)
            access.token.write_text(TOKENS["n1"])
            client.hurry()
            assert (await got.get()).changed
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
