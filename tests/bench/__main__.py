"""`make bench CASES=http1k,connect ROUNDS=5 SECONDS=3 PROXIES=envoy,narrows`: see README.md."""
from __future__ import annotations

import argparse
import os
import resource
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from tests.bench import report
from tests.bench.cases import CASES, HTTP_PORT, Case, start_origin
from tests.bench.proxies import NAMES, Proxy, start
from tests.bench.topology import LOAD_CORE, BenchError, Topology, check_congestion, family, pin, wait_listening


def run(cases: list[Case], names: list[str], rounds: int, seconds: float) -> dict[str, report.Samples]:
    """Every case: all its proxies stand ready, then take turns, round after round."""
    found: dict[str, report.Samples] = {}
    folder = Path(tempfile.mkdtemp(prefix="narrows-bench-", dir="/dev/shm"))
    topology = Topology()
    try:
        pids = start_origin(topology.origin.start, folder)
        wait_listening(topology.origin, HTTP_PORT, None, folder / "origin.out")
        pin([pid for one in pids for pid in family(one)], LOAD_CORE)
        ready: dict[tuple[str, str, int], Proxy] = {}
        try:
            for case in cases:
                mine = [name for name in names if name in case.proxies]
                for name in mine:
                    key = (name, case.mode, case.port)
                    if key not in ready:
                        site = topology.site(f"{name}-{case.mode}-{case.port}", captured=name != "direct")
                        ready[key] = start(name, case.mode, site, case.port, folder)
                found[case.name] = turns(case, [ready[name, case.mode, case.port] for name in mine], rounds or case.rounds, seconds)
        finally:
            for proxy in ready.values():
                proxy.stop()
    finally:
        topology.close()
        shutil.rmtree(folder, ignore_errors=True)
    return found


def turns(case: Case, proxies: list[Proxy], rounds: int, seconds: float) -> report.Samples:
    samples: report.Samples = {proxy.name: [] for proxy in proxies}
    for proxy in proxies:  # pools filled, code read in, and every socket looked at
        case.measure(proxy, min(1.0, seconds))
        check_congestion(proxy.site.netns)
    for number in range(rounds):
        for at in range(len(proxies)):
            proxy = proxies[(at + number) % len(proxies)]  # nobody is always the one after another
            samples[proxy.name].append(case.measure(proxy, seconds))
        print(f"{case.name}: round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    return samples


def wanted(text: str, known: tuple[str, ...], what: str) -> list[str]:
    names = [name for name in text.replace(",", " ").split() if name] or list(known)
    if unknown := [name for name in names if name not in known]:
        raise BenchError(f"no {what} {', '.join(unknown)}: there are {', '.join(known)}")
    return names


def main() -> int:
    options = argparse.ArgumentParser(prog="make bench", description=__doc__)
    options.add_argument("--cases", default="", help=f"of {', '.join(CASES)}; default: all")
    options.add_argument("--proxies", default="", help=f"of {', '.join(NAMES)}; default: all")
    options.add_argument("--rounds", type=int, default=0, help="default: the case's, 5 or 7")
    options.add_argument("--seconds", type=float, default=3.0, help="of load in each turn")
    options.add_argument("--out", type=Path, default=report.ROOT / "build" / "bench.json")
    given = options.parse_args()
    try:
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        os.sched_setaffinity(0, {LOAD_CORE})
        cases = [CASES[name] for name in wanted(given.cases, tuple(CASES), "case")]
        samples = run(cases, wanted(given.proxies, NAMES, "proxy"), given.rounds, given.seconds)
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    summaries = [report.summarise(replace(CASES[name]), found) for name, found in samples.items()]
    about = {**report.machine(), "seconds": given.seconds}
    print(f"\n{about['cpu']}, kernel {about['kernel']}, commit {about['commit']}, {about['when']}\n")
    print("\n\n".join(report.table(one) for one in summaries))
    report.save(given.out, about, summaries, samples)
    print(f"\nwritten: {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
