"""The type URLs that the agent follows, and how its resources are named. ARCHITECTURE.md, "Names of resources"."""
from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple


class TypeUrl(StrEnum):
    ADDRESS = "type.googleapis.com/istio.workload.Address"
    AUTHORIZATION = "type.googleapis.com/istio.security.Authorization"
    LISTENER = "type.googleapis.com/envoy.config.listener.v3.Listener"
    ROUTE = "type.googleapis.com/envoy.config.route.v3.RouteConfiguration"
    CLUSTER = "type.googleapis.com/envoy.config.cluster.v3.Cluster"
    ENDPOINTS = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"


# of these everything is wanted, before any pod is captured; the rest on demand
WHOLE = (TypeUrl.AUTHORIZATION, TypeUrl.ADDRESS)


class ScopedName(NamedTuple):
    """An xdstp name taken apart: `scope` is `ns=default`, `name` what stands between type and `?`."""

    scope: str
    name: str


XDSTP = "xdstp:///"


def xdstp(type_url: TypeUrl, scope: str, name: str) -> str:
    """The name on the wire of `name` (`reviews...:9080`, `outbound|9080||reviews...`) as clients of `scope` see it."""
    return f"{XDSTP}{type_url.rpartition('/')[2]}/{name}?{scope}"


def parse_xdstp(type_url: TypeUrl, text: str) -> ScopedName:
    """The reverse of `xdstp`. Raises ValueError, in words for an operator, when `text` is not such a name."""
    prefix = f"{XDSTP}{type_url.rpartition('/')[2]}/"
    if not text.startswith(prefix):
        raise ValueError(f"the name {text!r} does not begin with {prefix}")
    name, mark, scope = text[len(prefix):].rpartition("?")
    if not mark or not name or not scope.startswith("ns=") or scope == "ns=":
        raise ValueError(f"the name {text!r} lacks the scope of its clients (?ns=<namespace>)")
    return ScopedName(scope, name)


def destination_key(scope: str, authority: str) -> str:
    """The key of a DESTINATION blob and of a MISS: `ns=default|reviews.default.svc.cluster.local:9080`."""
    return f"{scope}|{authority}"


def parse_destination_key(key: str) -> ScopedName:
    """Scope and `host:port` of a DESTINATION key. Raises ValueError when it is none."""
    scope, mark, authority = key.partition("|")
    host, colon, port = authority.rpartition(":")
    if not mark or not scope.startswith("ns=") or scope == "ns=" or not colon or not host:
        raise ValueError(f"{key!r} is not a destination key (ns=<namespace>|<host>:<port>)")
    if not (port.isascii() and port.isdecimal()) or not 0 < int(port) < 65536:
        raise ValueError(f"{key!r} has no port between 1 and 65535")
    if any(c in authority for c in "?#/| \n"):
        raise ValueError(f"{key!r} has a character that no host name has")
    return ScopedName(scope, authority)
