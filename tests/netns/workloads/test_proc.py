"""Real processes in real cgroups and namespaces: each pod's is found, that of no other, and nothing is held that is not asked for."""
from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import uuid
from contextlib import suppress
from pathlib import Path

import pytest

from agent import netlink
from agent.workloads.proc import Found, Processes
from tests.support.cgroup import entering
from tests.support.kubepods import KubePods, cgroupfs, systemd
from tests.support.netns import Namespaces, Netns
from tests.support.wait import until

pytestmark = pytest.mark.netns
ID = "3f" * 32
READY = "echo; exec sleep 600"


def new() -> str:
    return str(uuid.uuid4())


def inode(netns: Netns) -> int:
    """By another's word: ls -i."""
    return int(subprocess.run(["stat", "-Lc", "%i", netns.path], capture_output=True, check=True, timeout=20).stdout)


def held() -> int:
    """How many namespaces this process has open; what tests before left to the garbage collector is gone."""
    gc.collect()
    found = []
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # that of the list itself
            found.append(os.readlink(f"/proc/self/fd/{name}"))
    return sum(link.startswith("net:[") for link in found)


def find(*uids: str) -> Found:
    return Processes().find(uids)


def test_each_driver_and_runtime(kubepods: KubePods, namespaces: Namespaces) -> None:
    forms = (cgroupfs, systemd, lambda uid, container: systemd(uid, container, "crio"),
             lambda uid, container: systemd(uid, container, "crio") + "/container",
             lambda uid, container: "kubelet/" + cgroupfs(uid, container))
    made = {new(): (form, namespaces.make(f"p{number}")) for number, form in enumerate(forms)}
    for uid, (form, netns) in made.items():
        kubepods.start(form(uid, ID), netns)
    found = find(*made, new())
    assert found.sandboxes.keys() == made.keys() and not found.on_node and not found.closed
    for uid, (form, netns) in made.items():
        sandbox = found.sandboxes[uid]
        assert sandbox.netns.id.inode == inode(netns) == os.stat(sandbox.netns.path).st_ino and netlink.is_namespace(sandbox.netns.path)
        directory = Path(sandbox.cgroup)
        assert uid.replace("-", "_") in directory.name.replace("-", "_") and directory in kubepods.directory(form(uid, ID)).parents
    # another process (the capture child, a command) comes by the path too
    one = next(iter(found.sandboxes.values()))
    done = subprocess.run(["nsenter", f"--net={one.netns.path}", "ip", "-json", "link"], capture_output=True, timeout=20)
    assert done.stdout.startswith(b"[")


def test_only_what_is_asked_for_is_opened(kubepods: KubePods, namespaces: Namespaces) -> None:
    netns = namespaces.make("p")
    asked, other = new(), new()
    kubepods.start(cgroupfs(asked, ID), netns)
    kubepods.start(cgroupfs(other, ID), netns)
    before = held()
    found = find(asked)
    assert found.sandboxes.keys() == {asked} and held() == before + 1
    del found
    assert held() == before


def test_the_oldest_process_has_the_sandbox(kubepods: KubePods, namespaces: Namespaces) -> None:
    """What a container makes within, whatever the number of its processes."""
    uid, sandbox, inner = new(), namespaces.make("sandbox"), namespaces.make("inner")
    pause = kubepods.start(cgroupfs(uid, ID), sandbox)
    for number in range(3):
        kubepods.start(cgroupfs(uid, f"{number}" * 64), inner)
    found = find(uid).sandboxes[uid]
    assert (found.netns.id.inode, found.pid) == (inode(sandbox), pause.pid)


def test_a_pod_on_the_nodes_network_has_none(kubepods: KubePods, namespaces: Namespaces) -> None:
    on_node, mixed, netns = new(), new(), namespaces.make("p")
    kubepods.start(cgroupfs(on_node, ID), None)
    kubepods.start(cgroupfs(mixed, "conmon"), None)  # a helper of the runtime, older than what it starts
    kubepods.start(cgroupfs(mixed, ID), netns)
    found = find(on_node, mixed)
    assert found.on_node == {on_node} and found.sandboxes[mixed].netns.id.inode == inode(netns)


def test_a_sandbox_that_is_made_again_is_another(kubepods: KubePods, namespaces: Namespaces) -> None:
    uid, first, second = new(), namespaces.make("first"), namespaces.make("second")
    process = kubepods.start(cgroupfs(uid, ID), first)
    before = find(uid).sandboxes[uid]
    assert before.lives()
    kubepods.end(process)
    assert not before.lives() and uid not in find(uid).sandboxes
    assert os.stat(before.netns.path).st_ino == inode(first)  # what is held stays, until nobody holds it
    kubepods.start(cgroupfs(uid, "1" * 64), second)
    after = find(uid).sandboxes[uid]
    assert after.netns.id.inode == inode(second) != before.netns.id.inode and after.lives()


def test_a_number_that_is_used_again_leads_to_no_other(kubepods: KubePods, namespaces: Namespaces) -> None:
    """Of a descriptor that was closed, and of a process that ended."""
    first, second = new(), new()
    process = kubepods.start(cgroupfs(first, ID), namespaces.make("first"))
    kubepods.start(cgroupfs(second, ID), namespaces.make("second"))
    before = find(first).sandboxes[first]
    path = before.netns.path
    # as if another had this number now
    other = find(second).sandboxes[second]
    moved = type(before)(before.netns, "", other.pid)
    assert not moved.lives()
    del before, moved
    gc.collect()
    assert find(second).sandboxes[second].netns.path != path and not os.path.exists(path)
    kubepods.end(process)


def test_processes_that_end_meanwhile_are_no_error(kubepods: KubePods, namespaces: Namespaces) -> None:
    uid, netns = new(), namespaces.make("p")
    kubepods.start(cgroupfs(uid, ID), netns)
    churn = kubepods.start(cgroupfs(uid, "1" * 64), netns, "sh", "-c", "echo; while :; do sleep 0.001; done")
    before = held()
    for _ in range(30):
        assert find(uid).sandboxes[uid].netns.id.inode == inode(netns)
    kubepods.end(churn)
    assert held() <= before


def test_a_process_cannot_be_another_pods(kubepods: KubePods, namespaces: Namespaces) -> None:
    """Not by a directory below its own, by its name or arguments, or by a cgroup namespace."""
    victim, evil, netns = new(), new(), namespaces.make("evil")
    kubepods.start(f"{cgroupfs(evil, ID)}/{cgroupfs(victim, ID)}", netns)
    kubepods.start(f"user.slice/user-1000.slice/{cgroupfs(victim, ID)}", netns)
    kubepods.start("plain", netns, "sh", "-c", f"echo; exec -a '0::/{cgroupfs(victim, ID)}' sleep 600; sleep 600")
    kubepods.start(cgroupfs(evil, "1" * 64), netns, "unshare", "--cgroup", "sh", "-c", READY)
    found = find(victim, evil)
    assert found.sandboxes.keys() == {evil} and not found.on_node and not found.closed


def test_who_looks_from_within_a_cgroup_namespace_sees_as_the_node_does(kubepods: KubePods, namespaces: Namespaces) -> None:
    """As an agent in a container. Where pid 1 is closed to it, it sees no pod, and takes none for another."""
    uid = new()
    kubepods.start(cgroupfs(uid, ID), namespaces.make("p"))
    kubepods.start("agent", None)
    code = f"from agent.workloads.proc import Processes; print(*Processes().find(['{uid}']).sandboxes)"

    def seen(*before: str) -> str:
        done = subprocess.run(entering(str(kubepods.directory("agent")), *before, sys.executable, "-c", code), capture_output=True,
                              text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    try:
        os.readlink("/proc/1/ns/cgroup")
        open_to_us = True
    except OSError:
        open_to_us = False
    assert seen() == uid
    assert seen("unshare", "--cgroup") == (uid if open_to_us else "")


def reads() -> int:
    """How many times this process has read so far, by the kernel's count (proc(5), io)."""
    return int(Path("/proc/self/io").read_text().partition("syscr: ")[2].split()[0])


def test_a_look_reads_once_a_process(kubepods: KubePods, namespaces: Namespaces) -> None:
    """Opens, reads and closes one file of each; of a pod's that is looked for two more. Whether it lives is no read at all."""
    uid, netns = new(), namespaces.make("p")
    kubepods.start(cgroupfs(uid, ID), netns)
    for number in range(30):
        kubepods.start(cgroupfs(new(), f"{number:064}"), netns)
    find(uid)
    before = reads()
    found = find(uid)
    after = reads()
    assert found.processes > 30 and found.processes / 2 < after - before <= found.processes + 20
    assert all(found.sandboxes[uid].lives() for _ in range(100)) and reads() - after < 20


def test_a_look_does_not_disturb_threads(kubepods: KubePods, namespaces: Namespaces) -> None:
    """It works in a thread of its own, which ends with it."""
    kubepods.start(cgroupfs(uid := new(), ID), namespaces.make("p"))
    before = os.readlink("/proc/thread-self/ns/cgroup"), threading.active_count()
    assert find(uid).sandboxes
    until(lambda: (os.readlink("/proc/thread-self/ns/cgroup"), threading.active_count()) == before, "as before")
