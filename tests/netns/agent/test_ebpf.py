"""Capture by eBPF in the agent: chosen and told, kept while nobody looks, and redirects where it cannot be."""
from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from agent.capture.loader import HOOKS, POD, PROXY
from tests.netns.agent.conftest import VIRTUAL, Connection, Instance
from tests.support.cgroup import cgroup2
from tests.support.netns import Netns
from tests.support.wait import until

pytestmark = pytest.mark.netns

WAY = "narrows.mesh/capture"
ON_POD = {hook.name for hook in HOOKS if POD in hook.on}
ON_PROXY = {hook.name for hook in HOOKS if PROXY in hook.on}


def served(instance: Instance) -> bool:
    """The service's address is routed to nowhere: nobody who escapes capture has an answer."""
    return instance.get() == f"served / to {instance.client.ip} 200"


def programs(instance: Instance, cgroup: str) -> set[str]:
    """What runs on a cgroup, by bpftool's word."""
    said = instance.node.netns.run("bpftool", "-j", "cgroup", "show", cgroup).stdout.strip()
    return {one["name"].removeprefix("nw_") for one in json.loads(said or "null") or []}


def redirects_out(netns: Netns) -> bool:
    return "--to-ports 15001" in netns.iptables_save()


def hooked(instance: Instance, name: str, netns: Netns) -> bool:
    """All three say so: the agent, bpftool and the rules."""
    shown = instance.shown(name)
    return bool((shown["method"], shown["egress"], shown["reason"]) == ("ebpf+iptables", "ebpf", "captured")
                and programs(instance, netns.cgroup) == ON_POD and not redirects_out(netns))


def redirected(instance: Instance, name: str, netns: Netns) -> dict[str, Any]:
    shown = instance.shown(name)
    assert shown["captured"] and shown["method"] == shown["egress"] == shown["ingress"] == "iptables", shown
    assert programs(instance, netns.cgroup) == set() if netns.cgroup else True
    assert redirects_out(netns)
    return shown


def test_what_pods_connect_to_is_captured_by_socket_hooks_and_what_comes_to_them_by_iptables(instance: Instance) -> None:
    instance.up("--capture", "ebpf")
    assert hooked(instance, "client", instance.client) and hooked(instance, "web-0", instance.server)
    assert programs(instance, instance.proxy) == ON_PROXY
    for _ in range(10):
        assert served(instance)
    until(lambda: instance.requests("source") == instance.requests("destination") == 10, "10 requests counted twice")
    lines = instance.metrics()
    assert 'narrows_capture_methods{direction="egress",method="ebpf"} 2.0' in lines
    assert 'narrows_capture_methods{direction="ingress",method="iptables"} 2.0' in lines
    assert instance.ask("/server_info")["capture"]["ebpf"] == {"state": "ready", "reason": ""}
    assert any("captured by ebpf+iptables" in event["message"] for event in instance.events("Captured"))


def test_an_agent_that_is_killed_leaves_capture_in_force_and_the_next_one_adopts_it(instance: Instance) -> None:
    instance.up("--capture", "ebpf")
    assert served(instance)
    live = Connection(instance)
    live.get()
    rules = instance.client.iptables_save()
    pins = pinned(instance)
    for number in (signal.SIGKILL, signal.SIGTERM):
        instance.kill("agent", number)
        assert served(instance)
        live.get()
        instance.start_agent("--capture", "ebpf")
        instance.ready()
        assert hooked(instance, "client", instance.client) and served(instance)
        live.get()
    live.close()
    assert (instance.client.iptables_save(), pinned(instance)) == (rules, pins)
    assert {event["message"].rpartition(": ")[2] for event in instance.events("Captured")} == {"0 changes"}
    assert not instance.events("Repaired")


def pinned(instance: Instance) -> list[str]:
    """Pins of the instance: an adopted link keeps its own."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    return sorted(f"{path} {path.stat().st_ino}" for _, target, kind, *_ in mounts if kind == "bpf"
                  for path in Path(target).glob(f"narrows/*{instance.run_dir.name}/v*/*/*"))


def test_a_pod_whose_cgroup_nobody_names_is_captured_by_redirects_and_says_why(instance: Instance) -> None:
    cgroup, instance.client.cgroup = instance.client.cgroup, ""
    instance.pod("client", instance.client, cgroup="")
    instance.up("--capture", "ebpf")
    shown = redirected(instance, "client", instance.client)
    assert "names no cgroup" in shown["fallback"] and shown["fallback"] in shown["reason"]
    assert [event["about"] for event in instance.events("CaptureFallback")] == ["pod default/client"]
    assert served(instance) and hooked(instance, "web-0", instance.server)
    instance.client.cgroup = cgroup  # the runtime names it now
    instance.pod("client", instance.client)
    until(lambda: hooked(instance, "client", instance.client), "captured by hooks")
    assert served(instance)


def test_a_keeper_in_the_root_cgroup_is_not_served_and_everything_is_redirected(instance: Instance) -> None:
    instance.proxy = str(cgroup2())
    instance.up("--capture", "ebpf")
    shown = redirected(instance, "client", instance.client)
    assert "root of cgroup v2" in shown["fallback"] and "start it in a cgroup of its own" in shown["fallback"]
    assert served(instance)


def test_a_pods_annotation_goes_before_the_nodes_default_and_a_bad_one_is_told(instance: Instance) -> None:
    instance.pod("client", instance.client, **{WAY: "ebpf"})
    instance.up()
    assert hooked(instance, "client", instance.client) and served(instance)
    redirected(instance, "web-0", instance.server)
    instance.pod("client", instance.client, **{WAY: "epbf"})
    event = until(lambda: instance.events("AnnotationRefused"), "an event")[0]
    assert event["about"] == "pod default/client" and "'epbf', expected auto or ebpf or iptables" in event["message"]
    until(lambda: instance.shown("client")["method"] == "iptables", "the node's default")
    redirected(instance, "client", instance.client)
    assert served(instance)
    instance.pod("client", instance.client, **{WAY: "ebpf"})
    until(lambda: hooked(instance, "client", instance.client), "captured by hooks again")
    assert served(instance) and VIRTUAL not in instance.client.iptables_save()
