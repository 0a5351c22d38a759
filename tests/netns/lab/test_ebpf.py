"""Labs whose nodes capture by eBPF: beside nftables, and what is left of one that was killed."""
from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.netns.lab.conftest import POD, PODS, SERVER, two_nodes
from tests.support.lab import Lab, lab
from tests.support.wait import until

pytestmark = [pytest.mark.netns, pytest.mark.redirects("asks for eBPF itself")]


def pins(name: str) -> list[Path]:
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    return [path for _, target, kind, *_ in mounts if kind == "bpf" for path in Path(target).glob(f"narrows/*{name}%2f*")]


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    path = tmp_path / "pods.yaml"
    path.write_text(PODS + POD % ("a", "a", "", "n1", "a", "sleep, infinity") + POD % ("server", "server", "", "n2", "server", SERVER))
    return path


@pytest.fixture
def without_tables(manifest: Path) -> Iterator[Lab]:
    with lab(manifest, options=("--capture", "ebpf"), hidden=True) as running:
        yield running


def test_on_nodes_without_legacy_tables_hooks_capture_both_ways(without_tables: Lab) -> None:
    this = without_tables
    assert {pod["method"] for pod in this.status()} == {"ebpf"}
    before = this.counts()
    assert this.exec("a", "curl", "-sS", "-m", "10", "-o", os.devnull, "-w", "%{http_code}", "http://server:8080/").stdout == "200"
    until(lambda: {key: this.counts()[key] - before.get(key, 0) for key in (("http", "source"), ("http", "destination"))} ==
          {("http", "source"): 1, ("http", "destination"): 1}, "counted on both sides", 20)


def test_what_a_killed_lab_has_pinned_goes_with_its_other_traces(tmp_path: Path) -> None:
    with two_nodes(tmp_path / "pods.yaml", ("--capture", "ebpf")) as this:
        assert {pod["method"] for pod in this.status()} == {"ebpf"} and len(pins(this.name)) == 2
        os.kill(int(Path(f"/run/narrows/lab/.{this.name}.lock").read_text()), signal.SIGKILL)
        this.run("down")
        assert pins(this.name) == []
