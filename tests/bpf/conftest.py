"""A bpffs of the tests' own, what the compiler made (once a run), and pods whose egress eBPF captures."""
from __future__ import annotations

import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.capture import egress, loader
from agent.capture.pins import Pins, pins_of
from tests.support.cgroup import Cgroups
from tests.support.egress import Stage, staged
from tests.support.ingress import Inward, staged_inward
from tests.support.netns import Namespaces


@pytest.fixture
def bpffs(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "bpf"
    place.mkdir()
    subprocess.run(["mount", "-t", "bpf", "-o", "mode=0700", "bpf", str(place)], check=True, timeout=20)
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True, timeout=20)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture
def pins(bpffs: Path) -> Pins:
    return pins_of(bpffs, f"test.{uuid.uuid4().hex[:8]}", egress.LAYOUT)


@pytest.fixture
def loaded(pins: Pins, cache: Path) -> Pins:
    found = loader.load(pins, cache)
    assert found.hooks == {hook.name: "" for hook in loader.HOOKS}
    return pins


@pytest.fixture
def stage(namespaces: Namespaces, cgroups: Cgroups, loaded: Pins) -> Iterator[Stage]:
    with staged(namespaces, cgroups, loaded) as made:
        yield made


@pytest.fixture
def inward(namespaces: Namespaces, cgroups: Cgroups, pins: Pins, cache: Path) -> Iterator[Inward]:
    found = loader.load(pins, cache, hooks=loader.INGRESS)
    assert found.hooks == {hook.name: "" for hook in loader.INGRESS} and found.ingress_problem == ""
    with staged_inward(namespaces, cgroups, pins, found) as made:
        yield made
