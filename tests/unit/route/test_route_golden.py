"""Encoder and decoder are held together by bytes in tests/golden/blobs: what one writes and the other reads.

After a wanted change of the format: NARROWS_GOLDEN=write python -m pytest tests/unit/route/test_route_golden.py
"""
from __future__ import annotations

import os
import re
from dataclasses import asdict
from pathlib import Path

import pytest

from agent.dataplane import blobs
from agent.model.settings import ProxySettings
from ext.route import asked_door, door
from tests.support.blobs import CERTIFICATE, CLUSTER, HOST, POD, PUTS, SCOPE, TRUST, V1, V2, VIP, everything, transaction

ROOT = Path(__file__).resolve().parents[3]
GOLDEN = ROOT / "tests" / "golden" / "blobs"


def golden(name: str, present: bytes) -> bytes:
    path = GOLDEN / f"{name}.hex"
    if os.environ.get("NARROWS_GOLDEN") == "write":
        GOLDEN.mkdir(parents=True, exist_ok=True)
        text = present.hex()
        path.write_text("\n".join(text[i : i + 96] for i in range(0, len(text), 96)) + "\n")
    return bytes.fromhex(path.read_text())


@pytest.mark.parametrize("name", PUTS)
def test_the_encoder_writes_the_golden_bytes_of_each_kind(name: str) -> None:
    present = transaction(PUTS[name])
    assert present == golden(name, present)


@pytest.mark.parametrize("name", PUTS)
def test_the_golden_bytes_of_each_kind_are_read_back(name: str) -> None:
    data = golden(name, transaction(PUTS[name]))
    assert blobs.decode_transaction(data) == (1, (PUTS[name],))
    assert door.Tables().load(data) == 1


def test_the_decoder_reads_what_the_golden_bytes_say() -> None:
    tables = door.Tables()
    for name in PUTS:
        tables.load(golden(name, transaction(PUTS[name])))
    settings = tables.settings
    assert (settings["access_log"], settings["hold_bytes"], settings["connect_timeout_ms"]) == (0, 4096, 10_000)
    assert tables.service_by_index(11) == (HOST, [VIP, "fd00:10:96::1"], [(9080, 9080, 2), (6379, 0, 1)])
    assert tables.workload_by_index(21) == (True, ["10.244.1.5", "fd00:10:244:1::5"], [(11, 9080, 9080, 2)])
    assert tables.workload_identity(21) == (
        1, "spiffe://cluster.local/ns/default/sa/reviews", ["default/only-productpage", "istio-system/istio_converted_static_strict"])
    assert tables.pod(POD) == (21, SCOPE, ["10.244.1.5", "fd00:10:244:1::5"])
    assert tables.pod_identity(POD) == "spiffe://cluster.local/ns/default/sa/reviews"
    assert tables.pod_excluded(POD) == [9091]
    assert tables.trust(b"cluster.local") == (list(TRUST.roots), list(TRUST.lists))
    assert tables.certificate(CERTIFICATE.identity.encode()) == (
        CERTIFICATE.key, CERTIFICATE.not_before, CERTIFICATE.not_after, list(CERTIFICATE.chain))
    assert tables.cluster(CLUSTER.key) == (
        11, 10_000, 2, [("10.244.1.5", 9080, 1, True, 21), ("fd00:10:244:2::6", 9080, 3, False, 0)])
    assert (tables.destination(POD, VIP, 9080), tables.destination(POD, VIP, 6379)) == ("http+tcp", "unknown")
    assert tables.tcp(POD, VIP, 9080) == CLUSTER.key
    jason = asked_door.Request("/reviews/0?page=1", HOST, headers=[("End-User", "jason")])
    assert tables.route(POD, VIP, 9080, jason) == {
        "route": "jason", "cluster": f"{SCOPE}|{V2}", "there": False, "timeout_ms": 1500, "request": [], "response": []}
    assert tables.route(POD, VIP, 9080, asked_door.Request("/", HOST)) == {
        "route": "main", "cluster": f"{SCOPE}|{V1}", "there": True, "timeout_ms": 0,
        "request": [("remove", "x-secret"), ("set", "x-route", "main"), ("add", "via", "narrows")],
        "response": [("add", "x-version", "v1")]}


def test_the_encoder_reads_back_trust_and_certificates() -> None:
    assert blobs.decode_trust(PUTS["trust"]) == TRUST
    assert blobs.decode_certificate(PUTS["certificate"]) == CERTIFICATE
    for name, read in (("trust", blobs.decode_trust), ("certificate", blobs.decode_certificate)):
        put = PUTS[name]
        for size in range(len(put.payload)):
            with pytest.raises(blobs.BlobError):
                read(blobs.Put(put.kind, put.key, put.payload[:size]))
        with pytest.raises(blobs.BlobError, match="too many"):
            read(blobs.Put(put.kind, put.key, put.payload + b"x"))


def test_a_whole_transaction_is_the_golden_one() -> None:
    assert golden("everything", everything()) == everything()


def constants(path: str) -> dict[str, int]:
    text = (ROOT / path).read_text()
    return {name: int(value, 0) for name, value in re.findall(r"^ +([A-Z][A-Z0-9_]+) = (0x[0-9a-f]+|\d+)", text, re.M)}


def test_the_encoders_numbers_are_those_of_the_protocol() -> None:
    protocol = constants("ext/core/protocol.pxd")
    assert (protocol["TXN_MAGIC"], protocol["TXN_VERSION"]) == (blobs.MAGIC, blobs.VERSION)
    assert {f"OP_{op.name}": int(op) for op in blobs.Op} == {k: v for k, v in protocol.items() if k.startswith("OP_")}
    kinds = {k: v for k, v in protocol.items() if k.startswith("KIND_") and k != "KIND_KEEPER_ONLY"}
    assert {f"KIND_{kind.name}": int(kind) for kind in blobs.Kind} == kinds


def test_the_encoders_numbers_are_those_of_the_tables() -> None:
    shapes = constants("ext/route/shapes.pxd")
    for prefix, table in (("PROTO", blobs.PROTOCOLS), ("BALANCE", blobs.BALANCERS), ("MATCH", blobs.MATCHERS)):
        written = {f"{prefix}_{kind.name}": number for kind, number in table.items()}
        written = {k.replace("PATH_SEPARATED_PREFIX", "PATH_PREFIX"): v for k, v in written.items()}
        assert written == {k: v for k, v in shapes.items() if k.startswith(prefix + "_")}


def test_without_a_settings_blob_the_tables_have_the_agents_defaults() -> None:
    settings = door.Tables().settings
    del settings["pad"]
    assert settings == {name: int(value) for name, value in asdict(ProxySettings()).items()}
    assert list(settings) == list(asdict(ProxySettings()))
