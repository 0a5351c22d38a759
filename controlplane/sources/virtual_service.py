"""VirtualService -> model. What this version does not do is refused by name: a mirror that is silently not mirrored is worse."""
from __future__ import annotations

import re

from controlplane.model.objects import Metadata, full_host
from controlplane.model.routing import Headers, HttpMatch, HttpRoute, RouteDestination, StringMatch, VirtualService
from controlplane.sources.expressions import check_in_turn
from controlplane.sources.fields import Fields, scalar
from controlplane.sources.matches import duration, header_name, headers, string_match

WEIGHT_BOUND = 0x7FFFFFFF  # Istio's field is an int32
_HOST = re.compile(r"(?:\*\.)?[a-zA-Z0-9_](?:[-a-zA-Z0-9_]*[a-zA-Z0-9_])?(?:\.[a-zA-Z0-9](?:[-a-zA-Z0-9]*[a-zA-Z0-9])?)*\Z")
_ADDRESS = re.compile(r"[0-9.]+\Z|.*:")

NOT_YET = {
    "redirect": "remove the route, or answer so in the application", "directResponse": "answer so in the application",
    "delegate": "put the routes here", "rewrite": "let the application take the path as it comes",
    "retries": "remove it; requests are tried once", "fault": "remove it", "mirror": "remove it", "mirrors": "remove it",
    "mirrorPercent": "remove it", "mirror_percent": "remove it", "mirrorPercentage": "remove it",
    "corsPolicy": "answer preflight requests in the application",
}
PSEUDO = {"uri": "match.uri", "method": "match.method", "authority": "match.authority", "scheme": "nothing (it is always http)"}


def virtual_service(top: Fields, meta: Metadata) -> VirtualService | None:
    top.ignore("status")
    spec = top.fields("spec", required=True)
    if spec is None:
        return None
    namespace = meta.key.namespace
    hosts = []
    for text, place in spec.texts("hosts"):
        if host := checked_host(spec, "hosts", text, namespace):
            hosts.append((host, place))
    if not hosts and not spec.take("hosts"):
        spec.error("hosts", "is missing; nothing would be routed", "name the service: hosts: [reviews]")
    for text, _ in spec.texts("gateways"):
        if text != "mesh":
            spec.error("gateways", f"names {text!r}; gateways are not supported yet", "leave gateways out, or write [mesh]")
    export_to_all(spec)
    spec.refuse({"tls": "TLS is passed through; remove it", "tcp": "connections go to the service's own endpoints; remove it"})
    http = tuple(_route(one, namespace) for one in spec.list_of_fields("http"))
    if not http and not spec.take("http"):
        spec.error("http", "is missing; there is nothing to do")
    check_in_turn(spec, http)
    spec.finish()
    return VirtualService(meta, tuple(hosts), http)


def export_to_all(spec: Fields) -> None:
    """`exportTo` may only be what it is by default."""
    for text, _ in spec.texts("exportTo"):
        if text != "*":
            spec.error("exportTo", f"names {text!r}; limiting who sees it is not supported yet", 'leave it out, or write ["*"]')


def checked_host(spec: Fields, key: str, text: str, namespace: str) -> str:
    """The full name of a host, in lower case; "" when it is none, which is noted."""
    if text == "*":
        spec.error(key, "'*' is every host there is, which the mesh does not take",
                   "name the services, or *.<namespace>.svc.cluster.local")
    elif _ADDRESS.match(text):
        spec.error(key, f"{text!r} is an address; addresses are not supported yet", "name the service")
    elif len(text) > 253 or not _HOST.match(text):
        spec.error(key, f"{text!r} is no host name")
    else:
        return full_host(text.lower(), namespace)
    return ""


def _route(one: Fields, namespace: str) -> HttpRoute:
    one.refuse(NOT_YET)
    name = one.text("name")
    matches = tuple(match for child in one.list_of_fields("match") if (match := _match(child)) is not None)
    edits = headers(one)
    timeout = duration(one, "timeout")
    children = one.list_of_fields("route")
    destinations = tuple(found for child in children if (found := _destination(child, namespace, len(children) == 1)))
    if not children and not any(key in one for key in NOT_YET):
        one.error("route", "is missing", "say where to: route: [{destination: {host: reviews}}]")
    total = sum(found.weight for found in destinations)
    if len(children) > 1 and len(destinations) == len(children):
        if total == 0:
            one.error("route", "has only weights of 0, so no request could go anywhere", "make the weights add up to 100")
        elif total != 100:
            shares = ", ".join(f"{found.subset or found.host} {found.weight / total:.1%}" for found in destinations)
            one.warn("route", f"has weights that add up to {total}, not 100; they are taken in proportion ({shares})",
                     "make the weights add up to 100")
    one.finish()
    return HttpRoute(name, matches, destinations, edits, timeout or 0, one.place())


def _destination(one: Fields, namespace: str, alone: bool) -> RouteDestination | None:
    weight = one.integer("weight", 0, WEIGHT_BOUND, 0)
    edits: Headers = headers(one)
    target = one.fields("destination", required=True)
    one.finish()
    if target is None:
        return None
    text = target.text("host", required=True)
    host = checked_host(target, "host", text, namespace) if text else ""
    if host.startswith("*"):
        target.error("host", f"{text!r} is a pattern; a request can only go to one host")
        host = ""
    subset = target.text("subset")
    port = 0
    if selector := target.fields("port"):
        port = selector.integer("number", 1, 65535, required=True)
        selector.finish()
    target.finish()
    return RouteDestination(host, subset, port, 1 if alone else weight, edits, target.place("host")) if host else None


def _match(one: Fields) -> HttpMatch | None:
    one.refuse({
        "scheme": "it is always http; remove it", "sourceLabels": "routes are the same for all clients; remove it",
        "sourceNamespace": "routes are the same for all clients; remove it", "gateways": "remove it", "statPrefix": "remove it",
    })
    found = HttpMatch(
        name=one.text("name"),
        uri=string_match(one, "uri"),
        ignore_uri_case=one.flag("ignoreUriCase"),
        method=string_match(one, "method"),
        authority=string_match(one, "authority"),
        headers=_named(one, "headers", True),
        without_headers=_named(one, "withoutHeaders", True),
        query=_named(one, "queryParams", False),
        port=one.integer("port", 1, 65535),
    )
    if found.uri is not None and found.uri.value and found.uri.kind != "regex" and not found.uri.value.startswith("/"):
        one.error("uri", f"is {found.uri.value!r}; a path begins with '/'")
    one.finish()
    return found


def _named(match: Fields, key: str, header: bool) -> tuple[tuple[str, StringMatch], ...]:
    """Matches on headers or query parameters by name; an empty one asks that it be there."""
    inner = match.fields(key)
    if inner is None:
        return ()
    found = []
    for name in inner.names():
        if header and name.lower() in PSEUDO:
            inner.error(name, "is no header", f"use {PSEUDO[name.lower()]}")
            inner.take(name)
            continue
        good = header_name(inner, name, name) if header else name
        if scalar(value := inner.take(name)) or isinstance(value, str):
            inner.error(name, f"is {value!r}, a map is expected", f'write {name}: {{exact: "{value}"}}')
            continue
        one = string_match(inner, name, empty_is_present=True)
        if good and one is not None:
            found.append((good, one))
    return tuple(sorted(found, key=lambda pair: pair[0]))
