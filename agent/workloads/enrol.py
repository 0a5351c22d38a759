"""Whether a pod is captured and how: a pure function of its labels and annotations and the mesh's policy.

The first of these that is set decides: pod annotation, pod label, namespace annotation, namespace label. Annotations
that refine capture are Istio's; a value that cannot be read refuses the change (nothing of the pod changes)
and is never read as "none": a typo must not capture what was to be left alone.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import ip_network
from typing import TypeVar

from agent.model.pod import CaptureSettings, Enrolment, LocalPod, Network

T = TypeVar("T")

INTERCEPT = "narrows.mesh/intercept"
METHOD = "narrows.mesh/capture"
DATAPLANE_MODE = "istio.io/dataplane-mode"
SIDECAR_STATUS = "sidecar.istio.io/status"  # Istio's injector writes it: the pod has a proxy of its own
TRAFFIC = "traffic.sidecar.istio.io/"
EXCLUDE_OUTBOUND_PORTS = TRAFFIC + "excludeOutboundPorts"
EXCLUDE_INBOUND_PORTS = TRAFFIC + "excludeInboundPorts"
EXCLUDE_OUTBOUND_RANGES = TRAFFIC + "excludeOutboundIPRanges"
INCLUDE_OUTBOUND_RANGES = TRAFFIC + "includeOutboundIPRanges"

DNS_CAPTURE = "ambient.istio.io/dns-capture"

ITEMS_LIMIT = 256  # of one annotation: each is an iptables rule that every new connection may pass

_HONOURED = (EXCLUDE_OUTBOUND_PORTS, EXCLUDE_INBOUND_PORTS, EXCLUDE_OUTBOUND_RANGES, INCLUDE_OUTBOUND_RANGES)
_METHODS = ("auto", "ebpf", "iptables")
_WORDS = {INTERCEPT: {"enabled": True, "disabled": False}, DATAPLANE_MODE: {"ambient": True, "none": False}}


@dataclass(frozen=True, slots=True)
class Policy:
    """What the mesh lets pods decide themselves. A forbidden wish is passed over, and the reason says so."""

    opt_out: bool = True  # a pod may switch off what its namespace switched on
    exclusions: bool = True  # a pod may exclude ports and addresses


class Malformed(ValueError):
    """A value that cannot be read; the text says what was expected."""


def enrol(pod: LocalPod, policy: Policy = Policy()) -> Enrolment:
    """Decide on one pod. Never raises: what is malformed comes back in `refused`, with `settings` None."""
    if pod.host_network:
        return Enrolment(None, "uses the node's network (hostNetwork)")
    wanted, reason, refused = _wish(pod, policy)
    if refused:
        return Enrolment(None, "refused: " + refused, (refused,))
    if not wanted:
        return Enrolment(None, reason)
    if SIDECAR_STATUS in pod.annotations:
        return Enrolment(None, f"has a sidecar of its own (annotation {SIDECAR_STATUS})")
    if pod.sidecar:
        return Enrolment(None, "has a sidecar of its own (container istio-proxy)")
    if not policy.exclusions:
        passed_over = [name for name in (*_HONOURED, DNS_CAPTURE) if name in pod.annotations]
        said = f"; the mesh forbids {', '.join(passed_over)}" if passed_over else ""
        return Enrolment(CaptureSettings(), reason + said, (), *_method(pod))
    settings, problems = _settings(pod)
    if problems:
        return Enrolment(None, "refused: " + "; ".join(problems), tuple(problems))
    return Enrolment(settings, reason, (), *_method(pod))


def asks(pod: LocalPod) -> bool:
    """Whether the pod or its namespace asks for capture, be it in words that cannot be read."""
    wanted, _, refused = _wish(pod, Policy())
    return wanted or bool(refused)


def _wish(pod: LocalPod, policy: Policy) -> tuple[bool, str, str]:
    """(wanted, reason, refusal); the refusal is "" unless the value that decides is malformed."""
    passed_over = ""
    for key, kind, owner, values in (
            (INTERCEPT, "annotation", "pod", pod.annotations), (DATAPLANE_MODE, "label", "pod", pod.labels),
            (INTERCEPT, "annotation", "namespace", pod.namespace_annotations),
            (DATAPLANE_MODE, "label", "namespace", pod.namespace_labels)):
        value = values.get(key)
        if value is None:
            continue
        words = _WORDS[key]
        if value not in words:
            where = f"{kind} {key}" + (f" of namespace {pod.namespace}" if owner == "namespace" else "")
            return False, "", _refusal(pod, where, value, " or ".join(words))
        wanted = words[value]
        if owner == "pod" and not wanted and not policy.opt_out:
            passed_over = f"; the mesh forbids the pod's {kind} {key}={value}"
            continue
        return wanted, f"{kind} {key}={value} of the {owner}{passed_over}", ""
    return False, f"neither {INTERCEPT} nor {DATAPLANE_MODE} is set on the pod or its namespace", ""


def _method(pod: LocalPod) -> tuple[str, tuple[str, ...]]:
    """What it wishes to be captured by, and what is wrong with that wish. Either way it is captured alike, so a bad one refuses nothing."""
    value = pod.annotations.get(METHOD, "auto")
    if value in _METHODS:
        return value, ()
    return "auto", (_refusal(pod, f"annotation {METHOD}", value, " or ".join(_METHODS)) + "; the node's default is taken",)


def _settings(pod: LocalPod) -> tuple[CaptureSettings, list[str]]:
    problems = [_refusal(pod, f"annotation {key}", pod.annotations[key],
                         f"one that is supported: {', '.join(name.removeprefix(TRAFFIC) for name in _HONOURED)}")
                for key in sorted(pod.annotations) if key.startswith(TRAFFIC) and key not in _HONOURED]

    def read(key: str, parse: Callable[[str], T], absent: T) -> T:
        value = pod.annotations.get(key)
        if value is None:
            return absent
        try:
            return parse(value)
        except Malformed as error:
            problems.append(_refusal(pod, f"annotation {key}", value, str(error)))
            return absent

    settings = CaptureSettings(read(EXCLUDE_OUTBOUND_PORTS, parse_ports, ()), read(EXCLUDE_INBOUND_PORTS, parse_ports, ()),
                               read(EXCLUDE_OUTBOUND_RANGES, parse_ranges, ()),
                               read(INCLUDE_OUTBOUND_RANGES, _parse_included, None), read(DNS_CAPTURE, _parse_choice, None))
    return settings, problems


def parse_ports(text: str) -> tuple[int, ...]:
    """`80, 443` sorted and without doubles; "" is none. Raises Malformed."""
    found = set()
    for item in _items(text, "a comma list of ports"):
        if not (item.isascii() and item.isdigit() and len(item) <= 5 and 1 <= int(item) <= 65535):
            raise Malformed(f"a comma list of ports from 1 to 65535, and {item!r} is none")
        found.add(int(item))
    return tuple(sorted(found))


def parse_ranges(text: str) -> tuple[Network, ...]:
    """`10.0.0.0/8, fd00::/8` sorted and without doubles; "" is none. Raises Malformed.

    As in Istio a prefix length is required, and bits behind it are dropped.
    """
    found = set()
    for item in _items(text, "a comma list of networks like 10.0.0.0/8"):
        address, slash, length = item.partition("/")
        try:
            if not (slash and length.isascii() and length.isdigit() and "%" not in address):
                raise ValueError
            found.add(ip_network(item, strict=False))
        except ValueError:
            raise Malformed(f"a comma list of networks like 10.0.0.0/8 or fd00::/8, and {item!r} is none") from None
    return tuple(sorted(found, key=lambda network: (network.version, int(network.network_address), network.prefixlen)))


def _parse_included(text: str) -> tuple[Network, ...] | None:
    if text.strip() == "*":
        return None
    try:
        return parse_ranges(text)
    except Malformed as error:
        raise Malformed(f"`*` or {error}") from None


def _parse_choice(text: str) -> bool | None:
    if text not in ("true", "false"):
        raise Malformed("`true` or `false`")
    return text == "true"


def _items(text: str, expected: str) -> list[str]:
    if not text.strip():
        return []
    items = [item.strip() for item in text.split(",")]
    if len(items) > ITEMS_LIMIT:
        raise Malformed(f"at most {ITEMS_LIMIT} items, and it has {len(items)}")
    if "" in items:
        raise Malformed(f"{expected}, and one item is empty")
    return items


def _refusal(pod: LocalPod, where: str, value: str, expected: str) -> str:
    shown = value if len(value) <= 80 else value[:77] + "..."
    return f"pod {pod.ref}: {where} is {shown!r}, expected {expected}"
