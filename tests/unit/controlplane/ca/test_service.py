"""CreateCertificate without gRPC: who gets what, who is refused with which words, and what is on record."""

from __future__ import annotations

import json
import os
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from google.protobuf import struct_pb2

from controlplane.ca import audit as audit_log
from controlplane.ca.audit import Audit
from controlplane.ca.authority import Authority
from controlplane.ca.limit import Limit
from controlplane.ca.service import REFUSALS, CertificateService, Refusal
from controlplane.ca.store import Folder, StoreError
from controlplane.ca.tokens import NodeTokens
from protos.gen.istio import ca_pb2
from tests.support.authority import IDENTITY, bearer, message, openssl_accepts, request, token_file
from tests.support.manifests import REVIEWS, good, mesh_of, pod
from tests.support.wait import until

Code = grpc.StatusCode
OTHER = "spiffe://cluster.local/ns/default/sa/sa-ratings"


class Desk:
    """A service with its folder, its mesh, and what it wrote."""

    def __init__(self, folder: Path, limit: Limit | None = None) -> None:
        self.now = datetime.now(UTC)
        self.mesh = mesh_of(REVIEWS, pod("ratings-0", "10.244.2.9", "ratings", node="n2"))
        store = Folder(folder / "ca")
        store.open("cluster.local", self.now)
        self.audit = Audit(folder / "audit.log")
        self.path = folder / "audit.log"
        authority = Authority(store, lambda: self.now)
        tokens = NodeTokens(token_file(folder / "tokens"))
        self.service = CertificateService(authority, tokens, self.mesh.runs, self.audit, "cluster.local", limit=limit)

    async def ask(self, what: Any = None, metadata: Any = None) -> list[str]:
        async def read() -> Any:
            return message() if what is None else what

        answer = await self.service.create(read, bearer() if metadata is None else metadata, "ipv4:10.0.0.1:555")
        return list(answer.cert_chain)

    async def refused(self, what: Any = None, metadata: Any = None) -> tuple[Code, str, str]:
        with pytest.raises(Refusal) as told:
            await self.ask(what, metadata)
        return told.value.code, told.value.reason, str(told.value)

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_text().splitlines()]


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


async def test_a_node_gets_certificates_for_the_pods_that_it_has(desk: Desk, tmp_path: Path) -> None:
    for node, identity in (("n1", IDENTITY), ("n2", IDENTITY), ("n2", OTHER)):
        chain = await desk.ask(message(identity=identity), bearer(node))
        assert openssl_accepts(tmp_path, chain) and len(chain) == 2
        names = x509.load_pem_x509_certificate(chain[0].encode()).extensions.get_extension_for_class(x509.SubjectAlternativeName)
        assert names.critical and [name.value for name in names.value] == [identity]


@pytest.mark.parametrize(
    ("what", "caller", "code", "reason", "said"),
    [
        (message(), (), Code.UNAUTHENTICATED, "token", "no token came with the call"),
        (message(), (("authorization", "Bearer x"),), Code.UNAUTHENTICATED, "token", "the token is not known here"),
        (message(identity=OTHER), bearer(), Code.PERMISSION_DENIED, "impersonation", f"n1 may not have a certificate for {OTHER}: no pod"),
        (message(), bearer("n3"), Code.PERMISSION_DENIED, "impersonation", "no pod of that service account is on this node"),
        (
            message(identity="spiffe://cluster.local/ns/kube-system/sa/sa-reviews"),
            bearer(),
            Code.PERMISSION_DENIED,
            "impersonation",
            "no pod of that service account is on this node",
        ),
        (
            message(identity="spiffe://other.mesh/ns/default/sa/sa-reviews"),
            bearer(),
            Code.PERMISSION_DENIED,
            "impersonation",
            "the trust domain here is cluster.local",
        ),
        (message(identity=""), bearer(), Code.INVALID_ARGUMENT, "identity", "node n1 does not say for whom"),
        (message(identity="reviews"), bearer(), Code.INVALID_ARGUMENT, "identity", "'reviews' is no SPIFFE ID"),
        (
            ca_pb2.IstioCertificateRequest(metadata=struct_pb2.Struct(fields={"ImpersonatedIdentity": struct_pb2.Value(number_value=1)})),
            bearer(),
            Code.INVALID_ARGUMENT,
            "identity",
            "does not say for whom",
        ),
        (message(csr="x"), bearer(), Code.INVALID_ARGUMENT, "request", "cannot be read (Unable to load PEM file"),
        (message(csr=request(OTHER)), bearer(), Code.INVALID_ARGUMENT, "request", f"names {OTHER}, and is for {IDENTITY} (for"),
        (message(seconds=90 * 86400 + 1), bearer(), Code.INVALID_ARGUMENT, "lifetime", "at most 7776000 s are given"),
    ],
)
async def test_who_is_refused_is_told_why_and_stands_in_the_record(
    desk: Desk, what: Any, caller: Any, code: Code, reason: str, said: str
) -> None:
    found = await desk.refused(what, caller)
    assert found[:2] == (code, reason) and said in found[2]
    (record,) = desk.records()
    assert (record["event"], record["code"], record["reason"], record["text"]) == ("refused", code.name, reason, found[2])
    assert record["node"] == ("" if reason == "token" else dict(caller)["authorization"].split("-")[2])
    assert record["peer"] == "ipv4:10.0.0.1:555"
    assert desk.service.counts.refused == {reason: 1} and desk.service.counts.issued == 0 and reason in REFUSALS


async def test_a_pod_counts_from_the_moment_it_is_there_until_it_ends(desk: Desk) -> None:
    fresh = pod("new-0", "10.244.1.77", "new").replace('podIPs: [{ip: "10.244.1.77"}]', "podIPs: []").replace("Running", "Pending")
    identity = "spiffe://cluster.local/ns/default/sa/sa-new"
    assert (await desk.refused(message(identity=identity)))[0] is Code.PERMISSION_DENIED
    desk.mesh.apply(good(fresh).objects.values())
    await desk.ask(message(identity=identity))  # it has no address yet, and needs a certificate before its first connection
    desk.mesh.apply(good(pod("new-0", "10.244.1.77", "new")).objects.values())
    await desk.ask(message(identity=identity))
    for phase in ("Succeeded", "Failed"):
        desk.mesh.apply(good(pod("new-0", "10.244.1.77", "new").replace("Running", phase)).objects.values())
        assert (await desk.refused(message(identity=identity)))[0] is Code.PERMISSION_DENIED
    moved = good(pod("new-0", "10.244.1.77", "new", node="n2"))
    desk.mesh.apply(moved.objects.values())
    assert (await desk.refused(message(identity=identity), bearer("n1")))[0] is Code.PERMISSION_DENIED
    await desk.ask(message(identity=identity), bearer("n2"))
    desk.mesh.apply([], list(moved.objects))
    assert (await desk.refused(message(identity=identity), bearer("n2")))[0] is Code.PERMISSION_DENIED


async def test_the_lifetime_is_what_was_asked_for_and_a_day_by_default(desk: Desk) -> None:
    for seconds, lasts in ((0, 86400), (-5, 86400), (60, 60), (90 * 86400, 90 * 86400)):
        made = x509.load_pem_x509_certificate((await desk.ask(message(seconds=seconds)))[0].encode())
        assert made.not_valid_after_utc == desk.now.replace(microsecond=0) + timedelta(seconds=lasts)


async def test_an_issue_is_on_record_with_all_that_finds_it_again(desk: Desk) -> None:
    leaf = x509.load_pem_x509_certificate((await desk.ask())[0].encode())
    (record,) = desk.records()
    assert record["event"] == "issued" and record["node"] == "n1" and record["identity"] == IDENTITY
    assert int(record["serial"], 16) == leaf.serial_number
    assert record["notAfter"] == leaf.not_valid_after_utc.strftime("%Y-%m-%dT%H:%M:%SZ")
    assert record["issuer"] == desk.service.status()["signing"]["sha256"] and len(record["key"]) == 64


async def test_without_a_record_there_is_no_certificate(desk: Desk) -> None:
    os.close(desk.audit._file)
    desk.audit._file = os.open("/dev/full", os.O_WRONLY)
    desk.path.unlink()
    os.mkdir(desk.path)  # it cannot be made anew
    code, reason, said = await desk.refused()
    assert (code, reason) == (Code.UNAVAILABLE, "audit") and "cannot write its audit log" in said
    assert desk.service.counts.issued == 0


async def test_an_authority_that_has_ended_issues_nothing_and_says_so(desk: Desk) -> None:
    desk.now += timedelta(days=3651)
    code, reason, said = await desk.refused()
    assert (code, reason) == (Code.FAILED_PRECONDITION, "expired") and "the authority's own one ended at" in said


async def test_a_caller_that_runs_wild_is_slowed_down_and_others_are_not(tmp_path: Path) -> None:
    desk = Desk(tmp_path, Limit(burst=3, per_second=0.001))
    for _ in range(3):
        await desk.ask()
    code, reason, said = await desk.refused()
    assert (code, reason) == (Code.RESOURCE_EXHAUSTED, "rate") and "node n1 asks for too many certificates; ask again in" in said
    await desk.ask(metadata=bearer("n2"))


async def test_the_request_is_not_even_read_before_the_caller_is_known(desk: Desk) -> None:
    async def read() -> Any:
        raise AssertionError

    with pytest.raises(Refusal, match="not known here"):
        await desk.service.create(read, (("authorization", "Bearer x"),), "peer")


async def test_a_burst_of_a_thousand_is_signed_within_seconds(desk: Desk) -> None:
    """What a node asks for that starts with everything, four times over: within the rate, and each of them its own."""
    asked = [message() for _ in range(20)]
    begin = time.thread_time()
    serials = {x509.load_pem_x509_certificate((await desk.ask(asked[number % 20]))[0].encode()).serial_number for number in range(1000)}
    spent = time.thread_time() - begin
    assert len(serials) == 1000 and len(desk.records()) == 1000 and desk.service.counts.issued == 1000
    assert spent < 10  # measured: 1.1 s


# -- the record itself ----------------------------------------------------------------------------------------------


def test_the_record_turns_over_at_its_size_and_keeps_the_last_ones(tmp_path: Path) -> None:
    audit = Audit(tmp_path / "audit.log", file_bytes=2000)
    for number in range(500):
        audit.issued(number=number)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["audit.log"] + [f"audit.log.{number}" for number in range(1, audit_log.FILES + 1)]
    lines = [json.loads(line)["number"] for name in (*files[:0:-1], files[0]) for line in (tmp_path / name).read_text().splitlines()]
    assert lines == list(range(lines[0], 500)) and all(path.stat().st_size <= 2000 for path in tmp_path.iterdir())
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}
    (tmp_path / "audit.log").rename(tmp_path / "taken-away")  # by logrotate, say
    audit.issued(number=500)
    assert json.loads((tmp_path / "audit.log").read_text())["number"] == 500
    audit.close()


def test_noise_is_counted_instead_of_pushing_the_past_out(tmp_path: Path) -> None:
    audit = Audit(tmp_path / "audit.log")
    for _ in range(1000):
        audit.refused("", text="no token")
    audit.refused("n1", text="another caller has lines of its own")
    assert len((tmp_path / "audit.log").read_text().splitlines()) < 100
    until(lambda: audit.settle() or "more within" in (tmp_path / "audit.log").read_text(), "the rest is written as one line")
    audit.close()
    records = [json.loads(line) for line in (tmp_path / "audit.log").read_text().splitlines()]
    assert sum(record.get("more", 1) for record in records) == 1001


def test_a_record_that_others_may_read_or_that_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").write_text("")
    (tmp_path / "open").chmod(0o644)
    (tmp_path / "link").symlink_to("/dev/null")
    for name in ("open", "link", "gone/audit.log"):
        with pytest.raises(StoreError, match=r"the audit log .* cannot be written"):
            Audit(tmp_path / name)
