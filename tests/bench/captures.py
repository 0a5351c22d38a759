"""Connects per second as they are captured, without a proxy behind: what the capture itself costs.

    python -m tests.bench.captures [--rounds 25] [--seconds 0.4]

    in     a client dials a pod's port over a bridge: nobody captures (the port listens), REDIRECT to 15006, sk_lookup to 15006
    out    an application dials an address: nobody captures (it dials 15001 itself), REDIRECT to 15001, eBPF's connect hook to 15001

One thread connects, resets and closes, on a core of its own; the handshake over veth or lo runs in it, so connects/s is the path's cost
(with some 10 us of Python and system calls in every variant, which brings ratios nearer to 1). Who accepts runs on the other core. The
variants take turns in each round. A ratio is that of medians, with a 95 % bootstrap interval over rounds (report.py).
"""
from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import IO

from agent.capture import loader
from agent.capture.egress import LAYOUT, Egress
from agent.capture.ingress import Ingress
from agent.capture.pins import pins_of
from agent.capture.plan import plan
from agent.capture.reconcile import Reconciler
from agent.model.pod import CaptureSettings
from tests.bench import ends, report
from tests.bench.cases import Sample
from tests.support import conntrack
from tests.support.cgroup import Cgroup, Cgroups
from tests.support.netns import Namespaces, Netns, Node

VIRTUAL = "10.96.0.10"  # routed to nowhere
LOAD_CORE, ACCEPT_CORE = 0, 1

ACCEPT = """if True:
    import os, socket, sys
    os.sched_setaffinity(0, {int(sys.argv[2])})
    s = socket.create_server(("0.0.0.0", int(sys.argv[1])), backlog=4096)
    print("ready", flush=True)
    while True:
        s.accept()[0].close()"""

CONNECT = """if True:
    import os, socket, struct, sys, time
    os.sched_setaffinity(0, {int(sys.argv[3])})
    target, reset = (sys.argv[1], int(sys.argv[2])), struct.pack("=ii", 1, 0)
    for line in sys.stdin:
        done, now = 0, time.monotonic()
        until = now + float(line)
        while now < until:
            s = socket.socket()
            s.connect(target)
            s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
            s.close()
            done += 1
            now = time.monotonic()
        print(done / (now - until + float(line)), flush=True)"""


class Variant:
    """`netns` is the client's, `tracked` the captured pod's."""

    def __init__(self, netns: Netns, cgroup: Cgroup, address: str, port: int, tracked: Netns) -> None:
        self.tracked = tracked
        self.process = cgroup.start(netns, sys.executable, "-c", CONNECT, address, str(port), str(LOAD_CORE), stdin=subprocess.PIPE,
                                    stdout=subprocess.PIPE, text=True)
        assert self.process.stdin is not None and self.process.stdout is not None
        self._in: IO[str] = self.process.stdin
        self._out: IO[str] = self.process.stdout

    def turn(self, seconds: float) -> float:
        self._in.write(f"{seconds}\n")
        self._in.flush()
        return float(self._out.readline())


def accept(netns: Netns, cgroup: Cgroup, port: int) -> None:
    """Ends with the cgroup."""
    process = cgroup.start(netns, sys.executable, "-c", ACCEPT, str(port), str(ACCEPT_CORE), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"


@contextmanager
def bpffs() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["mount", "-t", "bpf", "bpf", folder], check=True)
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", folder], check=True)


def variants(node: Node, cgroups: Cgroups, place: Path, cache: Path) -> dict[str, Variant]:
    pins = pins_of(place, f"bench{os.getpid()}", LAYOUT)
    found = loader.load(pins, cache, hooks=(*loader.HOOKS, *loader.INGRESS))
    assert not found.problem and not found.ingress_problem and found.lookup is not None, found
    app, proxy = cgroups.make("app"), cgroups.make("proxy")
    ingress, egress = Ingress(pins, found.lookup), Egress(pins)
    ingress.serve(proxy.path)
    egress.serve(proxy.path)
    outside = cgroups.make("outside")
    client = node.pod("client")
    made = {}
    for name in ("direct", "redirect", "sk_lookup"):
        pod = node.pod(f"in-{name}")
        accept(pod, proxy, 8080 if name == "direct" else 15006)
        _rules(pod, name == "redirect", redirect=False, hooks=True, inbound=True)
        if name == "sk_lookup":
            ingress.capture(pod.path, (ip_address(pod.ip),), CaptureSettings())
        made[f"in {name}"] = Variant(client, outside, pod.ip, 8080, pod)
    for name in ("direct", "redirect", "connect"):
        pod = node.pod(f"out-{name}")
        accept(pod, proxy, 15001)
        _rules(pod, name == "redirect", redirect=True, hooks=True)
        if name == "connect":
            egress.capture(pod.path, app.path, (ip_address(pod.ip),), CaptureSettings())
        where = (pod.ip, 15001) if name == "direct" else (VIRTUAL, 80)
        made[f"out {name}"] = Variant(pod, app if name == "connect" else outside, *where, pod)
    return made


def _rules(pod: Netns, wanted: bool, **how: bool) -> None:
    if wanted:
        asyncio.run(Reconciler("bench").apply(pod.path, plan(CaptureSettings(), (4, 6), "bench", **how)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--seconds", type=float, default=0.4)
    asked = parser.parse_args()
    with ExitStack() as stack:
        place = stack.enter_context(bpffs())
        cache = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        namespaces, cgroups = Namespaces(), Cgroups()
        stack.callback(namespaces.close)
        stack.callback(cgroups.close)
        made = variants(Node(namespaces), cgroups, place, cache)
        for one in made.values():
            one.turn(0.2)
        seen: dict[str, list[float]] = {name: [] for name in made}
        for turn in range(asked.rounds):
            for name in (list(made) if turn % 2 == 0 else list(reversed(made))):
                seen[name].append(made[name].turn(asked.seconds))
        print("| capture | connects/s, median (range) | of nobody's | of REDIRECT's | entries of conntrack |\n|---|---|---|---|---|")
        for name, one in made.items():
            print(f"| {name} | {statistics.median(seen[name]):,.0f} ({min(seen[name]):,.0f} - {max(seen[name]):,.0f}) | "
                  f"{_ratio(seen, name, 'direct')} | {_ratio(seen, name, 'redirect')} | {conntrack.count(one.tracked)} |")
    return 0


def _ratio(seen: dict[str, list[float]], name: str, other: str) -> str:
    peer = f"{name.partition(' ')[0]} {other}"
    if peer == name:
        return ""
    found = report.ratio({"narrows": [Sample(value, value) for value in seen[name]],
                          "other": [Sample(value, value) for value in seen[peer]]}, "other")
    assert found is not None
    return f"{found['ratio']:.3f} ({found['low']:.3f} - {found['high']:.3f})"


if __name__ == "__main__":
    sys.exit(ends.run(main))
