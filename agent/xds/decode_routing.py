"""LDS, RDS, CDS and EDS resources -> parts of the tree. `strict` has said before that nothing else is set."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import re2
from google.protobuf.message import DecodeError

from agent.model.routing import (
    Balancer,
    Cluster,
    Endpoint,
    HeaderEdit,
    MatchKind,
    NamedMatch,
    Route,
    RouteMatch,
    StringMatch,
    VirtualHost,
    WeightedCluster,
)
from agent.model.workload import address_of
from agent.xds import messages
from agent.xds.strict import Refused, check
from agent.xds.tree import ClusterPart, EndpointsPart, ListenerPart, RoutePart
from agent.xds.types import XDSTP, TypeUrl, parse_xdstp, xdstp

HCM = "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"
TCP_PROXY = "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy"
ROUTER = "envoy.extensions.filters.http.router.v3.Router"  # the filter that routes: we always do

# Envoy's defaults for what a resource leaves out
ROUTE_TIMEOUT_MS = 15_000  # RouteAction.timeout
CONNECT_TIMEOUT_MS = 5_000  # Cluster.connect_timeout

BALANCERS = {0: Balancer.ROUND_ROBIN, 1: Balancer.LEAST_REQUEST, 3: Balancer.RANDOM}
BALANCER_NAMES = {2: "RING_HASH", 4: "ORIGINAL_DST_LB", 5: "MAGLEV", 6: "CLUSTER_PROVIDED", 7: "LOAD_BALANCING_POLICY_CONFIG"}
STATIC, EDS = 0, 3
TYPE_NAMES = {1: "STRICT_DNS", 2: "LOGICAL_DNS", 4: "ORIGINAL_DST"}
SICK = {2, 3, 4}  # HealthStatus UNHEALTHY, DRAINING, TIMEOUT; what is new to us counts as unknown, hence healthy
APPEND, OVERWRITE = 0, 2  # HeaderAppendAction
APPEND_NAMES = {1: "ADD_IF_ABSENT", 3: "OVERWRITE_IF_EXISTS"}

REGEX_BOUND = 4096  # bytes of one expression
WEIGHT_BOUND = 0xFFFFFFFF  # Envoy's: the total is a u32
MILLISECONDS_BOUND = 0x7FFFFFFF  # 24 days


def decode_listener(name: str, message: Any) -> ListenerPart:
    """An API listener. Raises Refused."""
    scope, authority = parse_xdstp(TypeUrl.LISTENER, name)
    check(message)
    http, rds, tcp = None, None, None
    if message.HasField("api_listener"):
        http, rds = _connection_manager(message.api_listener.api_listener, scope)
    if message.HasField("default_filter_chain"):
        filters = message.default_filter_chain.filters
        if len(filters) != 1:
            raise Refused(f"default_filter_chain has {len(filters)} filters; one tcp_proxy is expected")
        tcp = _tcp_proxy(filters[0].typed_config, scope)
    if http is None and rds is None and tcp is None:
        raise Refused("it has neither an api_listener (HTTP) nor a default_filter_chain (TCP)")
    return ListenerPart(scope, authority, http, rds, tcp)


def decode_routes(name: str, message: Any) -> RoutePart:
    """Raises Refused."""
    scope, short = parse_xdstp(TypeUrl.ROUTE, name)
    check(message)
    return RoutePart(scope, short, _hosts(message, scope))


def decode_cluster(name: str, message: Any) -> ClusterPart:
    """Raises Refused. The service that metrics name is that of the `istio` metadata, else that of the name."""
    scope, short = parse_xdstp(TypeUrl.CLUSTER, name)
    check(message)
    balancer = BALANCERS.get(message.lb_policy)
    if balancer is None:
        said = BALANCER_NAMES.get(message.lb_policy, message.lb_policy)
        raise Refused(f"lb_policy {said} is not supported; use ROUND_ROBIN, LEAST_REQUEST or RANDOM")
    connect = _milliseconds(message, "connect_timeout", CONNECT_TIMEOUT_MS)
    if not connect:
        raise Refused("connect_timeout is 0; a connection needs some time")
    cluster = Cluster(scope, short, _service_of(short, message), balancer, connect, ())
    if message.type == STATIC and message.HasField("load_assignment"):
        return ClusterPart(cluster, None, _endpoints(message.load_assignment))
    if message.type != EDS:
        said = TYPE_NAMES.get(message.type, "STATIC without load_assignment" if message.type == STATIC else message.type)
        raise Refused(f"type {said} is not supported; use EDS")
    return ClusterPart(cluster, _full(TypeUrl.ENDPOINTS, scope, message.eds_cluster_config.service_name or short))


def decode_endpoints(name: str, message: Any) -> EndpointsPart:
    """Raises Refused."""
    scope, short = parse_xdstp(TypeUrl.ENDPOINTS, name)
    check(message)
    return EndpointsPart(scope, short, _endpoints(message))


# -- listeners ------------------------------------------------------------------------------------------------------


def _connection_manager(holder: Any, scope: str) -> tuple[tuple[VirtualHost, ...] | None, str | None]:
    manager = _open(holder, HCM, "api_listener")
    for http_filter in manager.http_filters:
        kind = http_filter.typed_config.type_url.rpartition("/")[2]
        if kind != ROUTER:
            raise Refused(f"the HTTP filter {http_filter.name} ({kind or 'without type'}) is not supported")
    which = manager.WhichOneof("route_specifier")
    if which == "rds":
        if not manager.rds.route_config_name:
            raise Refused("rds names no RouteConfiguration")
        return None, _full(TypeUrl.ROUTE, scope, manager.rds.route_config_name)
    if which == "route_config":
        return _hosts(manager.route_config, scope), None
    raise Refused("its HttpConnectionManager has no routes (rds or route_config)")


def _tcp_proxy(holder: Any, scope: str) -> tuple[WeightedCluster, ...]:
    proxy = _open(holder, TCP_PROXY, "default_filter_chain")
    if proxy.WhichOneof("cluster_specifier") == "cluster":
        return (WeightedCluster(_short(proxy.cluster, scope), 1),)
    if not proxy.HasField("weighted_clusters"):
        raise Refused("its tcp_proxy names no cluster")
    clusters = tuple(WeightedCluster(_short(one.name, scope), one.weight) for one in proxy.weighted_clusters.clusters)
    return _weighed(clusters, "tcp_proxy")


def _open(holder: Any, expected: str, where: str) -> Any:
    kind = holder.type_url.rpartition("/")[2]
    if kind != expected:
        raise Refused(f"{where} holds {kind or 'nothing'}; {expected.rpartition('.')[2]} is expected")
    message = messages.message_class(expected)()
    try:
        message.ParseFromString(holder.value)
    except DecodeError as error:
        raise Refused(f"{where} holds bytes that are no {expected.rpartition('.')[2]}: {error}") from None
    check(message, where)
    return message


# -- routes ---------------------------------------------------------------------------------------------------------


def _hosts(message: Any, scope: str) -> tuple[VirtualHost, ...]:
    taken: dict[str, str] = {}
    hosts = []
    for host in message.virtual_hosts:
        for domain in host.domains:
            if not domain:
                raise Refused(f"virtual host {host.name} has an empty domain")
            if (other := taken.setdefault(domain.lower(), host.name)) != host.name:
                raise Refused(f"the domain {domain} is in the virtual hosts {other} and {host.name}")
        if not host.domains:
            raise Refused(f"virtual host {host.name} has no domains")
        routes = tuple(_route(route, route.name or f"{host.name}[{number}]", scope)
                       for number, route in enumerate(host.routes))
        hosts.append(VirtualHost(host.name, tuple(dict.fromkeys(host.domains)), routes))
    return tuple(hosts)


def _route(route: Any, name: str, scope: str) -> Route:
    def refuse(reason: str) -> Refused:
        return Refused(f"route {name}: {reason}")

    if route.WhichOneof("action") != "route":
        raise refuse(f"its action {route.WhichOneof('action') or '(none)'} is not supported; only route is")
    action = route.route
    which = action.WhichOneof("cluster_specifier")
    try:
        if which == "cluster":
            clusters: tuple[WeightedCluster, ...] = (WeightedCluster(_short(action.cluster, scope), 1),)
        elif which == "weighted_clusters":
            clusters = _weighed(tuple(
                WeightedCluster(_short(one.name, scope), one.weight if not _wrapped(one) else one.weight.value,
                                _edit(one, "request"), _edit(one, "response"))
                for one in action.weighted_clusters.clusters), "weighted_clusters")
        else:
            raise Refused(f"it goes to {which or 'no cluster'}, which is not supported")
        return Route(route.name, _route_match(route.match), clusters, _milliseconds(action, "timeout", ROUTE_TIMEOUT_MS),
                     _edit(route, "request"), _edit(route, "response"))
    except Refused as error:
        raise refuse(str(error)) from None


def _wrapped(one: Any) -> bool:
    return not isinstance(one.weight, int)  # UInt32Value in routes, uint32 in tcp_proxy


def _weighed(clusters: tuple[WeightedCluster, ...], where: str) -> tuple[WeightedCluster, ...]:
    total = sum(one.weight for one in clusters)
    if not 0 < total <= WEIGHT_BOUND:
        raise Refused(f"the weights of {where} add up to {total}; between 1 and {WEIGHT_BOUND} is expected")
    return tuple(one for one in clusters if one.weight)


def _route_match(match: Any) -> RouteMatch:
    ignore_case = match.HasField("case_sensitive") and not match.case_sensitive.value
    which = match.WhichOneof("path_specifier")
    if which == "safe_regex":
        path = StringMatch(MatchKind.REGEX, _regex(match.safe_regex.regex), ignore_case)
    elif which in ("prefix", "path", "path_separated_prefix"):
        kind = {"prefix": MatchKind.PREFIX, "path": MatchKind.EXACT}.get(which, MatchKind.PATH_SEPARATED_PREFIX)
        path = StringMatch(kind, getattr(match, which), ignore_case)
    else:
        raise Refused("its match has no path (prefix, path, safe_regex or path_separated_prefix)")
    return RouteMatch(path, tuple(_header(one) for one in match.headers), tuple(_query(one) for one in match.query_parameters))


_FLAT: dict[str, MatchKind] = {"exact_match": MatchKind.EXACT, "prefix_match": MatchKind.PREFIX,
                               "suffix_match": MatchKind.SUFFIX, "contains_match": MatchKind.CONTAINS}


def _header(one: Any) -> NamedMatch:
    which = one.WhichOneof("header_match_specifier")
    invert = bool(one.invert_match)
    if which == "string_match":
        match = _string(one.string_match, invert)
    elif which in _FLAT:
        match = StringMatch(_FLAT[which], getattr(one, which), invert=invert)
    elif which == "safe_regex_match":
        match = StringMatch(MatchKind.REGEX, _regex(one.safe_regex_match.regex), invert=invert)
    else:  # nothing given means that it must be there
        wanted = one.present_match if which == "present_match" else True
        match = StringMatch(MatchKind.PRESENT, "", invert=invert is wanted)
    return NamedMatch(_header_name(one.name, pseudo=True), match, bool(one.treat_missing_header_as_empty))


def _query(one: Any) -> NamedMatch:
    if not one.name:
        raise Refused("a query parameter without name")
    if one.WhichOneof("query_parameter_match_specifier") == "string_match":
        return NamedMatch(one.name, _string(one.string_match, False))
    wanted = one.present_match if one.WhichOneof("query_parameter_match_specifier") else True
    return NamedMatch(one.name, StringMatch(MatchKind.PRESENT, "", invert=not wanted))


def _string(one: Any, invert: bool) -> StringMatch:
    which = one.WhichOneof("match_pattern")
    if which == "safe_regex":
        return StringMatch(MatchKind.REGEX, _regex(one.safe_regex.regex), invert=invert)
    if which not in ("exact", "prefix", "suffix", "contains"):
        raise Refused("a match without pattern")
    return StringMatch(MatchKind(which), getattr(one, which), bool(one.ignore_case), invert)


def _regex(text: str) -> str:
    if not text or len(text.encode()) > REGEX_BOUND:
        raise Refused(f"a regular expression of {len(text.encode())} bytes; 1 to {REGEX_BOUND} are expected")
    try:
        re2.compile(text)
    except re2.error as error:
        raise Refused(f"the regular expression {text!r} is not RE2: {_text(error)}") from None
    return text


def _text(error: Exception) -> str:
    said = error.args[0] if error.args else ""
    return said.decode(errors="replace") if isinstance(said, bytes) else str(said)


_TOKEN = frozenset("!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyz")  # RFC 9110 section 5.6.2, lower case


def _header_name(name: str, pseudo: bool = False) -> str:
    low = name.lower()
    body = low[1:] if pseudo and low.startswith(":") else low
    if not body or not set(body) <= _TOKEN:
        raise Refused(f"{name!r} is no name of a header")
    return low


def _edit(holder: Any, which: str) -> HeaderEdit:
    sets: list[tuple[str, str]] = []
    adds: list[tuple[str, str]] = []
    for option in getattr(holder, f"{which}_headers_to_add"):
        name, value = _header_name(option.header.key), option.header.value
        if any((ord(c) < 32 and c != "\t") or ord(c) == 127 for c in value):
            raise Refused(f"the value of the header {name} has a control character")
        if "%" in value.replace("%%", ""):
            raise Refused(f"the value {value!r} of the header {name} has a command operator (%...%), "
                          "which is not supported; write %% for a percent sign")
        if option.HasField("append"):
            add = option.append.value
        elif option.append_action in (APPEND, OVERWRITE):
            add = option.append_action == APPEND
        else:
            said = APPEND_NAMES.get(option.append_action, option.append_action)
            raise Refused(f"append_action {said} of the header {name} is not supported")
        (adds if add else sets).append((name, value.replace("%%", "%")))
    removes = tuple(_header_name(name) for name in getattr(holder, f"{which}_headers_to_remove"))
    return HeaderEdit(removes, tuple(sets), tuple(adds))


# -- clusters and endpoints -----------------------------------------------------------------------------------------


def _service_of(name: str, message: Any) -> str:
    """Service.key for metrics. Istio's metadata names it; else the host of `outbound|port|subset|host` has to do."""
    if "istio" in message.metadata.filter_metadata:
        fields = message.metadata.filter_metadata["istio"].fields
        for value in fields["services"].list_value.values if "services" in fields else ():
            one = value.struct_value.fields
            if "host" in one and "namespace" in one:
                return f"{one['namespace'].string_value}/{one['host'].string_value}"
    host = name.rpartition("|")[2]
    labels = host.split(".")
    return f"{labels[1]}/{host}" if len(labels) > 2 and labels[2] == "svc" else f"/{host}"


def _endpoints(assignment: Any) -> tuple[Endpoint, ...]:
    found: dict[tuple[str, int], Endpoint] = {}
    for locality in assignment.endpoints:
        if locality.priority:
            raise Refused(f"endpoints of priority {locality.priority} are not supported; only 0 is")
        for one in locality.lb_endpoints:
            socket = one.endpoint.address.socket_address
            try:
                address = address_of(socket.address)
            except ValueError:
                raise Refused(f"the endpoint {socket.address!r} is no IP address") from None
            if not 0 < socket.port_value < 65536:
                raise Refused(f"the endpoint {address} has the port {socket.port_value}")
            weight = one.load_balancing_weight.value if one.HasField("load_balancing_weight") else 1
            if not 0 < weight <= WEIGHT_BOUND:
                raise Refused(f"the endpoint {address} has the weight {weight}; at least 1 is expected")
            key = str(address), socket.port_value
            if key in found:
                raise Refused(f"the endpoint {address}:{socket.port_value} is there twice")
            found[key] = Endpoint(address, socket.port_value, weight, one.health_status not in SICK)
    return tuple(found.values())


def _milliseconds(message: Any, field: str, default: int) -> int:
    if not message.HasField(field):
        return default
    duration = getattr(message, field)
    value: int = duration.seconds * 1000 + -(-duration.nanos // 1_000_000)  # up: 0.5 ms is not "none"
    if not 0 <= value <= MILLISECONDS_BOUND:
        raise Refused(f"{field} of {value} ms; 0 to {MILLISECONDS_BOUND} ms are expected")
    return value


def _full(type_url: TypeUrl, scope: str, name: str) -> str:
    return name if name.startswith(XDSTP) else xdstp(type_url, scope, name)


def _short(name: str, scope: str) -> str:
    """The name of a cluster within its scope, from its full or short name."""
    if not name:
        raise Refused("a cluster without name")
    if not name.startswith(XDSTP):
        return name
    found = parse_xdstp(TypeUrl.CLUSTER, name)
    if found.scope != scope:
        raise Refused(f"the cluster {name} is of another scope than {scope}")
    return found.name


DECODERS: dict[TypeUrl, Callable[[str, Any], ListenerPart | RoutePart | ClusterPart | EndpointsPart]] = {
    TypeUrl.LISTENER: decode_listener,
    TypeUrl.ROUTE: decode_routes,
    TypeUrl.CLUSTER: decode_cluster,
    TypeUrl.ENDPOINTS: decode_endpoints,
}
