"""Capture of what a pod connects to, by the pinned programs of loader.py: maps that are written in place, and links to cgroups.

A pod is captured while two things hold: its cgroup has links to the hooks, and its network namespace stands in the map `pods`. The map
is written last and cleared first, so capture begins and ends in one step. A socket of the pod's cgroup in another namespace is left alone,
as is one of another cgroup in the pod's namespace (the proxy's own are such). Nothing here needs a child or blocks.
"""
from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterable
from contextlib import suppress
from ipaddress import IPv4Address, ip_network
from pathlib import Path

from agent import netlink
from agent.capture import bpf_call
from agent.capture.loader import HOOKS, POD, PROXY
from agent.capture.pins import Pins
from agent.capture.plan import PROBE_SOURCES
from agent.model.pod import CaptureSettings, Network
from agent.model.workload import IPAddress

# bpf/narrows.h; a test holds these against it
LAYOUT = 1
POD_VALUE, PORT_KEY, RANGE_KEY, NETNS_KEY = struct.Struct("=4sI16s"), struct.Struct("=QQ"), struct.Struct("=IQ16s"), struct.Struct("=Q")
HAS_IP4, HAS_IP6, ONLY_INCLUDED = 1, 2, 4
NETNS_BITS = 64

_SO_NETNS_COOKIE = 71  # asm-generic/socket.h, Linux 5.14
_YES = b"\1"
_MAPPED = bytes(10) + b"\xff\xff"


class EgressError(Exception):
    """Says which pod or cgroup, what the kernel said and what to do."""


def netns_cookie(netns: str) -> int:
    """The number by which BPF programs know a network namespace; the kernel gives it out once."""
    def ask() -> int:
        with socket.socket() as probe:
            (cookie,) = NETNS_KEY.unpack(probe.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, NETNS_KEY.size))
            return int(cookie)

    return netlink.in_netns(netns, ask)


class Egress:
    """One instance's. `lacking`: names of hooks that the kernel refused, which are not linked."""

    def __init__(self, pins: Pins, lacking: Iterable[str] = ()) -> None:
        self._pins = pins
        self._lacking = frozenset(lacking)

    def serve(self, cgroup: str) -> None:
        """Links the proxy's cgroup: listeners that its processes made or make learn where connections were meant to go."""
        self._link(cgroup, PROXY)

    def capture(self, netns: str, cgroup: str, addresses: Iterable[IPAddress], settings: CaptureSettings) -> None:
        """Capture a pod, or change how: again with the same is a no-op, and connects meanwhile follow the old or the new settings.

        `addresses`: the pod's own. A family that has none is not captured. EgressError when a hook is not linked; the pod is as before.
        """
        cookie = netns_cookie(netns)
        own = {address.version: address for address in addresses}
        if not own:
            raise EgressError(f"{netns}: a pod without an address cannot be captured by eBPF")
        self._link(cgroup, POD)
        excluded = [*settings.exclude_outbound_ranges, *(ip_network(text) for text in PROBE_SOURCES.values())]
        included = settings.include_outbound_ranges
        # what widens capture is written before what narrows it goes: no connect escapes that both would capture
        self._set("included_ranges", cookie, {_range(cookie, network) for network in included or ()}, remove=False)
        for name, keys in (("excluded_ports", {PORT_KEY.pack(cookie, port) for port in settings.exclude_outbound_ports}),
                           ("excluded_ranges", {_range(cookie, network) for network in excluded})):
            self._set(name, cookie, keys)
        flags = (HAS_IP4 if 4 in own else 0) | (HAS_IP6 if 6 in own else 0) | (0 if included is None else ONLY_INCLUDED)
        value = POD_VALUE.pack(own[4].packed if 4 in own else bytes(4), flags, own[6].packed if 6 in own else bytes(16))
        with _opened(self._pins.maps / "pods") as pods:
            bpf_call.update(pods, NETNS_KEY.pack(cookie), value)
        self._set("included_ranges", cookie, {_range(cookie, network) for network in included or ()})

    def release(self, cookie: int, cgroup_id: int) -> None:
        """End the capture of a pod, which may be gone. Connections that live go on. What is not there is no error."""
        with _opened(self._pins.maps / "pods") as pods:
            bpf_call.delete(pods, NETNS_KEY.pack(cookie))
        for path in self._pins.links.glob(f"{cgroup_id}_*"):
            path.unlink(missing_ok=True)
        for name in ("excluded_ports", "excluded_ranges", "included_ranges"):
            self._set(name, cookie, set())

    def captured(self) -> list[int]:
        """Cookies of the namespaces in force."""
        with _opened(self._pins.maps / "pods") as pods:
            return sorted(NETNS_KEY.unpack(key)[0] for key in bpf_call.keys(pods, NETNS_KEY.size))

    def _set(self, name: str, cookie: int, wanted: set[bytes], *, remove: bool = True) -> None:
        """Of one pod: what is missing is added, then what is too much removed."""
        shape, at = (PORT_KEY, 0) if name == "excluded_ports" else (RANGE_KEY, 1)
        with _opened(self._pins.maps / name) as fd:
            there = {key for key in bpf_call.keys(fd, shape.size) if shape.unpack(key)[at] == cookie}
            for key in wanted - there:
                bpf_call.update(fd, key, _YES)
            for key in there - wanted if remove else ():
                bpf_call.delete(fd, key)

    def _link(self, cgroup: str, who: str) -> None:
        """Hooks in the order of HOOKS; those that are linked stay."""
        try:
            folder = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise EgressError(f"cgroup {cgroup}: {error.strerror}; it must be a directory of cgroup v2") from None
        try:
            number = os.fstat(folder).st_ino
            for hook in HOOKS:
                path = self._pins.links / f"{number}_{hook.name}"
                if who not in hook.on or hook.name in self._lacking or path.exists():
                    continue
                with _opened(self._pins.programs / hook.name) as program:
                    try:
                        link = bpf_call.attach(program, folder, hook.attach)
                    except OSError as error:
                        raise EgressError(f"cgroup {cgroup}: {hook.name}: {error.strerror}; `bpftool cgroup tree` shows what else is "
                                          "attached, and only cgroup v2 has these hooks") from None
                with suppress(FileExistsError):  # somebody else of this instance was quicker
                    bpf_call.pin(link, path)
                os.close(link)
        finally:
            os.close(folder)


class _opened:
    """The descriptor of a pin."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> int:
        try:
            self._fd = bpf_call.pinned(self._path)
        except OSError as error:
            raise EgressError(f"{error.strerror}; the programs are not loaded, or somebody removed the pin") from None
        return self._fd

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def _range(cookie: int, network: Network) -> bytes:
    address = network.network_address
    packed, bits = (_MAPPED + address.packed, 96 + network.prefixlen) if isinstance(address, IPv4Address) else \
        (address.packed, network.prefixlen)
    return RANGE_KEY.pack(NETNS_BITS + bits, cookie, packed)
