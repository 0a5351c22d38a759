"""`narrows capture clean` after an instance that was killed: the node as other tools see it is what it was before there was one."""
from __future__ import annotations

import difflib
import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.netns.agent.conftest import NARROWS, Instance, instance
from tests.support.netns import Netns
from tests.support.wait import until

__all__ = ["instance"]
pytestmark = pytest.mark.netns

LISTS = {
    "iptables": ("iptables-save",), "ip6tables": ("ip6tables-save",), "nftables": ("nft", "list", "ruleset"),
    "rules": ("ip", "rule"), "rules6": ("ip", "-6", "rule"), "routes": ("ip", "route", "show", "table", "all"),
    "routes6": ("ip", "-6", "route", "show", "table", "all"), "sockets": ("ss", "-Hlnt"), "links": ("ip", "-br", "link"),
}


def output(*argv: str, netns: Netns | None = None) -> str:
    enter = ["nsenter", f"--net={netns.path}", "--"] if netns else []
    return subprocess.run([*enter, *argv], capture_output=True, text=True, check=True, timeout=60).stdout


def of_pods(made: Instance) -> dict[str, str]:
    """Rules, routes, listeners and links of each namespace, and what is attached to each cgroup."""
    found = {}
    for netns in (made.client, made.server):
        for name, argv in LISTS.items():
            lines = [line for line in output(*argv, netns=netns).splitlines() if not line.startswith("#")]
            # without counters; tables that are empty stay (legacy ones are made by listing them, and no tool removes them)
            found[f"{netns.name} {name}"] = "\n".join(line.partition(" [")[0] for line in lines)
        found[f"{netns.name} programs"] = str(attached(netns.cgroup))
    found["proxy programs"] = str(attached(made.proxy))
    return found


def attached(cgroup: str) -> list[dict[str, Any]]:
    return json.loads(output("bpftool", "-j", "cgroup", "show", cgroup).strip() or "null") or []


def pins(made: Instance) -> list[str]:
    """Of this instance, wherever a bpffs is mounted; by find(1)."""
    places = output("findmnt", "-rno", "TARGET", "-t", "bpf").split() if "bpf" in output("findmnt", "-rno", "FSTYPE").split() else []
    return [line for place in places for line in output("find", place).splitlines() if made.run_dir.name in line]


def objects(kind: str) -> set[int]:
    return {one["id"] for one in json.loads(output("bpftool", "-j", kind, "show").strip() or "null") or []}


@pytest.mark.parametrize("capture", ["ebpf", "iptables", "nftables"])
def test_nothing_is_left_of_an_instance_that_was_killed(instance: Instance, capture: str) -> None:
    for netns in (instance.client, instance.server):  # a link-local address brings a route when nobody else has it
        until(lambda one=netns: "tentative" not in output("ip", "-6", "address", netns=one), "IPv6 addresses are there")  # type: ignore[misc]
    before = of_pods(instance)
    assert before == of_pods(instance)  # looking changes nothing
    entries = sorted(path.name for path in Path("/run/narrows").iterdir())
    instance.up("--capture", capture)
    assert instance.get().endswith(" 200")
    during = of_pods(instance)
    assert during != before
    ours: dict[str, set[int]] = {"prog": set(), "map": set(), "link": set()}
    if capture == "ebpf":
        named = pins(instance)
        assert any("/links/" in path for path in named)
        for path in named:
            for kind, folder in (("prog", "programs"), ("map", "maps"), ("link", "links")):
                if f"/{folder}/" in path:
                    ours[kind].add(json.loads(output("bpftool", "-j", kind, "show", "pinned", path))["id"])
        assert all(ours[kind] and ours[kind] <= objects(kind) for kind in ours)
    for name in ("agent", "plane", "keeper"):
        instance.kill(name, signal.SIGKILL)
    until(lambda: not output("ss", "-Hlnt", netns=instance.client).strip(), "the workers are gone")
    done = subprocess.run([*NARROWS, "capture", "clean", "--run-dir", str(instance.run_dir), "--instance", str(instance.run_dir)],
                          capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    cgroups = (instance.client.cgroup, instance.server.cgroup, instance.proxy)
    until(lambda: not any(attached(cgroup) for cgroup in cgroups), "the links are off, a moment after their pins")
    after = of_pods(instance)
    changed = [line for name, text in after.items() for line in difflib.unified_diff(
        before[name].splitlines(), text.splitlines(), name, name, n=0, lineterm="")]
    assert not changed, "\n".join(changed)
    assert pins(instance) == []
    until(lambda: all(not ours[kind] & objects(kind) for kind in ours), "the kernel has let go of programs, maps and links")
    assert sorted(path.name for path in Path("/run/narrows").iterdir() if str(os.getpid()) in path.name) == \
        [name for name in entries if str(os.getpid()) in name]
