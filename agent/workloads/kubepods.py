"""Which pod a process belongs to, by the cgroup that kubelet put it in: pure.

What is read is /proc/PID/cgroup (cgroups(7)), a line for each hierarchy: v1 has several, v2 one, a hybrid machine both. kubelet names the
pod's directory, the runtime those below it:

    cgroupfs driver     <root>/kubepods[/burstable|/besteffort]/pod<uid>/<container>
    systemd driver      [<root>.slice/<root>-]kubepods[-<class>].slice/...-pod<uid, - as _>.slice/cri-containerd-<id>.scope
    drivers that differ <service>/kubepods[-<class>]-pod<uid>.slice:cri-containerd:<id>        (kubelet systemd, containerd cgroupfs)

`<root>` is kubelet's --cgroup-root and may be nothing (kind: kubelet). A process may make directories below its own, and call them what it
likes: so the first pod on the way counts, and none below user.slice, which systemd hands over to users.
"""
from __future__ import annotations

import re
from dataclasses import dataclass

_UID = r"(?P<uid>[0-9A-Za-z][0-9A-Za-z_-]{0,252})"
_CGROUPFS = re.compile(rf"pod{_UID}")
_SLICE = re.compile(rf"(?P<above>(?:[^:/]+-)?kubepods(?:-burstable|-besteffort)?)-pod{_UID}\.slice")
_JOINED = re.compile(rf"(?:[^:/]+-)?kubepods(?:-burstable|-besteffort)?-pod{_UID}\.slice:[a-z-]+:[^/]+")
_CLASSES = ("burstable", "besteffort")


@dataclass(frozen=True, slots=True)
class Place:
    """`uid` as the API server writes it, of a static pod kubelet's hash. `unified`: the pod's directory in v2, "" for none."""

    uid: str
    unified: str = ""


def place_of(text: str) -> Place | None:
    """Of the content of /proc/PID/cgroup, as the node's own cgroup namespace shows it. None for a process of no pod, and for one whose
    hierarchies name different ones."""
    found: dict[str, str] = {}
    for line in text.split("\n"):  # the one sign that no cgroup's name can hold
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if (pod := _pod_of(path)) is None:
            continue
        uid, directory = pod
        unified = directory if number == "0" and not controllers else ""
        found[uid] = found.get(uid) or unified
    if len(found) != 1:
        return None
    ((uid, unified),) = found.items()
    return Place(uid, unified)


def _pod_of(path: str) -> tuple[str, str] | None:
    """The pod's uid and its directory; "" when containers have no directory in common."""
    if not path.startswith("/") or path.startswith("/.."):  # outside of the cgroup namespace of who reads: not told from whose
        return None
    parts = path.split("/")[1:]
    for at, part in enumerate(parts):
        if part == "user.slice":
            return None
        above = parts[at - 1] if at else ""
        if match := _CGROUPFS.fullmatch(part):
            if above == "kubepods" or (above in _CLASSES and at > 1 and parts[at - 2] == "kubepods"):
                return match["uid"], "/" + "/".join(parts[:at + 1])
        elif match := _SLICE.fullmatch(part):
            if above == match["above"] + ".slice":
                return _dashed(match["uid"]), "/" + "/".join(parts[:at + 1])
        elif (match := _JOINED.fullmatch(part)) and (not above or above.endswith(".service")):
            return _dashed(match["uid"]), ""
    return None


def _dashed(uid: str) -> str:
    """systemd takes `-` for a level of slices, so kubelet writes `_`."""
    return uid.replace("_", "-")
