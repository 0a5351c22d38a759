"""What is measured: a case starts its load in a proxy's site and says how much work was done.

The figure of most cases is CPU per unit of work: CPU of the proxy's processes over the whole run of the load generator, its
connects included, by what the load generator counted.
"""
from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.bench.proxies import HOST, Proxy, program
from tests.bench.topology import LOAD_CORE, BenchError, cpu_ns, softirqd_ns

HTTP_PORT = 8080


@dataclass(frozen=True)
class Sample:
    """One turn of one proxy. `figure` is in the case's unit, lower is better; None for `direct` where it has no CPU of its own."""

    figure: float | None
    rate: float  # units of work per second
    more: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    name: str
    title: str
    unit: str
    mode: str
    port: int
    measure: Callable[[Proxy, float], Sample]
    targets: dict[str, float]  # ours / peer, at most; "better": the better of HAProxy and nginx
    proxies: tuple[str, ...] = ("direct", "envoy", "haproxy", "nginx", "narrows")
    rounds: int = 5


def charge(proxy: Proxy, run: Callable[[], tuple[float, float, dict[str, float]]], per: float) -> Sample:
    """Runs the load, which returns (work, seconds, more), and charges the proxy's CPU to each `per` of work."""
    pids = proxy.pids()
    cpu, soft = cpu_ns(pids), softirqd_ns()
    work, seconds, more = run()
    cpu, soft = cpu_ns(pids) - cpu, softirqd_ns() - soft
    if work <= 0:
        raise BenchError(f"{proxy.name}: no work was done")
    more = {**more, "cpu": cpu / 1e9 / seconds, "ksoftirqd": soft / 1e9 / seconds}
    return Sample(cpu / 1e9 / work * per if pids else None, work / seconds, more)


# ---- HTTP by wrk --------------------------------------------------------------------------------------------------------

def wrk(proxy: Proxy, seconds: float, path: str, *headers: str, connections: int = 64) -> Sample:
    """Closed loop: each connection asks again once it is answered."""
    argv = ["taskset", "-c", str(LOAD_CORE), program("wrk"), "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--latency",
            "-H", f"Host: {HOST}:{HTTP_PORT}", *(word for header in headers for word in ("-H", header)),
            f"http://{proxy.site.target(HTTP_PORT)}{path}"]

    def run() -> tuple[float, float, dict[str, float]]:
        said = proxy.site.netns.run(*argv, timeout=seconds + 30).stdout
        return read_wrk(proxy, said)

    return charge(proxy, run, 100_000)


def read_wrk(proxy: Proxy, said: str) -> tuple[float, float, dict[str, float]]:
    done = re.search(r"(\d+) requests in ([\d.]+)(s|m)", said)
    if done is None or "Non-2xx" in said:
        raise BenchError(f"{proxy.name}: not every request was answered with 200:\n{said}")
    errors = re.search(r"connect (\d+), read (\d+), write (\d+), timeout (\d+)", said)
    if errors is not None:
        raise BenchError(f"{proxy.name}: {errors[0]}")
    latencies = {f"p{name}_us": float(value) * {"us": 1, "ms": 1e3, "s": 1e6}[unit]
                 for name, value, unit in re.findall(r"^\s+(50|99)%\s+([\d.]+)(us|ms|s)", said, re.MULTILINE)}
    return float(done[1]), float(done[2]) * (60 if done[3] == "m" else 1), latencies


CASES = {case.name: case for case in (
    Case("http1k", "HTTP/1.1 keep-alive, 1 KiB, 64 connections", "CPU s per 100,000 requests", "http", HTTP_PORT,
         lambda proxy, seconds: wrk(proxy, seconds, "/1k"), {"envoy": 0.40, "better": 0.95}),
    Case("http64k", "HTTP/1.1, 64 KiB responses, 64 connections", "CPU s per 100,000 requests", "http", HTTP_PORT,
         lambda proxy, seconds: wrk(proxy, seconds, "/64k"), {"envoy": 0.90, "nginx": 1.0}),
    Case("connect", "HTTP/1.1, one request per connection, 64 at a time", "CPU s per 100,000 requests", "http", HTTP_PORT,
         lambda proxy, seconds: wrk(proxy, seconds, "/1k", "Connection: close"), {"envoy": 0.50, "nginx": 1.1}),
)}


# ---- the origin ---------------------------------------------------------------------------------------------------------

def start_origin(netns_start: Callable[..., subprocess.Popen[str]], folder: Path) -> list[int]:
    """What all cases need at the other end; returns the processes."""
    from tests.bench.proxies import fill

    (folder / "www").mkdir()
    (folder / "www" / "64k").write_bytes(b"x" * 65536)
    config = fill("origin.conf", folder / "origin.conf", DIR=folder, ONE_KIB="x" * 1024)
    with open(folder / "origin.out", "wb") as out:
        process = netns_start(program("nginx"), "-p", str(folder), "-c", str(config), "-g", "daemon off;",
                              stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    return [process.pid]
