"""What to do with a connection or a request: routes and clusters, decoded from LDS/RDS/CDS/EDS.

Everything is per scope: the answer depends on who asks. A scope is written `ns=<client namespace>`.
"""
from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from agent.model.workload import IPAddress


class MatchKind(StrEnum):
    EXACT = "exact"
    PREFIX = "prefix"
    SUFFIX = "suffix"
    REGEX = "regex"  # RE2, full match (envoy.type.matcher.v3.RegexMatcher)
    PRESENT = "present"
    CONTAINS = "contains"
    PATH_SEPARATED_PREFIX = "path_separated_prefix"  # /a matches /a and /a/b, not /ab


@dataclass(frozen=True, slots=True)
class StringMatch:
    kind: MatchKind
    value: str
    ignore_case: bool = False
    invert: bool = False


@dataclass(frozen=True, slots=True)
class NamedMatch:
    """A match on one header or query parameter. Pseudo headers: `:method`, `:authority`, `:scheme`.

    What is missing does not match, not even inverted (unless PRESENT is asked for): Envoy's rule. With
    `missing_is_empty` a missing header is matched as the empty string (HeaderMatcher.treat_missing_header_as_empty).
    """

    name: str
    match: StringMatch
    missing_is_empty: bool = False


@dataclass(frozen=True, slots=True)
class RouteMatch:
    """All given parts must agree. The path is matched without its query (Envoy does the same)."""

    path: StringMatch  # EXACT, PREFIX, REGEX or PATH_SEPARATED_PREFIX
    headers: tuple[NamedMatch, ...] = ()
    query: tuple[NamedMatch, ...] = ()


@dataclass(frozen=True, slots=True)
class HeaderEdit:
    """Removes happen first, then sets (replace every value), then adds (append one)."""

    remove: tuple[str, ...] = ()
    set: tuple[tuple[str, str], ...] = ()
    add: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class WeightedCluster:
    cluster: str  # Cluster.name in the same scope
    weight: int
    request: HeaderEdit = HeaderEdit()
    response: HeaderEdit = HeaderEdit()


@dataclass(frozen=True, slots=True)
class Route:
    name: str
    match: RouteMatch
    clusters: tuple[WeightedCluster, ...]  # total weight > 0
    timeout_ms: int = 0  # 0: none. Whole request, from its last byte read to the response's last byte
    request: HeaderEdit = HeaderEdit()
    response: HeaderEdit = HeaderEdit()


@dataclass(frozen=True, slots=True)
class VirtualHost:
    """Domains: exact, `*.suffix`, `prefix.*` or `*`; the most specific wins (Envoy's order)."""

    name: str
    domains: tuple[str, ...]
    routes: tuple[Route, ...]  # first match wins


@dataclass(frozen=True, slots=True)
class Destination:
    """The API listener of one (scope, host:port): how a connection dialled to that service port is treated.

    `http` is the route table for HTTP, `tcp` the weighted clusters for opaque bytes. Both are given for a port
    whose protocol is sniffed; exactly one for a declared port.
    """

    scope: str  # `ns=default`
    authority: str  # `reviews.default.svc.cluster.local:9080`
    http: tuple[VirtualHost, ...] | None
    tcp: tuple[WeightedCluster, ...] | None

    @property
    def key(self) -> str:
        return f"{self.scope}|{self.authority}"


class Balancer(StrEnum):
    ROUND_ROBIN = "round_robin"
    LEAST_REQUEST = "least_request"  # two random choices, the less busy of them
    RANDOM = "random"


@dataclass(frozen=True, slots=True)
class Endpoint:
    address: IPAddress
    port: int
    weight: int = 1
    healthy: bool = True


@dataclass(frozen=True, slots=True)
class Cluster:
    scope: str
    name: str  # `outbound|9080|v1|reviews.default.svc.cluster.local`
    service: str  # Service.key that metrics name
    balancer: Balancer
    connect_timeout_ms: int
    endpoints: tuple[Endpoint, ...]

    @property
    def key(self) -> str:
        return f"{self.scope}|{self.name}"
