"""Starting processes of the lab: what a container may, where it runs, and where its output goes."""
from __future__ import annotations

import asyncio
import json
import os
import pwd
import re
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

from agent.lab.spec import Container, PodTemplate
from agent.model.workload import IPAddress

LAUNCHER = str(Path(__file__).with_name("launch.py"))
LOG_BYTES = 4 << 20  # of one container's log before it is turned over; one older part is kept
CHUNK = 1 << 16
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# Folders of the host that would undo the isolation: sockets of the mesh, and name services that would answer instead
# of ours.
HIDDEN = ("/run/narrows", "/run/systemd/resolve", "/run/nscd", "/run/dbus")


def narrows(*arguments: str) -> list[str]:
    """The command line of `narrows` in the environment that runs the lab."""
    script = Path(sys.executable).with_name("narrows")
    return [str(script), *arguments] if script.exists() else [
        sys.executable, "-c", "from agent.cli.main import main; main()", *arguments]


@dataclass(frozen=True, slots=True)
class Launch:
    """One process to start; launch.py reads it as JSON. `join` is a process whose namespaces it enters (0: none)."""

    argv: list[str]
    env: dict[str, str]
    cgroup: str
    cwd: str = "/"
    netns: str = ""
    isolate: bool = False  # own mount, pid, ipc and uts namespaces
    join: int = 0
    hostname: str = ""
    hide: list[str] = field(default_factory=list)
    binds: list[list[str]] = field(default_factory=list)  # source, target
    uid: int = 0
    gid: int = 0
    groups: list[int] = field(default_factory=list)
    capabilities: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class PodContext:
    """What a container learns of its pod."""

    namespace: str
    name: str
    uid: str
    node: str
    node_address: str
    addresses: tuple[IPAddress, ...]
    template: PodTemplate

    def value(self, path: str) -> str:
        """The downward API's field at `path`."""
        plain = {"metadata.name": self.name, "metadata.namespace": self.namespace, "metadata.uid": self.uid,
                 "status.podIP": str(self.addresses[0]), "status.podIPs": ",".join(map(str, self.addresses)),
                 "status.hostIP": self.node_address, "spec.nodeName": self.node,
                 "spec.serviceAccountName": self.template.service_account}
        if path in plain:
            return plain[path]
        if match := re.fullmatch(r"metadata\.(labels|annotations)\['(.*)'\]", path):
            of = self.template.labels if match[1] == "labels" else self.template.annotations
            return of.get(match[2], "")
        return ""


def environment(container: Container, context: PodContext) -> dict[str, str]:
    """Variables of a container: the usual ones, then its own in order, each may use those before it."""
    user = _user(container)
    env = {"PATH": DEFAULT_PATH, "HOME": user.pw_dir if user else "/",
           "HOSTNAME": context.template.hostname or context.name}
    for variable in container.env:
        env[variable.name] = context.value(variable.field_path) if variable.field_path else expand(variable.value, env)
    return env


def expand(text: str, env: dict[str, str]) -> str:
    """`$(NAME)` becomes the variable's value, `$$` one dollar; an unknown name stays as it is (Kubernetes' rule)."""
    def one(match: re.Match[str]) -> str:
        return "$" if match[0] == "$$" else env.get(match[1], match[0])

    return re.sub(r"\$\$|\$\(([^()]+)\)", one, text)


def container_launch(container: Container, context: PodContext, *, cgroup: Path, netns: str, files: Path) -> Launch:
    """How to start a container's first process. `files` holds the pod's resolv.conf and hosts."""
    env = environment(container, context)
    user = _user(container)
    uid = container.uid if container.uid is not None else 0
    gid = container.gid if container.gid is not None else (user.pw_gid if user else 0)
    return Launch(
        argv=[expand(word, env) for word in container.argv], env=env, cgroup=str(cgroup), cwd=context.template.directory(container),
        netns=netns, isolate=True, hostname=(context.template.hostname or context.name)[:63], hide=list(HIDDEN),
        binds=[[str(files / "resolv.conf"), "/etc/resolv.conf"], [str(files / "hosts"), "/etc/hosts"]],
        uid=uid, gid=gid, groups=[gid], capabilities=list(container.capabilities))


def exec_launch(launch: Launch, pid: int, argv: list[str], term: str = "") -> Launch:
    """How to start another process beside a container's first one, with no more than it has."""
    env = launch.env | ({"TERM": term} if term else {})
    return Launch(argv=argv, env=env, cgroup=launch.cgroup, cwd=launch.cwd, join=pid, uid=launch.uid, gid=launch.gid,
                  groups=launch.groups, capabilities=launch.capabilities)


def spec_fd(launch: Launch) -> int:
    """The launch as a descriptor for launch.py; the caller closes it. Not an argument: variables may be secret."""
    fd = os.memfd_create("narrows-launch", os.MFD_CLOEXEC)
    os.write(fd, json.dumps(asdict(launch)).encode())
    return fd


def launcher_argv(*fds: int) -> list[str]:
    return [sys.executable, "-I", "-S", LAUNCHER, *map(str, fds)]


@dataclass(slots=True)
class Running:
    """A process of the lab. `pid` is the supervisor's child; `inner` the program itself, as this machine numbers it."""

    process: asyncio.subprocess.Process
    inner: int

    async def wait(self) -> int:
        """Exit status as a shell says it: above 128 it was a signal."""
        code = await self.process.wait()
        return code if code >= 0 else 128 - code


async def start(launch: Launch, output: int | IO[bytes] = asyncio.subprocess.DEVNULL) -> Running:
    """Start a process; stdout and stderr go to `output`. OSError when the machine cannot."""
    spec = spec_fd(launch)
    read_end, write_end = os.pipe()
    try:
        process = await asyncio.create_subprocess_exec(
            *launcher_argv(spec, write_end), stdin=asyncio.subprocess.DEVNULL, stdout=output,
            stderr=asyncio.subprocess.STDOUT, pass_fds=(spec, write_end), env={}, cwd="/")
    except BaseException:
        os.close(read_end)
        raise
    finally:
        os.close(spec)
        os.close(write_end)
    if not launch.isolate and not launch.join:
        os.close(read_end)
        return Running(process, process.pid)
    try:
        said = await asyncio.to_thread(os.read, read_end, 32)  # closed by the end of the launcher at the latest
    finally:
        os.close(read_end)
    return Running(process, int(said) if said.strip().isdigit() else 0)


class Log:
    """Output of a container on disk, bounded: the newest LOG_BYTES and at most as much before them in `<name>.1`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("ab", buffering=0)
        self._size = self._file.tell()

    def write(self, data: bytes) -> None:
        if self._size + len(data) > LOG_BYTES:
            self._file.close()
            self.path.replace(self.path.with_name(self.path.name + ".1"))
            self._file = self.path.open("ab", buffering=0)
            self._size = 0
        self._file.write(data)
        self._size += len(data)

    def line(self, text: str) -> None:
        self.write(f"narrows lab: {text}\n".encode())

    def close(self) -> None:
        self._file.close()

    async def pump(self, stream: asyncio.StreamReader) -> None:
        """Copy until the end of the stream."""
        while data := await stream.read(CHUNK):
            self.write(data)


def make_cgroup(directory: Path) -> None:
    for _ in range(5):
        try:
            directory.mkdir(parents=True, exist_ok=True)
            return
        except FileNotFoundError:
            continue  # another lab removed the empty parent between two steps of ours
    directory.mkdir(parents=True, exist_ok=True)


def _user(container: Container) -> pwd.struct_passwd | None:
    try:
        return pwd.getpwuid(container.uid or 0)
    except KeyError:
        return None
