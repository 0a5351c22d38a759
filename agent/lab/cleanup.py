"""Removing everything that a lab of a name may have left: derived from the name alone, so that it works after a crash.

Order: processes first, by their cgroup, since they hold namespaces; then names and folders. Every step
looks at what is there, so cleaning twice, or what never was, is no error.
"""
from __future__ import annotations

import errno
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from agent import netlink
from agent.lab import runtime
from agent.lab.place import RUN, Place

PINS_SECONDS = 60.0  # it takes half of one; a machine may be busy
DEADLINE = 10.0  # seconds for killed processes to be gone; the kernel needs milliseconds


class LeftOver(RuntimeError):
    """Something could not be removed; the text names it."""


def clean(place: Place) -> None:
    """Remove processes, namespaces (with links and rules), cgroups and files of a lab. LeftOver if something stays."""
    kill_tree(place.cgroup)
    remove_pins(place)
    for name in netlink.list_namespaces(place.netns_prefix):
        netlink.delete_namespace(name)
    remove_tree(place.cgroup)
    shutil.rmtree(place.directory, ignore_errors=True)
    if place.directory.exists():
        raise LeftOver(f"{place.directory} could not be removed; look for mounts in it: findmnt -R {place.directory}")
    for parent in (place.cgroup.parent, RUN):
        _remove_if_empty(parent)


def remove_pins(place: Place) -> None:
    """What agents of the lab pinned of BPF, in whose rooms we are a stranger: their own command takes it away. LeftOver if it cannot."""
    mounts = (line.split() for line in Path("/proc/self/mounts").read_text().splitlines())
    if not any(kind == "bpf" and Path(target, "narrows").is_dir() for _, target, kind, *_ in mounts):
        return
    done = subprocess.run(runtime.narrows("capture", "clean", "--below", str(place.directory)), stdin=subprocess.DEVNULL,
                          capture_output=True, text=True, timeout=PINS_SECONDS, check=False)
    if done.returncode:
        raise LeftOver(f"BPF pins of lab {place.name} could not be removed: {done.stderr.strip()}")


def exists(place: Place) -> bool:
    """Whether anything of a lab is there."""
    return place.cgroup.exists() or place.directory.exists() or bool(netlink.list_namespaces(place.netns_prefix))


def kill_tree(cgroup: Path) -> None:
    """End every process of a cgroup and of those below it, and wait until they are gone."""
    if not cgroup.exists():
        return
    kill = cgroup / "cgroup.kill"
    try:
        kill.write_text("1\n")
    except FileNotFoundError as error:
        if cgroup.exists():
            raise LeftOver(f"{kill} is missing: Linux 5.14 or newer is needed") from error
        return
    _until(lambda: not _populated(cgroup), f"processes in {cgroup} do not end: {_processes(cgroup)}")


def remove_tree(cgroup: Path) -> None:
    """Remove a cgroup with those below it; its processes must have ended."""
    def gone() -> bool:
        for directory, _, _ in os.walk(cgroup, topdown=False):
            try:
                os.rmdir(directory)
            except FileNotFoundError:
                continue
            except OSError as error:
                if error.errno != errno.EBUSY:  # a process that is dead but not yet collected
                    raise
                return False
        return True

    _until(gone, f"cgroup {cgroup} stays busy: {_processes(cgroup)}")


def _populated(cgroup: Path) -> bool:
    try:
        return "populated 1" in (cgroup / "cgroup.events").read_text()
    except (FileNotFoundError, OSError):
        return False


def _processes(cgroup: Path) -> list[str]:
    found: list[str] = []
    for directory, _, _ in os.walk(cgroup):
        try:
            found += Path(directory, "cgroup.procs").read_text().split()
        except OSError:
            continue
    return found[:20]


def _until(condition: Callable[[], bool], text: str) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        if time.monotonic() > deadline:
            raise LeftOver(text)
        time.sleep(0.005)


def _remove_if_empty(directory: Path) -> None:
    try:
        directory.rmdir()
    except OSError:
        return  # another lab lives there
