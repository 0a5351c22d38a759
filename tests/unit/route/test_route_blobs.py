"""The encoder and the agent's own reading: any values go round, anything else is refused with words."""
from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.dataplane import blobs
from agent.model.settings import ProxySettings
from tests.support.blobs import CLUSTER, PUTS, SERVICE, everything, index_of, transaction

KEYS = st.text(max_size=40)
ENTRIES = st.lists(
    st.builds(blobs.Put, st.integers(0, 255), KEYS, st.binary(max_size=60))
    | st.builds(blobs.Delete, st.integers(0, 255), KEYS),
    max_size=12,
)


@given(st.integers(0, 2**64 - 1), ENTRIES)
def test_any_transaction_is_read_back_as_it_was_written(txn_id: int, entries: list[blobs.Entry]) -> None:
    data = blobs.encode_transaction(txn_id, entries)
    assert len(data) % 8 == 0
    assert blobs.decode_transaction(data) == (txn_id, tuple(entries))


def test_every_cut_transaction_is_refused() -> None:
    data = everything()
    for size in range(len(data)):
        with pytest.raises(blobs.BlobError):
            blobs.decode_transaction(data[:size])
    with pytest.raises(blobs.BlobError):
        blobs.decode_transaction(data + bytes(8))


def test_every_changed_byte_is_noticed_but_for_the_id() -> None:
    data = everything()
    for at in range(len(data)):
        changed = data[:at] + bytes([data[at] ^ 0x40]) + data[at + 1 :]
        if 8 <= at < 16:
            assert blobs.decode_transaction(changed)[1] == tuple(PUTS.values())
            continue
        with pytest.raises(blobs.BlobError):
            blobs.decode_transaction(changed)


def test_a_resource_comes_back_whole() -> None:
    put = blobs.put_resource("type", "a|b:80?ns=x", "v1", b"\0body")
    assert blobs.decode_resource(put) == ("type", "a|b:80?ns=x", "v1", b"\0body")
    for size in range(len(put.payload)):
        with pytest.raises(blobs.BlobError):
            blobs.decode_resource(replace(put, payload=put.payload[:size]))
    with pytest.raises(blobs.BlobError, match="3 bytes too many"):
        blobs.decode_resource(replace(put, payload=put.payload + b"abc"))
    with pytest.raises(blobs.BlobError, match="not a resource"):
        blobs.decode_resource(blobs.put_note("k", b""))


def test_a_value_that_does_not_fit_is_refused_by_kind_and_key() -> None:
    with pytest.raises(blobs.BlobError, match="SERVICE default/reviews"):
        blobs.put_service(2**32, SERVICE)
    with pytest.raises(blobs.BlobError, match=r"CLUSTER ns=default\|outbound"):
        blobs.put_cluster(replace(CLUSTER, connect_timeout_ms=-1), index_of)
    with pytest.raises(blobs.BlobError, match="SETTINGS"):
        blobs.put_settings(ProxySettings(hold_bytes=-1))
    with pytest.raises(blobs.BlobError, match="key of 65536 bytes"):
        transaction(blobs.put_note("k" * 65536, b""))
    with pytest.raises(blobs.BlobError, match="transaction -1"):
        transaction(txn_id=-1)
