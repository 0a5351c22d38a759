"""Captured pods: their namespace and the listeners inside it, and the sockets made there for workers.

setns moves the keeper's only thread. Whatever happens inside, it comes back before anything else runs, or the process ends: a keeper in
somebody else's network would make the next pod's listeners there.
"""
import errno
import os
import socket
import time

from libc.stdint cimport uint8_t
from ext.core.protocol cimport (FAMILY_IPV6, LISTEN_HBONE, LISTEN_INBOUND, LISTEN_OUTBOUND, PORT_DNS, PORT_HBONE, PORT_INBOUND,
                                PORT_OUTBOUND, SOCKET_MARK)
from ext.sys.capture cimport capture_listen, capture_socket
from ext.sys.namespace cimport namespace_enter, namespace_inode, namespace_is

from ext.keeper.link import close_all
from ext.keeper.log import log

PORTS = ((LISTEN_OUTBOUND, PORT_OUTBOUND), (LISTEN_INBOUND, PORT_INBOUND), (LISTEN_HBONE, PORT_HBONE))

cdef enum:
    BACKLOG = 4096                  # the namespace's somaxconn bounds it
    DNS_BACKLOG = 128
    FREEBIND6 = 78                  # IPV6_FREEBIND, linux/in6.h
    EXIT_LOST = 70                  # EX_SOFTWARE
    HOLDER_LOOK_MS = 200            # of looking for who holds a port


class PodError(Exception):
    """A pod that cannot be served; the text says why and what to do."""


class Namespace:
    """with Namespace(home, fd): inside. Raises PodError when it cannot be entered."""

    def __init__(self, int home, int fd):
        self._home, self._fd = home, fd

    def __enter__(self):
        cdef int error = namespace_enter(self._fd)
        if error != 0:
            raise PodError(f"cannot enter the pod's network namespace: {os.strerror(-error)}"
                           + ("; the keeper needs root (CAP_SYS_ADMIN)" if error == -errno.EPERM else ""))

    def __exit__(self, *_):
        cdef int error = namespace_enter(self._home)
        if error != 0:
            log("error", f"cannot return from a pod's namespace: {os.strerror(-error)}; the keeper ends")
            os._exit(EXIT_LOST)


class Pod:
    """Owns `netns` and the descriptors of `listeners` (Listener -> descriptor). `identity`: "" for none. `slot`: whose worker accepts."""

    def __init__(self, handle, uid, identity, int netns, listeners):
        self.handle, self.uid, self.identity, self.netns, self.listeners = handle, uid, identity, netns, listeners
        self.inode = namespace_inode(netns)
        self.dns = ()               # descriptors; agents have duplicates, so that what waits in them outlives an agent
        self.slot = None

    def refuse(self) -> None:
        """No connection is taken any more, in no process: a listener that is shut down frees its port while others still have it."""
        for fd in self.listeners.values():
            shut(fd)
        close_all(self.listeners.values())
        self.listeners = {}

    def close(self) -> None:
        self.refuse()
        close_all(self.dns)
        self.dns = ()
        if self.netns >= 0:
            os.close(self.netns)
            self.netns = -1


def shut(int fd) -> None:
    try:
        with socket.socket(fileno=os.dup(fd)) as listener:
            listener.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass            # it is closed with its last descriptor then


def check_namespace(int fd) -> int:
    """Its inode. Raises PodError."""
    if not namespace_is(fd):
        raise PodError("the descriptor is not a network namespace; if it came from a file in /run/netns, its mount is gone "
                       "and so is the pod")
    return namespace_inode(fd)


def listen_in(int home, int netns, int families) -> dict:
    """Listeners of every kind inside a namespace. Raises PodError; nothing is left then."""
    cdef uint8_t family
    cdef const char* step = b""
    cdef int fd = -1, port = 0
    made = {}
    holder = None
    with Namespace(home, netns):
        for kind, number in PORTS:
            port = number
            family = 6 if families & FAMILY_IPV6 else 4
            fd = capture_listen(family, port, BACKLOG, &step)
            if family == 6 and fd in (-errno.EAFNOSUPPORT, -errno.EADDRNOTAVAIL):
                fd = capture_listen(4, port, BACKLOG, &step)
            if fd < 0:
                if fd == -errno.EADDRINUSE:
                    holder = holder_inodes(port)
                break
            made[kind] = fd
    if fd >= 0:
        return made
    close_all(made.values())
    said = f"port {port} in the pod's namespace: {step.decode()}: {os.strerror(-fd)}"
    if holder is not None:
        said += f"; {holder_name(holder)} holds it: the mesh needs this port, let that program use another"
    raise PodError(said)


def dns_in(int home, int netns) -> tuple:
    """Descriptors of the DNS sockets of a namespace: UDP and TCP on localhost, where a redirect brings what a pod sends. Raises PodError.

    ::1 also where IPv6 is switched off (IPV6_FREEBIND), since it may be switched on later; not where the kernel has none.
    """
    made = []
    with Namespace(home, netns):
        try:
            for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
                for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
                    try:
                        one = socket.socket(family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
                    except OSError as error:
                        if family == socket.AF_INET6 and error.errno == errno.EAFNOSUPPORT:
                            continue
                        raise
                    with one:
                        if family == socket.AF_INET6:
                            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                            one.setsockopt(socket.IPPROTO_IPV6, FREEBIND6, 1)
                        if kind == socket.SOCK_STREAM:
                            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                        one.bind((address, PORT_DNS))
                        if kind == socket.SOCK_STREAM:
                            one.listen(DNS_BACKLOG)
                        made.append(one.detach())
        except OSError as error:
            close_all(made)
            raise PodError(f"DNS port {PORT_DNS} in the pod's namespace: {error.strerror}"
                           + ("; another program has it, and the mesh needs it" if error.errno == errno.EADDRINUSE else "")) from None
    return tuple(made)


def sockets_in(int home, int netns, int family, int n) -> tuple:
    """At most n sockets made inside a namespace, and "" or why there are not more. The caller owns them. Raises PodError."""
    cdef const char* step = b""
    cdef int fd = 0
    made = []
    with Namespace(home, netns):
        while len(made) < n:
            fd = capture_socket(family, SOCKET_MARK, &step)
            if fd < 0:
                return made, f"{step.decode()}: {os.strerror(-fd)}"
            made.append(fd)
    return made, ""


# ---- who holds a port ------------------------------------------------------------------------------------------

def holder_inodes(int port) -> set:
    """Inodes of sockets that listen on a port of the namespace the thread is in now (proc_net(5), tcp)."""
    found = set()
    for table in ("/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"):
        try:
            with open(table) as lines:
                next(lines, None)
                for line in lines:
                    words = line.split()
                    if words[3] == "0A" and int(words[1].rpartition(":")[2], 16) == port:
                        found.add(words[9])
        except (OSError, IndexError, ValueError):
            continue
    return found


def holder_name(inodes) -> str:
    """`nginx (pid 12)`, or what is known when no process of ours to see has it. Looks for a bounded time."""
    cdef double until = time.monotonic() + HOLDER_LOOK_MS / 1000.0
    wanted = {f"socket:[{inode}]" for inode in inodes}
    for pid in sorted((name for name in os.listdir("/proc") if name.isdigit()), key=int, reverse=True):
        if time.monotonic() > until or not wanted:
            break
        try:
            for fd in os.listdir(f"/proc/{pid}/fd"):
                if os.readlink(f"/proc/{pid}/fd/{fd}") in wanted:
                    with open(f"/proc/{pid}/comm") as name:
                        return f"{name.read().strip()} (pid {pid})"
        except OSError:
            continue
    return "a process that could not be found"
