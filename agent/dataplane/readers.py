"""What the workers counted and logged, read from shared memory without stopping anybody."""
from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Mapping
from typing import Any

from agent.dataplane.client import Segments
from agent.model.telemetry import AccessRecord, Leg, SeriesKey, SeriesValues, TunnelRow
from ext.core import order, ring, roster, shm
from ext.sys import syscalls

SECCOMP = {0: "not yet", 1: "on", 2: "off: --seccomp off", 3: "off: a sanitizer is loaded"}  # Confinement, ext/sys/seccomp.pxd
DRAIN_MOST = 1000  # records of one worker at a time
# upper bounds of all buckets but the last, for whoever shows histograms without touching the extension
DURATION_BOUNDS_MS: tuple[float, ...] = shm.DURATION_BOUNDS_MS
SIZE_BOUNDS: tuple[float, ...] = shm.SIZE_BOUNDS_BYTES
ORDER = order  # likewise for whoever reads memory that the kernel writes


def seccomp(header: Mapping[str, int]) -> str:
    """Whether the present worker is under its filter of system calls: `on`, or `off` with the reason."""
    return SECCOMP.get(header["confinement"], "unknown")


def refused_call(header: Mapping[str, int]) -> str:
    """The system call for which the last worker of this index was killed: `execve (59)`; empty: none was."""
    return str(syscalls.told(header["refused_call"])) if header["refused_calls"] else ""


class Reader:
    """Maps the segments of one worker index. `close` when the keeper is another one."""

    def __init__(self, segments: Segments) -> None:
        """Takes the descriptors over. Raises ValueError when they hold another format, OSError when they cannot be mapped."""
        self.index = segments.index
        self.damaged = 0  # bytes of the log that were no records
        try:
            self._statistics = _map(segments.statistics, shm.stats_bytes(), mmap.PROT_READ)
            self._log = _map(segments.log, ring.log_bytes(), mmap.PROT_READ | mmap.PROT_WRITE)
        finally:
            segments.close()
        self.header()

    def header(self) -> dict[str, int]:
        """Gauges of the present worker and counters of this index; names are those of StatsHeader in ext/core/shm.pxd."""
        return dict(shm.read_header(self._statistics))

    def series(self) -> list[tuple[SeriesKey, SeriesValues]]:
        found: list[tuple[dict[str, Any], dict[str, Any]]] = shm.read_series(self._statistics)
        return [(SeriesKey(**key), SeriesValues(**values)) for key, values in found]

    def tunnels(self) -> tuple[list[TunnelRow], int]:
        """Those that the worker lists (1,024 at most), and how many it has."""
        rows, total = roster.read_roster(self._statistics)
        return [TunnelRow(**row) for row in rows], total

    def drain_log(self, most: int = DRAIN_MOST) -> list[AccessRecord]:
        """Takes records out of the ring, oldest first. One reader at a time: whoever takes them has them alone."""
        found, damaged = ring.drain_log(self._log, most)
        self.damaged += damaged
        for record in found:
            if "upstream_leg" in record:
                record["downstream_leg"], record["upstream_leg"] = Leg(*record["downstream_leg"]), Leg(*record["upstream_leg"])
        return [AccessRecord(**record) for record in found]

    def close(self) -> None:
        self._statistics.close()
        self._log.close()


class Readers:
    """Every worker index of one keeper."""

    def __init__(self, segments: Iterable[Segments]) -> None:
        self._readers: list[Reader] = []
        rest = list(segments)
        try:
            while rest:
                self._readers.append(Reader(rest.pop(0)))
        except BaseException:
            for one in rest:
                one.close()
            self.close()
            raise

    def headers(self) -> dict[int, dict[str, int]]:
        """Worker index -> gauges and counters."""
        return {reader.index: reader.header() for reader in self._readers}

    def series(self) -> dict[SeriesKey, SeriesValues]:
        """The sum over all workers."""
        total: dict[SeriesKey, SeriesValues] = {}
        for reader in self._readers:
            for key, values in reader.series():
                if key in total:
                    total[key].add(values)
                else:
                    total[key] = values
        return total

    def tunnels(self) -> dict[int, tuple[list[TunnelRow], int]]:
        """Worker index -> its tunnels, and how many it has."""
        return {reader.index: reader.tunnels() for reader in self._readers}

    def drain_log(self, most: int = DRAIN_MOST) -> list[AccessRecord]:
        """At most `most` records of each worker, in the order in which they ended."""
        found = [record for reader in self._readers for record in reader.drain_log(most)]
        found.sort(key=lambda record: record.start_us + record.duration_us)
        return found

    @property
    def damaged(self) -> int:
        return sum(reader.damaged for reader in self._readers)

    def close(self) -> None:
        while self._readers:
            self._readers.pop().close()


def _map(fd: int, least: int, protection: int) -> mmap.mmap:
    size = os.fstat(fd).st_size
    if size < least:
        raise ValueError(f"shared memory of {size} bytes, {least} are needed; keeper and agent are of different builds: "
                         "restart the keeper")
    return mmap.mmap(fd, size, mmap.MAP_SHARED, protection)
