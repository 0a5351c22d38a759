"""From protobuf to the agent's types: what is understood, and what is refused in words that an operator can use."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from ipaddress import ip_address
from typing import Any

import pytest

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
from agent.model.workload import Protocol, Service, ServicePort, Tunnel, Workload, WorkloadPort
from agent.xds.decode import Refused, decode
from agent.xds.tree import ClusterPart, EndpointsPart, ListenerPart, RoutePart
from agent.xds.types import TypeUrl, xdstp
from protos.gen.envoy.config.cluster.v3 import cluster_pb2
from protos.gen.envoy.config.endpoint.v3 import endpoint_pb2
from protos.gen.envoy.config.listener.v3 import listener_pb2
from protos.gen.envoy.config.route.v3 import route_pb2
from protos.gen.envoy.extensions.filters.http.router.v3 import router_pb2
from protos.gen.envoy.extensions.filters.network.http_connection_manager.v3 import http_connection_manager_pb2 as hcm
from protos.gen.envoy.extensions.filters.network.tcp_proxy.v3 import tcp_proxy_pb2
from protos.gen.istio import workload_pb2

SCOPE, AUTHORITY = "ns=default", "reviews.default.svc.cluster.local:9080"
HOST = "reviews.default.svc.cluster.local"
KEY = f"default/{HOST}"
V1 = f"outbound|9080|v1|{HOST}"
UID = "Kubernetes//Pod/default/reviews-v1-0"


def name(kind: TypeUrl, short: str = AUTHORITY) -> str:
    return xdstp(kind, SCOPE, short)


def workload(**changes: Any) -> Any:
    message = workload_pb2.Workload(
        uid=UID, name="reviews-v1-0", namespace="default", addresses=[b"\x0a\xf4\x01\x05"], node="n1",
        canonical_name="reviews", canonical_revision="v1", workload_name="reviews-v1", cluster_id="Kubernetes")
    port = workload_pb2.Port(service_port=9080, target_port=9081, app_protocol=workload_pb2.HTTP11)
    message.services[KEY].ports.append(port)
    for field, value in changes.items():
        setattr(message, field, value)
    return message


def address(**which: Any) -> bytes:
    data: bytes = workload_pb2.Address(**which).SerializeToString()
    return data


def test_a_workload_becomes_what_the_mesh_knows_of_a_pod() -> None:
    assert decode(TypeUrl.ADDRESS, UID, address(workload=workload())) == Workload(
        uid=UID, name="reviews-v1-0", namespace="default", addresses=(ip_address("10.244.1.5"),), node="n1",
        service_account="default", trust_domain="cluster.local", workload_name="reviews-v1",
        workload_type="deployment", canonical_name="reviews", canonical_revision="v1", cluster_id="Kubernetes",
        healthy=True, ports=(WorkloadPort(KEY, 9080, 9081, Protocol.HTTP),))


def test_enum_values_of_a_newer_control_plane_do_not_cost_a_workload() -> None:
    message = workload(workload_type=99, tunnel_protocol=99, status=99)
    message.services[KEY].ports[0].app_protocol = 99
    decoded = decode(TypeUrl.ADDRESS, UID, address(workload=message))
    assert isinstance(decoded, Workload)
    assert (decoded.workload_type, decoded.healthy, decoded.ports[0].protocol) == ("unknown", True, Protocol.AUTO)
    assert decoded.tunnel is Tunnel.HBONE  # an unknown tunnel must fail, not become plain text


@pytest.mark.parametrize(("wire", "tunnel"), [(0, Tunnel.NONE), (1, Tunnel.HBONE), (2, Tunnel.NONE)])
def test_a_workload_says_who_it_is_how_it_is_reached_and_what_selects_it(wire: int, tunnel: Tunnel) -> None:
    message = workload(trust_domain="example.org", service_account="reviews", tunnel_protocol=wire)
    message.authorization_policies.extend(["default/b", "istio-system/a"])
    decoded = decode(TypeUrl.ADDRESS, UID, address(workload=message))
    assert isinstance(decoded, Workload)
    assert (decoded.identity, decoded.tunnel, decoded.policies) == (
        "spiffe://example.org/ns/default/sa/reviews", tunnel, ("default/b", "istio-system/a"))


def test_a_workload_in_the_host_network_is_never_found_by_its_nodes_address() -> None:
    decoded = decode(TypeUrl.ADDRESS, UID, address(workload=workload(network_mode=1)))
    assert isinstance(decoded, Workload) and decoded.addresses == ()


def service(**changes: Any) -> Any:
    message = workload_pb2.Service(name="reviews", namespace="default", hostname=HOST)
    message.addresses.add(address=b"\x0a\x60\x00\x01")
    message.addresses.add(address=ip_address("fd00::1").packed)
    message.ports.add(service_port=9080, target_port=9080, app_protocol=workload_pb2.HTTP11)
    message.ports.add(service_port=9090)
    for field, value in changes.items():
        setattr(message, field, value)
    return message


def test_a_service_keeps_its_addresses_ports_and_protocols() -> None:
    assert decode(TypeUrl.ADDRESS, KEY, address(service=service())) == Service(
        "default", HOST, "reviews", (ip_address("10.96.0.1"), ip_address("fd00::1")),
        (ServicePort(9080, 9080, Protocol.HTTP), ServicePort(9090, 0, Protocol.AUTO)))


def test_a_mapped_address_is_the_ipv4_address_it_stands_for() -> None:
    """In services, workloads and endpoints: the wire has it as IPv4, and a worker would never find the other form."""
    mapped, plain = ip_address("::ffff:10.96.0.1"), ip_address("10.96.0.1")
    message = service()
    message.addresses[0].address = mapped.packed
    message.addresses[0].length = 128
    decoded = decode(TypeUrl.ADDRESS, KEY, address(service=message))
    assert isinstance(decoded, Service) and decoded.addresses == (plain, ip_address("fd00::1"))
    pod = decode(TypeUrl.ADDRESS, UID, address(workload=workload_pb2.Workload(uid=UID, addresses=[mapped.packed, plain.packed])))
    assert isinstance(pod, Workload) and pod.addresses == (plain,)
    assert of(TypeUrl.ENDPOINTS, assignment((str(mapped), 9080)), V1).endpoints == (Endpoint(plain, 9080),)


def _with_range(message: Any) -> Any:
    message.addresses[0].length = 24
    return message


def _with_waypoint(message: Any) -> Any:
    message.waypoint.hbone_mtls_port = 15008
    return message


def _with_port(message: Any) -> Any:
    message.ports[0].service_port = 70000
    return message


@pytest.mark.parametrize(("resource", "body", "said"), [
    (UID, b"\xff\xff", "its bytes are no Address"),
    (UID, b"", "neither a workload nor a service"),
    ("other", address(workload=workload()), "came under this name but its uid is"),
    (UID, address(workload=workload(uid="")), "without uid"),
    (KEY, address(service=service(hostname="")), "without hostname"),
    (KEY, address(service=_with_range(service())), "10.96.0.1/24 is a range"),
    (KEY, address(service=_with_waypoint(service())), "istio.io/use-waypoint"),
    (KEY, address(service=_with_port(service())), "port 70000"),
    (UID, address(workload=workload_pb2.Workload(uid=UID, addresses=[b"abc"])), "an address of 3 bytes"),
    ("x" * 2000, address(workload=workload(uid="x" * 2000)), "2000 characters"),
])
def test_a_bad_address_is_refused_with_its_reason(resource: str, body: bytes, said: str) -> None:
    with pytest.raises(Refused, match=said):
        decode(TypeUrl.ADDRESS, resource, body)


# -- listeners ------------------------------------------------------------------------------------------------------


def manager(**fields: Any) -> Any:
    message = hcm.HttpConnectionManager(stat_prefix="x", **fields)
    router = message.http_filters.add(name="envoy.filters.http.router")
    router.typed_config.Pack(router_pb2.Router())
    return message


def listener(api: Any = None, tcp: Any = None) -> Any:
    message = listener_pb2.Listener(name=name(TypeUrl.LISTENER))
    if api is not None:
        message.api_listener.api_listener.Pack(api)
    if tcp is not None:
        message.default_filter_chain.filters.add(name="tcp").typed_config.Pack(tcp)
    return message


def rds(route_config_name: str = "") -> Any:
    return manager(rds=hcm.Rds(route_config_name=route_config_name or name(TypeUrl.ROUTE)))


def of(kind: TypeUrl, message: Any, short: str = AUTHORITY) -> Any:
    return decode(kind, name(kind, short), message.SerializeToString())


def test_an_http_listener_names_its_routes() -> None:
    assert of(TypeUrl.LISTENER, listener(rds())) == ListenerPart(SCOPE, AUTHORITY, None, name(TypeUrl.ROUTE), None)
    assert of(TypeUrl.LISTENER, listener(rds(AUTHORITY))) == of(TypeUrl.LISTENER, listener(rds()))


def test_a_tcp_listener_names_its_clusters_in_full_or_short() -> None:
    for text in (V1, name(TypeUrl.CLUSTER, V1)):
        part = of(TypeUrl.LISTENER, listener(tcp=tcp_proxy_pb2.TcpProxy(cluster=text)))
        assert part == ListenerPart(SCOPE, AUTHORITY, None, None, (WeightedCluster(V1, 1),))


def test_a_sniffed_listener_has_both() -> None:
    weighted = tcp_proxy_pb2.TcpProxy()
    weighted.weighted_clusters.clusters.add(name="a", weight=3)
    weighted.weighted_clusters.clusters.add(name="b", weight=0)
    part = of(TypeUrl.LISTENER, listener(rds(), weighted))
    assert part.rds == name(TypeUrl.ROUTE) and part.tcp == (WeightedCluster("a", 3),)


def test_an_inline_route_table_needs_no_further_question() -> None:
    part = of(TypeUrl.LISTENER, listener(manager(route_config=routes())))
    assert part.rds is None and part.http[0].name == "reviews"


def _filtered() -> Any:
    message = manager(rds=hcm.Rds(route_config_name="r"))
    message.http_filters.add(name="envoy.filters.http.lua").typed_config.type_url = "type.googleapis.com/x.v3.Lua"
    return listener(message)


def _two_filters() -> Any:
    message = listener(tcp=tcp_proxy_pb2.TcpProxy(cluster="a"))
    message.default_filter_chain.filters.add(name="more")
    return message


def _sockets() -> Any:
    message = listener(rds())
    message.filter_chains.add()
    return message


@pytest.mark.parametrize(("message", "said"), [
    (listener(), "neither an api_listener"),
    (_filtered(), r"the HTTP filter envoy.filters.http.lua \(x.v3.Lua\) is not supported"),
    (_two_filters(), "has 2 filters"),
    (_sockets(), "filter_chains of Listener is not supported"),
    (listener(tcp_proxy_pb2.TcpProxy(cluster="a")), "HttpConnectionManager is expected"),
    (listener(tcp=tcp_proxy_pb2.TcpProxy()), "names no cluster"),
    (listener(hcm.HttpConnectionManager()), "no routes"),
    (listener(tcp=tcp_proxy_pb2.TcpProxy(cluster=xdstp(TypeUrl.CLUSTER, "ns=other", "a"))), "another scope"),
])
def test_a_listener_that_we_cannot_honour_is_refused(message: Any, said: str) -> None:
    with pytest.raises(Refused, match=said):
        of(TypeUrl.LISTENER, message)


@pytest.mark.parametrize("resource", ["reviews:9080", "xdstp:///envoy.config.listener.v3.Listener/reviews:9080"])
def test_a_name_without_scope_is_refused(resource: str) -> None:
    with pytest.raises(Refused, match="name"):
        decode(TypeUrl.LISTENER, resource, listener(rds()).SerializeToString())


# -- routes ---------------------------------------------------------------------------------------------------------


def routes(edit: Callable[[Any], None] = lambda _: None) -> Any:
    message = route_pb2.RouteConfiguration(name=name(TypeUrl.ROUTE))
    host = message.virtual_hosts.add(name="reviews", domains=["*"])
    route = host.routes.add(name="main")
    route.match.prefix = "/"
    route.route.cluster = V1
    route.route.timeout.seconds = 0
    edit(route)
    return message


def decoded_route(edit: Callable[[Any], None]) -> Route:
    part = of(TypeUrl.ROUTE, routes(edit))
    assert isinstance(part, RoutePart)
    return part.hosts[0].routes[0]


PLAIN = Route("main", RouteMatch(StringMatch(MatchKind.PREFIX, "/")), (WeightedCluster(V1, 1),))


def test_a_plain_route() -> None:
    assert of(TypeUrl.ROUTE, routes()) == RoutePart(SCOPE, AUTHORITY, (VirtualHost("reviews", ("*",), (PLAIN,)),))


def test_jason_goes_elsewhere_by_header_and_everything_of_a_match_is_kept() -> None:
    def edit(route: Any) -> None:
        route.match.path_separated_prefix = "/api"
        route.match.case_sensitive.value = False
        route.match.headers.add(name="End-User").string_match.exact = "jason"
        route.match.headers.add(name="x", invert_match=True).string_match.safe_regex.regex = "a.*b"
        route.match.headers.add(name=":method", treat_missing_header_as_empty=True).string_match.prefix = "G"
        route.match.headers.add(name="there", present_match=True)
        route.match.headers.add(name="absent", present_match=False)
        route.match.headers.add(name="gone", present_match=True, invert_match=True)
        route.match.query_parameters.add(name="q").string_match.contains = "z"
        route.match.query_parameters.add(name="p", present_match=True)

    def header(of_name: str, kind: MatchKind, value: str = "", invert: bool = False, empty: bool = False) -> NamedMatch:
        return NamedMatch(of_name, StringMatch(kind, value, invert=invert), empty)

    assert decoded_route(edit).match == RouteMatch(
        StringMatch(MatchKind.PATH_SEPARATED_PREFIX, "/api", ignore_case=True),
        (header("end-user", MatchKind.EXACT, "jason"), header("x", MatchKind.REGEX, "a.*b", invert=True),
         header(":method", MatchKind.PREFIX, "G", empty=True), header("there", MatchKind.PRESENT),
         header("absent", MatchKind.PRESENT, invert=True), header("gone", MatchKind.PRESENT, invert=True)),
        (header("q", MatchKind.CONTAINS, "z"), header("p", MatchKind.PRESENT)))


def test_weights_headers_and_timeout() -> None:
    def edit(route: Any) -> None:
        route.route.timeout.nanos = 500_000
        for short, weight in (("v1", 90), ("v2", 10), ("v3", 0)):
            one = route.route.weighted_clusters.clusters.add(name=short)
            one.weight.value = weight
        first = route.route.weighted_clusters.clusters[0]
        first.request_headers_to_add.add(append_action=2).header.key = "X-Canary"
        first.request_headers_to_add[0].header.value = "100%%"
        route.response_headers_to_add.add().header.key = "x-added"
        route.request_headers_to_remove.append("X-Secret")

    assert decoded_route(edit) == replace(
        PLAIN, timeout_ms=1, request=HeaderEdit(remove=("x-secret",)), response=HeaderEdit(add=(("x-added", ""),)),
        clusters=(WeightedCluster("v1", 90, HeaderEdit(set=(("x-canary", "100%"),))), WeightedCluster("v2", 10)))


def test_a_route_that_says_no_timeout_has_envoys() -> None:
    assert decoded_route(lambda route: route.route.ClearField("timeout")).timeout_ms == 15_000


def _append_action(route: Any) -> None:
    route.request_headers_to_add.add(append_action=1).header.key = "x"


def _value(value: str) -> Callable[[Any], None]:
    def edit(route: Any) -> None:
        option = route.request_headers_to_add.add()
        option.header.key, option.header.value = "x", value
    return edit


def _weights(*weights: int) -> Callable[[Any], None]:
    def edit(route: Any) -> None:
        for weight in weights:
            route.route.weighted_clusters.clusters.add(name="c").weight.value = weight
    return edit


def _unknown(number: int) -> Callable[[Any], None]:
    """Set a field that our messages leave out, as its bytes: an empty message."""
    return lambda route: route.route.MergeFromString(bytes([number << 3 & 0x7F | 2 | 0x80 * (number > 15)])
                                                     + (bytes([number >> 4]) if number > 15 else b"") + b"\0")


@pytest.mark.parametrize(("edit", "said"), [
    (lambda route: route.ClearField("route"), r"route main: its action \(none\) is not supported"),
    (lambda route: route.match.ClearField("prefix"), "its match has no path"),
    (lambda route: setattr(route.match.safe_regex, "regex", "a("), "is not RE2: missing \\)"),
    (lambda route: setattr(route.match.safe_regex, "regex", "a" * 5000), "5000 bytes"),
    (lambda route: route.match.headers.add(name="a b"), "'a b' is no name of a header"),
    (lambda route: route.match.runtime_fraction.default_value.SetInParent(), "runtime_fraction of RouteMatch"),
    (_append_action, "append_action ADD_IF_ABSENT of the header x"),
    (_value("%REQ(x)%"), "command operator"),
    (_value("a\r\nb: c"), "control character"),
    (_weights(0, 0), "add up to 0"),
    (_weights(0xFFFFFFFF, 1), "add up to 4294967296"),
    (_unknown(9), "retry_policy of RouteAction is not supported"),
    (_unknown(30), "request_mirror_policies of RouteAction is not supported"),
    (_unknown(14), "field number 14 of RouteAction is not supported"),
    (lambda route: setattr(route.route.timeout, "seconds", -1), "timeout of -1000 ms"),
])
def test_a_route_that_we_cannot_honour_is_refused_by_name(edit: Callable[[Any], None], said: str) -> None:
    with pytest.raises(Refused, match=said):
        decoded_route(edit)


def test_where_in_the_table_the_bad_field_is_stands_in_the_reason() -> None:
    with pytest.raises(Refused, match=r"virtual_hosts\[reviews\]\.routes\[main\]\.route\.retry_policy"):
        decoded_route(_unknown(9))


def test_a_domain_in_two_virtual_hosts_is_refused() -> None:
    message = routes()
    message.virtual_hosts.add(name="other", domains=["*"])
    with pytest.raises(Refused, match=r"the domain \* is in the virtual hosts reviews and other"):
        of(TypeUrl.ROUTE, message)


# -- clusters and endpoints -----------------------------------------------------------------------------------------


def cluster(**changes: Any) -> Any:
    message = cluster_pb2.Cluster(name=name(TypeUrl.CLUSTER, V1), type=3, lb_policy=1)
    message.connect_timeout.seconds = 10
    message.eds_cluster_config.service_name = name(TypeUrl.ENDPOINTS, V1)
    for field, value in changes.items():
        setattr(message, field, value)
    return message


def test_a_cluster_knows_its_service_and_where_its_endpoints_come_from() -> None:
    assert of(TypeUrl.CLUSTER, cluster(), V1) == ClusterPart(
        Cluster(SCOPE, V1, KEY, Balancer.LEAST_REQUEST, 10_000, ()), name(TypeUrl.ENDPOINTS, V1))


def test_the_service_of_istios_metadata_comes_before_what_the_name_suggests() -> None:
    message = cluster()
    message.metadata.filter_metadata["istio"].update({"services": [{"host": "h.example", "namespace": "prod"}]})
    assert of(TypeUrl.CLUSTER, message, V1).cluster.service == "prod/h.example"


@pytest.mark.parametrize(("message", "said"), [
    (cluster(lb_policy=2), "lb_policy RING_HASH is not supported; use ROUND_ROBIN"),
    (cluster(type=1), "type STRICT_DNS is not supported; use EDS"),
    (cluster(type=0), "STATIC without load_assignment"),
    (cluster_pb2.Cluster(type=3, connect_timeout={}), "connect_timeout is 0"),
    (cluster_pb2.Cluster.FromString(bytes([10 << 3 | 2, 0])), "circuit_breakers of Cluster is not supported"),
])
def test_a_cluster_that_we_cannot_honour_is_refused(message: Any, said: str) -> None:
    with pytest.raises(Refused, match=said):
        of(TypeUrl.CLUSTER, message, V1)


def assignment(*ends: tuple[str, int], health: int = 0, priority: int = 0, weight: int | None = None) -> Any:
    message = endpoint_pb2.ClusterLoadAssignment(cluster_name=V1)
    locality = message.endpoints.add(priority=priority)
    for ip, port in ends:
        one = locality.lb_endpoints.add(health_status=health)
        one.endpoint.address.socket_address.address = ip
        one.endpoint.address.socket_address.port_value = port
        if weight is not None:
            one.load_balancing_weight.value = weight
    return message


def test_endpoints_of_all_localities() -> None:
    message = assignment(("10.0.0.1", 9080), weight=3)
    message.MergeFrom(assignment(("fd00::1", 9080), health=2))
    assert of(TypeUrl.ENDPOINTS, message, V1) == EndpointsPart(SCOPE, V1, (
        Endpoint(ip_address("10.0.0.1"), 9080, 3), Endpoint(ip_address("fd00::1"), 9080, 1, healthy=False)))


@pytest.mark.parametrize(("health", "healthy"), [(0, True), (1, True), (2, False), (3, False), (4, False), (5, True),
                                                 (99, True)])
def test_health_states(health: int, healthy: bool) -> None:
    assert of(TypeUrl.ENDPOINTS, assignment(("10.0.0.1", 1), health=health), V1).endpoints[0].healthy is healthy


@pytest.mark.parametrize(("message", "said"), [
    (assignment(("reviews", 9080)), "'reviews' is no IP address"),
    (assignment(("10.0.0.1", 0)), "has the port 0"),
    (assignment(("10.0.0.1", 1), ("10.0.0.1", 1)), "is there twice"),
    (assignment(("10.0.0.1", 1), priority=1), "priority 1"),
    (assignment(("10.0.0.1", 1), weight=0), "weight 0"),
])
def test_bad_endpoints_are_refused(message: Any, said: str) -> None:
    with pytest.raises(Refused, match=said):
        of(TypeUrl.ENDPOINTS, message, V1)
