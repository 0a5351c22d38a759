"""Capture of what a pod connects to, by the pinned programs of loader.py: maps that are written in place, and links to cgroups.

A pod is captured while two things hold: its cgroup has links to the hooks, and its network namespace stands in the map `pods`. The map
is written last and cleared first, so capture begins and ends in one step. A socket of the pod's cgroup in another namespace is left alone,
as is one of another cgroup in the pod's namespace (the proxy's own are such). Nothing here needs a child, or blocks for longer than a
few milliseconds. One caller at a time.
"""
from __future__ import annotations

import socket
import struct
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from ipaddress import IPv4Address, ip_network
from pathlib import Path

from agent import netlink
from agent.capture import bpf_call, links
from agent.capture.loader import HOOKS, POD, PROXY, Hook
from agent.capture.mirror import Mirror
from agent.capture.pins import Pins
from agent.capture.plan import PROBE_SOURCES
from agent.model.pod import CaptureSettings, Network
from agent.model.workload import IPAddress

# bpf/narrows.h; a test holds these against it
LAYOUT = 1
POD_VALUE, PORT_KEY, RANGE_KEY, NETNS_KEY = struct.Struct("=4sI16s"), struct.Struct("=QQ"), struct.Struct("=IQ16s"), struct.Struct("=Q")
HAS_IP4, HAS_IP6, ONLY_INCLUDED = 1, 2, 4
NETNS_BITS = 64
# Maps of what pods exclude and include: how a key is written, and where in it the cookie is.
SETTINGS = {"excluded_ports": (PORT_KEY, 0), "excluded_ranges": (RANGE_KEY, 1), "included_ranges": (RANGE_KEY, 1)}

_HOOKS = {hook.name: hook for hook in HOOKS}
_SO_NETNS_COOKIE = 71  # asm-generic/socket.h, Linux 5.14
_MAPPED = bytes(10) + b"\xff\xff"


class EgressError(Exception):
    """Says which pod or cgroup, what the kernel said and what to do."""


def netns_cookie(netns: str) -> int:
    """The number by which BPF programs know a network namespace; the kernel gives it out once."""
    def ask() -> int:
        with socket.socket() as probe:
            return cookie_of(probe)

    return netlink.in_netns(netns, ask)


def cookie_of(one: socket.socket) -> int:
    """The number of a socket's network namespace."""
    (cookie,) = NETNS_KEY.unpack(one.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, NETNS_KEY.size))
    return int(cookie)


@dataclass(frozen=True, slots=True)
class Captured:
    """What names a pod to the kernel, which stays true when the pod is gone."""

    cookie: int  # of its network namespace
    cgroup: int  # id


@dataclass(frozen=True, slots=True)
class Standing:
    """What is in force at one moment."""

    pods: Mapping[int, bytes]  # cookie -> value
    settings: Mapping[str, Mapping[int, frozenset[bytes]]]  # map -> cookie -> keys
    links: Mapping[int, frozenset[str]]  # cgroup id -> hooks that run there


class Egress:
    """One instance's. `lacking`: names of hooks that the kernel refused, which are not linked."""

    def __init__(self, pins: Pins, lacking: Iterable[str] = ()) -> None:
        self._pins = pins
        self._lacking = frozenset(lacking)
        self._settings = Mirror(pins.maps, SETTINGS, EgressError)

    def serve(self, cgroup: str) -> int:
        """Links the proxy's cgroup: listeners that its processes made or make learn where connections were meant to go. Returns its id."""
        return links.to_cgroup(self._pins, self._of(PROXY), cgroup, EgressError)

    def capture(self, netns: str, cgroup: str, addresses: Iterable[IPAddress], settings: CaptureSettings) -> Captured:
        """Capture a pod, or change how: again with the same is a no-op, and connects meanwhile follow the old or the new settings.

        `addresses`: the pod's own. Connects of a family that has none are refused. EgressError: a hook is not linked, the pod is as before.
        """
        cookie = netns_cookie(netns)
        own = tuple(addresses)
        if not own:
            raise EgressError(f"{netns}: a pod without an address cannot be captured by eBPF")
        number = links.to_cgroup(self._pins, self._of(POD), cgroup, EgressError)
        wanted = _keys(cookie, settings)
        try:
            # what widens capture is written before what narrows it goes: no connect escapes that both would capture
            self._settings.set("included_ranges", cookie, wanted["included_ranges"], remove=False)
            for name in ("excluded_ports", "excluded_ranges"):
                self._settings.set(name, cookie, wanted[name])
            with _opened(self._pins.maps / "pods") as pods:
                bpf_call.update(pods, NETNS_KEY.pack(cookie), _value(own, settings))
            self._settings.set("included_ranges", cookie, wanted["included_ranges"])
        except OSError as error:
            raise EgressError(f"{netns}: {error.strerror}; it takes root, and room in the maps (bpf/README.md has their bounds)") from None
        return Captured(cookie, number)

    def release(self, cookie: int, cgroup_id: int) -> None:
        """End the capture of a pod, which may be gone. Connections that live go on. What is not there is no error."""
        self.stop(cookie)
        self.unlink(cgroup_id)

    def stop(self, cookie: int) -> None:
        """The half of `release` after which new connects are not captured. One under way needs the links for some microseconds more."""
        with _opened(self._pins.maps / "pods") as pods:
            bpf_call.delete(pods, NETNS_KEY.pack(cookie))
        for name in SETTINGS:
            self._settings.set(name, cookie, set())

    def unlink(self, cgroup_id: int) -> None:
        """The other half. Afterwards applications see the proxy as the peer of connections that live on. A captured pod must not be named.
        """
        for path in self._pins.links.glob(f"{cgroup_id}_*"):
            path.unlink(missing_ok=True)

    def captured(self) -> list[int]:
        """Cookies of the namespaces in force."""
        with _opened(self._pins.maps / "pods") as pods:
            return sorted(NETNS_KEY.unpack(key)[0] for key in bpf_call.keys(pods, NETNS_KEY.size))

    def linked(self) -> set[int]:
        """Ids of the cgroups that have a link's pin, which may be gone themselves."""
        return {int(path.name.partition("_")[0]) for path in self._pins.links.glob("*_*")}

    def standing(self, cgroups: Iterable[int]) -> Standing:
        """What the kernel has now, whoever wrote it; of links those of these cgroups. Some 0.1 ms for each pod."""
        found: dict[int, bytes] = {}
        with _opened(self._pins.maps / "pods") as pods:
            for key in bpf_call.keys(pods, NETNS_KEY.size):
                if (value := bpf_call.lookup(pods, key, POD_VALUE.size)) is not None:
                    found[NETNS_KEY.unpack(key)[0]] = value
        settings, programs = self._settings.read(), self._programs()
        return Standing(found, settings, {number: frozenset(name for name, program in programs.items() if links.runs(
            self._pins, _HOOKS[name], number, number, program)) for number in set(cgroups)})

    def lacks(self, standing: Standing, one: Captured, addresses: Iterable[IPAddress], settings: CaptureSettings) -> list[str]:
        """What of a captured pod does not stand as `capture` made it; empty when all is well."""
        found = self._lacks_links(standing, one.cgroup, POD)
        if standing.pods.get(one.cookie) != _value(addresses, settings):
            found.append("the pod's entry in the map `pods`")
        found += [f"the pod's entries in the map `{name}`" for name, keys in _keys(one.cookie, settings).items()
                  if standing.settings[name].get(one.cookie, frozenset()) != keys]
        return found

    def serves(self, standing: Standing, cgroup_id: int) -> list[str]:
        """The same of the proxy's cgroup."""
        return self._lacks_links(standing, cgroup_id, PROXY)

    def _lacks_links(self, standing: Standing, cgroup_id: int, who: str) -> list[str]:
        there = standing.links.get(cgroup_id, frozenset())
        return [f"the link of {hook.name}" for hook in self._of(who) if hook.name not in there]

    def _of(self, who: str) -> list[Hook]:
        return [hook for hook in HOOKS if who in hook.on and hook.name not in self._lacking]

    def _programs(self) -> dict[str, int]:
        """By hook the id of the program that is pinned."""
        found = {}
        for hook in HOOKS:
            if hook.name not in self._lacking:
                with _opened(self._pins.programs / hook.name) as fd:
                    found[hook.name] = bpf_call.program_id(fd)
        return found


def _opened(path: Path) -> AbstractContextManager[int]:
    return links.opened(path, EgressError)


def _range(cookie: int, network: Network) -> bytes:
    address = network.network_address
    packed, bits = (_MAPPED + address.packed, 96 + network.prefixlen) if isinstance(address, IPv4Address) else \
        (address.packed, network.prefixlen)
    return RANGE_KEY.pack(NETNS_BITS + bits, cookie, packed)


def _keys(cookie: int, settings: CaptureSettings) -> dict[str, set[bytes]]:
    """What stands of a pod in the maps of SETTINGS."""
    excluded = [*settings.exclude_outbound_ranges, *(ip_network(text) for text in PROBE_SOURCES.values())]
    # what is asked of a resolver by TCP goes to the DNS proxy, which rules see to
    ports = (*settings.exclude_outbound_ports, *((53,) if settings.dns else ()))
    return {"excluded_ports": {PORT_KEY.pack(cookie, port) for port in ports},
            "excluded_ranges": {_range(cookie, network) for network in excluded},
            "included_ranges": {_range(cookie, network) for network in settings.include_outbound_ranges or ()}}


def _value(addresses: Iterable[IPAddress], settings: CaptureSettings) -> bytes:
    own = {address.version: address for address in addresses}
    flags = (HAS_IP4 if 4 in own else 0) | (HAS_IP6 if 6 in own else 0) | (0 if settings.include_outbound_ranges is None else ONLY_INCLUDED)
    return POD_VALUE.pack(own[4].packed if 4 in own else bytes(4), flags, own[6].packed if 6 in own else bytes(16))
