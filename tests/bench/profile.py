"""Why a row of the table is what it is: where a proxy's time goes and how many system calls a unit of work takes.

    python -m tests.bench.profile CASE PROXY [SECONDS]      needs perf (linux-perf) and tracefs; prints, writes nothing

The samples are of the CPU clock: virtual machines often have no counters of cycles. System calls are counted in a run of their own, by
tracepoints: strace makes each so slow that several events come at once (HAProxy's 1.4 epoll_wait of `p99` look like 0.5).
"""
from __future__ import annotations

import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path

from tests.bench import ends, pairs
from tests.bench.cases import CASES, Case
from tests.bench.proxies import Proxy, program, start
from tests.bench.tools import ECHO_PORT, HTTP_PORT, SOURCE_PORT, start_origin
from tests.bench.topology import BenchError, Topology, family, wait_listening

TOP = 25
CALL = "syscalls:sys_enter_"


def profile(case: Case, name: str, seconds: float) -> str:
    with tempfile.TemporaryDirectory(prefix="narrows-bench-", dir="/dev/shm") as text:
        folder, topology = Path(text), Topology()
        try:
            start_origin(topology.origin, folder / "origin.log")
            for port in (HTTP_PORT, ECHO_PORT, SOURCE_PORT):
                wait_listening(topology.origin, port, topology.origin.started[0], folder / "origin.log")
            if case.pair:
                proxy = pairs.start(name, case.mode, *pairs.sites(topology, name, folder), case.port, folder)
            else:
                proxy = start(name, case.mode, topology.site(name, captured=True), case.port, folder)
            try:
                case.measure(proxy, 1.0)
                told = [*symbols(case, proxy, seconds, folder), "", *calls(case, proxy, seconds, folder)]
                return "\n".join([f"{case.title}: {name}", "", *told])
            finally:
                proxy.stop()
        finally:
            topology.close()


def workers(proxy: Proxy) -> str:
    """Of a pair both."""
    return ",".join(str(family(main)[-1]) for main in (proxy.other, proxy.main) if main)


def symbols(case: Case, proxy: Proxy, seconds: float, folder: Path) -> list[str]:
    """Self time by symbol, and which share of it is the kernel's."""
    data = folder / "perf.data"
    argv = [program("perf"), "record", "-q", "-F", "4999", "-e", "cpu-clock", "-o", str(data), "-p", workers(proxy)]
    during(argv, case, proxy, seconds)
    said = subprocess.run([program("perf"), "script", "-i", str(data), "-F", "ip,sym,dso"],
                          capture_output=True, text=True, check=True).stdout
    found: Counter[tuple[str, bool]] = Counter()
    for line in said.splitlines():
        if match := re.match(r"\s*[0-9a-f]+ (.+?) \((.*)\)$", line):
            found[match[1].split("+0x")[0], "kernel" in match[2]] += 1
    total = sum(found.values())
    if not total:
        raise BenchError("perf saw nothing: is it allowed to (kernel.perf_event_paranoid)?")
    kernel = sum(count for (_, inside), count in found.items() if inside)
    return [f"{total} samples, {kernel / total:.0%} in the kernel"] + [
        f"{count / total:6.1%}  {'k' if inside else 'u'}  {name}" for (name, inside), count in found.most_common(TOP)]


def calls(case: Case, proxy: Proxy, seconds: float, folder: Path) -> list[str]:
    """System calls of the workers per unit of work."""
    out = folder / "calls"
    argv = [program("perf"), "stat", "-x", ",", "-e", f"{CALL}*", "-o", str(out), "-p", workers(proxy)]
    work = during(argv, case, proxy, seconds)
    lines = [line.split(",") for line in out.read_text().splitlines()]
    counted = {words[2].removeprefix(CALL): int(words[0]) for words in lines if len(words) > 2 and words[0].isdigit()}
    if not counted:
        raise BenchError("perf counted no system call: is tracefs mounted (/sys/kernel/tracing)?")
    unit = work / (1 << 20) if "GiB" in case.unit else work
    return [f"system calls per {'MiB' if 'GiB' in case.unit else 'unit'}, {unit:,.0f} of them"] + [
        f"{count / unit:8.3f}  {name}" for name, count in sorted(counted.items(), key=lambda item: -item[1]) if count / unit > 0.001]


def during(argv: list[str], case: Case, proxy: Proxy, seconds: float) -> float:
    """Runs a watcher beside the load; returns how much work was done."""
    watcher = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert watcher.stderr is not None
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.extend(watcher.stderr or ()), daemon=True)
    reader.start()
    found = case.measure(proxy, seconds)
    if watcher.poll() is None:
        watcher.send_signal(signal.SIGINT)
    watcher.wait(20)
    reader.join(5)
    watcher.stderr.close()
    if watcher.returncode not in (0, -signal.SIGINT, -signal.SIGTERM, 130):
        raise BenchError(f"{argv[0]} ended with {watcher.returncode}: {''.join(said)[-1000:]}")
    return found.rate * seconds


def main() -> int:
    try:
        print(profile(CASES[sys.argv[1]], sys.argv[2], float(sys.argv[3]) if len(sys.argv) > 3 else 2.0))
    except (BenchError, IndexError, KeyError) as error:
        print(f"{__doc__}\nbench: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(ends.run(main))
