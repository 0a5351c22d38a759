"""The client before a server that misbehaves: everything has a bound, a reason and an end; tokens and CAs may change."""
from __future__ import annotations

import ipaddress
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from protos.kubernetes import errors
from protos.kubernetes.client import Client
from protos.kubernetes.configuration import Configuration, File, Given
from protos.kubernetes.objects import Head, Key
from protos.kubernetes.resources import CONFIG_MAPS, NAMESPACES, PODS
from tests.support.kubernetes.server import ApiServer, Token
from tests.support.pki import Authority

PEM = serialization.Encoding.PEM


async def test_nobody_listening_is_told(server: ApiServer) -> None:
    async with Client(Configuration("http://127.0.0.1:1")) as client:
        with pytest.raises(errors.Unreachable, match=r"list /api/v1/pods: Unreachable: .*look whether the API server runs"):
            await client.list(PODS)


async def test_a_server_that_closes_or_is_slow_is_told(server: ApiServer) -> None:
    async with Client(server.configuration(), seconds=0.2) as client:
        dropping = server.chaos.add("list", "pods", drop=True)
        with pytest.raises(errors.Unreachable):
            await client.page(PODS)
        server.chaos.stop(dropping)
        server.chaos.add("list", "pods", times=1, seconds=60.0)
        with pytest.raises(errors.Unreachable, match=r"within 0\.2 s"):
            await client.page(PODS)


async def test_an_answer_beyond_the_bound_is_not_read(server: ApiServer) -> None:
    async with Client(server.configuration(), answer_bound=100_000) as client:
        server.chaos.add("list", "pods", times=1, large=1_000_000)
        with pytest.raises(errors.TooLarge, match="more than 100000 bytes"):
            await client.page(PODS)
        assert (await client.page(PODS)).items == []


@pytest.mark.parametrize("text", [b"<html>proxy</html>", b"[]", b'{"items":7}', b"\xff\xfe", b"{"])
async def test_an_answer_that_is_not_the_apis_is_told(server: ApiServer, client: Client, text: bytes) -> None:
    server.chaos.add("list", "pods", times=1, text=text)
    with pytest.raises(errors.Malformed, match="look whether it is the API server"):
        await client.page(PODS)
    server.chaos.add("get", "namespaces", times=1, text=text)
    with pytest.raises(errors.Malformed):
        await client.get(NAMESPACES, "default", kind=Head)


async def test_a_server_that_has_too_much_to_do_says_when_to_come_again(server: ApiServer, client: Client) -> None:
    server.chaos.add(times=1, code=429, reason="TooManyRequests", retry_after="7")
    with pytest.raises(errors.TooManyRequests) as error:
        await client.page(PODS)
    assert error.value.retry_after == 7


async def test_a_redirect_is_not_followed_with_our_token(server: ApiServer) -> None:
    server.chaos.add("list", "pods", code=302, reason="Found")
    async with Client(server.configuration("secret")) as client:
        with pytest.raises(errors.ApiError, match="302"):
            await client.page(PODS)
    assert len(server.requests) == 1


async def test_pages_that_expire_are_listed_anew_in_one(server: ApiServer, client: Client) -> None:
    for name in "abc":
        await client.create(CONFIG_MAPS, {"metadata": {"name": name}}, "default")
    server.chaos.add("list", "configmaps", after=2, times=1, code=410, reason="Expired")
    found = await client.list(CONFIG_MAPS, "default", limit=1)
    assert [one.key for one in found.items] == [Key("default", name) for name in "abc"]
    assert [one.query.get("limit") for one in server.asked("list", "configmaps")] == ["1", "1", "1", None]


async def test_a_renewed_token_is_used_and_a_refused_one_is_read_again(server: ApiServer, tmp_path: Path) -> None:
    server.authorize, server.tokens = True, {"one": Token("me"), "two": Token("me")}
    path = tmp_path / "token"
    path.write_text("one")
    configuration = Configuration(server.url, token=File(path, "the token"))
    async with Client(configuration) as client:
        await client.page(PODS)
        del server.tokens["one"]
        with pytest.raises(errors.Unauthorized, match="token"):
            await client.page(PODS)
        path.write_text("two")
        await client.page(PODS)
        path.write_text("bad one")
        with pytest.raises(errors.Unreachable, match="one line"):
            await client.page(PODS)


async def test_a_token_is_reviewed_for_its_audience(server: ApiServer, client: Client) -> None:
    extra = {"authentication.kubernetes.io/pod-name": ("p",)}
    server.tokens = {"t": Token("system:serviceaccount:a:b", audiences=("istio-ca",), extra=extra), "other": Token("x")}
    told = await client.review_token("t", ["istio-ca"])
    assert told.authenticated and told.user.username == "system:serviceaccount:a:b" and told.audiences == ["istio-ca"]
    assert told.user.extra == {"authentication.kubernetes.io/pod-name": ["p"]}
    assert not (await client.review_token("other", ["istio-ca"])).authenticated
    server.audience_aware = False  # a server that knows no audiences says yes to any of its tokens
    refused = await client.review_token("other", ["istio-ca"])
    assert not refused.authenticated and "not for istio-ca" in refused.error and not refused.user.username


async def test_an_address_of_ipv6(server: ApiServer) -> None:
    with ApiServer(host="::1") as six:
        async with Client(six.configuration()) as client:
            assert "[::1]" in six.url and len((await client.list(NAMESPACES)).items) == 2


def server_context(root: Authority, folder: Path, name: str, clients: Authority | None = None) -> ssl.SSLContext:
    """Of a server at 127.0.0.1."""
    key = ec.generate_private_key(ec.SECP256R1())
    now, day = datetime.now(UTC), timedelta(days=1)
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName("api")])
    certificate = (x509.CertificateBuilder().subject_name(x509.Name([])).issuer_name(root.name).public_key(key.public_key())
                   .serial_number(x509.random_serial_number()).not_valid_before(now - day).not_valid_after(now + day)
                   .add_extension(names, critical=True).sign(root.private, hashes.SHA256()))
    path = folder / name
    private = key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(certificate.public_bytes(PEM) + private)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    if clients is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cadata=clients.certificate.public_bytes(PEM).decode())
    return context


async def test_only_a_server_of_our_ca_is_spoken_to_and_a_new_ca_counts(tmp_path: Path) -> None:
    mine, other = Authority("mine"), Authority("other")
    path = tmp_path / "ca.crt"
    path.write_bytes(other.certificate.public_bytes(PEM))
    with ApiServer(tls=server_context(mine, tmp_path, "server")) as server:
        async with Client(server.configuration("secret", File(path, "the CA"))) as client:
            with pytest.raises(errors.Unreachable, match="CA"):
                await client.page(PODS)
            assert server.requests == []
            path.write_bytes(mine.certificate.public_bytes(PEM))
            assert (await client.page(PODS)).items == []


async def test_a_client_certificate_is_shown(tmp_path: Path) -> None:
    root = Authority()
    one = root.issue("spiffe://cluster.local/ns/a/sa/b")
    key = one.private.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    with ApiServer(tls=server_context(root, tmp_path, "server", clients=root)) as server:
        ca = Given(root.certificate.public_bytes(PEM))
        certificate = Given(one.certificates[0].public_bytes(PEM))
        shown = Configuration(server.url, ca=ca, certificate=certificate, key=Given(key), server_name="api")
        async with Client(shown) as client:
            assert (await client.page(PODS)).items == []
        async with Client(Configuration(server.url, ca=ca)) as client:
            with pytest.raises(errors.Unreachable):
                await client.page(PODS)
