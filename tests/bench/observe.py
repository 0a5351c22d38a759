"""What observation of connections costs, on and off in turns on the same processes.

    python -m tests.bench.observe [--rounds 15] [--seconds 1]

Captured: our worker with one pod, whose cgroup is linked and whose pod is watched, or not. Uncaptured: the load itself is the pod. Each
turn is checked: the kernel told of connections, or of none. Last, what a record costs its reader: 10,000 connects that are refused, read
at once.
"""
from __future__ import annotations

import argparse
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path

from agent import netlink
from agent.capture import loader
from agent.capture.egress import LAYOUT
from agent.capture.observe import PART, Records, Watch
from agent.capture.pins import pins_of
from agent.telemetry.connections import Connections
from ext.core import order
from tests.bench import ends, proxies, report
from tests.bench.__main__ import foremost
from tests.bench.cases import CASES, Sample
from tests.bench.topology import PROXY_CORE, BenchError, Site, pin
from tests.bench.variants import Ground
from tests.support.cgroup import Cgroup, Cgroups
from tests.support.wait import until

FLOOD = 10_000


class Switch:
    """Observation of one pod by the sockets of one cgroup."""

    def __init__(self, watch: Watch, records: Records, site: Site, cgroup: Cgroup) -> None:
        self._watch, self._records, self._site, self._cgroup = watch, records, site, cgroup
        self._cookie = 0

    def turn(self, on: bool, measure: Callable[[], Sample], connections: int) -> Sample:
        """`connections`: at least so many must be told of, or fewer."""
        if on:
            self._watch.serve(self._cgroup.path)
            self._cookie = self._watch.add(self._site.netns.path, (ip_address(self._site.netns.ip),))
        before = self._records.counted()
        try:
            found = measure()
            if on:  # the last of them end behind the load's back
                until(lambda: sum(self._records.counted()) - sum(before) >= connections, f"the kernel told of {connections} connections")
        finally:
            if on:
                self._watch.remove(self._cookie, self._cgroup.id)
        if not on and sum(self._records.counted()) - sum(before) >= connections:  # a link goes a moment after its pin
            raise BenchError("the kernel told of connections with observation off")
        while self._records.read(100_000):
            pass
        return found


def compared(title: str, switch: Switch, measure: Callable[[], Sample], rounds: int, connections: int) -> str:
    """A line of the table: rates, and what is used of the proxy's core where there is a proxy."""
    found: dict[bool, list[Sample]] = {True: [], False: []}
    switch.turn(False, measure, connections)
    for number in range(rounds):
        for on in (True, False) if number % 2 else (False, True):
            found[on].append(switch.turn(on, measure, connections))
    cells = [f"{statistics.median(one.rate for one in found[on]):,.0f}" for on in (True, False)]
    rates = {name: [Sample(one.rate, one.rate) for one in found[on]] for name, on in (("narrows", True), ("off", False))}
    costs = {name: [Sample(one.figure, one.rate) for one in found[on]] for name, on in (("narrows", True), ("off", False))}
    for samples in (rates, costs):
        ratio = report.ratio(samples, "off")
        cells.append(f"{ratio['ratio']:.3f} ({ratio['low']:.3f} - {ratio['high']:.3f})" if ratio else "")
    return f"| {title} | {' | '.join(cells)} |"


@contextmanager
def loaded(folder: Path) -> Iterator[tuple[Watch, Records]]:
    place = folder / "bpf"
    place.mkdir()
    subprocess.run(["mount", "-t", "bpf", "-o", "mode=0700", "bpf", str(place)], check=True, timeout=20)
    try:
        pins = pins_of(place, "bench", LAYOUT, PART)
        if refused := loader.load(pins, folder / "cache", hooks=loader.OBSERVE).hooks["observe"]:
            raise BenchError(f"the kernel refuses the program: {refused}")
        records = Records(pins, order)
        try:
            yield Watch(pins), records
        finally:
            records.close()
    finally:
        subprocess.run(["umount", str(place)], check=True, timeout=20)


class Nobody:
    """Peers of the flood: nobody is known, so that what is measured is not this machine's tables."""

    def here(self, cookie: int) -> None: ...

    def at(self, address: bytes) -> None: ...

    def service(self, address: bytes) -> None: ...


def flood(watch: Watch, records: Records, site: Site, cgroup: Cgroup) -> str:
    def refused() -> None:
        for _ in range(FLOOD):
            with socket.socket() as one:
                one.connect_ex((site.address, 1))

    costs = []
    collector = Connections(Nobody(), 500, records.counted)
    for _ in range(5):
        cookie = watch.add(site.netns.path, (ip_address(site.netns.ip),))
        watch.serve(cgroup.path)
        with cgroup.visited():
            netlink.in_netns(site.netns.path, refused)
        watch.remove(cookie, cgroup.id)
        before, many = time.process_time(), 0
        while found := records.read(2000):
            collector.add(found)
            many += len(found)
        costs.append((time.process_time() - before) / many * 1e6)
        if many != FLOOD:
            raise BenchError(f"{many} of {FLOOD} records were read")
    return (f"reading and counting a record: {statistics.median(costs):.2f} us of CPU ({min(costs):.2f} - {max(costs):.2f}), "
            f"so 20,000 a second take {statistics.median(costs) * 2:.1f} % of a core")


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=15)
    options.add_argument("--seconds", type=float, default=1.0)
    given = options.parse_args()
    ground, cgroups = Ground(), Cgroups()
    try:
        with loaded(ground.folder) as (watch, records), foremost():
            lines = ["| case | on, /s | off, /s | rate on / off (95 % interval) | CPU of the proxy on / off |", "|---|---|---|---|---|"]
            for case, connections in ((CASES["tcpconnect"], 1000), (CASES["pingpong"], 32)):
                cgroup = cgroups.make(case.name)
                with cgroup.visited():
                    keeper, (site,) = ground.keeper(case.name, case.mode, case.port, 1)
                proxy = proxies.Proxy("narrows", site, case.port, keeper.pid, lambda: None)
                pin(proxy.pids(), PROXY_CORE)
                lines.append(compared(f"captured: {case.title}", Switch(watch, records, site, cgroup),
                                      lambda: case.measure(proxy, given.seconds), given.rounds, connections))  # noqa: B023 - at once
                print(lines[-1], file=sys.stderr, flush=True)
            site = ground.topology.site("uncaptured", captured=False)
            for case, connections in ((CASES["tcpconnect"], 1000), (CASES["pingpong"], 32)):
                cgroup = cgroups.make(f"direct-{case.name}")
                proxy = proxies.Proxy("direct", site, case.port, 0, lambda: None)

                def measure() -> Sample:
                    with cgroup.visited():  # noqa: B023 - at once
                        return case.measure(proxy, given.seconds)  # noqa: B023

                switch = Switch(watch, records, site, cgroup)
                lines.append(compared(f"uncaptured: {case.title}", switch, measure, given.rounds, connections))
                print(lines[-1], file=sys.stderr, flush=True)
            print("\n".join(lines))
            print(flood(watch, records, site, cgroups.make("flood")))
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    finally:
        ground.close()
        cgroups.close()
    return 0


if __name__ == "__main__":
    sys.exit(ends.run(main))
