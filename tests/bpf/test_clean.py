"""`narrows capture clean` takes away what eBPF capture left, by bpftool's word and the mounts'. In a mount namespace of its own."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from agent.capture import loader
from tests.support.cgroup import Cgroup, Cgroups

pytestmark = pytest.mark.netns

# Loads two instances, links one cgroup, cleans one instance, then the other; after each step a line of what is there.
SCRIPT = """if True:
    import json, os, subprocess, sys
    from pathlib import Path
    from agent.capture import egress, loader, pins
    cache, cgroup, run = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    bpffs = pins.bpffs(usual=Path("/none"))  # our own mount, whatever this machine has
    for instance in run:
        made = pins.pins_of(bpffs, instance, egress.LAYOUT)
        assert not loader.load(made, cache).problem
        egress.Egress(made).serve(cgroup)
    def show(*said):
        linked = subprocess.run(["bpftool", "-j", "cgroup", "show", cgroup], capture_output=True, text=True, check=True).stdout.strip()
        print(json.dumps({"linked": len(json.loads(linked or "null") or []), "pinned": sorted(p.name for p in bpffs.glob("narrows/*")),
                          "mounted": f" {bpffs} bpf " in Path("/proc/self/mounts").read_text(), "said": said}))
    show()
    for instance in (*run, run[0]):
        done = subprocess.run([sys.executable, "-c", "from agent.cli.main import main; main()", "capture", "clean", "--instance", instance],
                              capture_output=True, text=True)
        show(done.returncode, done.stdout, done.stderr)"""


@pytest.fixture
def app(cgroups: Cgroups) -> Cgroup:
    return cgroups.make("app")


def test_clean_removes_programs_links_maps_and_our_mount_of_the_instance_that_is_named(app: Cgroup, cache: Path) -> None:
    one, two = f"{app.id}-one", f"/run/{app.id}.two"
    done = subprocess.run(["unshare", "--mount", sys.executable, "-c", SCRIPT, str(cache), app.path, one, two], capture_output=True,
                          text=True, timeout=200, check=False, cwd=loader.SOURCES.parent)
    assert done.returncode == 0, done.stderr
    both, after_one, after_two, again = (json.loads(line) for line in done.stdout.splitlines())
    second = f"%2frun%2f{app.id}%2etwo"
    assert (both["linked"], both["pinned"], both["mounted"]) == (4, [second, one], True)
    assert (after_one["linked"], after_one["pinned"], after_one["mounted"]) == (2, [second], True)
    assert after_one["said"] == [0, f"/run/narrows/bpf/narrows/{one}/v1: removed\n", ""]
    assert (after_two["linked"], after_two["pinned"], after_two["mounted"]) == (0, [], False)
    assert again["said"] == [0, "", ""]
