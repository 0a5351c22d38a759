"""`narrows lab up`: the life of the supervisor process, from the lock to the last file removed."""
from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from agent.lab import cleanup, runtime
from agent.lab.control import Control, load
from agent.lab.objects import Found
from agent.lab.place import RUN, Place
from agent.lab.supervisor import Options, Supervisor
from agent.netlink.cgroup import find_cgroup2, of_process

THREADS = 32  # for work that blocks for milliseconds: netlink, probes
READY_MARK = "ready\n"


class AlreadyUp(RuntimeError):
    """A lab of this name runs."""


@contextlib.contextmanager
def locked(place: Place) -> Iterator[None]:
    """Own the lab's name on this machine, until the body or the process ends. AlreadyUp if another process does."""
    RUN.mkdir(parents=True, exist_ok=True)
    RUN.chmod(0o700)
    while True:
        file = os.open(place.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            raise AlreadyUp(f"lab {place.name!r} is already up; `narrows lab down --name {place.name}` ends it, "
                            "`--name OTHER` starts another one beside it") from None
        try:
            if os.fstat(file).st_ino == os.stat(place.lock).st_ino:
                break
        except FileNotFoundError:
            pass
        os.close(file)  # its owner removed it while we waited: this is no lock any more
    try:
        os.ftruncate(file, 0)
        os.write(file, f"{os.getpid()}\n".encode())
        yield
    finally:
        place.lock.unlink(missing_ok=True)
        os.close(file)
        with contextlib.suppress(OSError):  # others live there
            RUN.rmdir()
            RUN.parent.rmdir()


def owner(place: Place) -> int:
    """The pid of the supervisor of a lab, or 0 if none lives."""
    try:
        file = os.open(place.lock, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return 0
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        text = os.pread(file, 32, 0).strip()
        return int(text) if text.isdigit() else -1
    finally:
        os.close(file)
    return 0


def run(place: Place, paths: Sequence[Path], options: Options, wait: float, ready_fd: int = -1) -> int:
    """Bring a lab up and stay until SIGINT, SIGTERM or `down`. Returns the exit code."""
    with locked(place):
        cleanup.clean(place)  # what a killed predecessor left
        home = _enter(place)
        try:
            return asyncio.run(_serve(place, home, paths, options, wait, ready_fd))
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not leave half of it
            _leave(home)
            cleanup.clean(place)


def _enter(place: Place) -> Path:
    """Put ourselves into the lab's cgroup, so that all of the lab is in it. Returns where we were."""
    home = of_process(os.getpid())
    own = place.system_cgroup("supervisor")
    runtime.make_cgroup(own)
    (own / "cgroup.procs").write_text("0\n")
    return home


def _leave(home: Path) -> None:
    """Go back, or as far as we may: what cleaning up kills must not be ourselves."""
    for cgroup in (home, find_cgroup2()):
        try:
            (cgroup / "cgroup.procs").write_text("0\n")
            return
        except OSError:
            continue  # removed meanwhile, or it has controllers for its children and takes no process


async def _serve(place: Place, home: Path, paths: Sequence[Path], options: Options, wait: float,
                 ready_fd: int) -> int:
    loop = asyncio.get_running_loop()
    loop.set_default_executor(concurrent.futures.ThreadPoolExecutor(THREADS))
    down = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, down.set)
    found, warnings = await load(paths)
    for warning in warnings:
        print(warning, file=sys.stderr)
    print("narrows lab: `image` is ignored: commands run on this machine's file system", file=sys.stderr)
    supervisor = Supervisor(place, options)
    control = Control(supervisor, down.set)
    place.directory.mkdir(parents=True, exist_ok=True)
    place.directory.chmod(0o700)
    starting = asyncio.create_task(_start(supervisor, control, found, wait))
    ending = asyncio.create_task(down.wait())
    code = 0
    try:
        await asyncio.wait([starting, ending], return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            code = _report(place, supervisor, starting.result(), ready_fd >= 0)
            if ready_fd >= 0:
                _detach(place, ready_fd, code)
                code = 0
            await ending
        print("narrows lab: ending", file=sys.stderr, flush=True)
    finally:
        starting.cancel()
        await control.stop()
        _leave(home)  # what ends now is everything in the lab's cgroup
        await supervisor.stop()
    return code


async def _start(supervisor: Supervisor, control: Control, found: list[Found], wait: float) -> list[str]:
    await supervisor.start(found)
    await control.start()
    return await supervisor.wait(wait)


def _report(place: Place, supervisor: Supervisor, missing: list[str], detached: bool) -> int:
    pods, nodes = len(supervisor.pods), len(supervisor.nodes)
    print(f"lab {place.name!r} is up: {pods} pods on {nodes} nodes ({', '.join(supervisor.nodes)})"
          + ("" if supervisor.options.mesh else ", without a mesh"))
    for text in missing:
        print(f"not ready: {text}", file=sys.stderr)
    name = "" if place.name == "default" else f" --name {place.name}"
    print(f"  narrows lab status{name}    narrows lab exec{name} POD -- CMD    narrows lab down{name}"
          + ("" if detached else "    (or Ctrl-C)"), flush=True)
    return 1 if missing else 0


def _detach(place: Place, ready_fd: int, code: int) -> None:
    """Let go of whoever started us: our output goes to a file from now on."""
    sys.stdout.flush()
    sys.stderr.flush()
    log = os.open(place.logs / "supervisor.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    os.write(ready_fd, READY_MARK.encode() if code == 0 else b"not ready\n")
    os.close(ready_fd)


def run_detached(place: Place, paths: Sequence[Path], options: Options, wait: float) -> int:
    """Start a supervisor of its own session, pass on what it says until it is ready, and return its exit code."""
    read_end, write_end = os.pipe()
    argv = runtime.narrows("lab", "up", *map(str, paths), "--name", place.name, "--wait", str(wait),
                          "--ready-fd", str(write_end))
    argv += ["--nodes", str(options.nodes)] if options.nodes else []
    argv += ["--workers", str(options.workers)] if options.workers is not None else []
    argv += ["--access-log", options.access_log, "--capture", options.capture, "--tunnels" if options.tunnels else "--no-tunnels",
             "--certificate-lifetime", str(options.certificate_lifetime), "--observe", options.observe]
    argv += ["--same-node-tunnel"] if options.same_node_tunnel else []
    argv += [] if options.mesh else ["--no-mesh"]
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          pass_fds=(write_end,), start_new_session=True) as process:
        os.close(write_end)
        assert process.stdout is not None
        try:
            for line in process.stdout:
                sys.stderr.buffer.write(line)
                sys.stderr.flush()
            said = os.read(read_end, 64).decode()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
            process.wait()
            return 130
        finally:
            os.close(read_end)
        if said:
            process.returncode = 0  # it lives on; do not wait for it
            return 0 if said == READY_MARK else 1
        return process.wait() or 1
