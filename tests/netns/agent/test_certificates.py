"""From a pod's service account to a certificate in its worker: real authority, keeper, agent and workers; openssl looks at what came."""
from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.cli.main import CommandError
from agent.dataplane import blobs
from agent.dataplane.client import connect
from agent.model.identity import Certificate, Trust
from tests.netns.agent.conftest import NARROWS, Instance
from tests.support.authority import TOKENS, authority, openssl, token_file
from tests.support.keys import SCALAR, held, where
from tests.support.netns import Namespaces
from tests.support.wait import until

pytestmark = pytest.mark.netns
IDENTITY = "spiffe://cluster.local/ns/default/sa/default"


class Signed(Instance):
    """With an authority in its control plane, and a token for the agent."""

    @property
    def ca(self) -> Path:
        return self.run_dir / "ca"

    def start_plane(self) -> None:
        (self.run_dir / "xds.sock").unlink(missing_ok=True)
        tokens = token_file(self.run_dir / "tokens")
        self.start("plane", "control-plane", "--config", str(self.config), "--listen", f"unix:{self.run_dir}/xds.sock",
                   "--ca-dir", str(self.ca), "--node-tokens", str(tokens))

    def start_agent(self, *more: str) -> None:
        (self.run_dir / "token").write_text(TOKENS["n1"])
        self.start("agent", "agent", "--run-dir", str(self.run_dir), "--node", "n1", "--xds", f"unix:{self.run_dir}/xds.sock",
                   "--ca-token", str(self.run_dir / "token"), *more)

    def certificates(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.ask("/config_dump")["certificates"]
        return found

    def valid(self) -> dict[str, Any]:
        return until(lambda: next((one for one in self.certificates() if one["state"] == "valid"), None),
                     f"a certificate is in force: {self.certificates()}", 60)

    def workers(self) -> list[int]:
        return [one["pid"] for one in self.ask("/workers")]

    def trusted(self) -> list[Any]:
        """Roots of the authority, as its answers have them by now."""
        line = next(line for line in reversed((self.run_dir / "plane.log").read_text().splitlines()) if '"roots": [' in line)
        found: list[Any] = json.loads(line)["roots"]
        return found

    def missing(self) -> list[str]:
        try:
            found: list[str] = self.ask("/ready")["missing"]
        except CommandError:
            return []
        return found

    async def in_force(self) -> tuple[list[Certificate], list[Trust]]:
        client = await connect(self.run_dir / "keeper.sock", hello=False)
        puts = (await client.inventory()).blobs
        await client.close()
        return ([blobs.decode_certificate(one) for one in puts if one.kind == blobs.Kind.CERTIFICATE],
                [blobs.decode_trust(one) for one in puts if one.kind == blobs.Kind.TRUST])


@pytest.fixture
def signed(namespaces: Namespaces) -> Iterator[Signed]:
    made = Signed(namespaces)
    try:
        yield made
    finally:
        made.close()


async def test_a_pods_certificate_comes_from_the_authority_and_its_key_is_in_keeper_and_worker_alone(signed: Signed) -> None:
    signed.up()
    shown = signed.valid()
    assert (shown["identity"], shown["pods"]) == (IDENTITY, 2)
    (certificate,), (trust,) = await signed.in_force()
    (signed.run_dir / "leaf.der").write_bytes(certificate.chain[0])
    text = openssl("x509", "-inform", "DER", "-in", signed.run_dir / "leaf.der", "-noout", "-text", "-serial")
    assert f"URI:{IDENTITY}\n" in text
    serial = re.search(r"^serial=([0-9A-F]+)$", text, re.M)
    assert serial and int(serial[1], 16) == int(shown["certChain"][0]["serialNumber"], 16)
    assert trust.roots == tuple(blobs_of(signed.ca / "current" / "root-cert.pem"))
    # the key: of that certificate, in the keeper and in the workers of the two pods
    keeper = signed.processes["keeper"].pid
    (key,) = held(keeper)
    public = subprocess.run(["openssl", "pkey", "-inform", "DER", "-pubout"], input=key, capture_output=True, check=True).stdout.decode()
    assert public == openssl("x509", "-inform", "DER", "-in", signed.run_dir / "leaf.der", "-noout", "-pubkey")
    until(lambda: [held(pid) for pid in signed.workers()] == [{key}, {key}], "both workers have it")
    # and nowhere else: not in the agent's memory nor that of who signs, not in a file
    for name in ("agent", "plane"):
        pid = signed.processes[name].pid
        assert where(pid, key[SCALAR]) == [] and held(pid) == set()
        assert where(pid, IDENTITY.encode()), "the search finds what is there"
    secret, pem = key[SCALAR], re.compile(rb"BEGIN (EC )?PRIVATE KEY")
    for path in signed.run_dir.rglob("*"):
        if path.is_file() and path.name != "ca-key.pem":
            data = path.read_bytes()
            assert secret not in data and not pem.search(data), path
    metric = next(line for line in signed.metrics() if line.startswith("narrows_certificate_expiration_timestamp_seconds"))
    assert metric.startswith(f'narrows_certificate_expiration_timestamp_seconds{{identity="{IDENTITY}"}} ')
    assert float(metric.rpartition(" ")[2]) == certificate.not_after
    assert signed.metric("narrows_certificate_requests_total") == 1.0


async def test_an_agent_that_comes_back_asks_for_nothing_and_a_keeper_that_comes_back_has_everything_asked_again(signed: Signed) -> None:
    signed.up()
    signed.valid()
    before = await signed.in_force()
    signed.kill("agent")
    signed.start_agent()
    signed.ready()
    assert await signed.in_force() == before
    assert signed.valid()["key"] == before[0][0].key
    assert signed.metric("narrows_certificate_requests_total") == 0.0
    signed.kill("keeper")
    signed.start_keeper()
    until(lambda: signed.valid()["key"] != before[0][0].key, "another key, another certificate", 60)
    after = await signed.in_force()
    assert after[1] == before[1] and after[0][0].key != before[0][0].key
    assert held(signed.processes["keeper"].pid)


def test_a_refusal_is_told_and_the_pod_is_captured_all_the_same(signed: Signed) -> None:
    signed.start_keeper()
    signed.start_plane()
    signed.start_agent()
    signed.ready()
    signed.valid()
    signed.kill("agent")
    (signed.run_dir / "tokens").write_text("")
    shape = signed.node.pod("other")
    signed.pod("other-0", shape)
    for path in (signed.config / "pod-other-0.yaml", signed.run_dir / "pods" / "default.other-0.json"):
        path.write_text(path.read_text().replace('"serviceAccountName": "default"', '"serviceAccountName": "other"'))
    signed.start_agent()
    until(signed.missing, "the agent answers", 60)
    assert signed.shown("other-0")["captured"]
    refused = until(lambda: next((one for one in signed.certificates() if one["state"] == "failed"), None), "it is refused")
    assert refused["identity"].endswith("/sa/other") and "UNAUTHENTICATED" in refused["error"]
    assert any("has no certificate" in line for line in signed.ask("/ready")["missing"])
    table = subprocess.run([*NARROWS, "config", "certificates", "--run-dir", str(signed.run_dir)], capture_output=True, text=True,
                           check=True).stdout
    assert re.search(r"sa/default\s+valid\s+2\s", table) and re.search(r"sa/other\s+failed\s+1\s", table), table
    token_file(signed.run_dir / "tokens")
    until(lambda: all(one["state"] == "valid" for one in signed.certificates()), "it is signed once the token is known", 60)
    signed.ready()
    assert signed.metric("narrows_certificate_request_failures_total") >= 1.0


async def test_an_identity_goes_with_its_last_pod(signed: Signed) -> None:
    signed.up()
    signed.valid()
    for name in ("client", "web-0"):
        signed.remove_pod(name)
    until(lambda: signed.certificates() == [], "no certificate is left")
    until(lambda: not held(signed.processes["keeper"].pid), "no key is left")
    assert [held(pid) for pid in signed.workers()] == [set(), set()]
    assert (await signed.in_force())[0] == []


async def test_revocation_lists_and_a_second_root_come_into_force_while_everything_runs(signed: Signed) -> None:
    path = signed.run_dir / "lists.pem"
    signed.start_keeper()
    signed.start_plane()
    signed.start_agent("--ca-crl", str(path))
    until(lambda: any("revocation lists" in line for line in signed.missing()), "the missing file is told", 60)
    signed.valid()
    made = revocation_list()
    path.write_bytes(made)
    until(lambda: signed.events("RevocationLists"), "the lists are taken")
    signed.ready()
    async with asyncio.timeout(20):
        while [len(one.lists) for one in (await signed.in_force())[1]] != [1]:
            await asyncio.sleep(0.05)
    subprocess.run([sys.executable, "-c", "from controlplane.ca.cli import command; command()", "prepare", str(signed.ca)], check=True)
    roots = blobs_of(signed.ca / "current" / "root-cert.pem")
    assert len(roots) == 2
    until(lambda: len(signed.trusted()) == 2, "the control plane has read the new root", 60)
    signed.kill("agent", signal.SIGTERM)
    signed.pod("new-0", signed.node.pod("new"))
    for place in (signed.config / "pod-new-0.yaml", signed.run_dir / "pods" / "default.new-0.json"):
        place.write_text(place.read_text().replace('"serviceAccountName": "default"', '"serviceAccountName": "new"'))
    signed.start_agent("--ca-crl", str(path))
    signed.ready()
    until(lambda: [one["state"] for one in signed.certificates()] == ["valid", "valid"], "the new pod's too", 60)
    _, (trust,) = await signed.in_force()
    assert (set(trust.roots), len(trust.lists)) == (set(roots), 1)


def blobs_of(path: Path) -> list[bytes]:
    """Certificates of a PEM file as DER, by openssl."""
    parts = re.findall(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", path.read_text(), re.DOTALL)
    return [subprocess.run(["openssl", "x509", "-outform", "DER"], input=part.encode(), capture_output=True, check=True).stdout
            for part in parts]


def revocation_list() -> bytes:
    """Of an authority that signed nothing here, PEM."""
    import datetime

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization

    pair, now = authority("elsewhere"), datetime.datetime.now(datetime.UTC)
    builder = (x509.CertificateRevocationListBuilder().issuer_name(pair.certificate.subject).last_update(now)
               .next_update(now + datetime.timedelta(days=1)))
    return builder.sign(pair.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
