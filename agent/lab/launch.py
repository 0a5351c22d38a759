"""The program that becomes a process of the lab: run as a script, on the standard library alone.

`python -I -S launch.py SPEC_FD [REPORT_FD]` reads one JSON object (`Launch` in runtime.py describes it) and executes
what it names. It is not imported by the supervisor: entering namespaces needs a process with one thread, and starting
it without site packages costs 15 ms instead of 200.

Order, and why it may not be another: the cgroup first (whatever happens next is killed with it), then the network
namespace (opening its path needs the host's mounts), then new mount, ipc and uts namespaces, the mounts while all
capabilities are there, the fork (a pid namespace holds for children only; its first child mounts /proc), and
privileges last.

Errors before the program runs go to stderr, which is the pod's log; exit status 127 is "not found", 126 everything
else, as a shell says it.
"""
from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
from typing import Any, NoReturn

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWPID, CLONE_NEWNET = (
    0x20000, 0x4000000, 0x8000000, 0x20000000, 0x40000000)
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC, MS_SLAVE = (
    1, 2, 4, 8, 32, 0x1000, 0x4000, 0x80000)
PR_SET_PDEATHSIG, PR_CAPBSET_READ, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 1, 23, 24, 38, 47
PR_CAP_AMBIENT_CLEAR_ALL = 4
CAPABILITY_VERSION_3 = 0x20080522

# What a container runtime keeps from a container in /proc.
PROC_READ_ONLY = ("bus", "fs", "irq", "sys", "sysrq-trigger")
PROC_MASKED = ("kcore", "keys", "timer_list", "sched_debug", "latency_stats")

libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: Any) -> int:
    result: int = getattr(libc, name)(*arguments)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    try:
        call("mount", os.fsencode(source), os.fsencode(target), os.fsencode(kind) if kind else None,
             ctypes.c_ulong(flags), os.fsencode(data) if data else None)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror} ({source} on {target})") from error


def enter(path: str, kind: int) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        call("setns", ctypes.c_int(fd), ctypes.c_int(kind))
    finally:
        os.close(fd)


def join_cgroup(directory: str) -> None:
    with open(os.path.join(directory, "cgroup.procs"), "w") as procs:
        procs.write("0\n")


def join_process(pid: int) -> None:
    """Enter every namespace of a pod's first process; its mounts last, for they hide this machine's /proc."""
    kinds = (("net", CLONE_NEWNET), ("ipc", CLONE_NEWIPC), ("uts", CLONE_NEWUTS), ("pid", CLONE_NEWPID),
             ("mnt", CLONE_NEWNS))
    opened = [(os.open(f"/proc/{pid}/ns/{name}", os.O_RDONLY | os.O_CLOEXEC), kind) for name, kind in kinds]
    for fd, kind in opened:
        call("setns", ctypes.c_int(fd), ctypes.c_int(kind))
        os.close(fd)


def furnish(spec: dict[str, Any]) -> None:
    """The pod's own mounts. Slave, not private: what the host unmounts (a namespace's name) goes here too."""
    mount("none", "/", None, MS_REC | MS_SLAVE)
    call("sethostname", os.fsencode(spec["hostname"]), ctypes.c_size_t(len(os.fsencode(spec["hostname"]))))
    sources = [(os.open(source, os.O_PATH | os.O_CLOEXEC), target) for source, target in spec["binds"]]
    for directory in spec["hide"]:  # the sources are below one of these

        if os.path.isdir(directory):
            mount("tmpfs", directory, "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, "size=64k,mode=755")
    for source, target in sources:
        where = os.path.realpath(target)  # resolv.conf is often a symbolic link, here and there into a hidden folder
        if not os.path.exists(where):
            os.makedirs(os.path.dirname(where), exist_ok=True)
            os.close(os.open(where, os.O_WRONLY | os.O_CREAT, 0o644))
        mount(f"/proc/self/fd/{source}", where, None, MS_BIND)
        os.close(source)
    mount("sysfs", "/sys", "sysfs", MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC)


def furnish_proc() -> None:
    mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    for name in PROC_READ_ONLY:
        path = f"/proc/{name}"
        if os.path.exists(path):
            mount(path, path, None, MS_BIND | MS_REC)
            mount(path, path, None, MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC)
    for name in PROC_MASKED:
        if os.path.exists(f"/proc/{name}"):
            mount("/dev/null", f"/proc/{name}", None, MS_BIND)


def drop(spec: dict[str, Any]) -> None:
    """Become the container's user with its capabilities and no way to more."""
    keep = set(spec["capabilities"])
    os.setgroups(spec["groups"])
    os.setresgid(spec["gid"], spec["gid"], spec["gid"])
    number = 0
    while libc.prctl(PR_CAPBSET_READ, number, 0, 0, 0) >= 0:
        if number not in keep:
            call("prctl", PR_CAPBSET_DROP, number, 0, 0, 0)
        number += 1
    call("prctl", PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    os.setresuid(spec["uid"], spec["uid"], spec["uid"])
    mask = sum(1 << capability for capability in keep) if spec["uid"] == 0 else 0
    low, high = mask & 0xFFFFFFFF, mask >> 32
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    # twice: effective, permitted, inheritable
    sets = (ctypes.c_uint32 * 6)(low, low, 0, high, high, 0)
    call("capset", header, sets)


def execute(spec: dict[str, Any]) -> NoReturn:
    argv, env = spec["argv"], spec["env"]
    for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)  # Python ignores the first two, and exec would pass that on
    os.umask(0o022)
    soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (min(soft, 0), hard))
    try:
        os.chdir(spec["cwd"])
    except OSError as error:
        fail(126, f"cannot enter workingDir {spec['cwd']}: {error.strerror}; the lab runs on this machine's files")
    try:
        os.execvpe(argv[0], argv, env)
    except FileNotFoundError:
        fail(127, f"cannot run {argv[0]!r}: no such program on this machine (PATH={env.get('PATH', '')}); "
             "the lab ignores `image`, so install it or name another command")
    except OSError as error:
        fail(126, f"cannot run {argv[0]!r}: {error.strerror}")


def fail(status: int, text: str) -> NoReturn:
    os.write(2, f"narrows lab: {text}\n".encode())
    os._exit(status)


def wait_for(child: int) -> NoReturn:
    """Stand between the supervisor and the pod's first process: pass signals down and the status up."""
    for number in (signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)  # a terminal sends them to the child as well
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda got, _frame: os.kill(child, got))
    while True:
        try:
            _, status = os.waitpid(child, 0)
        except InterruptedError:
            continue
        code = os.waitstatus_to_exitcode(status)
        os._exit(code if code >= 0 else 128 - code)


def main() -> NoReturn:
    spec_fd = int(sys.argv[1])
    with os.fdopen(spec_fd, "rb") as source:
        source.seek(0)
        spec = json.loads(source.read())
    report_fd = int(sys.argv[2]) if len(sys.argv) > 2 else -1
    if report_fd >= 0:
        os.set_inheritable(report_fd, False)
    try:
        join_cgroup(spec["cgroup"])
        if spec["join"]:
            join_process(spec["join"])
        elif spec["netns"]:
            enter(spec["netns"], CLONE_NEWNET)
        if not spec["join"] and not spec["isolate"]:
            os.setsid()
            execute(spec)  # a process of the mesh itself: its own cgroup and network, nothing taken away
        if spec["isolate"]:
            call("unshare", CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID)
            furnish(spec)
        sys.stdout.flush()
        child = os.fork()
        if child:
            if report_fd >= 0:
                os.write(report_fd, f"{child}\n".encode())
                os.close(report_fd)
            wait_for(child)
        if spec["isolate"]:
            os.setsid()
            furnish_proc()
        drop(spec)
        if spec["join"]:
            call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # after setresuid, which clears it
        execute(spec)
    except OSError as error:
        fail(126, f"cannot prepare {spec['argv'][0]!r}: {error.strerror or error}")


if __name__ == "__main__":
    main()
