"""The loader: programs, maps and links in bpffs, by bpftool's word; what is not ours is refused; the agent pays nothing for it."""
from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest

from agent.capture import bpf_call, egress, ingress, loader, plan, rules
from agent.capture import pins as pins_room
from agent.capture.pins import PinError, Pins, pins_of
from agent.capture.pins import bpffs as find_bpffs
from ext.sys import bpf_door
from tests.support.cgroup import Cgroups
from tests.support.wait import until

pytestmark = pytest.mark.netns  # root

TYPES = {"sockops": "sock_ops", "getsockopt": "cgroup_sockopt", "setsockopt": "cgroup_sockopt", "connect4": "cgroup_sock_addr",
         "connect6": "cgroup_sock_addr", "getpeername4": "cgroup_sock_addr", "getpeername6": "cgroup_sock_addr"}


def bpftool(*argv: str) -> Any:
    done = subprocess.run(["bpftool", "-j", *argv], capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.strip() or "null")


def program(pins: Pins, name: str) -> dict[str, Any]:
    found: dict[str, Any] = bpftool("prog", "show", "pinned", str(pins.programs / name))
    return found


def attached(cgroup: str) -> dict[str, int]:
    """Program ids by attach type."""
    return {one["attach_type"]: one["id"] for one in bpftool("cgroup", "show", cgroup) or []}


def edited(tmp_path: Path, name: str, old: str, new: str) -> Path:
    """The sources with one change."""
    folder = tmp_path / "sources"
    folder.mkdir()
    for file in (*loader.HEADERS, *loader.FILES):
        text = (loader.SOURCES / file).read_text()
        if file == name:
            assert old in text
            text = text.replace(old, new)
        (folder / file).write_text(text)
    return folder


def test_every_hook_is_loaded_and_pinned_for_root_alone(loaded: Pins) -> None:
    assert {path.name: program(loaded, path.name)["type"] for path in loaded.programs.iterdir()} == TYPES
    assert {path.stat().st_mode & 0o777 for path in (loaded.root, loaded.maps, loaded.programs, loaded.links)} == {0o700}
    assert {path.stat().st_mode & 0o777 for folder in (loaded.maps, loaded.programs) for path in folder.iterdir()} == {0o600}


def test_programs_share_the_pinned_maps(loaded: Pins) -> None:
    ids = {path.name: bpftool("map", "show", "pinned", str(path))["id"] for path in loaded.maps.iterdir()}
    assert set(ids) == {"pods", "excluded_ports", "excluded_ranges", "included_ranges", "originals", "handshakes"}
    assert set(program(loaded, "connect4")["map_ids"]) == {ids[name] for name in ids if name != "handshakes"}
    assert set(program(loaded, "sockops")["map_ids"]) == {ids["originals"], ids["handshakes"]}


def test_what_was_compiled_is_kept_and_used_again(pins: Pins, tmp_path: Path) -> None:
    first, second = loader.load(pins, tmp_path / "cache"), loader.load(pins, tmp_path / "cache")
    assert (first.cached, second.cached) == (False, True)
    assert first.hooks == second.hooks
    (kept,) = (tmp_path / "cache").iterdir()
    kept.write_text("{")  # cut short
    assert not loader.load(pins, tmp_path / "cache").cached


def test_with_a_cache_neither_bcc_nor_a_compiler_is_needed(pins: Pins, cache: Path, tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    loader.load(pins, cache)
    (tmp_path / "bcc.py").write_text("raise ImportError('none here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert loader.load(pins, cache).cached
    with pytest.raises(loader.LoadError, match="BCC does not load: none here; install Debian's python3-bpfcc"):
        loader.load(pins, tmp_path / "empty")


def test_another_kernel_or_another_source_is_compiled_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = loader.cache_key(loader.SOURCES)
    assert loader.cache_key(edited(tmp_path, "connect.c", "CONNECT_ALLOW 1", "CONNECT_ALLOW 1 ")) != here
    uname = os.uname()
    monkeypatch.setattr(os, "uname", lambda: os.uname_result((*uname[:2], "6.99.0-other", *uname[3:])))
    assert loader.cache_key(loader.SOURCES) != here


# what a thread allocates lies above 4 GiB, as everything does of an interpreter that is position-independent
IN_A_THREAD = """
import json, sys, threading
from pathlib import Path
from agent.capture.bpf import compile_programs
found = []
worker = threading.Thread(target=lambda: found.append(compile_programs([Path(sys.argv[1], "connect.c")], Path(sys.argv[1], "program.h"))))
worker.start(); worker.join()
print(); print(json.dumps(found[0]["maps"]))
"""


def test_programs_compile_wherever_the_compiler_keeps_them() -> None:
    done = subprocess.run([sys.executable, "-c", IN_A_THREAD, str(loader.SOURCES)], capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr)
    told = next(line for line in done.stdout.splitlines() if line.startswith("{"))  # libbcc warns on stdout too, whenever C's buffer goes
    assert json.loads(told)["pods"][2:5] == [8, 24, 4096]


def test_loading_again_leaves_programs_and_maps_as_they_are(loaded: Pins, cache: Path) -> None:
    before = {path.name: program(loaded, path.name)["id"] for path in loaded.programs.iterdir()}
    maps = {path.name: bpftool("map", "show", "pinned", str(path))["id"] for path in loaded.maps.iterdir()}
    loader.load(loaded, cache)
    assert {path.name: program(loaded, path.name)["id"] for path in loaded.programs.iterdir()} == before
    assert {path.name: bpftool("map", "show", "pinned", str(path))["id"] for path in loaded.maps.iterdir()} == maps


def test_a_changed_program_takes_the_place_of_the_old_one_on_its_cgroup(loaded: Pins, cgroups: Cgroups, tmp_path: Path) -> None:
    cgroup = cgroups.make("app")
    egress.Egress(loaded).serve(cgroup.path)
    before = attached(cgroup.path)
    sources = edited(tmp_path, "sockops.c", "if (!sk)\n\t\treturn 1;", "if (!sk)\n\t\treturn 0;")
    found = loader.load(loaded, tmp_path / "cache", sources=sources)
    assert (set(found.hooks.values()), found.cached) == ({""}, False)
    after = attached(cgroup.path)
    assert after["cgroup_sock_ops"] == program(loaded, "sockops")["id"] != before["cgroup_sock_ops"]
    assert after["cgroup_getsockopt"] == before["cgroup_getsockopt"]


def test_a_pin_is_there_at_every_moment_while_its_program_is_replaced(loaded: Pins, tmp_path: Path) -> None:
    """Who enrols a pod meanwhile needs it. One looks all the time, the other replaces ten times."""
    code = """if True:
        import sys
        from pathlib import Path
        from agent.capture import bpf_call, loader
        from agent.capture.pins import Pins
        pins = Pins(Path(sys.argv[1]))
        made, _ = loader.obtain(Path(sys.argv[2]), loader.SOURCES)
        hook = next(hook for hook in loader.HOOKS if hook.name == "sockops")
        for _ in range(300):
            loader.install(pins, made, [hook])
            (pins.maps / "handshakes").unlink()  # with another map it is another program"""
    loader.load(loaded, tmp_path / "cache")
    ids = set()
    with subprocess.Popen([sys.executable, "-c", code, str(loaded.root), str(tmp_path / "cache")], cwd=loader.SOURCES.parent) as loading:
        while loading.poll() is None:
            fd = bpf_call.pinned(loaded.programs / "sockops")
            ids.add(bpf_call.program_id(fd))
            os.close(fd)
    assert loading.returncode == 0
    assert len(ids) > 10
    assert sorted(path.name for path in loaded.programs.iterdir()) == sorted(hook.name for hook in loader.HOOKS)


def test_a_link_that_a_loader_left_with_an_older_program_gets_the_new_one_and_is_not_made_again(
        loaded: Pins, cgroups: Cgroups, tmp_path: Path) -> None:
    """As when the loader was ended after the pin and before the links: a second link would leave a moment with none, or with two."""
    cgroup = cgroups.make("app")
    capture = egress.Egress(loaded)
    capture.serve(cgroup.path)
    links = {path.name: bpftool("link", "show", "pinned", str(path)) for path in loaded.links.iterdir()}
    held = {path: path.with_name(f"{path.name}-aside") for path in loaded.links.iterdir()}
    for path, aside in held.items():
        path.rename(aside)
    loader.load(loaded, tmp_path / "cache", sources=edited(tmp_path, "sockops.c", "if (!sk)\n\t\treturn 1;", "if (!sk)\n\t\treturn 0;"))
    for path, aside in held.items():
        aside.rename(path)
    assert attached(cgroup.path)["cgroup_sock_ops"] != program(loaded, "sockops")["id"]
    capture.serve(cgroup.path)
    assert attached(cgroup.path)["cgroup_sock_ops"] == program(loaded, "sockops")["id"]
    again = {path.name: bpftool("link", "show", "pinned", str(path)) for path in loaded.links.iterdir()}
    assert {name: link["id"] for name, link in again.items()} == {name: link["id"] for name, link in links.items()}


def test_programs_stay_with_a_cgroup_when_whoever_linked_them_has_gone(loaded: Pins, cgroups: Cgroups) -> None:
    cgroup = cgroups.make("app")
    code = ("import sys; from pathlib import Path; from agent.capture import egress; from agent.capture.pins import Pins; "
            "egress.Egress(Pins(Path(sys.argv[1]))).serve(sys.argv[2])")
    subprocess.run([sys.executable, "-c", code, str(loaded.root), cgroup.path], check=True, timeout=60, cwd=loader.SOURCES.parent)
    assert set(attached(cgroup.path)) == {"cgroup_sock_ops", "cgroup_getsockopt"}
    loaded.remove()
    until(lambda: attached(cgroup.path) == {}, "the links are off, a moment after their pins")


def test_a_hook_that_the_kernel_refuses_is_left_out_alone(pins: Pins, tmp_path: Path) -> None:
    found = loader.load(pins, tmp_path / "cache", sources=edited(tmp_path, "peername.c", "return 1;", "return 7;"))
    said = found.hooks
    assert {name for name, why in said.items() if why} == {"getpeername4", "getpeername6"}
    assert "verifier" in said["getpeername4"]
    assert not (pins.programs / "getpeername4").exists()
    assert found.problem == ""  # worse, and no reason to do without
    assert "connect4: no" in loader.Loaded({**said, "connect4": "no"}, False, "").problem


def test_the_doctor_says_of_each_hook_whether_it_works() -> None:
    done = subprocess.run([sys.executable, "-c", "from agent.cli.main import main; main()", "doctor", "-o", "json"], capture_output=True,
                          text=True, timeout=200, check=False, cwd=loader.SOURCES.parent)
    found = {check["name"]: (check["status"], check["found"]) for check in json.loads(done.stdout)["checks"]}
    assert {found[f"BPF hook {hook.name}"] for hook in (*loader.HOOKS, *loader.INGRESS)} == {("ok", "loads")}


@pytest.mark.parametrize("where", ["root", "maps"])
def test_a_directory_of_somebody_elses_is_not_used(loaded: Pins, cache: Path, where: str) -> None:
    folder = loaded.root if where == "root" else loaded.maps
    os.chown(folder, 12_345, -1)
    with pytest.raises(loader.LoadError, match=r"belongs to uid 12345 .* not made by us"):
        loader.load(loaded, cache)
    os.chown(folder, 0, -1)


def test_a_pin_of_somebody_elses_is_not_used(loaded: Pins, cache: Path) -> None:
    os.chown(loaded.maps / "pods", 12_345, -1)
    with pytest.raises(loader.LoadError, match="pods belongs to uid 12345"):
        loader.load(loaded, cache)


def test_a_map_of_another_shape_is_refused(pins: Pins, cache: Path) -> None:
    pins.make()
    fd = bpf_call.create_map("pods", bpf_call.MapShape(1, 8, 8, 16, 0))
    bpf_call.pin(fd, pins.maps / "pods")
    os.close(fd)
    with pytest.raises(loader.LoadError, match=r"pods is .*value=8.*expected .*value=24.*narrows capture clean"):
        loader.load(pins, cache)


def test_a_program_of_ours_is_replaced_when_its_maps_were_taken_away(loaded: Pins, cache: Path) -> None:
    (loaded.maps / "pods").unlink()
    loader.load(loaded, cache)
    assert bpftool("map", "show", "pinned", str(loaded.maps / "pods"))["id"] in program(loaded, "connect4")["map_ids"]


def test_a_cache_that_others_can_write_is_not_used(pins: Pins, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    with pytest.raises(loader.LoadError, match="not a directory of root's alone"):
        loader.load(pins, tmp_path / "cache")


def test_nothing_is_left_after_removal(loaded: Pins, bpffs: Path, cgroups: Cgroups) -> None:
    ids = {program(loaded, path.name)["id"] for path in loaded.programs.iterdir()}
    cgroup = cgroups.make("app")
    egress.Egress(loaded).serve(cgroup.path)
    loaded.remove()
    assert not (bpffs / "narrows").exists()
    until(lambda: attached(cgroup.path) == {}, "the links are off, a moment after their pins")
    loaded.remove()  # again: nothing to do
    until(lambda: ids.isdisjoint(one["id"] for one in bpftool("prog", "show")), "the programs are gone")


def test_two_instances_do_not_meet(loaded: Pins, bpffs: Path, cache: Path) -> None:
    other = pins_of(bpffs, "other", egress.LAYOUT)
    loader.load(other, cache)
    assert program(other, "connect4")["id"] != program(loaded, "connect4")["id"]
    other.remove()
    assert program(loaded, "connect4")["type"] == "cgroup_sock_addr"


def test_the_agent_does_not_grow(pins: Pins, tmp_path: Path) -> None:
    """In a process of its own: what this one holds already would hide it."""
    code = """if True:
        import re, sys
        from pathlib import Path
        from agent.capture import loader
        from agent.capture.pins import Pins
        size = lambda: int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
        loader.load(Pins(Path(sys.argv[1])), Path(sys.argv[2]))
        first = size()
        for turn in range(2):
            loaded = loader.load(Pins(Path(sys.argv[1])), Path(sys.argv[2], str(turn)))
            assert not loaded.cached
        print(first, size(), "bcc" in sys.modules)"""
    done = subprocess.run([sys.executable, "-c", code, str(pins.root), str(tmp_path / "cache")], capture_output=True, text=True,
                          timeout=300, check=False, cwd=loader.SOURCES.parent)
    assert done.returncode == 0, done.stderr
    first, last, imported = done.stdout.split()
    assert imported == "False"
    assert int(last) < 60_000 and int(last) - int(first) < 3_000  # KiB; BCC alone costs 70,000


def test_a_bpffs_is_mounted_where_there_is_none(tmp_path: Path) -> None:
    own = tmp_path / "mounted"
    try:
        assert find_bpffs(tmp_path / "usual", own) == own
        assert find_bpffs(tmp_path / "usual", own) == own  # as it is
        (mounted,) = (line.split() for line in Path("/proc/self/mounts").read_text().splitlines() if line.split()[1] == str(own))
        assert mounted[2] == "bpf" and "mode=700" in mounted[3]
        assert find_bpffs(own, tmp_path / "other") == own
    finally:
        subprocess.run(["umount", str(own)], check=True, timeout=20)


def test_a_bpffs_that_cannot_be_mounted_is_said(tmp_path: Path) -> None:
    with pytest.raises(PinError, match=r"mounting one at .* failed: .*mount -t bpf bpf"):
        code = "import sys; from pathlib import Path; from agent.capture.pins import bpffs; bpffs(Path('/none'), Path(sys.argv[1]))"
        done = subprocess.run(["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin", sys.executable, "-c", code,
                               str(tmp_path / "own")], capture_output=True, text=True, timeout=60, check=False, cwd=loader.SOURCES.parent)
        raise PinError(done.stderr)


def test_a_layout_is_part_of_the_path() -> None:
    root = pins_room.pins_of(Path("/b"), "lab.n1", 3).root
    assert root == Path("/b/narrows/lab%2en1/v3")
    assert re.fullmatch(r"[^.]*", str(root))


def test_kernel_proxy_and_agent_agree_on_what_they_share(loaded: Pins, cache: Path) -> None:
    assert loader.load(loaded, cache, hooks=loader.INGRESS).ingress_problem == ""
    sizes, constants = bpf_door.sizes(), bpf_door.constants()
    assert {name: (egress.POD_VALUE, egress.PORT_KEY, egress.RANGE_KEY)[at].size for at, name in enumerate(("pod", "port", "range"))} == \
        {name: sizes[name] for name in ("pod", "port", "range")}
    shapes = {path.name: bpftool("map", "show", "pinned", str(path)) for path in loaded.maps.iterdir()}
    assert {name: (one["bytes_key"], one["bytes_value"]) for name, one in shapes.items()} == {
        "pods": (8, sizes["pod"]), "excluded_ports": (sizes["port"], 1), "excluded_ranges": (sizes["range"], 1),
        "included_ranges": (sizes["range"], 1), "originals": (4, sizes["end"]), "handshakes": (sizes["source"], sizes["end"]),
        "inbound": (8, sizes["inside"]), "excluded_inbound": (sizes["port"], 1), "listeners": (8, 8)}
    assert ingress.INSIDE_VALUE.size == sizes["inside"]
    assert [ip_network((number, bits)) for number, bits in zip(bpf_door.probes(), (32, 128), strict=True)] == \
        [ip_network(plan.PROBE_SOURCES[family]) for family in (4, 6)]
    assert constants == {"LAYOUT": egress.LAYOUT, "OUTBOUND_PORT": plan.OUTBOUND_PORT, "MARK": int(rules.MARK_OURS.split("/")[0], 16),
                         "MARK_MASK": int(rules.MARK_OURS.split("/")[1], 16), "HAS_IP4": egress.HAS_IP4, "HAS_IP6": egress.HAS_IP6,
                         "ONLY_INCLUDED": egress.ONLY_INCLUDED, "NETNS_BITS": egress.NETNS_BITS, "INBOUND_PORT": plan.INBOUND_PORT,
                         "HBONE_PORT": plan.HBONE_PORT, "MARK_LOCAL": int(rules.MARK_LOCAL.split("/")[0], 16),
                         "REDIRECTED": ingress.REDIRECTED, "ACCEPT_KEPT": ingress.ACCEPT_KEPT,
                         "REFLECT4_KEPT": ingress.REFLECT4_KEPT, "REFLECT6_KEPT": ingress.REFLECT6_KEPT, "NETNS_HERE": loader.NETNS_HERE}
