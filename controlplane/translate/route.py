"""A VirtualService -> the routes of one destination. A host without one has a single route to all its endpoints."""
from __future__ import annotations

from ipaddress import IPv6Address

from google.protobuf.duration_pb2 import Duration

from controlplane.model.mesh import Mesh
from controlplane.model.objects import Protocol, Service
from controlplane.model.routing import HeaderOperations, Headers, HttpMatch, HttpRoute, MatchKind, RouteDestination, StringMatch
from controlplane.translate.names import TypeUrl, Wanted
from protos.gen.envoy.config.core.v3 import core_pb2
from protos.gen.envoy.config.route.v3 import route_pb2
from protos.gen.envoy.type.matcher.v3 import matcher_pb2

DEFAULT_NAME = "default"  # Istio's name of the route of a host without rules


def routes(mesh: Mesh, wanted: Wanted) -> route_pb2.RouteConfiguration | None:
    """None: there is no such service, it has no such port, or the port is declared to carry something else than HTTP/1."""
    service = mesh.service(wanted.host)
    port = service.port(wanted.port) if service else None
    if service is None or port is None or port.protocol not in (Protocol.HTTP, Protocol.AUTO):
        return None
    rule = mesh.virtual_service(wanted.host)
    found: list[route_pb2.Route] = []
    for number, one in enumerate(rule.http if rule else ()):
        default = f"{rule.meta.key.namespace}/{rule.meta.key.name}[{number}]" if rule else ""
        found += _routes(mesh, wanted, one, one.name or default)
    if not found:  # no rule, or none for this port
        found.append(route_pb2.Route(name=DEFAULT_NAME, match=route_pb2.RouteMatch(prefix="/"), route=route_pb2.RouteAction(
            cluster=wanted.named(TypeUrl.CLUSTER, ""), timeout=Duration())))
    host = route_pb2.VirtualHost(name=f"{wanted.host}:{wanted.port}", domains=_domains(service, wanted), routes=found)
    return route_pb2.RouteConfiguration(name=wanted.named(TypeUrl.ROUTE), virtual_hosts=[host])


def _domains(service: Service, wanted: Wanted) -> list[str]:
    """The virtual host is that of the dialled service, whatever Host says (`*`); the names say what is meant."""
    key = service.meta.key
    names = [service.hostname, f"{key.name}.{key.namespace}.svc", f"{key.name}.{key.namespace}"]
    if wanted.scope == key.namespace:
        names.append(key.name)
    names += [f"[{address}]" if isinstance(address, IPv6Address) else str(address) for address in service.addresses]
    return [text for name in names for text in (name, f"{name}:{wanted.port}")] + ["*"]


def _routes(mesh: Mesh, wanted: Wanted, one: HttpRoute, name: str) -> list[route_pb2.Route]:
    """One route per match that is for this port."""
    if not one.matches:
        return [_route(mesh, wanted, one, HttpMatch(), name)]
    return [_route(mesh, wanted, one, match, f"{name}.{match.name}" if match.name else name)
            for match in one.matches if match.port in (0, wanted.port)]


def _route(mesh: Mesh, wanted: Wanted, one: HttpRoute, match: HttpMatch, name: str) -> route_pb2.Route:
    action = route_pb2.RouteAction(timeout=Duration(seconds=one.timeout_ms // 1000, nanos=one.timeout_ms % 1000 * 1_000_000))
    found = route_pb2.Route(name=name, match=_match(match), route=action)
    if len(one.destinations) == 1:
        found.route.cluster = _cluster(mesh, wanted, one.destinations[0])
        _edit(found, one.headers)
        _edit(found, one.destinations[0].headers)
        return found
    for target in one.destinations:
        if target.weight:
            part = found.route.weighted_clusters.clusters.add(name=_cluster(mesh, wanted, target))
            part.weight.value = target.weight
            _edit(part, target.headers)
    _edit(found, one.headers)
    return found


def _cluster(mesh: Mesh, wanted: Wanted, target: RouteDestination) -> str:
    """Without a port: the only one that the host has, else the one that was dialled (Istio's rule)."""
    port = target.port
    if not port:
        service = mesh.service(target.host)
        port = service.ports[0].port if service and len(service.ports) == 1 else wanted.port
    return wanted.named(TypeUrl.CLUSTER, target.subset, target.host, port)


def _match(match: HttpMatch) -> route_pb2.RouteMatch:
    found = route_pb2.RouteMatch(prefix="/")
    if match.uri is not None:
        if match.uri.kind is MatchKind.EXACT:
            found.path = match.uri.value
        elif match.uri.kind is MatchKind.PREFIX:
            found.prefix = match.uri.value
        else:
            found.safe_regex.regex = match.uri.value
        if match.ignore_uri_case and match.uri.kind is not MatchKind.REGEX:
            found.case_sensitive.value = False
    if match.method is not None:
        found.headers.append(_header(":method", match.method))
    if match.authority is not None:
        found.headers.append(_header(":authority", match.authority))
    found.headers.extend(_header(name, one) for name, one in match.headers)
    found.headers.extend(_header(name, one, absent=True) for name, one in match.without_headers)
    for name, one in match.query:
        parameter = found.query_parameters.add(name=name)
        if one.kind is MatchKind.PRESENT:
            parameter.present_match = True
        else:
            parameter.string_match.CopyFrom(_string(one))
    return found


def _header(name: str, match: StringMatch, absent: bool = False) -> route_pb2.HeaderMatcher:
    """`absent`: the header is not there, or not like that. A missing one then counts as empty, as in Istio."""
    if match.kind is MatchKind.PRESENT:
        return route_pb2.HeaderMatcher(name=name, present_match=True, invert_match=absent)
    return route_pb2.HeaderMatcher(name=name, string_match=_string(match), invert_match=absent,
                                   treat_missing_header_as_empty=absent)


def _string(match: StringMatch) -> matcher_pb2.StringMatcher:
    if match.kind is MatchKind.EXACT:
        return matcher_pb2.StringMatcher(exact=match.value)
    if match.kind is MatchKind.PREFIX:
        return matcher_pb2.StringMatcher(prefix=match.value)
    return matcher_pb2.StringMatcher(safe_regex=matcher_pb2.RegexMatcher(regex=match.value))


def _edit(holder: route_pb2.Route | route_pb2.WeightedCluster.ClusterWeight, headers: Headers) -> None:
    for operations, add, remove in ((headers.request, holder.request_headers_to_add, holder.request_headers_to_remove),
                                    (headers.response, holder.response_headers_to_add, holder.response_headers_to_remove)):
        add.extend(_options(operations))
        remove.extend(operations.remove)


def _options(operations: HeaderOperations) -> list[core_pb2.HeaderValueOption]:
    option = core_pb2.HeaderValueOption
    both = ((operations.set, option.OVERWRITE_IF_EXISTS_OR_ADD), (operations.add, option.APPEND_IF_EXISTS_OR_ADD))
    return [option(header=core_pb2.HeaderValue(key=name, value=value), append_action=action, keep_empty_value=not value)
            for pairs, action in both for name, value in pairs]
