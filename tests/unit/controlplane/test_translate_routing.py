"""VirtualService and DestinationRule as LDS, RDS, CDS, EDS: exactly what goes over the wire, and that our agent takes all of it."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict

from agent.model.routing import MatchKind
from agent.xds import decode
from agent.xds.tree import ClusterPart, EndpointsPart, ListenerPart, RoutePart
from controlplane.model.mesh import Mesh, Touched
from controlplane.translate.catalog import MAKERS, Catalog
from controlplane.translate.names import TypeUrl, full_name, parse, short_name
from tests.support.manifests import REVIEWS, SUBSETS, destination_rule, good, mesh_of, pod, service, virtual_service

HOST = "reviews.default.svc.cluster.local"


def resource(
    mesh: Mesh, type_url: TypeUrl, host: str = HOST, port: int = 9080, subset: str = "", scope: str = "default", plain: bool = True
) -> Any:
    """As a dictionary, with short names; None when it does not exist."""
    short = short_name(type_url, host, port, subset)
    message = MAKERS[type_url](mesh, parse(type_url, short if plain else full_name(type_url, short, scope), scope))
    return None if message is None else MessageToDict(message)


def routes(mesh: Mesh, **more: Any) -> list[dict[str, Any]]:
    found = resource(mesh, TypeUrl.ROUTE, **more)
    assert len(found["virtualHosts"]) == 1
    held: list[dict[str, Any]] = found["virtualHosts"][0]["routes"]
    return held


def as_agent(mesh: Mesh, type_url: TypeUrl, host: str = HOST, port: int = 9080, subset: str = "", scope: str = "default") -> Any:
    """What our agent makes of the resource; fails when it refuses anything in it."""
    name = full_name(type_url, short_name(type_url, host, port, subset), scope)
    found = Catalog(mesh).resource(parse(type_url, name, "other"))
    assert found is not None
    return decode.decode(type_url, name, found.content)


# -- listeners ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("port", "api", "chain"),
    [
        ("{name: http, port: 9080}", True, False),
        ("{port: 9080}", True, True),
        ("{name: tcp, port: 9080}", False, True),
        ("{name: grpc, port: 9080}", False, True),
        ("{name: http2, port: 9080}", False, True),
        ("{name: tls, port: 9080}", False, True),
    ],
)
def test_the_declared_protocol_decides_what_a_listener_holds(port: str, api: bool, chain: bool) -> None:
    mesh = mesh_of(service("reviews", f"[{port}]"))
    found = resource(mesh, TypeUrl.LISTENER)
    assert ("apiListener" in found, "defaultFilterChain" in found) == (api, chain)
    assert (resource(mesh, TypeUrl.ROUTE) is not None) is api
    part = as_agent(mesh, TypeUrl.LISTENER)
    assert isinstance(part, ListenerPart) and (part.rds is not None, part.tcp is not None) == (api, chain)


def test_a_listener_names_its_routes_in_the_clients_own_form() -> None:
    mesh = mesh_of(REVIEWS)
    manager = resource(mesh, TypeUrl.LISTENER)["apiListener"]["apiListener"]
    assert manager == {
        "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "rds": {"configSource": {"ads": {}, "resourceApiVersion": "V3"}, "routeConfigName": f"{HOST}:9080"},
        "httpFilters": [
            {
                "name": "envoy.filters.http.router",
                "typedConfig": {"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"},
            }
        ],
    }
    found = resource(mesh, TypeUrl.LISTENER, plain=False, scope="shop")
    assert found["name"] == f"xdstp:///envoy.config.listener.v3.Listener/{HOST}:9080?ns=shop"
    assert found["apiListener"]["apiListener"]["rds"]["routeConfigName"] == (
        f"xdstp:///envoy.config.route.v3.RouteConfiguration/{HOST}:9080?ns=shop"
    )


@pytest.mark.parametrize(("host", "port"), [("gone.default.svc.cluster.local", 9080), (HOST, 1), ("reviews", 9080)])
def test_what_is_not_there_is_not_made(host: str, port: int) -> None:
    mesh = mesh_of(REVIEWS)
    for type_url in MAKERS:
        assert resource(mesh, type_url, host, port) is None
    assert resource(mesh, TypeUrl.CLUSTER, subset="v9") is None and resource(mesh, TypeUrl.ENDPOINTS, subset="v9") is None


# -- routes ---------------------------------------------------------------------------------------------------------


def test_a_host_without_rules_has_one_route_without_timeout() -> None:
    mesh = mesh_of(REVIEWS)
    assert routes(mesh) == [{"name": "default", "match": {"prefix": "/"}, "route": {"cluster": f"outbound|9080||{HOST}", "timeout": "0s"}}]
    host = resource(mesh, TypeUrl.ROUTE)["virtualHosts"][0]
    names = [HOST, "reviews.default.svc", "reviews.default", "reviews", "10.96.0.10"]
    assert host["domains"] == [text for name in names for text in (name, f"{name}:9080")] + ["*"]
    assert "reviews" not in resource(mesh, TypeUrl.ROUTE, plain=False, scope="shop")["virtualHosts"][0]["domains"]
    part = as_agent(mesh, TypeUrl.ROUTE)
    assert isinstance(part, RoutePart) and part.hosts[0].routes[0].timeout_ms == 0


def test_an_ipv6_address_is_a_domain_in_brackets() -> None:
    mesh = mesh_of(service("reviews", "[{name: http, port: 9080}]", ip="fd00::1"))
    assert {"[fd00::1]", "[fd00::1]:9080"} <= set(resource(mesh, TypeUrl.ROUTE)["virtualHosts"][0]["domains"])


def test_every_match_and_edit_goes_over_the_wire() -> None:
    mesh = mesh_of(
        REVIEWS,
        virtual_service(
            "vs",
            """
hosts: [reviews]
http:
- name: a
  timeout: 1.5s
  match:
  - name: m
    uri: {exact: /x}
    ignoreUriCase: true
    method: {exact: GET}
    authority: {prefix: rev}
    headers: {end-user: {exact: jason}, x-there: {}}
    withoutHeaders: {x-bot: {regex: "b.*"}, x-none: {}}
    queryParams: {q: {prefix: a}, r: {}}
  headers: {request: {set: {a: "1"}, add: {b: "2"}, remove: [c]}, response: {set: {d: ""}}}
  route: [{destination: {host: reviews, subset: v1}, headers: {request: {set: {e: "3"}}}}]
- match: [{uri: {regex: "/r[0-9]+"}, ignoreUriCase: true}, {uri: {prefix: /p}}]
  route: [{destination: {host: reviews, subset: v2}}]
- route: [{destination: {host: reviews}}]
""",
        ),
    )
    found = routes(mesh)
    assert found[0] == {
        "name": "a.m",
        "match": {
            "path": "/x",
            "caseSensitive": False,
            "headers": [
                {"name": ":method", "stringMatch": {"exact": "GET"}},
                {"name": ":authority", "stringMatch": {"prefix": "rev"}},
                {"name": "end-user", "stringMatch": {"exact": "jason"}},
                {"name": "x-there", "presentMatch": True},
                {"name": "x-bot", "stringMatch": {"safeRegex": {"regex": "b.*"}}, "invertMatch": True, "treatMissingHeaderAsEmpty": True},
                {"name": "x-none", "presentMatch": True, "invertMatch": True},
            ],
            "queryParameters": [{"name": "q", "stringMatch": {"prefix": "a"}}, {"name": "r", "presentMatch": True}],
        },
        "route": {"cluster": f"outbound|9080|v1|{HOST}", "timeout": "1.500s"},
        "requestHeadersToAdd": [
            {"header": {"key": "a", "value": "1"}, "appendAction": "OVERWRITE_IF_EXISTS_OR_ADD"},
            {"header": {"key": "b", "value": "2"}},
            {"header": {"key": "e", "value": "3"}, "appendAction": "OVERWRITE_IF_EXISTS_OR_ADD"},
        ],
        "requestHeadersToRemove": ["c"],
        "responseHeadersToAdd": [{"header": {"key": "d"}, "appendAction": "OVERWRITE_IF_EXISTS_OR_ADD", "keepEmptyValue": True}],
    }
    assert [(one["name"], one["match"]) for one in found[1:]] == [
        ("default/vs[1]", {"safeRegex": {"regex": "/r[0-9]+"}}),
        ("default/vs[1]", {"prefix": "/p"}),
        ("default/vs[2]", {"prefix": "/"}),
    ]
    part = as_agent(mesh, TypeUrl.ROUTE)
    assert isinstance(part, RoutePart)
    one = part.hosts[0].routes[0]
    assert (one.timeout_ms, one.request.remove, one.request.set) == (1500, ("c",), (("a", "1"), ("e", "3")))
    assert one.match.path.kind is MatchKind.EXACT and one.match.path.ignore_case and len(one.match.headers) == 6


def test_weights_and_headers_of_a_destination_stay_with_it_and_nothing_goes_to_a_weight_of_zero() -> None:
    mesh = mesh_of(
        REVIEWS,
        virtual_service(
            "vs",
            """
hosts: [reviews]
http:
- route:
  - {destination: {host: reviews, subset: v1}, weight: 90, headers: {response: {add: {x: "1"}}}}
  - {destination: {host: reviews, subset: v2}, weight: 10}
  - {destination: {host: reviews}, weight: 0}
""",
        ),
    )
    assert routes(mesh)[0]["route"]["weightedClusters"]["clusters"] == [
        {"name": f"outbound|9080|v1|{HOST}", "weight": 90, "responseHeadersToAdd": [{"header": {"key": "x", "value": "1"}}]},
        {"name": f"outbound|9080|v2|{HOST}", "weight": 10},
    ]
    part = as_agent(mesh, TypeUrl.ROUTE)
    assert [(one.cluster, one.weight) for one in part.hosts[0].routes[0].clusters] == [
        (f"outbound|9080|v1|{HOST}", 90),
        (f"outbound|9080|v2|{HOST}", 10),
    ]


def test_a_route_for_another_port_is_left_out_and_a_port_without_any_has_the_default() -> None:
    mesh = mesh_of(
        service("reviews", "[{name: http, port: 80}, {name: http-b, port: 81}, {name: http-c, port: 82}]"),
        virtual_service(
            "vs",
            """
hosts: [reviews]
http:
- name: only-80
  match: [{port: 80}]
  route: [{destination: {host: reviews}}]
- name: only-81
  match: [{port: 81}]
  route: [{destination: {host: reviews, port: {number: 80}}}]
""",
        ),
    )
    assert [[(one["name"], one["route"]["cluster"]) for one in routes(mesh, port=port)] for port in (80, 81, 82)] == [
        [("only-80", f"outbound|80||{HOST}")],
        [("only-81", f"outbound|80||{HOST}")],
        [("default", f"outbound|82||{HOST}")],
    ]


def test_a_destination_without_port_means_the_only_port_of_its_host() -> None:
    mesh = mesh_of(
        REVIEWS,
        service("other", "[{name: http, port: 7000}]", ip="10.96.0.20"),
        virtual_service("vs", "hosts: [reviews]\nhttp: [{route: [{destination: {host: other}}]}]"),
    )
    assert routes(mesh)[0]["route"]["cluster"] == "outbound|7000||other.default.svc.cluster.local"


# -- clusters and endpoints -----------------------------------------------------------------------------------------


def test_a_cluster_says_whom_it_stands_for_and_where_its_endpoints_are() -> None:
    mesh = mesh_of(REVIEWS)
    assert resource(mesh, TypeUrl.CLUSTER, subset="v1") == {
        "name": f"outbound|9080|v1|{HOST}",
        "type": "EDS",
        "connectTimeout": "10s",
        "lbPolicy": "LEAST_REQUEST",
        "edsClusterConfig": {"edsConfig": {"ads": {}, "resourceApiVersion": "V3"}, "serviceName": f"outbound|9080|v1|{HOST}"},
        "metadata": {"filterMetadata": {"istio": {"services": [{"host": HOST, "name": "reviews", "namespace": "default"}]}}},
    }
    part = as_agent(mesh, TypeUrl.CLUSTER, subset="v1")
    assert isinstance(part, ClusterPart) and (part.cluster.name, part.cluster.service) == (f"outbound|9080|v1|{HOST}", f"default/{HOST}")


def test_a_subset_overrides_its_host_and_the_host_the_default() -> None:
    mesh = mesh_of(
        REVIEWS,
        destination_rule(
            "reviews",
            """
host: reviews
trafficPolicy: {loadBalancer: {simple: ROUND_ROBIN}, connectionPool: {tcp: {connectTimeout: 250ms}}}
subsets:
- {name: v1, labels: {version: v1}, trafficPolicy: {loadBalancer: {simple: RANDOM}}}
- {name: v2, labels: {version: v2}}
""",
            namespace="shop",
        ).replace("host: reviews", f"host: {HOST}"),
    )
    found = [resource(mesh, TypeUrl.CLUSTER, subset=subset, scope="shop", plain=False) for subset in ("", "v1", "v2")]
    assert [(one.get("lbPolicy", "ROUND_ROBIN"), one["connectTimeout"]) for one in found] == [
        ("ROUND_ROBIN", "0.250s"),
        ("RANDOM", "0.250s"),
        ("ROUND_ROBIN", "0.250s"),
    ]
    assert resource(mesh, TypeUrl.CLUSTER, subset="v1")["lbPolicy"] == "LEAST_REQUEST"  # another scope, another rule


def addresses(mesh: Mesh, **more: Any) -> list[str]:
    found = resource(mesh, TypeUrl.ENDPOINTS, **more)
    sockets = [one["endpoint"]["address"]["socketAddress"] for group in found.get("endpoints", ()) for one in group["lbEndpoints"]]
    return [f"{one['address']}:{one['portValue']}" for one in sockets]


def test_endpoints_are_the_ready_pods_of_the_subset() -> None:
    mesh = mesh_of(REVIEWS, pod("reviews-v1-1", "10.244.1.8", "reviews", labels=", version: v1", ready="False"))
    assert addresses(mesh) == ["10.244.1.5:9080", "10.244.2.6:9080"]
    assert addresses(mesh, subset="v2") == ["10.244.2.6:9080"]
    mesh.apply(good(pod("reviews-v1-1", "10.244.1.8", "reviews", labels=", version: v1")).objects.values())
    assert addresses(mesh, subset="v1") == ["10.244.1.5:9080", "10.244.1.8:9080"]
    part = as_agent(mesh, TypeUrl.ENDPOINTS, subset="v1")
    assert isinstance(part, EndpointsPart) and [str(one.address) for one in part.endpoints] == ["10.244.1.5", "10.244.1.8"]


def test_no_pod_is_an_empty_list_and_not_nothing() -> None:
    assert resource(mesh_of(service("reviews", "[{port: 9080}]")), TypeUrl.ENDPOINTS) == {"clusterName": f"outbound|9080||{HOST}"}


def test_pods_that_are_not_ready_are_endpoints_where_the_service_says_so() -> None:
    mesh = mesh_of(
        service("reviews", "[{port: 9080}]", ip="None", more=", publishNotReadyAddresses: true"),
        pod("a", "10.244.0.1", "reviews", ready="False"),
    )
    assert addresses(mesh) == ["10.244.0.1:9080"]


def test_endpoints_have_the_family_and_the_port_of_the_service() -> None:
    text = pod("a", "10.244.0.1", "reviews", ports="{name: web, containerPort: 8080}").replace(
        '{ip: "10.244.0.1"}', "{ip: 10.244.0.1}, {ip: 'fd00::9'}"
    )
    for families, expected in (("[IPv4]", "10.244.0.1:8080"), ("[IPv6]", "fd00::9:8080"), ("[IPv6, IPv4]", "fd00::9:8080")):
        mesh = mesh_of(service("reviews", "[{name: http, port: 9080, targetPort: web}]", ip="None", more=f", ipFamilies: {families}"), text)
        assert addresses(mesh) == [expected]


def test_endpoints_are_grouped_by_where_their_nodes_are() -> None:
    nodes = "".join(
        f"---\napiVersion: v1\nkind: Node\nmetadata: {{name: {name}, labels: {{topology.kubernetes.io/zone: {zone}}}}}\n"
        for name, zone in (("n1", "b"), ("n2", "a"))
    )
    found = resource(mesh_of(REVIEWS, nodes), TypeUrl.ENDPOINTS)["endpoints"]
    assert [(one["locality"], one["loadBalancingWeight"], len(one["lbEndpoints"])) for one in found] == [
        ({"zone": "a"}, 1, 1),
        ({"zone": "b"}, 1, 1),
    ]


# -- names and the catalog ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("type_url", "name"),
    [
        (TypeUrl.LISTENER, "no-port"),
        (TypeUrl.LISTENER, "h:0"),
        (TypeUrl.LISTENER, "h:99999"),
        (TypeUrl.LISTENER, "h:x"),
        (TypeUrl.ROUTE, ":80"),
        (TypeUrl.LISTENER, "xdstp:///envoy.config.route.v3.RouteConfiguration/h:80?ns=a"),
        (TypeUrl.LISTENER, "x" * 3000 + ":80"),
        (TypeUrl.LISTENER, "xdstp:///envoy.config.listener.v3.Listener/h:80"),
        (TypeUrl.LISTENER, "xdstp:///envoy.config.listener.v3.Listener/h:80?ns="),
        (TypeUrl.LISTENER, "xdstp:///envoy.config.listener.v3.Listener/h:80?ns=a&b=c"),
        (TypeUrl.CLUSTER, "inbound|80||h"),
        (TypeUrl.CLUSTER, "outbound|80|h"),
        (TypeUrl.ENDPOINTS, "outbound|80||"),
        (TypeUrl.CLUSTER, ""),
    ],
)
def test_a_name_that_cannot_be_is_refused_in_words(type_url: TypeUrl, name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        parse(type_url, name, "default")


def test_equal_content_has_an_equal_version_and_a_change_remakes_only_its_host() -> None:
    mesh = mesh_of(REVIEWS, service("other", ip="10.96.0.20"))
    catalog = Catalog(mesh)
    asked = [
        parse(TypeUrl.ENDPOINTS, f"outbound|9080||{HOST}", "default"),
        parse(TypeUrl.LISTENER, "other.default.svc.cluster.local:80", "default"),
    ]
    before = [catalog.resource(one) for one in asked]
    assert before == [Catalog(mesh).resource(one) for one in asked] and None not in before
    catalog.update(mesh.apply(good(pod("reviews-v1-0", "10.244.1.5", "reviews", ready="False")).objects.values()))
    after = [catalog.resource(one) for one in asked]
    assert after[0] != before[0] and after[1] is before[1]


def test_addresses_that_are_the_same_after_a_change_are_not_told() -> None:
    mesh = mesh_of(REVIEWS)
    catalog = Catalog(mesh)
    every = Touched(addresses={one.uid for one in mesh.pods()} | {one.address_name for one in mesh.services()})
    assert catalog.update(every) == every.addresses and catalog.update(every) == set()
    assert list(catalog.addresses()) == [f"default/{HOST}", "Kubernetes//Pod/default/reviews-v1-0", "Kubernetes//Pod/default/reviews-v2-0"]


def test_a_rule_with_subsets_for_a_pattern_gives_each_host_its_subsets() -> None:
    mesh = mesh_of(
        REVIEWS.partition("---\napiVersion: networking")[0],
        destination_rule("dr", SUBSETS.replace("reviews", "'*.default.svc.cluster.local'")),
    )
    assert addresses(mesh, subset="v1") == ["10.244.1.5:9080"]
