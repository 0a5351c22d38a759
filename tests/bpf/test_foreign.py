"""Other people's programs on the hooks that ours have: attached by bpftool, before ours and after, here and on an ancestor."""
from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest

from agent.capture import bpf_call, egress
from agent.model.pod import CaptureSettings
from tests.bpf.test_loader import bpftool
from tests.support.cgroup import Cgroup
from tests.support.egress import Stage
from tests.support.mesh import TCP_PORT, VIP
from tests.support.wait import until

pytestmark = pytest.mark.netns

CONNECT4, SOCK_ADDR = 10, 18  # BPF_CGROUP_INET4_CONNECT, BPF_PROG_TYPE_CGROUP_SOCK_ADDR


class Foreign:
    """Programs on connect4 that count and let pass; attached and detached by bpftool."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._counters: dict[str, int] = {}

    def attach(self, name: str, cgroup: str, *flags: str) -> None:
        counter = bpf_call.create_map("counter", bpf_call.MapShape(2, 4, 8, 1, 0))
        code = b"".join(struct.pack("=BBhi", *line) for line in (
            (0x62, 10, -4, 0), (0xBF, 2 | 10 << 4, 0, 0), (0x07, 2, 0, -4), (0x18, 1 | 1 << 4, 0, counter), (0, 0, 0, 0), (0x85, 0, 0, 1),
            (0x15, 0, 2, 0), (0xB7, 1, 0, 1), (0xDB, 0 | 1 << 4, 0, 0), (0xB7, 0, 0, 1), (0x95, 0, 0, 0)))
        program = bpf_call.load_program(name, SOCK_ADDR, CONNECT4, code)
        bpf_call.pin(program, self._folder / name)
        os.close(program)
        self._counters[name] = counter
        self._call("attach", cgroup, name, *flags)

    def detach(self, name: str, cgroup: str) -> None:
        self._call("detach", cgroup, name)

    def _call(self, what: str, cgroup: str, name: str, *flags: str) -> None:
        subprocess.run(["bpftool", "cgroup", what, cgroup, "connect4", "pinned", str(self._folder / name), *flags], check=True, timeout=20)

    def count(self, name: str) -> int:
        value = bpf_call.lookup(self._counters[name], bytes(4), 8)
        assert value is not None
        return int.from_bytes(value, "little")

    def close(self) -> None:
        for name, counter in self._counters.items():
            (self._folder / name).unlink()
            os.close(counter)


@pytest.fixture
def foreign(bpffs: Path) -> Iterator[Foreign]:
    made = Foreign(bpffs)
    try:
        yield made
    finally:
        made.close()


def on(cgroup: str) -> list[str]:
    """Names of the programs on connect4, in the order in which they run."""
    return [one["name"] for one in bpftool("cgroup", "show", cgroup) or [] if one["attach_type"] in ("connect4", "cgroup_inet4_connect")]


def test_programs_of_others_run_beside_ours_and_neither_removal_takes_the_other(stage: Stage, foreign: Foreign) -> None:
    cgroup = stage.app.path
    foreign.attach("before", cgroup, "multi")
    stage.capture()
    foreign.attach("after", cgroup, "multi")
    assert sorted(on(cgroup)) == ["after", "before", "nw_connect4"]
    stage.talk(VIP)
    assert (stage.taken_out(), foreign.count("before"), foreign.count("after")) == (1, 1, 1)
    foreign.detach("before", cgroup)
    stage.talk(VIP)
    assert (stage.taken_out(), foreign.count("before"), foreign.count("after")) == (2, 1, 2)
    stage.egress.release(egress.netns_cookie(stage.client.path), stage.app.id)
    until(lambda: on(cgroup) == ["after"], "ours has left")  # the kernel lets go of a link some milliseconds after its pin
    stage.talk(stage.other.ip, 9000)
    assert (stage.taken_out(), foreign.count("after")) == (2, 3)
    assert stage.outside.peers == [stage.client.ip]
    foreign.detach("after", cgroup)


def capture_in(stage: Stage, cgroup: Cgroup) -> None:
    stage.egress.capture(stage.client.path, cgroup.path, (ip_address(stage.client.ip),), CaptureSettings())


@pytest.fixture
def below(stage: Stage) -> Iterator[Cgroup]:
    made = Cgroup(Path(stage.app.path) / "container")
    try:
        yield made
    finally:
        made.remove()


def test_a_program_of_an_ancestor_runs_beside_ours(stage: Stage, foreign: Foreign, below: Cgroup) -> None:
    foreign.attach("above", stage.app.path, "multi")
    capture_in(stage, below)
    stage.talk(VIP, TCP_PORT, cgroup=below)
    assert (stage.taken_out(), foreign.count("above")) == (1, 1)
    stage.egress.release(egress.netns_cookie(stage.client.path), below.id)
    until(lambda: (on(stage.app.path), on(below.path)) == (["above"], []), "ours has left")


@pytest.mark.parametrize("where", ["here", "above"])
def test_a_program_that_allows_no_other_keeps_its_place_and_is_told_and_nothing_of_ours_stays(
        stage: Stage, foreign: Foreign, below: Cgroup, where: str) -> None:
    pod = stage.app if where == "here" else below
    foreign.attach("alone", stage.app.path)
    with pytest.raises(egress.EgressError, match=r"connect4: .*not permitted.*; `bpftool cgroup tree` shows what else is attached"):
        capture_in(stage, pod)
    assert on(stage.app.path) == ["alone"]
    until(lambda: [one["name"] for one in bpftool("cgroup", "show", pod.path) or []] == (["alone"] if where == "here" else []),
          "nothing of ours stays")
    foreign.detach("alone", stage.app.path)
    capture_in(stage, pod)
    stage.talk(VIP, cgroup=pod)
    assert stage.taken_out() == 1


def test_a_failure_half_way_leaves_links_that_were_there_before(stage: Stage, foreign: Foreign) -> None:
    """Of a captured pod whose link of connect4 somebody took off, to take its place."""
    stage.capture()
    (stage.pins.links / f"{stage.app.id}_connect4").unlink()
    until(lambda: on(stage.app.path) == [], "it was taken off")
    foreign.attach("alone", stage.app.path)
    before = sorted(path.name for path in stage.pins.links.iterdir())
    with pytest.raises(egress.EgressError, match="connect4"):
        stage.capture()
    assert sorted(path.name for path in stage.pins.links.iterdir()) == before


def test_a_cgroup_of_version_1_or_a_plain_directory_is_refused_and_told(stage: Stage, tmp_path: Path) -> None:
    """The first is mounted here; what a node without version 2 has."""
    old = tmp_path / "v1"
    old.mkdir()
    subprocess.run(["mount", "-t", "cgroup", "-o", f"none,name=t{os.getpid()}", "none", str(old)], check=True, timeout=20)
    try:
        pod = old / "pod"
        pod.mkdir()
        try:
            for folder in (pod, tmp_path):
                with pytest.raises(egress.EgressError, match="only cgroup v2 has these hooks"):
                    stage.egress.capture(stage.client.path, str(folder), (ip_address(stage.client.ip),), CaptureSettings())
        finally:
            pod.rmdir()
    finally:
        subprocess.run(["umount", str(old)], check=True, timeout=20)
    assert stage.egress.captured() == []
