"""The log ring: a record arrives as it was written, once and in order, whatever the other side does to the memory."""
from __future__ import annotations

import struct
import threading
import time

import pytest

from ext.core import ring, shm

NO_TEXTS = [b""] * 10


def address(ip: bytes, port: int) -> bytes:
    return struct.pack("<BH16s", 4 if len(ip) == 4 else 6, port, ip)


def test_a_log_record_arrives_as_it_was_written(segments, writer) -> None:
    addresses = (address(bytes([10, 0, 0, 1]), 4000) + address(bytes([10, 0, 0, 2]), 80) + bytes(19)
                 + address(bytes(15) + b"\1", 9) + bytes(19))
    texts = [b"GET", b"/p?q", b"reviews:9080", "Grüße".encode(), b"id", b"", b"route", b"outbound|9080||reviews", b"", b"\xff"]
    fields = {"reporter": 2, "flag": 4, "start_us": 5, "duration_us": 6, "upstream_us": 7, "received": 8, "sent": 9, "source": 10,
              "destination": 11, "service": 12, "code": 404, "details": shm.DETAILS.index("route_not_found"),
              "addresses": addresses}
    assert writer.append(fields, texts)
    [record], damaged = ring.drain_log(segments[1])
    assert damaged == 0
    assert record == {
        "reporter": "destination", "protocol": "http", "flag": "NR", "version_minor": 1, "start_us": 5, "duration_us": 6,
        "upstream_us": 7, "received": 8, "sent": 9, "source": 10, "destination": 11, "service": 12, "code": 404,
        "details": "route_not_found", "downstream_remote": "10.0.0.1:4000", "downstream_local": "10.0.0.2:80",
        "upstream_remote": "", "upstream_local": "[::1]:9", "method": "GET", "path": "/p?q", "authority": "reviews:9080",
        "user_agent": "Grüße", "request_id": "id", "forwarded_for": "", "route": "route", "cluster": "outbound|9080||reviews",
        "sni": "", "failure": "\\xff",
    }
    assert ring.drain_log(segments[1]) == ([], 0)


@pytest.mark.parametrize("length", range(16))
def test_legs_come_behind_whatever_length_and_padding_the_texts_have(segments, writer, length) -> None:
    """A record without them, as workers of older builds write it, is never taken for one with them."""
    texts = [b"GET", b"/" * length] + [b""] * 8
    assert writer.append({"start_us": 1}, texts, ((1, 41, 20, 0), (2, 12_345, 9_000, 3)))
    assert writer.append({"start_us": 2}, texts)
    assert writer.append({"start_us": 3}, texts, ((3, 0, 0, 0), (0, 0, 0, 0)))
    (first, second, third), damaged = ring.drain_log(segments[1])
    assert damaged == 0
    assert (first["downstream_leg"], first["upstream_leg"]) == (("socket", 41, 20, 0), ("tunnel", 12_345, 9_000, 3))
    assert "downstream_leg" not in second
    assert "upstream_leg" not in second
    assert (third["downstream_leg"], third["upstream_leg"]) == (("node", 0, 0, 0), (None, 0, 0, 0))
    assert [one["path"] for one in (first, second, third)] == ["/" * length] * 3


def test_a_leg_that_no_worker_writes_is_counted_as_damaged(segments, writer) -> None:
    writer.append({"start_us": 1}, NO_TEXTS, ((4, 0, 0, 0), (0, 0, 0, 0)))
    writer.append({"start_us": 2}, NO_TEXTS, ((0, 0, 0, 0), (200, 0, 0, 0)))
    writer.append({"start_us": 3}, NO_TEXTS)
    records, damaged = ring.drain_log(segments[1])
    assert [record["start_us"] for record in records] == [3]
    assert damaged > 0


def test_a_ring_is_passed_many_times_without_losing_order(segments, writer) -> None:
    seen: list[str] = []
    for number in range(20_000):
        legs = ((1, number, number, 0), (1, number, number, 0)) if number % 3 else None
        assert writer.append({"start_us": number}, [b"GET", b"/" * (number % 900)] + [b""] * 8, legs)
        if number % 700 == 0:
            records, damaged = ring.drain_log(segments[1], 10_000)
            assert damaged == 0
            seen += [record["start_us"] for record in records]
    seen += [record["start_us"] for record in ring.drain_log(segments[1], 10_000)[0]]
    assert seen == list(range(20_000))


def test_a_full_ring_drops_and_counts(segments, writer) -> None:
    kept = dropped = 0
    for _ in range(5000):
        if writer.append({}, [b"x" * 2000] * 10):
            kept += 1
        else:
            dropped += 1
    assert dropped
    assert shm.read_header(segments[0])["dropped_records"] == dropped
    records, damaged = ring.drain_log(segments[1], 5000)
    assert (len(records), damaged) == (kept, 0)
    assert len(records[0]["path"]) == 1024
    assert writer.append({}, NO_TEXTS)


def test_a_drain_is_bounded_and_goes_on_where_it_stopped(segments, writer) -> None:
    for number in range(10):
        writer.append({"start_us": number}, NO_TEXTS)
    assert [r["start_us"] for r in ring.drain_log(segments[1], 4)[0]] == [0, 1, 2, 3]
    assert [r["start_us"] for r in ring.drain_log(segments[1], 4)[0]] == [4, 5, 6, 7]


@pytest.mark.parametrize("damage", range(200))
def test_a_ring_with_nonsense_in_it_loses_records_and_nothing_else(segments, writer, damage) -> None:
    for number in range(50):
        writer.append({"start_us": number}, [b"GET", b"/x"] + [b""] * 8)
    log = segments[1]
    offset = 4096 + damage * 37 % (50 * 190)
    log[offset] ^= 0xFF
    records, _ = ring.drain_log(log)
    assert len(records) <= 50
    writer.append({"start_us": 777}, NO_TEXTS)
    assert ring.drain_log(log)[0][-1]["start_us"] == 777


@pytest.mark.parametrize("field", [{"start_us": 2**63}, {"reporter": 9}, {"protocol": 0}, {"flag": 99}, {"details": 999}])
def test_a_record_that_no_worker_writes_is_counted_as_damaged(segments, writer, field) -> None:
    writer.append(field, NO_TEXTS)
    writer.append({"start_us": 1}, NO_TEXTS)
    records, damaged = ring.drain_log(segments[1])
    assert [record["start_us"] for record in records] == [1]
    assert damaged > 0


def test_cursors_that_make_no_sense_are_survived(segments, writer) -> None:
    log = segments[1]
    writer.append({}, NO_TEXTS)
    log[16:24] = struct.pack("<Q", 1 << 60)  # head
    assert ring.drain_log(log) == ([], ring.log_bytes() - 4096)
    log[24:32] = struct.pack("<Q", 1 << 61)  # tail
    assert not writer.append({}, NO_TEXTS)


def test_a_reader_of_records_shares_no_plain_memory_with_a_writer_thread(segments, writer) -> None:
    """Under ThreadSanitizer, as in test_shm: what a record holds is published by `head` and given back by `tail`."""
    logging = threading.Thread(target=writer.pour, args=(20_000,))
    logging.start()
    seen = 0
    while seen < 20_000:
        records, damaged = ring.drain_log(segments[1], 500)
        assert damaged == 0
        for record in records:
            assert (record["start_us"], len(record["path"])) == (seen, seen % 600)
            seen += 1
    logging.join()


def test_a_log_reader_beside_a_writer_gets_every_record_once_and_whole(segments, writer) -> None:
    done = threading.Event()

    def write() -> None:
        for number in range(5000):
            while not writer.append({"start_us": number}, [b"GET", b"/%d" % number] + [b"y" * 500] * 8):
                if done.wait(0.001):
                    return

    thread = threading.Thread(target=write)
    thread.start()
    seen = []
    try:
        deadline = time.monotonic() + 30
        while len(seen) < 5000:
            assert time.monotonic() < deadline, f"only {len(seen)} of 5000 came"
            records, damaged = ring.drain_log(segments[1], 500)
            assert damaged == 0
            assert all(record["path"] == f"/{record['start_us']}" for record in records)
            seen += [record["start_us"] for record in records]
    finally:
        done.set()
        thread.join()
    assert seen == list(range(5000))
