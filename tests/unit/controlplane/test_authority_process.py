"""The certificate authority as a process: over a unix socket and over TLS, with tokens, across restarts and a change of root."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import grpc.aio
import pytest
from click.testing import CliRunner
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from prometheus_client.parser import text_string_to_metric_families

from controlplane.ca.cli import command as narrows_ca
from tests.support.authority import IDENTITY, TOKENS, authority, bearer, message, openssl_accepts, s_client, token_file
from tests.support.controlplane import ControlPlane, control_plane
from tests.support.manifests import REVIEWS
from tests.support.mesh_client import LOCAL, Ended, addresses, channel, create, refused, root_of
from tests.support.wait import until


def options(folder: Path, *more: str) -> list[str]:
    token_file(folder / "tokens")
    return ["--ca-dir", str(folder / "ca"), "--node-tokens", str(folder / "tokens"), *more]


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    folder = tmp_path_factory.mktemp("authority")
    with control_plane(folder, REVIEWS, more=options(folder), ports=["127.0.0.1:0"]) as made:
        yield made


@pytest.mark.parametrize("tls", [False, True])
async def test_a_certificate_is_given_to_a_caller_with_a_token_and_to_nobody_else(plane: ControlPlane, tmp_path: Path, tls: bool) -> None:
    async with channel(plane, tls) as one:
        chain = await create(one)
        assert openssl_accepts(tmp_path, chain) and chain[-1].encode() == root_of(plane)
        assert (await refused(one, metadata=()))[0] is grpc.StatusCode.UNAUTHENTICATED  # a socket's mode is no token
        code, said = await refused(one, metadata=bearer("n3"))
        assert code is grpc.StatusCode.PERMISSION_DENIED and "node n3 may not have a certificate for" in said
        assert (await refused(one, message(csr="x")))[0] is grpc.StatusCode.INVALID_ARGUMENT


async def test_over_the_network_the_mesh_is_followed_with_a_token_of_the_own_node_only(plane: ControlPlane) -> None:
    async with channel(plane, tls=True) as one:
        assert len(await addresses(one, bearer("n1"), "n1")) == len(await addresses(one, bearer("n1"))) >= 3
        for metadata, node, code, said in (
            ((), "n1", grpc.StatusCode.UNAUTHENTICATED, "no token came with the call"),
            ((("authorization", "Bearer x"),), "n1", grpc.StatusCode.UNAUTHENTICATED, "not known here"),
            (bearer("n1"), "n2", grpc.StatusCode.PERMISSION_DENIED, "the token is that of the node n1, and the client says it is n2"),
        ):
            with pytest.raises(Ended) as told:
                await addresses(one, metadata, node)
            assert told.value.args[0] is code and said in told.value.args[1]
    async with channel(plane, tls=False) as one:  # who may open the socket may follow the mesh
        assert len(await addresses(one, ())) >= 3


async def test_a_port_speaks_tls_with_a_certificate_of_the_mesh_root_and_nothing_else(plane: ControlPlane, tmp_path: Path) -> None:
    (tmp_path / "root.pem").write_bytes(root_of(plane))
    trust = ["-CAfile", tmp_path / "root.pem"]
    for name in (["-verify_hostname", "localhost"], ["-verify_ip", "127.0.0.1"]):
        said = s_client(plane.ports[0], *trust, *name)
        assert "Verify return code: 0 (ok)" in said and "TLSv1.3" in said and "ALPN protocol: h2" in said, said
    assert "ostname mismatch" in s_client(plane.ports[0], *trust, "-verify_hostname", "elsewhere")
    old = s_client(plane.ports[0], *trust, "-tls1_1", "-cipher", "ALL:@SECLEVEL=0")
    assert "Cipher is (NONE)" in old, old
    async with grpc.aio.insecure_channel(plane.ports[0], options=LOCAL) as plain:
        with pytest.raises(grpc.aio.AioRpcError) as told:
            await create(plain)
        assert told.value.code() is grpc.StatusCode.UNAVAILABLE
    async with channel(plane, tls=True, root=authority("stranger").pem) as one:
        assert (await refused(one))[0] is grpc.StatusCode.UNAVAILABLE


async def test_who_connects_and_says_nothing_is_let_go(plane: ControlPlane) -> None:
    host, _, number = plane.ports[0].rpartition(":")
    with socket.create_connection((host, int(number)), timeout=30) as silent:
        begin = time.monotonic()
        assert await asyncio.to_thread(silent.recv, 1) == b""
        assert 5 < time.monotonic() - begin < 25  # 10 s


async def test_connections_that_go_before_their_handshake_do_no_harm_also_while_the_certificate_changes(tmp_path: Path) -> None:
    """gRPC issue 36693: with a certificate given anew to each handshake, the first round of this ended the process."""
    with control_plane(tmp_path, REVIEWS, more=options(tmp_path), ports=["127.0.0.1:0", "127.0.0.1:0"]) as plane:
        for step in ("", "prepare", "switch", ""):
            if step:
                done = CliRunner().invoke(narrows_ca, [step, str(tmp_path / "ca"), *(["--now"] if step == "switch" else [])])
                assert done.exit_code == 0, done.output
            for port in plane.ports * 3:
                host, _, number = port.rpartition(":")
                held = [socket.create_connection((host, int(number)), timeout=10) for _ in range(200)]
                for one in held:
                    one.close()
            if step:
                until(lambda: served(plane, tmp_path) == (tmp_path / "ca/current/ca-cert.pem").read_bytes(), f"{step} reached the port")
            async with channel(plane, tls=True) as tls:
                await create(tls)
        assert plane.process is not None and plane.process.poll() is None


async def test_pages_metrics_and_the_record_tell_what_was_done(plane: ControlPlane) -> None:
    before = plane.debug("ca")
    async with channel(plane, tls=False) as one:
        await create(one)
        await refused(one, metadata=())
    shown = plane.debug("ca")
    assert (shown["issued"] - before["issued"], shown["refused"]["token"] - before["refused"].get("token", 0)) == (1, 1)
    assert shown["trustDomain"] == "cluster.local" and shown["problem"] == "" and shown["tokens"] == len(TOKENS)
    root = x509.load_pem_x509_certificate(root_of(plane))
    assert [item["sha256"] for item in shown["roots"]] == [shown["signing"]["sha256"]] == [root.fingerprint(hashes.SHA256()).hex()]
    samples = {
        (one.name, one.labels.get("reason", "")): one.value
        for family in text_string_to_metric_families(plane.get("/metrics")[1])
        for one in family.samples
    }
    assert samples["citadel_server_csr_count", ""] == shown["requests"]
    assert samples["citadel_server_success_cert_issuance_count", ""] == shown["issued"]
    told = shown["refused"]
    assert samples["citadel_server_authentication_failure_count", ""] == told["token"] + told.get("impersonation", 0)
    assert samples["citadel_server_root_cert_expiry_timestamp", ""] == root.not_valid_after_utc.timestamp()
    assert samples["narrows_ca_refusals", "token"] == shown["refused"]["token"]
    log = Path(shown["auditLog"])
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert [record["event"] for record in records[-2:]] == ["issued", "refused"]
    assert records[-2]["node"] == "n1" and records[-2]["identity"] == IDENTITY
    assert "PRIVATE" not in plane.log.read_text() + log.read_text() and not any(token in plane.log.read_text() for token in TOKENS.values())


async def test_a_burst_of_a_thousand_from_one_node_is_answered(tmp_path: Path) -> None:
    with control_plane(tmp_path, REVIEWS, more=options(tmp_path), ports=["127.0.0.1:0"]) as plane:
        async with channel(plane, tls=True) as one:
            asked, gate = message(), asyncio.Semaphore(8)  # as many as an agent has under way

            async def ask() -> str:
                async with gate:
                    return (await create(one, asked, seconds=60))[0]

            begin = time.monotonic()
            leaves = await asyncio.gather(*(ask() for _ in range(1000)))
            spent = time.monotonic() - begin
            assert len({x509.load_pem_x509_certificate(leaf.encode()).serial_number for leaf in leaves}) == 1000
            code, said = grpc.StatusCode.OK, ""
            for _ in range(1000):  # the bucket has filled a little meanwhile
                try:
                    await create(one, asked)
                except grpc.aio.AioRpcError as error:
                    code, said = error.code(), error.details() or ""
                    break
            assert code is grpc.StatusCode.RESOURCE_EXHAUSTED and "node n1 asks for too many certificates" in said
            await create(one, metadata=bearer("n2"))
        print(f"1000 certificates in {spent:.2f} s")
        assert spent < 60


async def test_the_root_outlives_restarts_and_a_kill_and_other_trust_domains_are_told(tmp_path: Path) -> None:
    with control_plane(tmp_path, REVIEWS, more=options(tmp_path, "--trust-domain", "prod.example")) as plane:
        root = root_of(plane)
        identity = IDENTITY.replace("cluster.local", "prod.example")
        for _ in range(2):
            async with channel(plane, tls=False) as one:
                assert (await create(one, message(identity=identity)))[-1].encode() == root
                assert (await refused(one))[0] is grpc.StatusCode.PERMISSION_DENIED
                pods = [found.workload for found in (await addresses(one, ())).values() if found.HasField("workload")]
                assert {pod.trust_domain for pod in pods} == {"prod.example"}
            await asyncio.to_thread(plane.end, signal.SIGKILL)
            await asyncio.to_thread(plane.start)


async def test_plugged_in_files_sign_and_are_followed(tmp_path: Path) -> None:
    root = authority("root")
    first, second = authority("first", root), authority("second", root)
    token_file(tmp_path / "tokens")
    for name, content in (("cert", first.pem), ("key", first.key_pem), ("chain", first.pem), ("root", root.pem)):
        (tmp_path / name).write_bytes(content)
        (tmp_path / name).chmod(0o600)
    more = [f"--ca-{name}={tmp_path / name}" for name in ("cert", "key", "chain", "root")]
    more += ["--node-tokens", str(tmp_path / "tokens"), "--audit-log", str(tmp_path / "audit.log"), "--server-name", "narrows.example"]
    with control_plane(tmp_path, REVIEWS, more=more, ports=["127.0.0.1:0"]) as plane:
        async with channel(plane, tls=True, root=root.pem) as one:
            chain = await create(one)
            assert chain[1:] == [first.pem.decode(), root.pem.decode()] and openssl_accepts(tmp_path, chain)
        for name, content in (("cert", second.pem), ("key", second.key_pem), ("chain", b"")):
            (tmp_path / name).write_bytes(content)
        until(lambda: plane.debug("ca")["signing"]["subject"] == "CN=second", "the new files are in force")
        async with channel(plane, tls=True, root=root.pem) as one:
            assert (await create(one))[1] == second.pem.decode()
        (tmp_path / "key").chmod(0o644)
        until(lambda: "open to others" in plane.debug("ca")["problem"], "the mode is told")
        async with channel(plane, tls=True, root=root.pem) as one:
            assert (await create(one))[1] == second.pem.decode()  # what was in force stays


async def test_a_running_control_plane_follows_a_change_of_root(tmp_path: Path) -> None:
    with control_plane(tmp_path, REVIEWS, more=options(tmp_path), ports=["127.0.0.1:0"]) as plane:
        folder, before = tmp_path / "ca", root_of(plane)
        for step, roots in (("prepare", 2), ("switch", 2), ("finish", 1)):
            done = CliRunner().invoke(narrows_ca, [step, str(folder), *(["--now"] if step != "prepare" else [])])
            assert done.exit_code == 0, done.output
            until(lambda roots=roots: len(plane.debug("ca")["roots"]) == roots, f"{step} is in force")  # type: ignore[misc]
            signing = (folder / "current" / "ca-cert.pem").read_bytes()
            until(lambda signing=signing: served(plane, tmp_path) == signing, f"after {step} the port has a certificate of what signs")  # type: ignore[misc]
            async with channel(plane, tls=True) as one:
                chain = await create(one)
            assert len(re.findall("BEGIN", chain[-1])) == roots and openssl_accepts(tmp_path, chain)
        assert before not in root_of(plane)


def served(plane: ControlPlane, folder: Path) -> bytes:
    """The root that signed what the port shows, found among those of the folder."""
    (folder / "root.pem").write_bytes(root_of(plane))
    shown = s_client(plane.ports[0], "-CAfile", folder / "root.pem")
    found = re.search(r"-----BEGIN.*?END CERTIFICATE-----\n", shown, re.DOTALL)
    if found is None:
        return b""  # it still has one of the root that went
    leaf = x509.load_pem_x509_certificate(found[0].encode())
    for one in x509.load_pem_x509_certificates(root_of(plane)):
        with contextlib.suppress(ValueError, InvalidSignature):
            leaf.verify_directly_issued_by(one)
            return one.public_bytes(serialization.Encoding.PEM)
    return b""
