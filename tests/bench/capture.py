"""Annotation to captured, for 1 to 100 pods annotated at once; what watching them costs; how soon an edit is repaired.

    python -m tests.bench.capture [--pods 1,10,50,100] [--rounds 3] [--capture iptables|nftables|ebpf]

A real keeper, control plane and agent on one node. A pod's time runs from the moment its annotated file is renamed into place to the
event `Captured`, which comes after the rules were read back. CPU is the agent's and that of its capture children. At the end: the agent's
resident memory, and the entries of conntrack that 100 requests leave in the client's and in the server's namespace.
"""
from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

from tests.bench import ends
from tests.netns.agent.conftest import Instance
from tests.support.netns import Namespaces, Netns
from tests.support.wait import until

WATCHED_SECONDS = 10.0


def cpu(instance: Instance) -> float:
    """Seconds of the agent and of its children, ended ones included."""
    agent = psutil.Process(instance.processes["agent"].pid)
    found = 0.0
    for process in [agent, *agent.children(recursive=True)]:
        times = process.cpu_times()
        found += times.user + times.system + times.children_user + times.children_system
    return found


def events(instance: Instance, kind: str, since: float) -> dict[str, float]:
    """Time of the last event of this kind by pod."""
    return {event["about"]: event["time"] for event in instance.ask("/events")
            if event["kind"] == kind and event["time"] >= since}


def enrol(instance: Instance, pods: dict[str, Netns]) -> tuple[list[float], float, float]:
    """(milliseconds of each pod, seconds until the last, CPU milliseconds a pod)."""
    before, written = cpu(instance), {}
    start = time.time()
    for name, netns in pods.items():
        written[f"pod default/{name}"] = time.time()
        instance.pod(name, netns)
    done: dict[str, float] = {}

    def all_captured() -> bool:
        done.update(events(instance, "Captured", start))
        return written.keys() <= done.keys()

    until(all_captured, "every pod is captured", 60, 0.05)
    used = cpu(instance) - before
    return [(done[about] - written[about]) * 1000 for about in written], max(done.values()) - start, used * 1000 / len(pods)


def release(instance: Instance, pods: dict[str, Netns]) -> None:
    for name, netns in pods.items():
        instance.pod(name, netns, intercept="disabled")
    names = set(pods)
    until(lambda: all(pod["state"] == "out" for pod in instance.ask("/pods") if pod["name"] in names), "every pod is let go", 60, 0.1)


def watched(instance: Instance) -> float:
    """Share of a core that the agent uses with these pods captured and nothing going on."""
    time.sleep(3)  # the first look compares in full
    before = cpu(instance)
    time.sleep(WATCHED_SECONDS)
    return (cpu(instance) - before) / WATCHED_SECONDS


def repaired(instance: Instance, pods: dict[str, Netns], edit: list[str]) -> list[float]:
    """Seconds from the edit of every pod's rules to the event that says they are repaired."""
    edited = {}
    start = time.time()
    for name, netns in pods.items():
        subprocess.run(["nsenter", f"--net={netns.path}", "--", *edit], check=True)
        edited[f"pod default/{name}"] = time.time()
    done: dict[str, float] = {}

    def all_repaired() -> bool:
        done.update(events(instance, "Repaired", start))
        return edited.keys() <= done.keys()

    until(all_repaired, "every pod is repaired", 60, 0.1)
    return [max(done[about] - moment, 0.0) for about, moment in edited.items()]


def tracked(instance: Instance) -> str:
    """By conntrack(8), of the client's requests: on its side what goes out, on the server's what comes in, and all else there is."""
    assert instance.get().endswith(" 200")
    for netns in (instance.client, instance.server):
        netns.run("conntrack", "-F")
    for _ in range(100):
        assert instance.get().endswith(" 200")
    found = []
    for name, netns in (("client", instance.client), ("server", instance.server)):
        lines = [line for line in netns.run("conntrack", "-L").stdout.splitlines() if line.startswith("tcp")]
        ports = Counter(next(word for word in line.split() if word.startswith("dport=")) for line in lines)
        found.append(f"{len(lines)} at the {name} ({', '.join(f'{count} {port}' for port, count in sorted(ports.items()))})")
    return ", ".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pods", default="1,10,25,50,100")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--capture", choices=["iptables", "nftables", "ebpf"], default="iptables")
    parser.add_argument("--enrol-only", action="store_true")
    asked: Any = parser.parse_args()
    edit = {"iptables": ["iptables-legacy", "-t", "nat", "-F"], "nftables": ["nft", "flush", "ruleset"],
            "ebpf": ["ip", "rule", "del", "priority", "32764"]}[asked.capture]
    counts = [int(text) for text in asked.pods.split(",")]
    namespaces = Namespaces()
    instance = Instance(namespaces)
    try:
        instance.start_keeper()
        instance.start_plane()
        instance.start("agent", "agent", "--run-dir", str(instance.run_dir), "--node", "n1", "--xds",
                       f"unix:{instance.run_dir}/xds.sock", "--capture", asked.capture)
        instance.ready()
        every = {f"p{number}": instance.node.pod(f"p{number}") for number in range(max(counts))}
        for name, netns in every.items():
            instance.pod(name, netns, intercept="disabled")
        print(f"capture by {asked.capture}, {asked.rounds} rounds\n| pods | a pod, median ms | slowest ms | all, s | CPU ms a pod "
              "| agent's CPU with them | edit to repair, median / slowest s |\n|---|---|---|---|---|---|---|")
        for count in counts:
            pods = dict(list(every.items())[:count])
            rounds = []
            for turn in range(asked.rounds):
                if turn:
                    release(instance, pods)
                rounds.append(enrol(instance, pods))
            each = sorted(value for values, _, _ in rounds for value in values)
            total, used = statistics.median(row[1] for row in rounds), statistics.median(row[2] for row in rounds)
            line = f"| {count} | {statistics.median(each):.0f} | {each[-1]:.0f} | {total:.2f} | {used:.1f} |"
            if not asked.enrol_only:
                load, times = watched(instance), repaired(instance, pods, edit)
                line += f" {load * 100:.1f} % | {statistics.median(times):.1f} / {max(times):.1f} |"
            print(line, flush=True)
            release(instance, pods)
        memory = psutil.Process(instance.processes["agent"].pid).memory_info().rss >> 10
        print(f"agent: {memory:,} KiB resident; 100 requests leave {tracked(instance)}", flush=True)
    finally:
        instance.close()
        namespaces.close()
    assert not Path(instance.run_dir).exists()


if __name__ == "__main__":
    sys.exit(ends.run(main))
