"""The leak check sees what a test leaves, and nothing else; it is what every other netns test relies on."""
from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from agent import netlink
from tests.support.netns import Namespaces, observe
from tests.support.wait import until

pytestmark = pytest.mark.netns


def test_a_namespace_is_seen(namespaces: Namespaces) -> None:
    before = observe()
    made = namespaces.make("left")
    assert observe().beyond(before) == [f"namespace {made.name}"]


def test_a_link_is_seen() -> None:
    before = observe()
    name = f"t{os.getpid()}l"
    netlink.add_bridge(None, name, up=False)
    try:
        assert observe().beyond(before) == [f"link {name}"]
    finally:
        netlink.delete_link(None, name)


def test_a_cgroup_is_seen() -> None:
    mount = next(line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines() if line.split()[2] == "cgroup2")
    before = observe()
    path = f"{mount}/t{os.getpid()}"
    os.mkdir(path)
    try:
        assert observe().beyond(before) == [f"cgroup {path}"]
    finally:
        os.rmdir(path)


def test_a_process_is_seen_even_when_it_left_its_parent_and_its_session() -> None:
    before = observe()
    done = subprocess.run(["setsid", "-f", "sh", "-c", "echo $$; exec sleep 60 >/dev/null 2>&1"], capture_output=True,
                          text=True, check=True, timeout=10)
    pid = int(done.stdout) if done.stdout else 0
    try:
        until(lambda: observe().beyond(before) == [f"process {pid}: sleep 60"], "the orphan is seen")
    finally:
        os.kill(pid, 9)


def test_a_process_that_was_there_before_is_not_counted() -> None:
    process = subprocess.Popen(["sleep", "60"])
    try:
        before = observe()
        assert observe().beyond(before) == []
    finally:
        process.kill()
        process.wait()
