"""The small parts that routing resources share: string matches, header operations, durations, traffic policies."""
from __future__ import annotations

import re

import re2

from controlplane.model.routing import Balancer, HeaderOperations, Headers, MatchKind, StringMatch, TrafficPolicy
from controlplane.sources.fields import Fields, describe

REGEX_BOUND = 1024  # characters, Istio's bound
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+\Z")  # RFC 9110 section 5.6.2
_DURATION = re.compile(r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:ms|us|µs|ns|s|m|h)")
_UNITS = {"h": 3_600_000.0, "m": 60_000.0, "s": 1000.0, "ms": 1.0, "us": 0.001, "µs": 0.001, "ns": 0.000_001}
DURATION_BOUND = 24 * 3_600_000  # ms
KINDS = ("exact", "prefix", "regex")


def string_match(holder: Fields, key: str, *, empty_is_present: bool = False) -> StringMatch | None:
    """`{exact: x}`, `{prefix: x}` or `{regex: x}`; None when it is not given, or wrong and noted."""
    one = holder.fields(key)
    if one is None:
        return StringMatch(MatchKind.PRESENT) if empty_is_present and holder.take(key) is None else None
    given = [kind for kind in KINDS if kind in one]
    texts = {kind: one.text(kind) for kind in KINDS}
    one.finish()
    if len(given) > 1:
        holder.error(key, f"has {' and '.join(given)}", "give exactly one of exact, prefix and regex")
        return None
    if not given:
        if empty_is_present and not list(one.names()):
            return StringMatch(MatchKind.PRESENT)
        if not list(one.names()):
            holder.error(key, "is empty", "give one of exact, prefix and regex")
        return None
    kind = MatchKind(given[0])
    text = texts[given[0]]
    if kind is MatchKind.REGEX and not _regex(one, text):
        return None
    if kind is MatchKind.PREFIX and not text:
        one.error("prefix", "is empty, which matches everything", "leave the match out, or say what it begins with")
        return None
    return StringMatch(kind, text)


def _regex(one: Fields, text: str) -> bool:
    if not text or len(text) > REGEX_BOUND:
        one.error("regex", f"has {len(text)} characters; 1 to {REGEX_BOUND} are expected")
        return False
    try:
        re2.compile(text)
    except re2.error as error:
        said = error.args[0].decode(errors="replace") if error.args and isinstance(error.args[0], bytes) else str(error)
        one.error("regex", f"{text!r} is not RE2: {said}",
                  "look-around and back references are not possible; see https://github.com/google/re2/wiki/Syntax")
        return False
    return True


def header_name(holder: Fields, key: str, name: str) -> str:
    """In lower case; "" when it is none, which is noted."""
    if not _TOKEN.match(name):
        holder.error(key, f"{name!r} is no name of a header")
        return ""
    return name.lower()


def headers(holder: Fields) -> Headers:
    """`headers: {request: {set, add, remove}, response: {...}}`."""
    one = holder.fields("headers")
    if one is None:
        return Headers()
    found = Headers(_operations(one, "request"), _operations(one, "response"))
    one.finish()
    return found


def _operations(holder: Fields, key: str) -> HeaderOperations:
    one = holder.fields(key)
    if one is None:
        return HeaderOperations()
    found = HeaderOperations(_pairs(one, "set"), _pairs(one, "add"),
                             tuple(name for text, _ in one.texts("remove") if (name := _editable(one, "remove", text))))
    one.finish()
    return found


def _pairs(holder: Fields, key: str) -> tuple[tuple[str, str], ...]:
    found = []
    for name, (value, _) in holder.text_map(key).items():
        good = _editable(holder, key, name)
        if any((ord(c) < 32 and c != "\t") or ord(c) == 127 for c in value):
            holder.error(key, f"gives {name} a value with a control character")
        elif "%" in value.replace("%%", ""):
            holder.error(key, f"gives {name} the value {value!r}; operators (%...%) are not supported yet",
                         "write %% for a percent sign")
        elif good:
            found.append((good, value))
    return tuple(found)


def _editable(holder: Fields, key: str, name: str) -> str:
    if name.lower() in ("host", ":authority") or name.startswith(":"):
        holder.error(key, f"names {name}; changing the authority is not supported yet", "use another header")
        return ""
    return header_name(holder, key, name)


def duration(holder: Fields, key: str) -> int | None:
    """A Go duration such as 1.5s in milliseconds, rounded up; None when it is not given, or wrong and noted."""
    value = holder.take(key)
    if value is None:
        return None
    if value in (0, "0"):
        return 0
    text = value if isinstance(value, str) else ""
    parts = _DURATION.findall(text)
    if not parts or "".join(parts) != text:
        holder.error(key, f"is {describe(value)}, which is no duration", "write a number and a unit: 10s, 500ms, 1m30s")
        return None
    total = 0.0
    for part in parts:
        number = part.rstrip("hmsunµ")
        total += float(number) * _UNITS[part[len(number):]]
    if total > DURATION_BOUND:
        holder.error(key, f"is {text}; at most 24h is possible")
        return None
    if 0 < total < 1:
        holder.error(key, f"is {text}; at least 1ms is expected")
        return None
    return -int(-total // 1)


BALANCERS = {"LEAST_REQUEST": Balancer.LEAST_REQUEST, "LEAST_CONN": Balancer.LEAST_REQUEST,
             "ROUND_ROBIN": Balancer.ROUND_ROBIN, "RANDOM": Balancer.RANDOM, "UNSPECIFIED": None}


def traffic_policy(holder: Fields) -> TrafficPolicy:
    """`trafficPolicy` of a DestinationRule or of one of its subsets."""
    one = holder.fields("trafficPolicy")
    if one is None:
        return TrafficPolicy()
    one.refuse({
        "tls": "the mesh itself will encrypt; remove it",
        "outlierDetection": "endpoints leave by readiness only",
        "portLevelSettings": "settings are for all ports of the host; move them up",
        "tunnel": "remove it", "proxyProtocol": "remove it", "retryBudget": "there are no retries; remove it",
    })
    policy = TrafficPolicy(_balancer(one), _connect_timeout(one))
    one.finish()
    return policy


def _balancer(policy: Fields) -> Balancer | None:
    one = policy.fields("loadBalancer")
    if one is None:
        return None
    one.refuse({
        "consistentHash": "use simple: LEAST_REQUEST, ROUND_ROBIN or RANDOM",
        "localityLbSetting": "endpoints of all localities are used alike",
        "warmup": "remove it", "warmupDurationSecs": "remove it",
    })
    simple = one.text("simple")
    found: Balancer | None = None
    if simple == "PASSTHROUGH":
        one.error("simple", "PASSTHROUGH is not supported yet", f"it may be {', '.join(BALANCERS)}")
    elif simple and simple not in BALANCERS:
        one.error("simple", f"is {simple!r}", f"it may be {', '.join(BALANCERS)}")
    elif simple:
        found = BALANCERS[simple]
    one.finish()
    return found


def _connect_timeout(policy: Fields) -> int | None:
    pool = policy.fields("connectionPool")
    if pool is None:
        return None
    pool.refuse({"http": "bounds on requests are not done yet; remove it"})
    tcp = pool.fields("tcp")
    pool.finish()
    if tcp is None:
        return None
    tcp.refuse({"maxConnections": "connections are not bounded per service yet; remove it",
                "tcpKeepalive": "the proxy's own keepalive is used; remove it",
                "maxConnectionDuration": "remove it", "idleTimeout": "remove it"})
    timeout = duration(tcp, "connectTimeout")
    if timeout == 0:
        tcp.error("connectTimeout", "is 0; a connection needs some time", "leave it out for the default of 10s")
    tcp.finish()
    return timeout or None
