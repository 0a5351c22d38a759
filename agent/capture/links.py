"""Links of programs to cgroups and network namespaces, by their pins: looked at, made, given another program. For capture in both
directions, and for observation; each says what failed by an error of its own.
"""
from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from agent.capture import bpf_call
from agent.capture.loader import NETNS, Hook
from agent.capture.pins import Pins


@contextmanager
def opened(path: Path, error: type[Exception]) -> Iterator[int]:
    """The descriptor of a pin; `error` when it is not there."""
    try:
        fd = bpf_call.pinned(path)
    except OSError as refused:
        raise error(f"{refused.strerror}; the programs are not loaded, or somebody removed the pin") from None
    try:
        yield fd
    finally:
        os.close(fd)


def runs(pins: Pins, hook: Hook, number: int, target: int, program: int | None = None) -> bool:
    """Whether the hook's pinned link of this number (a cgroup's id, a namespace's cookie) holds our program to `target` (a cgroup's id, a
    namespace's inode). `program`: which program (id) it has to be. A pin may stay when the link was taken off.
    """
    try:
        with bpf_call.opened(pins.links / hook.link(number)) as link:
            found, *where = bpf_call.linked(link, netns=NETNS in hook.on)
    except OSError:
        return False
    return where == [target, hook.attach] and program in (None, found)


def attach(pins: Pins, hook: Hook, number: int, target: int, program: int) -> Path | None:
    """Link `program` to `target` (both descriptors), and pin that. Returns the pin, or None if somebody of this instance was quicker.
    OSError when the kernel refuses."""
    path = pins.links / hook.link(number)
    link = bpf_call.attach(program, target, hook.attach)
    try:
        path.unlink(missing_ok=True)  # of a link that was taken off
        with suppress(FileExistsError):
            bpf_call.pin(link, path)
            return path
        return None
    finally:
        os.close(link)


def to_cgroup(pins: Pins, hooks: Iterable[Hook], cgroup: str, error: type[Exception]) -> int:
    """Link these hooks' pinned programs, in their order; those that are linked stay. Returns the cgroup's id.

    `error` when one cannot be: what was linked now goes again.
    """
    try:
        folder = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as refused:
        raise error(f"cgroup {cgroup}: {refused.strerror}; it must be a directory of cgroup v2") from None
    made: list[Path] = []
    try:
        number = os.fstat(folder).st_ino
        for hook in hooks:
            with opened(pins.programs / hook.name, error) as program:
                if runs(pins, hook, number, number, bpf_call.program_id(program)) or _replaced(pins, hook, number, program):
                    continue
                try:
                    path = attach(pins, hook, number, folder, program)
                except OSError as refused:
                    raise error(f"cgroup {cgroup}: {hook.name}: {refused.strerror}; `bpftool cgroup tree` shows what else is attached, and "
                                "only cgroup v2 has these hooks") from None
                if path is not None:
                    made.append(path)
        return number
    except BaseException:
        for path in made:
            path.unlink(missing_ok=True)
        raise
    finally:
        os.close(folder)


def _replaced(pins: Pins, hook: Hook, number: int, program: int) -> bool:
    """Whether there is a link to this cgroup, which has the program now: a loader that was ended half way left it with an older one. A
    new link in its place would leave a moment without any."""
    if not runs(pins, hook, number, number):
        return False
    try:
        with bpf_call.opened(pins.links / hook.link(number)) as link:
            bpf_call.replace(link, program)
        return True
    except OSError:
        return False
