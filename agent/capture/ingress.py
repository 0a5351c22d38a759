"""Capture of what connects to a pod, by sk_lookup: a program and a link of its namespace alone, and maps that are written in place.

A pod is captured while its namespace has the link and stands in the map `inbound`, which is written last and cleared first. Its listener
comes to the map `listeners` without us: sockops on the proxy's cgroup puts it there within listen(2), and its end takes it out. So neither
our absence nor a new keeper leaves a gap; while there is no listener, who connects is refused. Nothing here needs a child.
The way back from the application needs the policy rule and route of `plan`, the sysctl tcp_fwmark_accept, and fwmark_reflect for the
refusal of a port that nobody listens on. One caller at a time.
"""
from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from agent import netlink
from agent.capture import bpf_call, links
from agent.capture.egress import HAS_IP4, HAS_IP6, NETNS_KEY, PORT_KEY, cookie_of, netns_cookie
from agent.capture.loader import INGRESS, NETNS, PROXY, Template
from agent.capture.mirror import Mirror
from agent.capture.pins import Pins
from agent.capture.plan import INBOUND_PORT
from agent.model.pod import CaptureSettings
from agent.model.workload import IPAddress

INSIDE_VALUE = struct.Struct("=4sI16sII")  # bpf/narrows.h; a test holds it against that
REDIRECTED, ACCEPT_KEPT, REFLECT4_KEPT, REFLECT6_KEPT = 8, 16, 32, 64
FWMARK_ACCEPT = "net.ipv4.tcp_fwmark_accept"  # of IPv6 too
FWMARK_REFLECT = "net.ipv4.fwmark_reflect", "net.ipv6.fwmark_reflect"
# by name the flag of an entry of `inbound` that says that it was set before us
_SYSCTLS = {FWMARK_ACCEPT: ACCEPT_KEPT, FWMARK_REFLECT[0]: REFLECT4_KEPT, FWMARK_REFLECT[1]: REFLECT6_KEPT}
_KEPT = ACCEPT_KEPT | REFLECT4_KEPT | REFLECT6_KEPT

_PIDFD_GETFD = 438  # asm-generic/unistd.h
_LISTENER = struct.Struct("=Q")  # in: a descriptor; out: the socket's cookie
_AHEAD = 256  # turns; the program goes on with its own while an entry is written anew
(_SK_LOOKUP,) = (hook for hook in INGRESS if NETNS in hook.on)
_EXCLUDED = "excluded_inbound"
_OF_PROXY = tuple(hook for hook in INGRESS if PROXY in hook.on)


class IngressError(Exception):
    """Says which pod or cgroup, what the kernel said and what to do. The pod is as it was."""


@dataclass(frozen=True, slots=True)
class Entered:
    """What is in force of incoming connections at one moment."""

    pods: Mapping[int, bytes]  # cookie -> value
    excluded: Mapping[int, frozenset[bytes]]  # cookie -> keys
    listeners: frozenset[int]  # cookies
    unset: Mapping[str, tuple[str, ...]]  # by namespace the sysctls that are not as they must be


class Ingress:
    """One instance's, with what `load` said of it (`Loaded.lookup`); without that it can only release."""

    def __init__(self, pins: Pins, lookup: Template | None = None) -> None:
        self._pins = pins
        self._lookup = lookup
        self._excluded = Mirror(pins.maps, {_EXCLUDED: (PORT_KEY, 0)}, IngressError)

    def serve(self, cgroup: str) -> int:
        """Links the proxy's cgroup: listeners that its processes make from now on are found, and its connections to applications are let
        pass. Again is a no-op. Returns its id."""
        return links.to_cgroup(self._pins, _OF_PROXY, cgroup, IngressError)

    def adopt(self, pid: int) -> list[int]:
        """Listeners that a keeper made before `serve`; call it after that. Returns the cookies of their namespaces.

        It takes CAP_SYS_PTRACE over the keeper; IngressError otherwise.
        """
        found = []
        try:
            process = os.pidfd_open(pid)
        except OSError as error:
            raise IngressError(f"keeper {pid}: {error.strerror}") from None
        try:
            with bpf_call.opened(self._pins.maps / "listeners") as listeners:
                for name in os.listdir(f"/proc/{pid}/fd"):
                    with suppress(FileNotFoundError):
                        if not os.readlink(f"/proc/{pid}/fd/{name}").startswith("socket:"):
                            continue
                        fd = _descriptor_of(process, int(name))
                        with socket.socket(fileno=fd) as theirs:
                            if (cookie := _inbound_listener(theirs)) is not None:
                                bpf_call.update(listeners, NETNS_KEY.pack(cookie), _LISTENER.pack(fd))
                                found.append(cookie)
        except OSError as error:
            raise IngressError(f"keeper {pid}: its listeners cannot be had: {error.strerror}; it takes CAP_SYS_PTRACE") from None
        finally:
            os.close(process)
        return sorted(found)

    def capture(self, netns: str, addresses: Iterable[IPAddress], settings: CaptureSettings, *, redirected: bool = False) -> int:
        """Capture a pod, or change how: again with the same is a no-op. Returns the cookie of its namespace.

        `addresses`: the pod's own, as many as are known. `redirected`: rules redirect too, as while a pod changes from
        the one way to the other. IngressError when its listener is not known, or something is missing here.
        """
        own: dict[int, IPAddress] = {address.version: address for address in addresses}
        if not own:
            raise IngressError(f"{netns}: a pod without an address cannot be captured by eBPF")
        try:
            cookie = netns_cookie(netns)
            if not self.has_listener(cookie):
                raise IngressError(f"{netns}: no listener on port {INBOUND_PORT} is known; "
                                   "the keeper has made none since its cgroup is served")
            with bpf_call.opened(self._pins.maps / "inbound") as inbound:
                before = bpf_call.lookup(inbound, NETNS_KEY.pack(cookie), INSIDE_VALUE.size)
                kept = _set_sysctls(netns, before)
                try:
                    self._excluded.set(_EXCLUDED, cookie, {PORT_KEY.pack(cookie, port) for port in settings.exclude_inbound_ports})
                    self._attach(netns, cookie)
                    value = _value(own, (REDIRECTED if redirected else 0) | kept)
                    old = INSIDE_VALUE.unpack(before) if before is not None else (b"", 0, b"", 0, 0)
                    if old[:3] != value:
                        turn = (old[3] + _AHEAD) & 0xFFFFFFFF
                        bpf_call.update(inbound, NETNS_KEY.pack(cookie), INSIDE_VALUE.pack(*value, turn, 0))
                except (OSError, IngressError):
                    if before is None:
                        _put_back_sysctls(netns, kept)
                    raise
        except OSError as error:
            raise IngressError(f"{netns}: {error.strerror}; it takes root, a pod that lives, and pins that nobody removed") from None
        return cookie

    def release(self, cookie: int, netns: str | None = None) -> None:
        """End the capture of a pod, which may be gone. Connections that live go on. What is not there is no error.

        `netns` of a pod that goes on: its sysctls are put back.
        """
        try:
            with bpf_call.opened(self._pins.maps / "inbound") as inbound:
                before = bpf_call.lookup(inbound, NETNS_KEY.pack(cookie), INSIDE_VALUE.size)
                bpf_call.delete(inbound, NETNS_KEY.pack(cookie))
            (self._pins.links / _SK_LOOKUP.link(cookie)).unlink(missing_ok=True)
            self._excluded.set(_EXCLUDED, cookie, set())
            if netns is not None and before is not None:
                _put_back_sysctls(netns, INSIDE_VALUE.unpack(before)[1])
        except OSError as error:
            raise IngressError(f"namespace {cookie}: {error.strerror}; this needs root") from None

    def captured(self) -> list[int]:
        """Cookies of the namespaces in force."""
        with bpf_call.opened(self._pins.maps / "inbound") as inbound:
            return sorted(NETNS_KEY.unpack(key)[0] for key in bpf_call.keys(inbound, NETNS_KEY.size))

    def linked(self) -> set[int]:
        """Ids of the cgroups that have a link's pin, which may be gone themselves."""
        return {int(path.name.split("-")[1]) for hook in _OF_PROXY for path in self._pins.links.glob(hook.link("*"))}

    def unlink(self, cgroup_id: int) -> None:
        """The end of `serve`. No pod may be captured then."""
        for hook in _OF_PROXY:
            (self._pins.links / hook.link(cgroup_id)).unlink(missing_ok=True)

    def entered(self, cookies: Mapping[str, int]) -> Entered:
        """What the kernel has now, whoever wrote it. `cookies`: of the namespaces at these paths, of which listeners and sysctls are told.

        Some 0.1 ms for each pod. OSError, IngressError without the pins.
        """
        pods: dict[int, bytes] = {}
        with bpf_call.opened(self._pins.maps / "inbound") as inbound:
            for key in bpf_call.keys(inbound, NETNS_KEY.size):
                if (value := bpf_call.lookup(inbound, key, INSIDE_VALUE.size)) is not None:
                    pods[NETNS_KEY.unpack(key)[0]] = value
        listeners = frozenset(cookie for cookie in cookies.values() if self.has_listener(cookie))
        return Entered(pods, self._excluded.read()[_EXCLUDED], listeners,
                       netlink.visit(cookies, lambda _: _unset_here()))

    def lacks(self, entered: Entered, netns: str, cookie: int, addresses: Iterable[IPAddress], settings: CaptureSettings) -> list[str]:
        """What of a captured pod does not stand as `capture` made it; empty when all is well. OSError when its namespace is gone."""
        found = [] if links.runs(self._pins, _SK_LOOKUP, cookie, os.stat(netns).st_ino) else [f"the link of {_SK_LOOKUP.name}"]
        value = entered.pods.get(cookie)
        have = INSIDE_VALUE.unpack(value)[:3] if value is not None else None
        if have is None or (have[0], have[1] & ~_KEPT, have[2]) != _value({one.version: one for one in addresses}, 0):
            found.append("the pod's entry in the map `inbound`")
        if entered.excluded.get(cookie, frozenset()) != {PORT_KEY.pack(cookie, port) for port in settings.exclude_inbound_ports}:
            found.append("the pod's entries in the map `excluded_inbound`")
        return found + [f"the sysctl {name}" for name in entered.unset.get(netns, (FWMARK_ACCEPT,))]

    def serves(self, cgroup_id: int) -> list[str]:
        """The same of the proxy's cgroup."""
        found = []
        for hook in _OF_PROXY:
            with bpf_call.opened(self._pins.programs / hook.name) as program:
                if not links.runs(self._pins, hook, cgroup_id, cgroup_id, bpf_call.program_id(program)):
                    found.append(f"the link of {hook.name}")
        return found

    def has_listener(self, cookie: int) -> bool:
        with bpf_call.opened(self._pins.maps / "listeners") as listeners:
            return bpf_call.lookup(listeners, NETNS_KEY.pack(cookie), _LISTENER.size) is not None

    def _attach(self, netns: str, cookie: int) -> None:
        namespace = netlink.open_namespace(netns)
        try:
            if links.runs(self._pins, _SK_LOOKUP, cookie, os.fstat(namespace).st_ino):
                return
            if self._lookup is None:
                raise IngressError(f"{netns}: no program is loaded")
            program = self._lookup.load(_SK_LOOKUP, self._pins, cookie)
            try:
                links.attach(self._pins, _SK_LOOKUP, cookie, namespace, program)
            finally:
                os.close(program)
        finally:
            os.close(namespace)


def _set_sysctls(netns: str, before: bytes | None) -> int:
    """Sees to them. Returns the flags of those that were set before us, as when the pod was captured first."""
    kept = _KEPT
    for name, flag in _SYSCTLS.items():
        try:
            if netlink.read_sysctl(netns, name) != "1":
                netlink.write_sysctl(netns, name, 1)
                kept &= ~flag
        except OSError as error:
            if error.errno == errno.ENOENT and name == FWMARK_REFLECT[1]:  # a kernel without IPv6
                continue
            if before is None:
                _put_back_sysctls(netns, kept)
            raise IngressError(f"{netns}: {name}: {error.strerror}; without it an application's answer "
                               "does not find the proxy") from None
    return kept if before is None else INSIDE_VALUE.unpack(before)[1] & _KEPT


def _put_back_sysctls(netns: str, kept: int) -> None:
    for name, flag in _SYSCTLS.items():
        if not kept & flag:
            netlink.write_sysctl(netns, name, 0)


def _unset_here() -> tuple[str, ...]:
    """Of the namespace that this thread is in."""
    found = []
    for name in _SYSCTLS:
        path = Path("/proc/sys", *name.split("."))
        if path.exists() and path.read_text().strip() != "1":
            found.append(name)
    return tuple(found)


def _value(own: Mapping[int, IPAddress], flags: int) -> tuple[bytes, int, bytes]:
    """The front of an entry of `inbound`. `own`: a pod's addresses by family."""
    return (own[4].packed if 4 in own else bytes(4), (HAS_IP4 if 4 in own else 0) | (HAS_IP6 if 6 in own else 0) | flags,
            own[6].packed if 6 in own else bytes(16))


def _descriptor_of(process: int, number: int) -> int:
    """Another process's descriptor as one of ours (pidfd_getfd(2), Linux 5.6)."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd: int = libc.syscall(_PIDFD_GETFD, process, number, 0)
    if fd < 0:
        error = ctypes.get_errno()
        raise (FileNotFoundError if error == errno.EBADF else OSError)(error, os.strerror(error))  # it was closed meanwhile
    return fd


def _inbound_listener(theirs: socket.socket) -> int | None:
    """The cookie of its namespace if it is one."""
    if theirs.family not in (socket.AF_INET, socket.AF_INET6) or not theirs.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return None
    if theirs.getsockname()[1] != INBOUND_PORT:
        return None
    return cookie_of(theirs)
