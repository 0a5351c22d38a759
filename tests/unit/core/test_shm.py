"""Shared memory of statistics: what a worker counts is what the agent reads, whoever dies between."""
from __future__ import annotations

import mmap
import os
import signal
import struct
import threading
import time

import pytest

from ext.core import ring, shm, shm_door
from tests.support.wait import PATIENCE

REQUEST = (1, 2, 3, 200, 1, 2, 0)  # source, destination, service, code, reporter, protocol, flag
TCP = (4, 5, 6, 0, 2, 1, 0)


def by_source(stats) -> dict[int, dict]:
    return {key["source"]: values for key, values in shm.read_series(stats)}


def test_a_fresh_segment_has_no_series_and_zero_gauges(segments) -> None:
    stats, log = segments
    assert shm.read_series(stats) == []
    assert ring.drain_log(log) == ([], 0)
    assert set(shm.read_header(stats)) == set(shm.HEADER_FIELDS)
    assert not any(shm.read_header(stats).values())


def test_a_request_is_counted_in_every_family(segments, writer) -> None:
    writer.request(REQUEST, 1_500, 300, 100_000)
    [(key, values)] = shm.read_series(segments[0])
    assert key == {"reporter": "source", "protocol": "http", "source": 1, "destination": 2, "service": 3, "code": 200,
                   "flag": "-", "grpc_status": None, "mutual_tls": False}
    assert (values["opened"], values["closed"], values["failed"]) == (1, 1, 0)
    assert (values["sent"], values["received"], values["duration_us"]) == (300, 100_000, 1_500)
    assert values["duration"].index(1) == shm.DURATION_BOUNDS_MS.index(5)
    assert values["request_bytes"].index(1) == shm.SIZE_BOUNDS_BYTES.index(500)
    assert values["response_bytes"].index(1) == shm.SIZE_BOUNDS_BYTES.index(300_000)
    assert all(sum(values[family]) == 1 for family in ("duration", "request_bytes", "response_bytes"))


@pytest.mark.parametrize(("duration_us", "size", "expected"), [
    (0, 0, (0, 0)), (500, 1, (0, 1)), (501, 2, (1, 2)), (1000, 5, (1, 2)), (1001, 6, (2, 3)),
    (3_600_000_000, 3_600_000, (18, 18)), (3_600_000_001, 3_600_001, (19, 19)), (2**64 - 1, 2**64 - 1, (19, 19)),
])
def test_bounds_are_inclusive_and_the_last_bucket_takes_the_rest(duration_us, size, expected) -> None:
    assert shm_door.buckets(duration_us, size) == expected


def test_bounds_are_envoys_default_buckets() -> None:
    assert shm.DURATION_BOUNDS_MS == (0.5, 1, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10000, 30000, 60000, 300000, 600000,
                                      1800000, 3600000)
    assert shm.SIZE_BOUNDS_BYTES == shm.DURATION_BOUNDS_MS


def test_counters_outlive_the_worker_and_gauges_do_not(segments, writer) -> None:
    writer.request(REQUEST, 1, 1, 1)
    writer.gauge_open(7)
    assert shm.read_header(segments[0])["downstream_open"] == 7
    successor = shm_door.Writer(*segments, pid=99, now_ns=5)
    header = shm.read_header(segments[0])
    assert (header["downstream_open"], header["pid"], header["started_ns"]) == (0, 99, 5)
    successor.request(REQUEST, 1, 1, 1)
    assert by_source(segments[0])[1]["closed"] == 2
    assert successor.taken == 1


def test_forgotten_workloads_give_their_slots_back(segments, writer) -> None:
    for index in range(1, 2001):
        writer.request((index, index, 0, 200, 1, 2, 0), 1, 1, 1)
    for index in range(1, 2001):
        writer.forget_workload(index)
    assert shm.read_series(segments[0]) == []
    writer.request(REQUEST, 1, 1, 1)
    assert by_source(segments[0])[1]["closed"] == 1
    # what a probe run still needs stays gone until its end is freed; with all forgotten nothing may stay but the new one
    assert writer.taken == 1


def test_others_are_found_after_a_neighbour_was_forgotten(segments, writer) -> None:
    keys = [(index, 9000, index % 7, 200, 1, 2, 0) for index in range(1, 3001)]
    for key in keys:
        writer.request(key, 1, 1, 1)
    for index in range(1, 3001, 3):
        writer.forget_workload(index)
    for key in keys:
        writer.request(key, 1, 1, 1)
    counts = by_source(segments[0])
    assert len(counts) == 3000
    assert all(counts[key[0]]["closed"] == (1 if key[0] % 3 == 1 else 2) for key in keys)


def test_a_service_is_forgotten_and_the_passthrough_cluster_never(segments, writer) -> None:
    writer.request((1, 2, 3, 200, 1, 2, 0), 1, 1, 1)
    writer.request((1, 2, 0xFFFFFFFF, 200, 1, 2, 0), 1, 1, 1)
    writer.forget_service(3)
    writer.forget_service(0xFFFFFFFF)
    assert [key["service"] for key, _ in shm.read_series(segments[0])] == [0xFFFFFFFF]


def test_a_series_that_a_connection_holds_is_freed_when_it_ends(segments, writer) -> None:
    handle = writer.hold(TCP)
    writer.forget_workload(5)
    writer.held(handle)
    assert by_source(segments[0])[4]["opened"] == 1
    writer.drop(handle)
    assert shm.read_series(segments[0]) == []


def test_a_killed_workers_holds_are_released_by_its_successor(segments, writer) -> None:
    writer.hold(TCP)
    writer.forget_workload(5)
    assert shm_door.Writer(*segments).taken == 0
    assert shm.read_series(segments[0]) == []


def test_a_full_table_counts_into_overflow_by_reporter_and_protocol(segments, writer) -> None:
    for index in range(1, 4001):
        writer.request((index, 0, 0, 200, 1, 2, 0), 1, 1, 1)
    for _ in range(3):
        writer.tcp(TCP, 10, 20)
    found = shm.read_series(segments[0])
    overflow = [(key["reporter"], key["protocol"], values["closed"]) for key, values in found if key["source"] == 0]
    assert sorted(overflow) == [("destination", "tcp", 3), ("source", "http", 4000 - writer.taken)]
    assert shm.read_header(segments[0])["overflow_series"] == 4000 - writer.taken + 3
    assert sum(values["closed"] for _, values in found) == 4003


@pytest.mark.parametrize("door", [shm.read_series, shm.read_header, ring.drain_log, shm.format_stats, ring.format_log])
def test_memory_that_is_too_small_is_refused(door) -> None:
    with pytest.raises(ValueError, match="are needed"):
        door(bytearray(4096))


@pytest.mark.parametrize(("door", "size"), [(shm.read_series, shm.stats_bytes), (shm.read_header, shm.stats_bytes),
                                            (ring.drain_log, ring.log_bytes)])
def test_memory_of_another_format_is_refused(door, size) -> None:
    with pytest.raises(ValueError, match="restart the keeper"):
        door(bytearray(size()))


def test_what_no_worker_writes_is_left_out(segments, writer) -> None:
    writer.request(REQUEST, 1, 1, 1)
    stats = segments[0]
    at = bytes(stats[4096:]).index(struct.pack("<IIIHBB", 1, 2, 3, 200, 1, 2)) + 4096
    for offset in (14, 15, 16):  # reporter, protocol, flag
        was = stats[at + offset]
        stats[at + offset] = 200
        assert shm.read_series(stats) == []
        stats[at + offset] = was
    assert len(shm.read_series(stats)) == 1


def test_a_reader_beside_a_writer_sees_sums_that_neither_go_back_nor_mix() -> None:
    """A writer process counts request i as i us, i and i bytes, and forgets series in turn: every copy must fit its own key."""
    stats, log = mmap.mmap(-1, shm.stats_bytes()), mmap.mmap(-1, ring.log_bytes())
    shm.format_stats(stats)
    ring.format_log(log)
    pid = os.fork()
    if pid == 0:
        try:
            shm_door.Writer(stats, log).churn(50, 40_000)
        finally:
            os._exit(0)
    last = reads = 0
    try:
        deadline = time.monotonic() + 60 * PATIENCE
        while os.waitpid(pid, os.WNOHANG)[0] == 0:
            assert time.monotonic() < deadline, "the writer did not end"
            for key, values in shm.read_series(stats):
                at = key["source"]
                assert key["destination"] == key["service"] == at
                # the writer may be between two stores of one request: each sum is at most one request apart from the others
                counts = [values["opened"], values["closed"], *(values[f] // at for f in ("sent", "received", "duration_us")),
                          sum(values["duration"]), sum(values["request_bytes"])]
                assert all(values[f] % at == 0 for f in ("sent", "received", "duration_us"))
                if at == 1:  # never forgotten
                    assert values["closed"] >= last
                    last = values["closed"]
                else:
                    assert max(counts) < 40_000 * 2
            reads += 1
        pid = 0
    finally:
        if pid:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    assert reads > 3, "the writer was done before anyone read: the test proved nothing"
    assert by_source(stats)[1]["closed"] == 40_000
    assert by_source(stats)[1]["sent"] == 40_000


def test_a_reader_shares_no_plain_memory_with_a_writer_thread(segments, writer) -> None:
    """Neither waits for the other: under ThreadSanitizer every word that both touch must be atomic, or published before it is read."""
    stats, _ = segments
    counting = threading.Thread(target=writer.churn, args=(50, 10_000))
    counting.start()
    while counting.is_alive():
        shm.read_series(stats)
        shm.read_header(stats)
    counting.join()
    assert by_source(stats)[1]["closed"] == 10_000
