"""Takes socket hooks off a pod by hand, of which nothing is known but its network namespace: for `narrows capture clean --netns`.

The map `pods` names pods by the cookie of their namespace, links name cgroups. Which cgroup is the pod's is seen from the processes in it.
"""
from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from agent import netlink
from agent.capture.egress import Egress, EgressError, netns_cookie
from agent.capture.ingress import Ingress
from agent.capture.pins import Pins
from agent.netlink.cgroup import find_cgroup2


def unhook(netns: str, those: Iterable[Pins]) -> list[str]:
    """End the capture of a namespace's connects, and of what comes to it, by these instances, which a living agent repairs.

    Returns what was removed. A pin whose cgroup is gone goes too. OSError when the namespace cannot be entered, IngressError when the
    kernel refuses.
    """
    cookie = netns_cookie(netns)
    fd = netlink.open_namespace(netns)
    try:
        inside = os.fstat(fd).st_ino
    finally:
        os.close(fd)
    removed = []
    for pins in those:
        egress = Egress(pins)
        with suppress(EgressError):  # there are pins, and no maps
            if cookie in egress.captured():
                egress.stop(cookie)
                removed.append(f"the pod in {pins.maps / 'pods'}")
        if (pins.maps / "inbound").exists() and cookie in (ingress := Ingress(pins)).captured():
            ingress.release(cookie, netns)
            removed.append(f"the pod in {pins.maps / 'inbound'}")
        linked = egress.linked()
        paths = cgroups_by_id(linked)
        for number in sorted(linked):
            if number not in paths or inside in namespaces_of(paths[number]):
                egress.unlink(number)
                removed.append(f"{pins.links / str(number)}_*")
    return removed


def cgroups_by_id(cgroups: set[int]) -> dict[int, Path]:
    """Where the cgroups of these ids are."""
    found: dict[int, Path] = {}
    if not cgroups:
        return found
    for folder, _, _ in os.walk(find_cgroup2()):
        with suppress(OSError):
            if (number := os.stat(folder).st_ino) in cgroups:
                found[number] = Path(folder)
    return found


def namespaces_of(cgroup: Path) -> set[int]:
    """Network namespaces of the processes in it and below, as inode numbers."""
    return {number for folder, _, _ in os.walk(cgroup) for number in _of(Path(folder))}


def _of(cgroup: Path) -> Iterator[int]:
    with suppress(OSError):
        for pid in (cgroup / "cgroup.procs").read_text().split():
            with suppress(OSError):
                yield os.stat(f"/proc/{pid}/ns/net").st_ino
