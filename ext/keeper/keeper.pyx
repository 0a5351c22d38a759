"""The keeper of a node: holds what must not be lost, and decides nothing. ARCHITECTURE.md, "Processes on a node".

One thread, one loop. It imports little, and is changed rarely: its own crash is the one that costs connections.

    SIGTERM, SIGINT   no listener any more, live connections get --drain seconds, exit 0; a second one ends at once
    exit status       0 ended as asked, 64 used wrongly, 70 lost in a pod's namespace, 75 another keeper has this run directory
"""
import fcntl
import os
import resource
import signal
import sys
import time

from ext.keeper.agents import Agents, Away
from ext.keeper.blobs import Table
from ext.keeper.crew import Crew
from ext.keeper.keys import Keys
from ext.keeper.log import log
from ext.keeper.loop import Loop
from ext.keeper.pods import Pod, PodError, check_namespace, dns_in, listen_in

cdef enum:
    EXIT_USAGE = 64
    EXIT_BUSY = 75              # EX_TEMPFAIL
    OPEN_FILES = 1048576        # a captured connection costs a worker two

BOOT = "import sys; sys.path.insert(0, {!r}); from {} import main; main()"
OPTIONS = ("--run-dir", "--workers", "--worker-uid", "--worker-gid", "--instance", "--drain", "--worker-path", "--worker-module",
           "--seccomp")


class Keeper:
    """Composes loop, agents, crew, pods, keys and blobs. `pods`: handle -> Pod."""

    def __init__(self, str run_dir, str instance):
        self.instance = instance
        self.start_us = time.time_ns() // 1000
        self.pods = {}
        self.table = Table()
        self.keys = Keys()
        self.loop = Loop()
        self._ending = 0
        self._home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        self.agents = Agents(self.loop, self, os.path.join(run_dir, "keeper.sock"))
        self.crew = Crew(self.loop, self._home, self.table, self.keys, self.pods, self.agents.tell_miss, self.agents.tell_worker)

    # ---- pods --------------------------------------------------------------------------------------------------

    def pod_add(self, handle, str uid, int families, str identity, list fds) -> None:
        """Takes fds[0] out of the list when it keeps it. The same pod again changes nothing. Raises PodError, Away."""
        cdef object inode = check_namespace(fds[0])
        if self.crew.ending:
            raise Away("the keeper is draining")
        there = self.pods.get(handle)
        if there is not None and there.uid != uid:
            raise PodError(f"handle {handle} is pod {there.uid}; one handle is one pod")
        same = next((pod for pod in self.pods.values() if pod.uid == uid), None)
        if same is not None and same.inode == inode and same.listeners:
            if same.handle != handle:
                self._rename(same, handle)
            if same.identity != identity:
                same.identity = identity
                self.crew.identify(same)
            return
        if same is not None:                        # its runtime made the namespace anew
            self.pod_delete(same.handle)
        pod = Pod(handle, uid, identity, fds[0], listen_in(self._home, fds[0], families))
        fds.pop()
        self.pods[handle] = pod
        self.crew.attach(pod)
        log("info", "a pod's listeners are open", pod=uid, handle=handle, namespace=inode)

    def pod_dns(self, handle) -> tuple:
        """Descriptors of the pod's DNS sockets, which stay the pod's. Raises PodError."""
        pod = self.pods.get(handle)
        if pod is None:
            raise PodError(f"POD_DNS: no pod has handle {handle}; POD_ADD makes it known")
        if not pod.dns:
            pod.dns = dns_in(self._home, pod.netns)
            log("info", "a pod's DNS sockets are open", pod=pod.uid, handle=handle)
        return pod.dns

    def _rename(self, pod, handle) -> None:
        """An agent that forgot its handles names the pod anew; listeners stay."""
        self.crew.detach(pod)
        self.crew.forget(pod.handle)
        del self.pods[pod.handle]
        pod.handle = handle
        self.pods[handle] = pod
        self.crew.attach(pod)

    def pod_leave(self, handle) -> None:
        pod = self.pods.get(handle)
        if pod is not None:
            self.crew.leave(pod)

    def pod_delete(self, handle) -> None:
        pod = self.pods.pop(handle, None)
        if pod is not None:
            self.crew.detach(pod)
            self.crew.forget(handle)
            pod.close()
            log("info", "a pod's listeners are closed", pod=pod.uid, handle=handle)

    # ---- keys --------------------------------------------------------------------------------------------------

    def key_make(self, str identity) -> tuple:
        """(id, certificate request); the workers that serve the identity have the key. Raises KeyRefused, OSError."""
        key, request = self.keys.make(identity)
        self.crew.key_made(key)
        log("info", "a key is made", identity=identity, key=key.id)
        return key.id, request

    def key_forget(self, key_id) -> None:
        if self.keys.forget(key_id):
            self.crew.key_forgotten(key_id)
            log("info", "a key is forgotten", key=key_id)

    # ---- the end -----------------------------------------------------------------------------------------------

    def drain(self, int milliseconds, done) -> None:
        if self.crew.ending:
            raise Away("the keeper is draining already")
        log("info", f"draining for at most {milliseconds} ms")
        self.crew.drain(milliseconds, done)
        for pod in self.pods.values():
            pod.refuse()

    def shut_down(self, str why) -> None:
        if not self._ending:
            self._ending = 2
            log("info", f"ending: {why}")
            if not self.crew.ending:
                self.drain(0, self.loop.stop)
            elif any(slot.pid for slot in self.crew.slots):
                self.crew.kill()
                self.loop.later(0.2, self.loop.stop)
            else:
                self.loop.stop()

    def on_signal(self, int milliseconds) -> None:
        self._ending += 1
        if self._ending == 1:
            log("info", "ending: a signal asks for it")
            if self.crew.ending:
                self.loop.stop()
            else:
                self.drain(milliseconds, self.loop.stop)
        else:
            log("warning", "ending at once")
            self.loop.stop()

    def close(self) -> None:
        for pod in self.pods.values():
            pod.close()
        self.pods.clear()
        self.crew.kill()
        for slot in self.crew.slots:
            if slot.pid:
                os.waitid(os.P_PIDFD, slot.pidfd, os.WEXITED)
        self.keys.close()
        self.agents.close()
        self.crew.close()
        os.close(self._home)
        self.loop.close()


def lock(str run_dir) -> int:
    """The run directory is ours as long as the descriptor is open. SystemExit when it is another keeper's."""
    os.makedirs(run_dir, 0o700, exist_ok=True)
    os.chmod(run_dir, 0o700)
    path = os.path.join(run_dir, "keeper.lock")
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(fd, 20, 0).decode(errors="replace").strip()
            log("error", f"{run_dir} is in use by the keeper with pid {holder}: end it first, or use another --run-dir")
            sys.exit(EXIT_BUSY)
        try:
            if os.fstat(fd).st_ino == os.stat(path).st_ino:
                os.ftruncate(fd, 0)
                os.pwrite(fd, str(os.getpid()).encode(), 0)
                return fd
        except FileNotFoundError:
            pass                    # the one before removed it between open and lock
        os.close(fd)


def options(list argv) -> dict:
    """`--name value` pairs. The click command in agent/dataplane/cli.py is the one for people; this door only checks."""
    found = {}
    words = iter(argv)
    for word in words:
        if word not in OPTIONS:
            sys.exit(f"keeper: unknown option {word}; there are {' '.join(OPTIONS)}")
        value = next(words, None)
        if value is None:
            sys.exit(f"keeper: {word} needs a value")
        found[word] = value
    return found


def number(dict found, str name, default, least, most) -> int:
    try:
        value = int(found.get(name, default))
    except ValueError:
        value = least - 1
    if not least <= value <= most:
        log("error", f"{name} {found.get(name)}: a number from {least} to {most}")
        sys.exit(EXIT_USAGE)
    return value


def main() -> None:
    """The process. Options: OPTIONS; the first is required."""
    found = options(sys.argv[1:])
    if "--run-dir" not in found:
        sys.exit("keeper: --run-dir is required")
    run_dir = os.path.abspath(found["--run-dir"])
    workers = number(found, "--workers", min(len(os.sched_getaffinity(0)), 2), 1, 64)
    uid = number(found, "--worker-uid", 15001, 1, 0xfffffffe)
    gid = number(found, "--worker-gid", uid, 1, 0xfffffffe)
    drain_ms = number(found, "--drain", 5, 0, 86400) * 1000
    instance = found.get("--instance") or os.urandom(8).hex()
    built = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    boot = BOOT.format(found.get("--worker-path", built), found.get("--worker-module", "ext.proxy.worker"))

    seccomp = found.get("--seccomp", "required")
    if seccomp not in ("required", "off"):
        log("error", f"--seccomp {seccomp}: required or off")
        sys.exit(EXIT_USAGE)

    os.umask(0o077)
    held = lock(run_dir)
    os.chdir("/")
    raise_limit()
    keeper = Keeper(run_dir, instance)
    wake_read, wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    for number_ in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number_, lambda *_: None)
    for number_ in (signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number_, signal.SIG_IGN)

    def on_wake(_) -> None:
        for _ in os.read(wake_read, 64):
            keeper.on_signal(drain_ms)

    keeper.loop.add(wake_read, on_wake)
    keeper.crew.start(workers, boot, (str(uid), str(gid), seccomp))
    log("info", "keeper is up", pid=os.getpid(), instance=instance, run_dir=run_dir, workers=workers)
    try:
        keeper.loop.run()
    finally:
        keeper.close()
        try:
            os.unlink(os.path.join(run_dir, "keeper.lock"))
        except OSError:
            pass                    # somebody removed the run directory; there is nothing left to do
        os.close(held)
    log("info", "keeper ended", pid=os.getpid())


def raise_limit() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    for wanted in ((max(hard, OPEN_FILES), max(hard, OPEN_FILES)), (hard, hard)):
        try:
            return resource.setrlimit(resource.RLIMIT_NOFILE, wanted)
        except (ValueError, OSError):
            continue
