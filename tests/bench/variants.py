"""What our own settings cost, beside ourselves in the same run.

    python -m tests.bench.variants seccomp [--rounds 15] [--seconds 1]   http1k and pingpong, `--seccomp required` and `off`
    python -m tests.bench.variants workers [--rounds 7] [--seconds 2]    http1k on four pods, 1, 2 and 4 workers
    python -m tests.bench.variants near [--rounds 7] [--seconds 1]       two pods of one worker: joined in memory, and by way of 15006
    python -m tests.bench.variants log [--rounds 15] [--seconds 1]       tcpconnect and http1k: access log off, on, and with TCP figures

A pod has one worker, so several workers need several pods: four namespaces, each with 16 connections in a load process of its own,
which a keeper spreads evenly (or the run stops). Workers float over all cores; loads and origin keep the load core. On a machine of
two cores the second worker shares its core with them: the figure to read there is the CPU of a request, not the rate.
"""
from __future__ import annotations

import argparse
import asyncio
import mmap
import os
import shutil
import statistics
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

from agent import netlink
from agent.capture.plan import plan
from agent.capture.reconcile import Reconciler
from agent.dataplane import blobs
from agent.dataplane.client import Segments, connect
from agent.model.pod import CaptureSettings
from agent.model.workload import Protocol, WorkloadPort, spiffe
from ext.core import ring
from tests.bench import ends, pairs, proxies, report
from tests.bench.__main__ import foremost
from tests.bench.cases import CASES, Case, Sample, request
from tests.bench.tools import ECHO_PORT, HTTP_PORT, SOURCE_PORT, load, start_origin
from tests.bench.topology import CAPTURED_PORT, PROXY_CORE, BenchError, Site, Topology, cpu_ns, family, pin, wait_listening
from tests.support.keeper import Keeper
from tests.support.wait import until

PODS, CONNECTIONS = 4, 64
WORKERS = (1, 2, 4)


class Ground:
    """A topology with an origin, and keepers in it; `close` ends all."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="narrows-variants-", dir="/dev/shm"))
        self.folder.chmod(0o755)
        self.topology = Topology()
        self.stops: list[Keeper] = []
        try:
            start_origin(self.topology.origin, self.folder / "origin.log")
            for port in (HTTP_PORT, ECHO_PORT, SOURCE_PORT):
                wait_listening(self.topology.origin, port, self.topology.origin.started[0], self.folder / "origin.log")
        except BaseException:
            self.close()
            raise

    def keeper(self, label: str, mode: str, port: int, pods: int, *options: str, workers: int = 1) -> tuple[Keeper, list[Site]]:
        """One with its workers ready and its pods enrolled."""
        sites = [self.topology.site(f"{label}-{number}", captured=True) for number in range(pods)]
        keeper = Keeper(self.folder / label, "--workers", str(workers), *options).wait()
        self.stops.append(keeper)
        until(lambda: keeper.text.count("is ready") >= workers, "the workers are ready", timeout=15)
        asyncio.run(enrol(keeper, mode, port, sites, workers))
        for site in sites:
            wait_listening(site.netns, CAPTURED_PORT, None, keeper.log)
        return keeper, sites

    def close(self) -> None:
        for keeper in self.stops:
            keeper.stop()
        self.topology.close()
        shutil.rmtree(self.folder, ignore_errors=True)


async def enrol(keeper: Keeper, mode: str, port: int, sites: list[Site], workers: int) -> None:
    client = await connect(keeper.path)
    try:
        await client.commit([*proxies.entries(mode, sites[0], port), *(
            blobs.put_pod(f"pod-{handle}", handle, "w-client", proxies.SCOPE, (ip_address(site.netns.ip),))
            for handle, site in enumerate(sites, 1))])
        for handle, site in enumerate(sites, 1):
            fd = netlink.open_namespace(site.netns.path)
            try:
                await client.add_pod(handle, f"pod-{handle}", (4,), fd)
            finally:
                os.close(fd)
        spread = [one.pods for one in await client.workers()]
        if spread != [len(sites) // workers] * workers:
            raise BenchError(f"the pods are not spread evenly over {workers} workers: {spread}")
    finally:
        await client.close()


def together(keeper: Keeper, sites: list[Site], seconds: float) -> Sample:
    """All pods ask at the same time: CPU s of keeper and workers for each 100,000 requests, and requests/s of all."""
    pids = family(keeper.pid)
    before = cpu_ns(pids)
    with ThreadPoolExecutor(len(sites)) as pool:
        runs = [pool.submit(load, site, HTTP_PORT, seconds, do="exchange", connections=CONNECTIONS // len(sites), request=request("/1k"))
                for site in sites]
        found = [run.result() for run in runs]
    work = sum(one["work"] for one in found)
    return Sample((cpu_ns(pids) - before) / 1e9 / work * 100_000, sum(one["work"] / one["seconds"] for one in found))


def workers(ground: Ground, rounds: int, seconds: float) -> str:
    ready = {count: ground.keeper(f"w{count}", "http", HTTP_PORT, PODS, workers=count) for count in WORKERS}
    found: dict[int, list[Sample]] = {count: [] for count in WORKERS}
    for count in WORKERS:
        together(*ready[count], 0.5)
    for number in range(rounds):
        for at in range(len(WORKERS)):
            count = WORKERS[(at + number) % len(WORKERS)]
            found[count].append(together(*ready[count], seconds))
        print(f"workers: round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    lines = ["| workers | requests/s | CPU s per 100,000 requests |", "|---|---|---|"]
    for count, samples in found.items():
        rates, figures = [one.rate for one in samples], [one.figure or 0 for one in samples]
        lines.append(f"| {count} | {statistics.median(rates):,.0f} ({min(rates):,.0f} - {max(rates):,.0f}) | "
                     f"{statistics.median(figures):.3f} ({min(figures):.3f} - {max(figures):.3f}) |")
    return "\n".join(lines)


def seccomp(ground: Ground, rounds: int, seconds: float) -> str:
    lines = ["| case | required | off | required / off (95 % interval) |", "|---|---|---|---|"]
    for case in (CASES["http1k"], CASES["pingpong"]):
        ready = {}
        for how in ("required", "off"):
            keeper, sites = ground.keeper(f"{case.name}-{how}", case.mode, case.port, 1, "--seccomp", how)
            ready[how] = proxies.Proxy("narrows", sites[0], case.port, keeper.pid, lambda: None)
            pin(ready[how].pids(), PROXY_CORE)
            case.measure(ready[how], 0.5)
        lines.append(compared(case, ready, "off", rounds, seconds))
        print(f"seccomp: {case.name} done", file=sys.stderr, flush=True)
    return "\n".join(lines)


def compared(case: Case, ready: dict[str, proxies.Proxy], other: str, rounds: int, seconds: float) -> str:
    """A line of a table: the two of `ready` in turns, and the ratio to `other`."""
    found: report.Samples = {"narrows": [], other: []}
    ours = next(how for how in ready if how != other)
    for number in range(rounds):
        for how in (ours, other) if number % 2 else (other, ours):
            found["narrows" if how == ours else how].append(case.measure(ready[how], seconds))
    ratio = report.ratio(found, other)
    assert ratio is not None
    cells = [f"{statistics.median(one.figure or 0 for one in found[name]):.3f}" for name in found]
    return f"| {case.title}: {case.unit} | {' | '.join(cells)} | {ratio['ratio']:.3f} ({ratio['low']:.3f} - {ratio['high']:.3f}) |"


async def enrol_pair(keeper: Keeper, case: Case, site: Site, server: Site, *, hops: bool) -> None:
    """A client's and a server's pod, both captured, at one worker. `hops`: they are reached as pods of another node without tunnels."""
    protocol = Protocol.HTTP if case.mode == "http" else Protocol.TCP
    origin = replace(proxies.workload("w-origin", site.address),
                     ports=(WorkloadPort(f"default/{proxies.HOST}", case.port, case.port, protocol),))
    client = await connect(keeper.path)
    try:
        await client.commit([*proxies.entries(case.mode, site, case.port),
                             blobs.put_settings(replace(proxies.SETTINGS, same_node_tunnel=hops)),
                             blobs.put_workload(2, origin, lambda _: 2)])
        for handle, (name, one) in enumerate((("client", site), ("origin", server)), 1):
            await client.commit([blobs.put_pod(f"pod-{name}", handle, f"w-{name}", proxies.SCOPE, (ip_address(one.netns.ip),),
                                               spiffe("cluster.local", "default", name), ())])
            fd = netlink.open_namespace(one.netns.path)
            try:
                await client.add_pod(handle, f"pod-{name}", (4,), fd)
            finally:
                os.close(fd)
    finally:
        await client.close()


def near(ground: Ground, rounds: int, seconds: float) -> str:
    """Every turn is checked: the worker had connections to 15006, or had none."""
    lines = ["| case | joined | by 15006 | joined / by 15006 (95 % interval) |", "|---|---|---|---|"]
    for case in (CASES[name] for name in ("http1k", "connect", "pingpong", "tcpconnect", "bulk1")):
        ready = {}
        for how in ("near", "hops"):
            site, server = pairs.sites(ground.topology, f"{case.name}-{how}", ground.folder)
            asyncio.run(Reconciler(f"bench{os.getpid()}").apply(server.netns.path, plan(CaptureSettings(), (4,), f"bench{os.getpid()}")))
            keeper = Keeper(ground.folder / f"{case.name}-{how}", "--workers", "1").wait()
            ground.stops.append(keeper)
            until(lambda: "is ready" in keeper.text, "the worker is ready", timeout=15)  # noqa: B023 - asked before the next one
            asyncio.run(enrol_pair(keeper, case, site, server, hops=how == "hops"))
            wait_listening(site.netns, CAPTURED_PORT, None, keeper.log)
            ready[how] = proxies.Proxy("narrows", site, case.port, keeper.pid, lambda: None)
            pin(ready[how].pids(), PROXY_CORE)
            before = passed(server)
            case.measure(ready[how], 0.5)
            if (passed(server) > before) != (how == "hops"):
                raise BenchError(f"{case.name}: {how} took the other way")
        lines.append(compared(case, ready, "hops", rounds, seconds))
        print(f"near: {case.name} done", file=sys.stderr, flush=True)
    return "\n".join(lines)


class Drain(threading.Thread):
    """An agent that only takes the log records away, without reading them: on two cores a real one would take the load's."""

    def __init__(self, segments: Segments) -> None:
        super().__init__(daemon=True)
        with closing(segments):
            self._log = mmap.mmap(segments.log, ring.log_bytes())
        self._over = threading.Event()
        self.start()

    def written(self) -> int:
        """Bytes of records, ever; LogHeader.head (ext/core/ring.pxd)."""
        return int.from_bytes(self._log[16:24], "little")

    def run(self) -> None:
        while not self._over.wait(0.02):
            self._log[24:32] = self._log[16:24]

    def stop(self) -> None:
        self._over.set()
        self.join()
        self._log.close()


async def log_settings(keeper: Keeper, **settings: bool) -> Segments:
    client = await connect(keeper.path)
    try:
        await client.commit([blobs.put_settings(replace(proxies.SETTINGS, **settings))])
        (one,) = await client.shm()
        return one
    finally:
        await client.close()


LOGS = {"off": {"access_log": False}, "on": {"access_log": True}, "tcp": {"access_log": True, "access_log_tcp": True}}


def log(ground: Ground, rounds: int, seconds: float) -> str:
    """Every turn is checked: records were written, or none."""
    lines = ["| case | off | on | with TCP figures | on / off | with TCP figures / on |", "|---|---|---|---|---|---|"]
    for case in (CASES["tcpconnect"], CASES["http1k"]):
        ready, drains = {}, {}
        for how, settings in LOGS.items():
            keeper, sites = ground.keeper(f"{case.name}-log-{how}", case.mode, case.port, 1)
            drains[how] = Drain(asyncio.run(log_settings(keeper, **settings)))
            ready[how] = proxies.Proxy("narrows", sites[0], case.port, keeper.pid, lambda: None)
            pin(ready[how].pids(), PROXY_CORE)
            case.measure(ready[how], 0.5)
        found: dict[str, list[Sample]] = {how: [] for how in LOGS}
        for number in range(rounds):
            for at in range(len(LOGS)):
                how = list(LOGS)[(at + number) % len(LOGS)]
                before = drains[how].written()
                found[how].append(case.measure(ready[how], seconds))
                if (drains[how].written() > before) != (how != "off"):
                    raise BenchError(f"{case.name}: {how} wrote {drains[how].written() - before} bytes of records")
        for drain in drains.values():
            drain.stop()
        cells = [f"{statistics.median(one.rate for one in samples):,.0f}/s, {statistics.median(one.figure or 0 for one in samples):.3f}"
                 for samples in found.values()]
        for ours, other in (("on", "off"), ("tcp", "on")):
            ratio = report.ratio({"narrows": found[ours], other: found[other]}, other)
            rates = report.ratio({"narrows": [Sample(one.rate, one.rate) for one in found[ours]],
                                  other: [Sample(one.rate, one.rate) for one in found[other]]}, other)
            assert ratio is not None
            assert rates is not None
            cells.append(f"rate {rates['ratio']:.3f} ({rates['low']:.3f} - {rates['high']:.3f}), "
                         f"{case.unit} {ratio['ratio']:.3f} ({ratio['low']:.3f} - {ratio['high']:.3f})")
        lines.append(f"| {case.title} | {' | '.join(cells)} |")
        print(f"log: {case.name} done", file=sys.stderr, flush=True)
    return "\n".join(lines)


def passed(server: Site) -> int:
    """SYNs that were redirected to 15006 so far."""
    rules = server.netns.run("iptables-legacy-save", "-c", "-t", "nat").stdout.splitlines()
    return sum(int(line[1:line.index(":")]) for line in rules if "--to-ports 15006" in line)


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("what", choices=("seccomp", "workers", "near", "log"))
    options.add_argument("--rounds", type=int, default=0, help="default: 15, 7, 7, 15")
    options.add_argument("--seconds", type=float, default=0, help="of load in each turn; default: 1, 2, 1, 1")
    given = options.parse_args()
    ground = Ground()
    try:
        with foremost():
            if given.what == "seccomp":
                print(seccomp(ground, given.rounds or 15, given.seconds or 1.0))
            elif given.what == "log":
                print(log(ground, given.rounds or 15, given.seconds or 1.0))
            elif given.what == "near":
                print(near(ground, given.rounds or 7, given.seconds or 1.0))
            else:
                print(workers(ground, given.rounds or 7, given.seconds or 2.0))
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    finally:
        ground.close()
    return 0


if __name__ == "__main__":
    sys.exit(ends.run(main))
