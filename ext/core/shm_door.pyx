"""For tests: the worker's side of shared memory, driven from Python over any writable buffer."""
from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memset
from ext.core.text cimport Span
from ext.core.ring cimport TEXT_COUNT, LogLegs, LogRecord, LogRing, log_append, log_attach
from ext.core.shm cimport (
    DETAIL_COUNT, DURATION_BOUNDS_US, FLAG_COUNT, SIZE_BOUNDS, Series, SeriesKey, Stats, bucket, bump, gauge, series_drop, series_hold,
    series_request, stats_attach, stats_forget_service, stats_forget_workload, stats_series)

cdef extern from "<sched.h>" nogil:
    int sched_yield()


cdef class Writer:
    """One worker's view. `stats` and `log` are writable buffers that were formatted; ValueError: they were not."""
    cdef Py_buffer stats_raw
    cdef Py_buffer log_raw
    cdef Stats stats
    cdef LogRing log

    def __cinit__(self, stats, log, uint32_t pid=1, uint64_t now_ns=1):
        PyObject_GetBuffer(stats, &self.stats_raw, PyBUF_WRITABLE)
        PyObject_GetBuffer(log, &self.log_raw, PyBUF_WRITABLE)
        if stats_attach(&self.stats, self.stats_raw.buf, self.stats_raw.len, pid, now_ns) != 0:
            raise ValueError("stats_attach refused the segment")
        if log_attach(&self.log, self.log_raw.buf, self.log_raw.len) != 0:
            raise ValueError("log_attach refused the segment")

    def __dealloc__(self):
        PyBuffer_Release(&self.stats_raw)       # does nothing to one that was never filled
        PyBuffer_Release(&self.log_raw)

    cdef Series* py_find(self, tuple key):
        """key: source, destination, service, code, reporter, protocol, flag."""
        cdef SeriesKey raw
        memset(&raw, 0, sizeof(SeriesKey))
        raw.source, raw.destination, raw.service, raw.code, raw.reporter, raw.protocol, raw.flag = key
        raw.grpc_status = 0xff
        return stats_series(&self.stats, &raw)

    @property
    def taken(self) -> int:
        return self.stats.taken

    def request(self, tuple key, uint64_t duration_us, uint64_t request_bytes, uint64_t response_bytes) -> None:
        series_request(self.py_find(key), duration_us, request_bytes, response_bytes)

    def tcp(self, tuple key, uint64_t sent, uint64_t received) -> None:
        cdef Series* one = self.py_find(key)
        bump(&one.opened, 1)
        bump(&one.sent, sent)
        bump(&one.received, received)
        bump(&one.closed, 1)

    def hold(self, tuple key) -> int:
        """Takes hold; the answer is the handle for `held` and `drop`."""
        cdef Series* one = self.py_find(key)
        series_hold(one)
        return one - self.stats.series

    def held(self, uint32_t handle) -> None:
        bump(&self.stats.series[handle].opened, 1)

    def drop(self, uint32_t handle) -> None:
        series_drop(&self.stats, &self.stats.series[handle])

    def forget_workload(self, uint32_t index) -> None:
        stats_forget_workload(&self.stats, index)

    def forget_service(self, uint32_t index) -> None:
        stats_forget_service(&self.stats, index)

    def gauge_open(self, uint64_t value) -> None:
        gauge(&self.stats.header.downstream_open, value)

    def churn(self, uint32_t keys, uint32_t rounds) -> None:
        """Requests over `keys` series, each forgotten and made again in turn: what a concurrent reader must survive."""
        cdef SeriesKey raw
        cdef uint32_t i
        cdef uint32_t n
        memset(&raw, 0, sizeof(SeriesKey))
        raw.code = 200
        raw.reporter = 1
        raw.protocol = 2
        raw.grpc_status = 0xff
        with nogil:
            for n in range(rounds):
                for i in range(1, keys + 1):
                    raw.source = i
                    raw.destination = i
                    raw.service = i
                    series_request(stats_series(&self.stats, &raw), i, i, i)
                if keys > 1:
                    stats_forget_workload(&self.stats, 2 + n % (keys - 1))

    def pour(self, uint32_t records) -> None:
        """Records of growing `start_us` and length, without the GIL; waits while the ring is full."""
        cdef LogRecord record
        cdef Span spans[10]
        cdef char[600] filling
        cdef uint32_t i
        memset(&record, 0, sizeof(LogRecord))
        memset(&spans, 0, sizeof(spans))
        memset(filling, 121, 600)
        record.reporter = 1
        record.protocol = 2
        spans[1].p = filling
        with nogil:
            for i in range(records):
                record.start_us = i
                spans[1].n = i % 600
                while log_append(&self.log, &self.stats, &record, spans, NULL) == 0:
                    sched_yield()

    def append(self, dict entry, list texts, told=None) -> bool:
        """entry: fields of LogRecord by name, `addresses` as 95 bytes. texts: TEXT_COUNT bytes objects. told: of each leg its kind, rtt,
        least rtt and retransmits; None: a record without."""
        cdef LogRecord record
        cdef LogLegs legs
        cdef Span spans[10]
        cdef uint32_t i
        cdef bytes text
        memset(&record, 0, sizeof(LogRecord))
        record.reporter = entry.get("reporter", 1)
        record.protocol = entry.get("protocol", 2)
        record.flag = entry.get("flag", 0)
        record.version_minor = entry.get("version_minor", 1)
        record.start_us = entry.get("start_us", 0)
        record.duration_us = entry.get("duration_us", 0)
        record.upstream_us = entry.get("upstream_us", 0)
        record.received = entry.get("received", 0)
        record.sent = entry.get("sent", 0)
        record.source = entry.get("source", 0)
        record.destination = entry.get("destination", 0)
        record.service = entry.get("service", 0)
        record.code = entry.get("code", 0)
        record.details = entry.get("details", 0)
        for i, byte in enumerate(entry.get("addresses", b"")):
            record.addresses[i] = byte
        if told is not None:
            memset(&legs, 0, sizeof(LogLegs))
            legs.downstream.kind, legs.downstream.rtt_us, legs.downstream.min_rtt_us, legs.downstream.retransmits = told[0]
            legs.upstream.kind, legs.upstream.rtt_us, legs.upstream.min_rtt_us, legs.upstream.retransmits = told[1]
        if len(texts) != TEXT_COUNT:
            raise ValueError(f"{len(texts)} texts, {TEXT_COUNT} are needed")
        for i in range(TEXT_COUNT):
            text = texts[i]
            spans[i].p = text
            spans[i].n = len(text)
        return log_append(&self.log, &self.stats, &record, spans, &legs if told is not None else NULL) == 1


def buckets(uint64_t duration_us, uint64_t size) -> tuple:
    return bucket(DURATION_BOUNDS_US, duration_us), bucket(SIZE_BOUNDS, size)


COUNTS = (FLAG_COUNT, DETAIL_COUNT)
