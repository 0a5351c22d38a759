"""VirtualService and DestinationRule as far as this version does them. Everything else in them is refused at the door."""
from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from controlplane.model.objects import Labels, Metadata
from controlplane.model.problems import Place


class MatchKind(StrEnum):
    EXACT = "exact"
    PREFIX = "prefix"
    REGEX = "regex"  # RE2, the whole text
    PRESENT = "present"


@dataclass(frozen=True, slots=True)
class StringMatch:
    kind: MatchKind
    value: str = ""


@dataclass(frozen=True, slots=True)
class HttpMatch:
    """All that is given must agree. `port` 0: any."""

    name: str = ""
    uri: StringMatch | None = None
    ignore_uri_case: bool = False
    method: StringMatch | None = None
    authority: StringMatch | None = None
    headers: tuple[tuple[str, StringMatch], ...] = ()
    without_headers: tuple[tuple[str, StringMatch], ...] = ()
    query: tuple[tuple[str, StringMatch], ...] = ()
    port: int = 0


@dataclass(frozen=True, slots=True)
class HeaderOperations:
    set: tuple[tuple[str, str], ...] = ()
    add: tuple[tuple[str, str], ...] = ()
    remove: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Headers:
    request: HeaderOperations = HeaderOperations()
    response: HeaderOperations = HeaderOperations()


@dataclass(frozen=True, slots=True)
class RouteDestination:
    """`host` is a full name. `port` 0: the only port of the host, or the one that was dialled."""

    host: str
    subset: str
    port: int
    weight: int
    headers: Headers
    place: Place


@dataclass(frozen=True, slots=True)
class HttpRoute:
    """Matches if any of `matches` does; no matches at all: always. `timeout_ms` 0: none."""

    name: str
    matches: tuple[HttpMatch, ...]
    destinations: tuple[RouteDestination, ...]
    headers: Headers
    timeout_ms: int
    place: Place


@dataclass(frozen=True, slots=True)
class VirtualService:
    meta: Metadata
    hosts: tuple[tuple[str, Place], ...]  # full names, or `*.suffix`
    http: tuple[HttpRoute, ...]


class Balancer(StrEnum):
    LEAST_REQUEST = "least_request"
    ROUND_ROBIN = "round_robin"
    RANDOM = "random"


@dataclass(frozen=True, slots=True)
class TrafficPolicy:
    """None: not said here; the subset inherits the host's, the host's is the mesh's default."""

    balancer: Balancer | None = None
    connect_timeout_ms: int | None = None


@dataclass(frozen=True, slots=True)
class Subset:
    name: str
    labels: Labels
    policy: TrafficPolicy
    place: Place


@dataclass(frozen=True, slots=True)
class DestinationRule:
    meta: Metadata
    host: str  # a full name, or `*.suffix`
    host_place: Place
    policy: TrafficPolicy
    subsets: tuple[Subset, ...]

    def subset(self, name: str) -> Subset | None:
        return next((one for one in self.subsets if one.name == name), None)
