"""What `narrows capture verify` says of capture by socket hooks: what of a pod does not stand, what that means, and what to do.

It is read from the kernel by pins and links, as the agent reads it each 2.5 s, and nothing is changed. Which cgroup is the pod's and which
addresses it has says its pod file where there is one; else the links and the namespace.
"""
from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from agent import netlink
from agent.capture.egress import HAS_IP4, HAS_IP6, LAYOUT, POD_VALUE, Captured, Egress, EgressError, netns_cookie
from agent.capture.ingress import INSIDE_VALUE, Ingress, IngressError
from agent.capture.loader import HOOKS, INGRESS, NETNS, PROXY, Hook
from agent.capture.pins import Pins
from agent.capture.unhook import cgroups_by_id, namespaces_of
from agent.model.pod import CaptureSettings
from agent.model.workload import IPAddress, address_of

_LINK = "the link of "
_MEANS = {
    "sockops": "the proxy does not learn where the pod's connections were meant to go, and resets them",
    "connect4": "what the pod connects to by IPv4 is not captured",
    "connect6": "what the pod connects to by IPv6 is not captured",
    "sk_lookup": "what connects to the pod passes by the proxy",
    "the pod's entry in the map `pods`": "what the pod connects to is not captured, or goes where an earlier address was",
    "the pod's entry in the map `inbound`":
        "what connects to the pod passes by the proxy, or the pod's own connections are taken for others'",
}
_OF_PROXY = {
    "sockops": "the proxy does not learn where connections were meant to go, and resets them",
    "getsockopt": "the proxy does not learn where connections were meant to go, and resets them",
    "listen": "a listener of a new keeper is not found, and who connects to a pod is refused",
    "lasthop4": "the proxy's connections to applications by IPv4 come back to it",
    "lasthop6": "the proxy's connections to applications by IPv6 come back to it",
}


@dataclass(frozen=True, slots=True)
class Pod:
    """`cgroup`, `addresses`: as its runtime says; "" and empty when nobody says."""

    netns: str
    cgroup: str = ""
    addresses: tuple[IPAddress, ...] = ()


@dataclass(frozen=True, slots=True)
class Wrong:
    """One thing of a direction that does not stand."""

    what: str
    means: str

    def text(self, direction: str) -> str:
        return f"{direction}: {self.what}" + (f": {self.means}" if self.means else "")


class Hooks:
    """Of one instance, what is pinned of it. OSError when the pod's namespace cannot be entered."""

    def __init__(self, pod: Pod, pinned: Iterable[Pins]) -> None:
        self._pod = pod
        self._pins = next((pins for pins in pinned if pins.root.name == f"v{LAYOUT}"), None)
        self._cookie = netns_cookie(pod.netns)
        self._there = netlink.own_addresses([pod.netns]).get(pod.netns, ())
        linked = Egress(self._pins).linked() if self._pins is not None else set()
        inside = os.stat(pod.netns).st_ino
        self._linked = {number: path for number, path in cgroups_by_id(linked).items() if inside in namespaces_of(path)}

    def stands(self) -> tuple[bool, bool]:
        """Whether anything captures what the pod connects to, and what connects to it."""
        if self._pins is None:
            return False, False
        out, inward = bool(self._of_pod()), False
        with suppress(EgressError):
            out = out or self._cookie in Egress(self._pins).captured()
        with suppress(OSError):
            inward = self._cookie in Ingress(self._pins).captured() or (self._pins.links / _lookup().link(self._cookie)).exists()
        return out, inward

    def egress(self, settings: CaptureSettings) -> list[Wrong]:
        if self._pins is None:
            return [_NOT_LOADED]
        pins, cgroup = self._pins, self._cgroup()
        absent = [hook for hook in HOOKS if not (pins.programs / hook.name).exists()]
        found = [_unpinned(pins, hook) for hook in absent]
        egress = Egress(pins, [hook.name for hook in absent])
        try:
            proxies = {int(path.name.partition("_")[0]) for path in pins.links.glob("*_getsockopt")}
            number = os.stat(cgroup).st_ino if cgroup else 0
            standing = egress.standing({number} | proxies)
            entry = standing.pods.get(self._cookie)
            own = self._own(entry, POD_VALUE.unpack(entry) if entry else (bytes(4), 0, bytes(16)))
            for text in egress.lacks(standing, Captured(self._cookie, number), own, settings):
                if not text.startswith(_LINK):
                    found.append(_entry(text, entry is None))
                elif cgroup:
                    hook = next(one for one in HOOKS if one.name == text.removeprefix(_LINK))
                    found.append(Wrong(f"{hook.name} is not attached to cgroup {cgroup} by us", _MEANS.get(hook.name, hook.lack)))
            if not cgroup:
                found.append(Wrong("no cgroup with a process of this namespace has our hooks", _MEANS["connect4"].replace(" by IPv4", "")))
        except (EgressError, OSError) as error:
            return [*found, Wrong(f"the maps in {pins.maps} cannot be read: {error}", "")]
        return found + _proxy(egress.serves(standing, one) for one in proxies)

    def ingress(self, settings: CaptureSettings) -> list[Wrong]:
        if self._pins is None:
            return [_NOT_LOADED]
        pins = self._pins
        absent = [hook for hook in INGRESS if NETNS not in hook.on and not (pins.programs / hook.name).exists()]
        found = [_unpinned(pins, hook) for hook in absent]
        ingress = Ingress(pins)
        try:
            entered = ingress.entered({self._pod.netns: self._cookie})
            entry = entered.pods.get(self._cookie)
            own = self._own(entry, INSIDE_VALUE.unpack(entry)[:3] if entry else (bytes(4), 0, bytes(16)), guess=False)
            for text in ingress.lacks(entered, self._pod.netns, self._cookie, own, settings):
                if text.startswith(_LINK):
                    found.append(Wrong("no sk_lookup of ours is attached to the namespace", _MEANS["sk_lookup"]))
                elif text.startswith("the sysctl "):
                    found.append(Wrong(f"{text} is not 1", "the application's answers, or its refusals, do not find the proxy"))
                else:
                    found.append(_entry(text, entry is None))
            if self._cookie not in entered.listeners:
                found.append(Wrong("the proxy's listener on 15006 is not in the map `listeners`",
                                   "who connects is refused; does a keeper run?"))
            if not absent:
                found += _proxy(ingress.serves(one) for one in ingress.linked())
        except (IngressError, EgressError, OSError) as error:
            return [*found, Wrong(f"the maps in {pins.maps} cannot be read: {error}", "")]
        return found

    # -- inside -------------------------------------------------------------------------------------------------------

    def _of_pod(self) -> dict[int, Path]:
        """Cgroups of this namespace's processes that have links. A proxy's has none of connect."""
        assert self._pins is not None
        return {number: path for number, path in self._linked.items()
                if any((self._pins.links / hook.link(number)).exists() for hook in HOOKS if PROXY not in hook.on)}

    def _cgroup(self) -> str:
        return self._pod.cgroup or next((str(path) for path in self._of_pod().values()), "")

    def _own(self, entry: bytes | None, value: tuple[bytes, int, bytes], *, guess: bool = True) -> tuple[IPAddress, ...]:
        """The addresses that an entry has to have: those that the runtime says, and of a family that it does not name one that the
        namespace has. `guess`: also when the entry has none (egress asks the namespace for what the runtime does not name, ingress not)."""
        own: dict[int, IPAddress] = {address.version: address for address in self._pod.addresses}
        stands = [address_of(written) for written, flag in ((value[0], HAS_IP4), (value[2], HAS_IP6)) if value[1] & flag]
        for family in {4, 6} - own.keys():
            have = [address for address in self._there if address.version == family]
            chosen = next((address for address in stands if address in have), None)
            if chosen is None and have and guess:
                chosen = have[0]
            if chosen is not None:
                own[family] = chosen
        return tuple(own.values())


_NOT_LOADED = Wrong("no programs of this instance are pinned",
                    "an agent that is started with `--capture ebpf` and this run directory loads them")


def _lookup() -> Hook:
    return next(hook for hook in INGRESS if NETNS in hook.on)


def _unpinned(pins: Pins, hook: Hook) -> Wrong:
    means = _MEANS.get(hook.name) or _OF_PROXY.get(hook.name) or hook.lack
    return Wrong(f"{hook.name} is not pinned in {pins.programs}, the kernel refused it or somebody removed it", means)


def _entry(text: str, absent: bool) -> Wrong:
    return Wrong(f"{text} is {'missing' if absent else 'not as the settings of the pod have it'}", _MEANS.get(text, ""))


def _proxy(cgroups: Iterable[list[str]]) -> list[Wrong]:
    """What a proxy's cgroup has to have, of the one that lacks least: an earlier keeper's may have left pins."""
    least = min(cgroups, key=len, default=None)
    if least is None:
        return [Wrong("no cgroup of a proxy has our hooks", _OF_PROXY["getsockopt"])]
    names = [text.removeprefix(_LINK) for text in least]
    return [Wrong(f"{name} is not attached to the cgroup of the proxy by us", _OF_PROXY[name]) for name in names]
