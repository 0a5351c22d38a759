"""`narrows capture verify` and `clean` on a real namespace, and `plan` through the real iptables-restore."""
from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from agent.capture.cli import command
from agent.capture.reconcile import Reconciler
from tests.netns.capture.conftest import planned, state, tables
from tests.support.netns import Namespaces, Netns

pytestmark = pytest.mark.netns


def run(*argv: str) -> tuple[int, str]:
    done = CliRunner().invoke(command, argv)
    return done.exit_code, done.output


def test_the_printed_plan_is_what_iptables_restore_takes_and_verify_accepts(namespaces: Namespaces) -> None:
    pod = namespaces.make("pod")
    for address, restore in (("10.0.0.1", "iptables-legacy-restore"), ("fd00::1", "ip6tables-legacy-restore")):
        rules = run("plan", "--pod-ip", address, "--instance", "test", "--exclude-inbound-port", "9090")[1]
        subprocess.run(["nsenter", f"--net={pod.path}", restore, "--noflush"], input=rules, text=True, check=True,
                       timeout=20)
        for line in rules.splitlines():
            if line.startswith("# ip "):
                pod.run(*line[2:].split())
    same = ("--netns", pod.path, "--instance", "test", "--exclude-inbound-port", "9090")
    assert run("verify", *same) == (0, f"{pod.path}: as planned\n")
    pod.run("ip", "rule", "del", "priority", "32764")
    assert run("verify", *same) == (1, "IPv4 rule 32764 (fwmark 0x111/0xfff, table 100) is missing\n")


async def capture(pod: Netns) -> list[str]:
    before = tables(state(pod))
    await Reconciler("test").apply(pod.path, planned())
    assert tables(state(pod)) != before
    return before


async def test_clean_removes_every_trace_of_every_instance(namespaces: Namespaces, tmp_path: Path) -> None:
    import asyncio

    pods = [namespaces.make(label) for label in ("one", "two")]
    before = [await capture(pod) for pod in pods]
    (tmp_path / "pods").mkdir()
    for number, pod in enumerate(pods):
        (tmp_path / f"pods/default.p{number}.json").write_text(json.dumps({"narrows": {"netns": pod.path}}))
    code, text = await asyncio.to_thread(run, "clean", "--run-dir", str(tmp_path))
    assert code == 0 and text.count("removed IPv4 nat, IPv6 nat, IPv4 mangle") == 2
    assert [tables(state(pod)) for pod in pods] == before
    assert await asyncio.to_thread(run, "clean", "--netns", pods[0].path) == (0, f"{pods[0].path}: nothing of ours\n")
