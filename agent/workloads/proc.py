"""Finds the network namespaces and cgroups of pods among the processes of the node: no runtime is asked.

    /proc/PID/cgroup -> uid of the pod (kubepods.py) -> /proc/PID/ns/net -> a descriptor, held

Of several namespaces in a pod the oldest process's is taken: that is the sandbox's, whatever a container made within. The node's own
namespace (pid 1's; ours, where that may not be looked into) is none of a pod: runtimes keep helpers in pods' cgroups (conmon), and a pod on
the node's network has no other. A look costs three system calls a process and nine more for one of a pod that is looked for. To see that
what was found still holds costs one a pod (`Sandbox.lives`).
"""
from __future__ import annotations

import ctypes
import fcntl
import itertools
import os
import resource
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from agent.netlink.cgroup import find_cgroup2
from agent.netlink.inside import in_thread, libc_call
from agent.workloads.kubepods import Place, place_of

READ_BOUND = 64 << 10  # bytes of /proc/PID/cgroup; a line of a hierarchy is at most some 4 KiB
_CLONE_NEWCGROUP = 0x02000000
# Descriptors of namespaces get numbers from here, round and round: who still has the path of one that was closed finds nothing there,
# and not another pod's
_FIRST, _SPAN = 4_096, 8_192
_next = itertools.count()


class ScanError(Exception):
    """The node's processes cannot be looked at; the text says what to do."""


class Id(NamedTuple):
    """Of a namespace, as stat(2) has it."""

    device: int
    inode: int


class Held:
    """A namespace that stays while this object lives: `path` leads to it, for this process and for those that see it in their /proc.

    A path of a process would end with that process, and may lead to another's namespace when the kernel uses its number again.
    """

    __slots__ = ("_fd", "id", "path")

    def __init__(self, fd: int) -> None:
        """Takes the descriptor over."""
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        first = min(_FIRST, limit // 2)
        least = first + next(_next) % max(min(_SPAN, limit - first - 1), 1)
        try:
            self._fd = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, least)
        except OSError:  # none from there on
            self._fd = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, first)
        finally:
            os.close(fd)
        found = os.fstat(self._fd)
        self.id = Id(found.st_dev, found.st_ino)
        self.path = f"/proc/{os.getpid()}/fd/{self._fd}"

    def __del__(self) -> None:
        with suppress(AttributeError, OSError):
            os.close(self._fd)


@dataclass(frozen=True, slots=True)
class Sandbox:
    """The network of a pod. `cgroup` is its directory in v2, "" where it has none; `pid` the process that it was found by."""

    netns: Held
    cgroup: str
    pid: int
    proc: Path = Path("/proc")

    def lives(self) -> bool:
        """Whether that process still is, in that namespace. One system call."""
        try:
            found = os.stat(f"{self.proc}/{self.pid}/ns/net")
        except OSError:
            return False
        return Id(found.st_dev, found.st_ino) == self.netns.id


@dataclass(slots=True)
class Found:
    """By the pods' uids. `on_node`: all processes of these have the node's network; `closed`: theirs may not be looked into."""

    sandboxes: dict[str, Sandbox] = field(default_factory=dict)
    on_node: set[str] = field(default_factory=set)
    closed: set[str] = field(default_factory=set)
    processes: int = 0


class Processes:
    """Those of `proc`: the node's, so the agent has to see the node's process ids (hostPID)."""

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self._proc = proc

    def find(self, uids: Collection[str]) -> Found:
        """Those of `uids` that have a process. Blocks (some 10 us a process). Raises ScanError."""
        wanted = frozenset(uids)
        return in_thread(lambda: self._find(wanted))  # a thread of its own, that may enter the node's cgroup namespace

    def _find(self, wanted: frozenset[str]) -> Found:
        self._see_as_node()
        node = _id(f"{self._proc}/1/ns/net") or _id(f"{self._proc}/thread-self/ns/net")
        try:
            names = os.listdir(self._proc)
        except OSError as error:
            raise ScanError(f"{self._proc} cannot be listed: {error.strerror}") from error
        try:
            mount: Path | None = find_cgroup2()
        except LookupError:
            mount = None
        found, oldest = Found(), dict[str, int]()
        for name in names:
            if not name.isdecimal():
                continue
            found.processes += 1
            place = _place(f"{self._proc}/{name}/cgroup")
            if place is not None and place.uid in wanted:
                self._look(name, place, node, mount, found, oldest)
        found.on_node -= found.sandboxes.keys()
        found.closed -= found.sandboxes.keys()
        return found

    def _look(self, name: str, place: Place, node: Id | None, mount: Path | None, found: Found, oldest: dict[str, int]) -> None:
        """The namespace of one process, if it is older than what was found. All is read below one descriptor of its directory: when the
        process ends meanwhile, what is read fails, and is never of another that got its number."""
        try:
            folder = os.open(f"{self._proc}/{name}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            return
        try:
            if _place("cgroup", folder) != place:
                return
            started = _started(folder)
            if place.uid in oldest and oldest[place.uid] <= started:
                return
            netns = Held(os.open("ns/net", os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder))
        except PermissionError:
            found.closed.add(place.uid)
            return
        except (OSError, ValueError):
            return  # it has ended
        finally:
            os.close(folder)
        if netns.id == node:
            found.on_node.add(place.uid)
            return
        oldest[place.uid] = started
        directory = str(mount) + place.unified if mount is not None and place.unified else ""
        found.sandboxes[place.uid] = Sandbox(netns, directory if os.path.isdir(directory) else "", int(name), self._proc)

    def _see_as_node(self) -> None:
        """Paths of cgroups are told from the cgroup namespace of the thread that reads: enter that of the node, where ours is another."""
        there, here = (_id(f"{self._proc}/{name}/ns/cgroup") for name in ("1", "thread-self"))
        if there is None or there == here:
            return  # if pid 1 may not be looked into, its namespace may not be entered: paths outside of ours are no pod's then
        try:
            fd = os.open(f"{self._proc}/1/ns/cgroup", os.O_RDONLY | os.O_CLOEXEC)
            try:
                libc_call("setns", ctypes.c_int(fd), ctypes.c_int(_CLONE_NEWCGROUP))
            finally:
                os.close(fd)
        except OSError as error:
            raise ScanError(f"cannot enter the cgroup namespace of the node: {error.strerror}; give the agent CAP_SYS_ADMIN and "
                            "CAP_SYS_PTRACE, and the node's process ids (hostPID)") from error


def _id(path: str) -> Id | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return Id(found.st_dev, found.st_ino)


def _read(path: str, folder: int | None = None) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder)
    try:
        return os.read(fd, READ_BOUND)
    finally:
        os.close(fd)


def _place(path: str, folder: int | None = None) -> Place | None:
    try:
        raw = _read(path, folder)
    except OSError:
        return None  # it has ended
    return place_of(raw.decode("utf-8", "replace")) if b"kubepods" in raw else None


def _started(folder: int) -> int:
    """Clock ticks since the machine started (proc(5), stat, field 22); the name before it may hold anything."""
    return int(_read("stat", folder).rpartition(b")")[2].split()[19])
