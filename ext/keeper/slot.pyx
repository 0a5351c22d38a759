"""One worker index: the shared memory that outlives its workers, and the process that has it now.

    DOWN --spawn--> STARTED --READY--> READY --drain--> DRAINING
      ^________________|__________________|_____________|          the process ended, however

Start: python -I -S -c BOOT INDEX UID GID SECCOMP, with control socket, statistics and log ring as descriptors 3, 4, 5.
"""
import fcntl
import mmap
import os
import signal
import socket
import struct
import sys
import time

from libc.stdint cimport uint64_t
from ext.core.protocol cimport (FD_CONTROL, FD_LOG, FD_STATS, WORKER_DRAINING, WORKER_READY, WORKER_STARTED)
from ext.sys.memory cimport memory_shared

import ext.core.ring as ring
import ext.core.shm as shm
from ext.keeper.link import Link
from ext.sys.syscalls import told as syscall_told

FIRST_WORD = 16             # StatsHeader.heartbeat_ns; behind it all are words, in the order of HEADER_FIELDS
FIELDS = {name: FIRST_WORD + 8 * at for at, name in enumerate(shm.HEADER_FIELDS[1:])}
DOWN, STARTED, READY, DRAINING = 0, WORKER_STARTED, WORKER_READY, WORKER_DRAINING
PASSED = ("PATH", "LANG", "LD_LIBRARY_PATH", "LD_PRELOAD")      # of the environment; and what starts with NARROWS_

cdef enum:
    QUEUE = 1024            # messages that a worker has not read; then it is hung
    SOCKETS_A_SECOND = 30000    # for one worker; it makes at most some 20,000 connections a second
    ABOVE = 10              # our descriptors stay above those that a worker finds


class Slot:
    """`restarts` counts workers after the first. `pods`: handle -> Pod attached now; `served`: handles it ever had."""

    def __init__(self, int index):
        self.index = index
        self.stats = shared(b"narrows-statistics", shm.stats_bytes(), shm.format_stats)
        self.log = shared(b"narrows-log", ring.log_bytes(), ring.format_log)
        self._header = mmap.mmap(self.stats, mmap.PAGESIZE, mmap.MAP_SHARED, mmap.PROT_READ)
        self.refused = 0            # system calls refused until now
        self._sockets, self._asked, self._complained = 0.0, 0.0, 0.0
        self.state = DOWN
        self.pid = 0
        self.pidfd = -1
        self.link = None
        self.restarts = -1
        self.quick = 0              # deaths in a row that came soon after the start
        self.began = 0.0
        self.died = 0.0             # when its last worker died; 0: nobody to stand in for
        self.pods = {}
        self.served = set()
        self.keys = {}              # id -> identity: what its worker was given
        self.snapshot = 0           # sequence of the COMMIT that fills a new worker
        self.drain = 0              # sequence of a DRAIN
        self.retry = None           # timer of the next start
        self.watch = None           # timer of the bound on starting

    def spawn(self, loop, str boot, arguments, on_message) -> None:
        """Starts a process. OSError when there is no descriptor, memory or program."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        with ours, theirs:
            ours.setblocking(False)
            theirs.setblocking(False)
            actions = [(os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0)]
            copies = []
            try:
                for fd, place in ((theirs.fileno(), FD_CONTROL), (self.stats, FD_STATS), (self.log, FD_LOG)):
                    copies.append(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, ABOVE))
                    actions.append((os.POSIX_SPAWN_DUP2, copies[-1], place))
                argv = [sys.executable, "-I", "-S", "-c", boot, str(self.index), *arguments]
                env = {name: value for name, value in os.environ.items() if name in PASSED or name.startswith("NARROWS_")}
                # all signals blocked from the first instruction: Ctrl-C in a terminal is for the keeper
                self.pid = os.posix_spawn(sys.executable, argv, env, file_actions=actions, setsigmask=signal.valid_signals())
            finally:
                for fd in copies:
                    os.close(fd)
            try:
                self.pidfd = os.pidfd_open(self.pid)
            except OSError:
                os.kill(self.pid, 9)
                os.waitpid(self.pid, 0)
                self.pid = 0
                raise
            self.link = Link(loop, ours.detach(), on_message, 0, QUEUE)
        self.state = STARTED
        self.began = time.monotonic()
        self.restarts += 1
        self.snapshot = self.drain = 0

    def word(self, str name) -> int:
        """A field of the statistics' header, as the worker wrote it."""
        return struct.unpack_from("<Q", self._header, FIELDS[name])[0]

    def refused_call(self):
        """The system call that the worker which just ended was ended for, as text; None: it was not."""
        cdef uint64_t calls = self.word("refused_calls")
        if calls == self.refused:
            return None
        self.refused = calls
        return syscall_told(self.word("refused_call"))

    def allowed(self, int wanted) -> int:
        """Of so many sockets, how many it may have now: SOCKETS_A_SECOND, saved up for a second at most."""
        cdef double now = time.monotonic()
        self._sockets = min(self._sockets + (now - self._asked) * SOCKETS_A_SECOND, float(SOCKETS_A_SECOND))
        self._asked = now
        cdef int given = min(wanted, <int>(<double>self._sockets))
        self._sockets -= given
        return given

    def may_complain(self) -> bool:
        """Once a second: whoever fails for each message must not fill the log."""
        cdef double now = time.monotonic()
        if now - self._complained < 1.0:
            return False
        self._complained = now
        return True

    def heartbeat_age(self) -> float:
        """Seconds since its loop turned; since the start for one that has not yet."""
        cdef uint64_t beat = self.word("heartbeat_ns")
        return time.monotonic() - max(beat / 1e9, self.began)

    def kill(self) -> None:
        if self.pid:
            try:
                os.kill(self.pid, 9)        # not reaped yet, so the number is still its own
            except ProcessLookupError:
                pass

    def reap(self):
        """None: it still runs. Else its exit status, or minus the signal; then everything of the process is let go."""
        found = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG)
        if found is None:
            return None
        self.link.close()
        os.close(self.pidfd)
        self.link, self.pidfd, self.pid, self.state = None, -1, 0, DOWN
        self.served = set()
        self.keys = {}
        return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status

    def close(self) -> None:
        self._header.close()
        os.close(self.stats)
        os.close(self.log)


def shared(bytes name, size_t size, form) -> int:
    cdef int fd = memory_shared(name, size)
    if fd < 0:
        raise OSError(-fd, f"shared memory of {size} bytes: {os.strerror(-fd)}")
    with mmap.mmap(fd, size) as whole:
        form(whole)
    return fd
