"""`narrows capture verify` of a pod that socket hooks capture: as planned, and each thing that somebody took away."""
from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.netns.agent.conftest import NARROWS, Instance
from tests.netns.agent.test_ebpf import pins, undo_attachment, undo_entry, undo_inbound, undo_link, undo_listen, undo_lookup, undo_sysctl
from tests.support.wait import until

pytestmark = [pytest.mark.netns, pytest.mark.redirects("asks for eBPF itself")]


def verify(instance: Instance, *options: str) -> tuple[int, list[str]]:
    done = subprocess.run([*NARROWS, "capture", "verify", "--netns", instance.client.path, "--instance", str(instance.run_dir), *options],
                          capture_output=True, text=True, timeout=60, check=False)
    assert not done.stderr, done.stderr
    return done.returncode, done.stdout.splitlines()


@contextmanager
def asleep(instance: Instance) -> Iterator[None]:
    """The agent, which may be quicker than we look."""
    agent = instance.processes["agent"]
    os.kill(agent.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(agent.pid, signal.SIGCONT)


def undo_setsockopt(instance: Instance, _: str) -> None:
    number = Path(instance.client.cgroup).stat().st_ino
    next(path for path in pins(instance) if path.name == f"{number}_setsockopt").unlink()


def undo_excluded(instance: Instance, _: str) -> None:
    """A range that the plan excludes: where probes come from."""
    undo_entry_of(instance, "excluded_ranges")


def undo_entry_of(instance: Instance, name: str) -> None:
    pin = next(path for path in pins(instance) if path.name == name)
    for one in json.loads(instance.node.netns.run("bpftool", "-j", "map", "dump", "pinned", str(pin)).stdout):
        instance.node.netns.run("bpftool", "map", "delete", "pinned", str(pin), "key", "hex", *[byte[2:] for byte in one["key"]])


def undo_route(instance: Instance, _: str) -> None:
    instance.client.run("ip", "route", "flush", "table", "100")


UNDONE: list[tuple[str, Callable[[Instance, str], None], str]] = [
    ("client", undo_link, "egress: sockops is not attached to cgroup {cgroup} by us: the proxy does not learn"),
    ("client", undo_attachment, "egress: sockops is not attached to cgroup {cgroup} by us: the proxy does not learn"),
    ("client", undo_setsockopt, "egress: setsockopt is not attached to cgroup {cgroup} by us: applications with CAP_NET_RAW may"),
    ("client", undo_entry, "egress: the pod's entry in the map `pods` is missing: what the pod connects to is not captured"),
    ("client", undo_excluded, "egress: the pod's entries in the map `excluded_ranges` is not as the settings of the pod have it"),
    ("client", undo_lookup, "ingress: no sk_lookup of ours is attached to the namespace: what connects to the pod passes by the proxy"),
    ("client", undo_inbound, "ingress: the pod's entry in the map `inbound` is missing: what connects to the pod passes by the proxy"),
    ("client", undo_sysctl, "ingress: the sysctl net.ipv4.tcp_fwmark_accept is not 1: the application's answers"),
    ("client", undo_route, "route local 0.0.0.0/0 dev lo table 100 is missing"),
    ("proxy", undo_link, "egress: sockops is not attached to the cgroup of the proxy by us: the proxy does not learn"),
    ("proxy", undo_listen, "ingress: listen is not attached to the cgroup of the proxy by us: a listener of a new keeper is not found"),
]


@pytest.mark.timeout(300)  # ten damages and their repairs, each within a look of the agent's
def test_verify_names_what_somebody_took_away_and_what_it_means(instance: Instance) -> None:
    instance.up("--capture", "ebpf")
    well = 0, [f"{instance.client.path}: as planned, egress and ingress by socket hooks"]
    assert verify(instance) == verify(instance, "--capture", "ebpf") == well
    for whose, undo, said in UNDONE:
        cgroup = instance.client.cgroup if whose == "client" else instance.proxy
        with asleep(instance):
            undo(instance, cgroup)
            found: list[str] = []

            def told(found: list[str] = found, said: str = said) -> bool:
                found[:] = verify(instance, "--capture", "ebpf")[1]
                return any(line.startswith(said.format(cgroup=instance.client.cgroup)) for line in found)

            until(told, f"{undo.__name__} of the {whose} is told: {found}")  # a link whose pin went lives a moment longer
            assert "`narrows capture clean --netns" in found[-1]
            assert len(found) == 2, f"and nothing else: {found}"
        until(lambda: verify(instance) == well, f"{undo.__name__} is repaired", 30)


def test_verify_says_what_is_not_by_hooks_and_must_be_and_the_other_way_round(instance: Instance) -> None:
    instance.up("--capture", "iptables")
    assert verify(instance) == (0, [f"{instance.client.path}: as planned"])
    code, lines = verify(instance, "--capture", "ebpf")
    assert code == 1
    assert {line.partition(": an agent that is started")[0] for line in lines if "pinned" in line} == {
        f"{direction}: no programs of this instance are pinned" for direction in ("egress", "ingress")}
    instance.kill("agent", signal.SIGTERM)
    instance.start_agent("--capture", "ebpf+iptables")
    instance.ready()
    until(lambda: verify(instance) == (0, [f"{instance.client.path}: as planned, egress by socket hooks"]), "one direction by hooks", 30)
    code, lines = verify(instance, "--capture", "iptables")
    assert code == 1 and any("nat" in line for line in lines), "rules of egress are missing then"
    code, lines = verify(instance, "--capture", "iptables+ebpf")
    assert code == 1
    assert [line for line in lines if line.startswith("ingress: the pod's entry in the map `inbound` is missing")]


def test_verify_needs_no_pod_file_and_looks_at_the_addresses_of_the_namespace(instance: Instance) -> None:
    instance.up("--capture", "ebpf")
    file = instance.run_dir / "pods" / "default.client.json"
    kept = file.read_bytes()
    inside, own = instance.client.start("/bin/sleep", "100"), Path(instance.client.cgroup) / "cgroup.procs"
    until(lambda: Path(f"/proc/{inside.pid}/comm").read_text() == "sleep\n", "it is in the pod")
    with asleep(instance):
        file.unlink()
        (Path(instance.proxy) / "cgroup.procs").write_text(str(inside.pid))
        assert verify(instance)[1][0].startswith("egress: no cgroup with a process of this namespace has our hooks")
        own.write_text(str(inside.pid))
        well = 0, [f"{instance.client.path}: as planned, egress and ingress by socket hooks"]
        assert verify(instance) == well
        code, lines = verify(instance, "--cgroup", instance.proxy)
        assert code == 1 and lines[0].startswith(f"egress: getpeername4 is not attached to cgroup {instance.proxy} by us")
        instance.client.run("ip", "addr", "del", f"{instance.client.ip}/24", "dev", "eth0")
        said = verify(instance)[1]
        assert said[0].startswith("egress: the pod's entry in the map `pods` is not as the settings of the pod have it"), said
        file.write_bytes(kept)
        assert verify(instance) == well, "the runtime's word counts"
    inside.kill()
    inside.wait()
