"""`make bench CASES=http1k,connect ROUNDS=5 SECONDS=3 PROXIES=envoy,narrows`: see README.md."""
from __future__ import annotations

import argparse
import os
import resource
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.bench import ends, pairs, report, starvation, tunnels
from tests.bench.cases import CASES, Case, Sample
from tests.bench.proxies import NAMES, Proxy, start
from tests.bench.tools import ECHO_PORT, HTTP_PORT, SOURCE_PORT, start_origin
from tests.bench.topology import LOAD_CORE, BenchError, Site, Topology, check_congestion, wait_listening


def run(cases: list[Case], names: list[str], rounds: int, seconds: float) -> dict[str, report.Samples]:
    """Every case: all its proxies stand ready, then take turns, round after round."""
    found: dict[str, report.Samples] = {}
    folder = Path(tempfile.mkdtemp(prefix="narrows-bench-", dir="/dev/shm"))
    folder.chmod(0o755)
    topology = Topology()
    ground = Ground(topology, folder)
    try:
        start_origin(topology.origin, folder / "origin.log")
        for port in (HTTP_PORT, ECHO_PORT, SOURCE_PORT):
            wait_listening(topology.origin, port, topology.origin.started[0], folder / "origin.log")
        for case in cases:
            mine = [name for name in names if name in case.proxies]
            found[case.name] = turns(case, ground, mine, rounds or case.rounds, seconds or case.seconds)
    finally:
        ground.stop()
        topology.close()
        shutil.rmtree(folder, ignore_errors=True)
    return found


class Ground:
    """Sites and the proxies that stand ready in them; cases of one mode and port share them."""

    def __init__(self, topology: Topology, folder: Path) -> None:
        self.topology, self.folder = topology, folder
        self.sites: dict[tuple[str, str, int], Site] = {}
        self.servers: dict[tuple[str, str, int], Site] = {}
        self.ready: dict[tuple[str, str, int], Proxy] = {}

    def proxy(self, name: str, case: Case) -> Proxy:
        key = (name, case.mode, case.port)
        label = f"{name}-{case.mode}-{case.port}"
        if key not in self.sites and case.pair:
            self.sites[key], self.servers[key] = pairs.sites(self.topology, label, self.folder)
        elif key not in self.sites:
            self.sites[key] = self.topology.site(label, captured=name != "direct")
        if key not in self.ready and case.pair:
            self.ready[key] = pairs.start(name, case.mode, self.sites[key], self.servers[key], case.port, self.folder)
        elif key not in self.ready:
            self.ready[key] = start(name, case.mode, self.sites[key], case.port, self.folder)
        return self.ready[key]

    def turn(self, name: str, case: Case, seconds: float) -> Sample:
        if case.fresh:
            self.end(name, case)
        try:
            return case.measure(self.proxy(name, case), seconds)
        finally:
            if case.fresh:
                self.end(name, case)

    def end(self, name: str, case: Case) -> None:
        if proxy := self.ready.pop((name, case.mode, case.port), None):
            proxy.stop()

    def stop(self) -> None:
        for proxy in self.ready.values():
            proxy.stop()


@contextmanager
def foremost() -> Iterator[None]:
    """The session's share of the cores is raised for as long as it measures: others' work goes on beside it, slowly.

    The kernel groups processes by session (autogroup), between which nice(1) counts for nothing.
    """
    group = Path("/proc/self/autogroup")
    try:
        before = group.read_text().split()[-1]
        group.write_text("-19")
    except (OSError, IndexError):  # a kernel without autogroups
        yield
        return
    try:
        yield
    finally:
        group.write_text(before)


def turns(case: Case, ground: Ground, names: list[str], rounds: int, seconds: float) -> report.Samples:
    samples: report.Samples = {name: [] for name in names}
    for name in names if not case.fresh else ():  # pools filled, code read in, and sockets looked at
        ground.turn(name, case, min(1.0, seconds))
        check_congestion(ground.proxy(name, case).site.netns)
    for number in range(rounds):
        for at in range(len(names)):
            name = names[(at + number) % len(names)]  # nobody is always the one after another
            samples[name].append(ground.turn(name, case, seconds))
        print(f"{case.name}: round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    check_congestion(ground.topology.origin)
    return samples


def wanted(text: str, known: tuple[str, ...], what: str) -> list[str]:
    names = [name for name in text.replace(",", " ").split() if name] or list(known)
    if unknown := [name for name in names if name not in known]:
        raise BenchError(f"no {what} {', '.join(unknown)}: there are {', '.join(known)}")
    return names


def main() -> int:
    options = argparse.ArgumentParser(prog="make bench", description=__doc__)
    options.add_argument("--cases", default="", help=f"of {', '.join(CASES)}; default: all; or starvation alone, or starvation:ATTACK,...")
    options.add_argument("--proxies", default="", help=f"of {', '.join((*NAMES, *pairs.FILES))}; default: all")
    options.add_argument("--rounds", type=int, default=0, help="default: the case's, 5 or 7")
    options.add_argument("--seconds", type=float, default=0, help="of load in each turn; default: the case's, 2 or 4")
    options.add_argument("--out", type=Path, default=report.ROOT / "build" / "bench.json")
    options.add_argument("--openssl", default="", help="folder with libssl.so.3 and libcrypto.so.3 for our tunnels; default: the system's")
    given = options.parse_args()
    try:
        if given.openssl:
            print(f"our tunnels use {tunnels.openssl(given.openssl)}", file=sys.stderr)
            os.environ[tunnels.OPENSSL] = given.openssl
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        os.sched_setaffinity(0, {LOAD_CORE})
        case, _, attacks = given.cases.partition(":")
        if case == "starvation":  # two pods of one worker instead of one pod and many proxies
            with foremost():
                return starvation.main(given.rounds or 3, given.seconds or 2.0,
                                       tuple(wanted(attacks, tuple(starvation.ATTACKS), "attack")))
        cases = [CASES[name] for name in wanted(given.cases, tuple(CASES), "case")]
        with foremost():
            samples = run(cases, wanted(given.proxies, (*NAMES, *pairs.FILES), "proxy"), given.rounds, given.seconds)
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    summaries = [report.summarise(CASES[name], found) for name, found in samples.items()]
    about = {**report.machine(), "seconds": given.seconds, "openssl": tunnels.openssl(given.openssl)}
    print(f"\n{about['cpu']}, kernel {about['kernel']}, commit {about['commit']}, {about['openssl']}, {about['when']}\n")
    print("\n\n".join(report.table(one) for one in summaries))
    report.save(given.out, about, summaries, samples)
    print(f"\nwritten: {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(ends.run(main))
