"""Where cgroup v2 is, and where a process is in it."""
from __future__ import annotations

from pathlib import Path


def find_cgroup2(mounts: Path = Path("/proc/self/mounts")) -> Path:
    """Where cgroup v2 is mounted; hybrid machines have it beside the v1 controllers. LookupError if nowhere."""
    for line in mounts.read_text().splitlines():
        _, target, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(target.replace("\\040", " "))
    raise LookupError("no cgroup v2 file system is mounted; try `mount -t cgroup2 none /sys/fs/cgroup/unified`")


def of_process(pid: int) -> Path:
    """The directory of a process's cgroup. LookupError, with what to do, when there is none that this process can name."""
    mount = find_cgroup2()
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    except OSError as error:
        raise LookupError(f"process {pid}: {error.strerror}") from None
    inside = next((line.removeprefix("0::") for line in lines if line.startswith("0::")), None)
    if inside is None:
        raise LookupError(f"process {pid} is in no cgroup of version 2")
    if inside.startswith("/.."):  # relative to this process's cgroup namespace (cgroup_namespaces(7))
        raise LookupError(f"process {pid} is in cgroup {inside}, outside of this process's cgroup namespace; run the agent in the node's")
    return mount / inside.lstrip("/")
