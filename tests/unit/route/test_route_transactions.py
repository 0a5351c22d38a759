"""A transaction is applied whole or not at all, whatever is in it, and leaves no memory behind."""
from __future__ import annotations

import gc
import struct
from collections.abc import Iterator
from zlib import crc32

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from agent.dataplane import blobs
from agent.model.identity import Trust
from ext.route import door
from tests.support.blobs import CLUSTER, HOST, PUTS, SCOPE, SERVICE, dump, everything, transaction

TINY = struct.pack("<I", 2) + b"\x30\x00"  # a str that is an empty SEQUENCE
DECODED = [put for name, put in PUTS.items() if name not in {"resource", "note"}]


@pytest.fixture(autouse=True)
def no_block_is_lost() -> Iterator[None]:
    gc.collect()
    before = door.live_blocks()
    yield
    door.fail_block(0)
    gc.collect()
    assert door.live_blocks() == before, "memory of tables was lost (or freed twice)"


def loaded() -> door.Tables:
    tables = door.Tables()
    tables.load(everything())
    return tables


def refused(tables: door.Tables, data: bytes) -> str:
    before = dump(tables)
    with pytest.raises(door.Refused) as failure:
        tables.load(data)
    assert dump(tables) == before, "a refused transaction changed something"
    return str(failure.value)


def test_every_cut_transaction_is_refused_and_changes_nothing() -> None:
    data = everything()
    tables = loaded()
    for size in range(len(data)):
        refused(tables, data[:size])
    refused(tables, data + bytes(8))


def test_every_changed_byte_is_refused_but_for_the_id() -> None:
    data = everything()
    tables = loaded()
    for at in range(len(data)):
        for bit in (1, 0x80):
            changed = data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :]
            if 8 <= at < 16:
                tables.load(changed)
            else:
                refused(tables, changed)


def forged(put: blobs.Put, payload: bytes) -> bytes:
    """As a faulty encoder would write it: checksums right, content not."""
    return transaction(PUTS["service"], blobs.Put(put.kind, put.key, payload), PUTS["pod"])


def harmless(tables: door.Tables, data: bytes) -> None:
    before = dump(tables)
    try:
        tables.load(data)
    except door.Refused as failure:
        assert str(failure)
        assert dump(tables) == before
    else:
        dump(tables)
        tables.picks(CLUSTER.key, 3)
        tables.load(everything())


@pytest.mark.parametrize("name", [name for name in PUTS if name not in {"resource", "note"}])
def test_any_byte_of_a_payload_may_be_wrong_under_a_right_checksum(name: str) -> None:
    tables = loaded()
    payload = PUTS[name].payload
    for at in range(len(payload)):
        for value in {0, 1, 0x7F, 0x80, 0xFF, payload[at] ^ 1, payload[at] ^ 0x20}:
            harmless(tables, forged(PUTS[name], payload[:at] + bytes([value]) + payload[at + 1 :]))


@pytest.mark.parametrize("name", [name for name in PUTS if name not in {"resource", "note"}])
def test_any_payload_cut_under_a_right_checksum_is_refused(name: str) -> None:
    tables = loaded()
    payload = PUTS[name].payload
    for size in range(len(payload)):
        assert refused(tables, forged(PUTS[name], payload[:size])).startswith(blobs.Kind(PUTS[name].kind).name)
    assert "too many" in refused(tables, forged(PUTS[name], payload + b"\0")) or name == "settings"


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(DECODED), st.binary(max_size=80), st.integers(0, 400))
@example(DECODED[3], b"\xff\xff\xff\xff", 1)
def test_random_bytes_in_a_payload_are_harmless(put: blobs.Put, noise: bytes, at: int) -> None:
    at %= len(put.payload) + 1
    harmless(loaded(), forged(put, put.payload[:at] + noise + put.payload[at + len(noise) :]))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_are_no_transaction(noise: bytes) -> None:
    refused(loaded(), noise)
    body = noise
    refused(loaded(), blobs.HEADER.pack(blobs.MAGIC, blobs.VERSION, 0, 1, 1, crc32(body)) + body[:11])
    with_crc = blobs.HEADER.pack(blobs.MAGIC, blobs.VERSION, 0, 1, max(len(body) // 12, 1), crc32(body)) + body
    if not noise.startswith((b"\x01", b"\x02")):
        refused(loaded(), with_crc)


def test_no_allocation_is_needed_twice_and_each_may_fail() -> None:
    fresh = transaction(*PUTS.values(), blobs.put_unknown_destination("ns=other", f"{HOST}:9080"))
    for base in (False, True):
        failures = 0
        for n in range(1, 500):
            tables = loaded() if base else door.Tables()
            before = dump(tables)
            door.fail_block(n)
            try:
                tables.prepare(fresh)
            except door.Refused as failure:
                door.fail_block(0)
                assert "out of memory" in str(failure)
                assert dump(tables) == before
                failures += 1
                continue
            door.fail_block(0)
            tables.apply()
            assert dump(tables)["destination 9080"] == "http+tcp"
            break
        else:
            pytest.fail("still failing after 500 allocations")
        assert failures > 10


def test_applying_allocates_nothing() -> None:
    tables = loaded()
    tables.prepare(everything())
    door.fail_block(1)
    tables.apply()
    with pytest.raises(MemoryError):  # the failure is still to come
        door.Tables()
    assert dump(tables)["destination 9080"] == "http+tcp"


def test_an_abandoned_transaction_leaves_no_trace() -> None:
    tables = door.Tables()
    before = dump(tables)
    tables.prepare(everything())
    tables.abandon()
    assert dump(tables) == before


def test_the_same_transaction_again_and_again_takes_no_more_memory() -> None:
    tables = loaded()
    live, answers = door.live_blocks(), dump(tables)
    for _ in range(50):
        tables.load(everything())
    assert door.live_blocks() == live
    assert {**dump(tables), "generation": 0} == {**answers, "generation": 0}


def test_deleting_everything_empties_the_tables() -> None:
    tables = loaded()
    tables.load(transaction(*(blobs.Delete(put.kind, put.key) for put in PUTS.values())))
    assert set(tables.counts.values()) == {0}
    tables.load(transaction(*(blobs.Delete(put.kind, put.key) for put in PUTS.values())))
    assert set(tables.counts.values()) == {0}


def test_the_last_entry_of_a_key_wins() -> None:
    tables = door.Tables()
    put = PUTS["service"]
    tables.load(transaction(put, blobs.Delete(put.kind, put.key), blobs.put_service(12, SERVICE)))
    assert (tables.service_by_index(11), tables.service_by_index(12) is None) == (None, False)
    tables.load(transaction(put, blobs.Delete(put.kind, put.key)))
    assert tables.counts["services"] == 0


def test_what_the_keeper_keeps_alone_is_passed_over() -> None:
    tables = door.Tables()
    tables.load(transaction(PUTS["resource"], PUTS["note"]))
    assert set(tables.counts.values()) == {0}


def entry(op: int, kind: int, key: bytes, payload: bytes) -> bytes:
    size = 12 + len(key) + len(payload)
    return struct.pack("<BBHII", op, kind, len(key), len(payload), crc32(payload)) + key + payload + bytes(-size % 8)


def raw(*entries: bytes, magic: int = blobs.MAGIC, version: int = 1, flags: int = 0) -> bytes:
    body = b"".join(entries)
    return blobs.HEADER.pack(magic, version, flags, 5, len(entries), crc32(body)) + body


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not a transaction: 0 bytes"),
        (raw(magic=1), "not a transaction: 24 bytes, magic 00000001"),
        (raw(version=2), "version 2 flags 0: this worker reads version 1"),
        (raw(flags=1), "version 1 flags 1"),
        (raw(entry(3, 2, b"k", b"")), "WORKLOAD k: neither a put nor a delete"),
        (raw(entry(2, 2, b"k", b"x")), "WORKLOAD k: neither a put nor a delete"),
        (raw(entry(1, 10, b"k", b"")), "blob of unknown kind k: unknown kind"),
        (raw(entry(1, 8, b"td", struct.pack("<II", 0, 0))), "TRUST td: number of certificates or lists: 0"),
        (raw(entry(1, 8, b"td", struct.pack("<I", 33) + TINY * 33 + bytes(4))), "TRUST td: number of certificates or lists: 33"),
        (raw(entry(1, 8, b"td", struct.pack("<I", 1) + TINY + struct.pack("<I", 65) + TINY * 65)), "TRUST td: number of"),
        (raw(entry(1, 8, b"td", struct.pack("<II3sI", 1, 3, b"\x30\x00\x00", 0))), "TRUST td: not DER: item: 0"),
        (raw(entry(1, 8, b"td", struct.pack("<II3sI", 1, 3, b"\x30\x80\x00", 0))), "TRUST td: not DER: item: 0"),
        (raw(entry(1, 8, b"td", struct.pack("<II3sI", 1, 3, b"\x30\x81\x00", 0))), "TRUST td: not DER: item: 0"),
        (raw(entry(1, 8, b"td", struct.pack("<II2sI", 1, 2, b"\x31\x00", 0))), "TRUST td: not DER: item: 0"),
        (raw(entry(1, 8, b"td", struct.pack("<II", 1, 65540) + b"\x30\x83" + bytes(65538))), "TRUST td: bytes of a certificate"),
        (raw(entry(1, 9, b"k", struct.pack("<IQQI", 1, 1, 2, 1) + TINY)), "CERTIFICATE k: identity is not spiffe://"),
        (raw(entry(1, 9, b"spiffe://a/ns/b/sa/c", struct.pack("<IQQI", 0, 1, 2, 1) + TINY)), "sa/c: 0 is no key's number"),
        (raw(entry(1, 9, b"spiffe://a/ns/b/sa/c", struct.pack("<IQQI", 1, 2, 2, 1) + TINY)), "sa/c: it ends before it begins"),
        (raw(entry(1, 9, b"spiffe://a/ns/b/sa/c", struct.pack("<IQQI", 1, 1, 2, 0))), "sa/c: number of certificates or lists: 0"),
        (raw(entry(1, 9, b"spiffe://a/ns/b/sa/c", struct.pack("<IQQI", 1, 1, 2, 17) + TINY * 17)), "sa/c: number of certificates"),
        (raw(entry(1, 3, b"", b"")), "SERVICE : unknown kind, or no key"),
        (raw(entry(1, 1, b"k", b"\0\0\0\0")), "SETTINGS k: has no key"),
        (raw(entry(1, 4, b"nobar", b"\0")), "DESTINATION nobar: key is not `scope|name`"),
        (raw(entry(1, 4, b"|x", b"\0")), "DESTINATION |x: key is not `scope|name`"),
        (raw(entry(1, 5, b"ns=a|", b"")), "CLUSTER ns=a|: key is not `scope|name`"),
        (raw(entry(1, 2, b"u", struct.pack("<IBIIBII", 0, 1, 0, 0, 0, 0, 0))), "WORKLOAD u: index 0 means unknown"),
        (raw(entry(1, 2, b"u", struct.pack("<IBIIBII", 1, 1, 0, 0, 2, 0, 0))), "WORKLOAD u: tunnel of a workload: 2"),
        (raw(entry(1, 2, b"u", struct.pack("<IBIIBI5sI", 1, 1, 0, 0, 1, 5, b"alice", 0))), "WORKLOAD u: identity is not spiffe://"),
        (raw(entry(1, 2, b"u", struct.pack("<IBIIBIII", 1, 1, 0, 0, 1, 0, 1, 0))), "WORKLOAD u: length of a policy's name: 0"),
        (raw(entry(1, 2, b"u", struct.pack("<IBIIBII", 1, 1, 0, 0, 1, 0, 9))), "WORKLOAD u: the payload ends early"),
        (raw(entry(1, 1, b"", struct.pack("<II", 1, 2))), "SETTINGS : access_log 2: expected 0 to 1"),
        (raw(entry(1, 5, b"a|b", struct.pack("<BIII", 9, 1, 1, 0))), "CLUSTER a|b: balancer: 9"),
        (raw(entry(1, 5, b"a|b", struct.pack("<BIII", 1, 0, 1, 0))), "CLUSTER a|b: connect timeout 0"),
        (raw(entry(1, 5, b"a|b", struct.pack("<BIIIBI", 1, 1, 1, 1, 5, 0) + bytes(7))), "CLUSTER a|b: address family: 5"),
        (raw(entry(1, 5, b"a|b", struct.pack("<BIII", 1, 1, 1, 2**32 - 1))), "CLUSTER a|b: the payload ends early"),
    ],
)
def test_a_refusal_names_kind_key_and_reason(data: bytes, words: str) -> None:
    assert words in refused(loaded(), data)


@pytest.mark.parametrize("identity", [
    "spiffe:/td/ns/a/sa/b", "spiffe://td/ns/a/sa/b/", "spiffe://td/ns/a/sa/", "spiffe:///ns/a/sa/b", "spiffe://td/ns//sa/b",
    "spiffe://td/sa/a/ns/b", "spiffe://td/ns/a/sa/b/c", "spiffe://td/ns/a", "SPIFFE://td/ns/a/sa/b", f"spiffe://td/ns/a/sa/{'b' * 2048}",
])
def test_an_identity_of_another_shape_is_refused(identity: str) -> None:
    pod = blobs.put_pod("p", 9, "w", "ns=default", (), identity)
    assert "POD p: identity is not spiffe://" in refused(loaded(), transaction(pod))


def test_settings_of_a_newer_agent_are_read_as_far_as_they_are_known() -> None:
    payload = PUTS["settings"].payload
    known = struct.unpack_from("<I", payload)[0]
    tables = door.Tables()
    tables.load(raw(entry(1, 1, b"", struct.pack("<I", known + 2) + payload[4:] + struct.pack("<II", 1, 2))))
    assert tables.settings["hold_bytes"] == 4096
    tables.load(raw(entry(1, 1, b"", struct.pack("<II", 1, 0))))
    assert (tables.settings["access_log"], tables.settings["hold_bytes"]) == (0, 65_536)
    tables.load(raw(entry(2, 1, b"", b"")))
    assert tables.settings["access_log"] == 1


def test_overlong_keys_are_cut_in_the_refusal_but_the_reason_is_there() -> None:
    text = refused(door.Tables(), raw(entry(1, 4, f"{SCOPE}|".encode() + b"x" * 60000, b"\x09")))
    assert text.endswith("flags: 9") and len(text) < 512


def test_a_transaction_can_be_tried_without_any_worker() -> None:
    assert door.check(transaction(PUTS["cluster"], txn_id=9)) == 9
    with pytest.raises(door.Refused, match="DESTINATION a: key"):
        door.check(raw(entry(1, 4, b"a", b"")))


def test_only_revocation_lists_have_open_tunnels_looked_up() -> None:
    tables, before = door.Tables(), 0
    root, crl = b"\x30\x02\x05\x00", b"\x30\x00"
    tables.load(transaction(blobs.put_trust(Trust("cluster.local", (root,), ()))))
    assert tables.recalls == before
    tables.load(transaction(blobs.put_trust(Trust("cluster.local", (root,), (crl,)))))
    assert tables.recalls == before + 1
    tables.load(transaction(blobs.Delete(blobs.Kind.TRUST, "cluster.local")))
    assert tables.recalls == before + 1
