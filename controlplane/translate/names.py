"""Type URLs, and what a requested name asks for. ARCHITECTURE.md, "Names of resources"."""
from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from controlplane.model.objects import CLUSTER


class TypeUrl(StrEnum):
    ADDRESS = "type.googleapis.com/istio.workload.Address"
    AUTHORIZATION = "type.googleapis.com/istio.security.Authorization"
    LISTENER = "type.googleapis.com/envoy.config.listener.v3.Listener"
    ROUTE = "type.googleapis.com/envoy.config.route.v3.RouteConfiguration"
    CLUSTER = "type.googleapis.com/envoy.config.cluster.v3.Cluster"
    ENDPOINTS = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"


SHORT = {TypeUrl.ADDRESS: "wds", TypeUrl.AUTHORIZATION: "authz", TypeUrl.LISTENER: "lds", TypeUrl.ROUTE: "rds",
         TypeUrl.CLUSTER: "cds", TypeUrl.ENDPOINTS: "eds"}
WHOLE = frozenset({TypeUrl.ADDRESS, TypeUrl.AUTHORIZATION})  # by their own names, and all of them by wildcard
XDSTP = "xdstp:///"
NAME_BOUND = 2048  # characters of a requested name


@dataclass(frozen=True, slots=True)
class Wanted:
    """A requested resource of layer 7. `subset` is empty for Listener and RouteConfiguration. `xdstp`: the client knows such
    names, and the names within the resource are of that form too."""

    type_url: TypeUrl
    scope: str  # a namespace
    host: str
    port: int
    subset: str = ""
    xdstp: bool = True

    def named(self, type_url: TypeUrl, subset: str | None = None, host: str = "", port: int = 0) -> str:
        """The name of another resource, as this client asks for it; of the same host and port unless others are given."""
        short = short_name(type_url, host or self.host, port or self.port, self.subset if subset is None else subset)
        return full_name(type_url, short, self.scope) if self.xdstp else short


def is_workload(name: str) -> bool:
    """Of an Address: a workload's uid begins with the cluster's id, a service's name with a namespace, which has no capitals."""
    return name.startswith(f"{CLUSTER}/")


def short_name(type_url: TypeUrl, host: str, port: int, subset: str = "") -> str:
    if type_url in (TypeUrl.LISTENER, TypeUrl.ROUTE):
        return f"{host}:{port}"
    return f"outbound|{port}|{subset}|{host}"


def full_name(type_url: TypeUrl, short: str, scope: str) -> str:
    return f"{XDSTP}{type_url.rpartition('/')[2]}/{short}?ns={scope}"


def parse(type_url: TypeUrl, name: str, scope: str) -> Wanted:
    """What a client of the namespace `scope` asks for by `name`. Raises ValueError, in words for an operator."""
    if len(name) > NAME_BOUND:
        raise ValueError(f"a name of {len(name)} characters; at most {NAME_BOUND} are expected")
    short, full = name, name.startswith(XDSTP)
    if full:
        prefix = f"{XDSTP}{type_url.rpartition('/')[2]}/"
        short, mark, context = name.removeprefix(prefix).rpartition("?")
        if not name.startswith(prefix) or not mark or not context.startswith("ns=") or not context[3:] or "&" in context:
            raise ValueError(f"the name {name!r} is not of the form {prefix}<name>?ns=<namespace>")
        scope = context[3:]
    if type_url in (TypeUrl.LISTENER, TypeUrl.ROUTE):
        host, colon, port = short.rpartition(":")
        if not colon or not host:
            raise ValueError(f"the name {name!r} is not of the form <host>:<port>")
        return Wanted(type_url, scope, host, _port(name, port), "", full)
    parts = short.split("|")
    if len(parts) != 4 or parts[0] != "outbound" or not parts[3]:
        raise ValueError(f"the name {name!r} is not of the form outbound|<port>|<subset>|<host>")
    return Wanted(type_url, scope, parts[3], _port(name, parts[1]), parts[2], full)


def _port(name: str, text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 6 and 0 < int(text) < 65536):
        raise ValueError(f"the name {name!r} has no port between 1 and 65535")
    return int(text)
