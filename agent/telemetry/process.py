"""What the processes of this node's mesh use, by psutil: CPU, memory, descriptors, threads."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import psutil
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

LABELS = ("role", "pid")


class KeeperCollector(Collector):
    """`silent`: seconds since the keeper's last answer (it is asked each second), None while there is no connection to it."""

    def __init__(self, silent: Callable[[], float | None]) -> None:
        self._silent = silent

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        seconds = self._silent()
        connected = GaugeMetricFamily("narrows_keeper_connected", "1: the agent has a connection to its keeper")
        connected.add_metric((), float(seconds is not None))
        silent = GaugeMetricFamily("narrows_keeper_silent_seconds", "Since the keeper's last answer; it is asked each second")
        if seconds is not None:
            silent.add_metric((), seconds)
        return (connected, silent)


class ProcessCollector(Collector):
    """`pids` tells the process ids by role (`agent`, `keeper`, `worker-0`, ...) at scrape time; a dead one is left out."""

    def __init__(self, pids: Callable[[], Mapping[str, int]]) -> None:
        self._pids = pids

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        cpu = CounterMetricFamily("narrows_process_cpu_seconds", "CPU time, user and system", labels=LABELS)
        memory = GaugeMetricFamily("narrows_process_resident_memory_bytes", "Resident memory", labels=LABELS)
        descriptors = GaugeMetricFamily("narrows_process_open_fds", "Open descriptors", labels=LABELS)
        threads = GaugeMetricFamily("narrows_process_threads", "Threads", labels=LABELS)
        for role, pid in sorted(self._pids().items()):
            at = (role, str(pid))
            try:
                process = psutil.Process(pid)
                with process.oneshot():
                    times = process.cpu_times()
                    cpu.add_metric(at, times.user + times.system)
                    memory.add_metric(at, process.memory_info().rss)
                    descriptors.add_metric(at, process.num_fds())
                    threads.add_metric(at, process.num_threads())
            except psutil.Error:
                continue
        return (cpu, memory, descriptors, threads)
