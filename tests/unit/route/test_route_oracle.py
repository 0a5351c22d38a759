"""Any values go through encoder and decoder unchanged; any request finds what a plain reading of the rules finds."""
from __future__ import annotations

import re
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from agent.dataplane import blobs
from agent.model.routing import (
    Balancer,
    Cluster,
    Endpoint,
    MatchKind,
    NamedMatch,
    Route,
    RouteMatch,
    StringMatch,
    VirtualHost,
    WeightedCluster,
)
from agent.model.workload import Protocol, Service, ServicePort, WorkloadPort
from ext.route import asked_door, door
from tests.support.blobs import DESTINATION, POD, PUTS, SCOPE, V1, VIP, WORKLOAD, transaction

U16, U32 = st.integers(0, 2**16 - 1), st.integers(1, 2**32 - 1)
# an IPv4-mapped address is the IPv4 address to the tables
V6 = st.integers(2**48, 2**128 - 1).map(IPv6Address)
ADDRESSES = st.integers(0, 2**32 - 1).map(IPv4Address) | V6
PORTS = st.builds(ServicePort, U16, U16, st.sampled_from(Protocol))
NAMES = st.text("abcdefghijklmnopqrstuvwxyz.-", min_size=1, max_size=30)


def unique(addresses: list[Any]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(addresses))


@settings(max_examples=150, deadline=None)
@given(U32, NAMES, st.lists(ADDRESSES, max_size=5).map(unique), st.lists(PORTS, max_size=6))
def test_any_service_goes_through(index: int, host: str, addresses: tuple[Any, ...], ports: list[ServicePort]) -> None:
    tables = door.Tables()
    tables.load(transaction(blobs.put_service(index, Service("n", host, host, addresses, tuple(ports)))))
    expected = [(p.port, p.target_port, blobs.PROTOCOLS[p.protocol]) for p in ports]
    assert tables.service_by_index(index) == (host, [str(a) for a in addresses], expected)
    for address in addresses:
        for port, _target, protocol in expected[:1]:
            assert tables.service_at(address, port) == (index, f"{host}:{port}", protocol)


@settings(max_examples=150, deadline=None)
@given(
    U32, st.booleans(), st.lists(ADDRESSES, max_size=5).map(unique),
    st.lists(st.builds(WorkloadPort, st.sampled_from(["a", "b", "gone"]), U16, U16, st.sampled_from(Protocol)), max_size=6),
)
def test_any_workload_goes_through(
    index: int, healthy: bool, addresses: tuple[Any, ...], ports: list[WorkloadPort]
) -> None:
    known = {"a": 1, "b": 2**32 - 1}
    tables = door.Tables()
    workload = replace(WORKLOAD, healthy=healthy, addresses=addresses, ports=tuple(ports))
    tables.load(transaction(blobs.put_workload(index, workload, lambda key: known.get(key, 0))))
    expected = [(known.get(p.service, 0), p.service_port, p.target_port, blobs.PROTOCOLS[p.protocol]) for p in ports]
    assert tables.workload_by_index(index) == (healthy, [str(a) for a in addresses], expected)
    assert all(tables.workload_by_address(address) == index for address in addresses)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(Balancer), U32, U32,
    st.lists(st.builds(Endpoint, ADDRESSES, st.integers(1, 65535), st.integers(1, 2**20), st.booleans()), max_size=20),
)
def test_any_cluster_goes_through(balancer: Balancer, timeout: int, service: int, endpoints: list[Endpoint]) -> None:
    tables = door.Tables()
    cluster = Cluster(SCOPE, V1, "s", balancer, timeout, tuple(endpoints))
    tables.load(transaction(blobs.put_cluster(cluster, lambda _key: service)))
    expected = [(str(e.address), e.port, e.weight, e.healthy, 0) for e in endpoints]
    assert tables.cluster(cluster.key) == (service, timeout, blobs.BALANCERS[balancer], expected)


# ---- a second reading of the rules, as plain as can be

# few texts, so that most requests meet most rules
TEXT = st.sampled_from(["", "a", "A", "ab", "a/b", "a.b", "b", "b.", ".b"])
DOMAINS = ["a", "A.b", "*", "*.b", "*b", "a*", "a.*", "b*", "*/b"]
VALUE = st.builds(
    StringMatch,
    st.sampled_from([MatchKind.EXACT, MatchKind.PREFIX, MatchKind.SUFFIX, MatchKind.CONTAINS, MatchKind.PRESENT, MatchKind.REGEX]),
    TEXT, st.booleans(), st.booleans(),
)
HEADER = st.builds(NamedMatch, st.sampled_from(["x", "Y"]), VALUE, st.booleans())
QUERY = st.builds(NamedMatch, st.sampled_from(["p", "q"]), VALUE)
PATH = st.just(StringMatch(MatchKind.PREFIX, "/")) | st.builds(
    StringMatch,
    st.sampled_from([MatchKind.EXACT, MatchKind.PREFIX, MatchKind.PATH_SEPARATED_PREFIX, MatchKind.REGEX]),
    TEXT.map("/".__add__), st.booleans(),
)
MATCHES = st.builds(RouteMatch, PATH, st.lists(HEADER, max_size=2).map(tuple), st.lists(QUERY, max_size=2).map(tuple))
DOMAIN = st.sampled_from(DOMAINS)
FEW_OR_MANY = st.lists(MATCHES, max_size=3) | st.lists(MATCHES, min_size=8, max_size=30)  # an index finds among many


def value_agrees(match: StringMatch, value: str) -> bool:
    wanted = match.value
    if match.kind is MatchKind.REGEX:
        return re.fullmatch(wanted, value) is not None
    if match.ignore_case:
        wanted, value = wanted.lower(), value.lower()
    if match.kind is MatchKind.PATH_SEPARATED_PREFIX:
        wanted = wanted.removesuffix("/")
        return value == wanted or value.startswith(wanted + "/")
    return {
        MatchKind.EXACT: value == wanted, MatchKind.PREFIX: value.startswith(wanted), MatchKind.SUFFIX: value.endswith(wanted),
        MatchKind.CONTAINS: wanted in value, MatchKind.PRESENT: True,
    }[match.kind]


def named_agrees(named: NamedMatch, value: str | None) -> bool:
    if value is None and named.match.kind is MatchKind.PRESENT:
        return named.match.invert
    if value is None and not named.missing_is_empty:
        return False
    return value_agrees(named.match, value or "") is not named.match.invert


def expected_route(
    hosts: list[VirtualHost], host: str, path: str, query: list[tuple[str, str]], headers: list[tuple[str, str]]
) -> str:
    host = host.lower()

    def rank(domain: str) -> tuple[int, int] | None:
        domain = domain.lower()
        if domain == "*":
            return (3, 0)
        if domain.startswith("*"):
            return (1, -len(domain)) if host.endswith(domain[1:]) and len(host) >= len(domain) else None
        if domain.endswith("*"):
            return (2, -len(domain)) if host.startswith(domain[:-1]) and len(host) >= len(domain) else None
        return (0, 0) if host == domain else None

    ranked = [(r, v) for v in hosts for d in v.domains if (r := rank(d)) is not None]
    if not ranked:
        return "NR"
    for route in min(ranked, key=lambda pair: pair[0])[1].routes:
        values = [[v for n, v in headers if n.lower() == m.name.lower()] for m in route.match.headers]
        joined = [",".join(v) if v else None for v in values]
        first = [next((v for n, v in query if n == m.name), None) for m in route.match.query]
        if (value_agrees(route.match.path, path)
                and all(map(named_agrees, route.match.headers, joined)) and all(map(named_agrees, route.match.query, first))):
            return route.name
    return "NR"


@settings(max_examples=600, deadline=None)
@given(
    st.lists(st.tuples(st.lists(DOMAIN, min_size=1, max_size=4), FEW_OR_MANY), min_size=1, max_size=4),
    st.sampled_from(["", "a", "A.B", "a.", "b", "xb", "x.b", "a.x"]), TEXT,
    st.lists(st.tuples(st.sampled_from(["p", "q", "P"]), TEXT), max_size=3),
    st.lists(st.tuples(st.sampled_from(["x", "X", "y"]), TEXT), max_size=4),
)
def test_any_request_finds_the_route_that_the_rules_say(
    shape: list[tuple[list[str], list[RouteMatch]]], host: str, path: str, query: list[tuple[str, str]],
    headers: list[tuple[str, str]],
) -> None:
    seen: set[str] = set()
    hosts = []
    for i, (domains, matches) in enumerate(shape):
        fresh = tuple(d for d in domains if d.lower() not in seen)
        seen |= {d.lower() for d in domains}
        routes = tuple(Route(f"{i}.{k}", match, (WeightedCluster(V1, 1),)) for k, match in enumerate(matches))
        rest = Route(f"{i}.rest", RouteMatch(StringMatch(MatchKind.PREFIX, "/")), (WeightedCluster(V1, 1),))
        hosts.append(VirtualHost(str(i), fresh, (*routes, rest)))
    tables = door.Tables()
    tables.load(transaction(
        PUTS["service"], PUTS["pod"], blobs.put_destination(replace(DESTINATION, http=tuple(hosts), tcp=None))))
    path = "/" + path
    target = path + ("?" + "&".join(f"{n}={v}" for n, v in query) if query else "")
    found = tables.route(POD, VIP, 9080, asked_door.Request(target, host, headers=headers))
    answer = found if isinstance(found, str) else found["route"]
    assert answer == expected_route(hosts, host, path, query, headers)


# ---- expressions are found by what they begin with: RE2 alone, without an index, is the other reading

PIECES = ["a", "b", "/", "ab", "é", "\\.", "\\|", "\\(", "\\d", "\\Q|(\\E", "\\Q\\E", "\\E", "|", "(", ")", "(?i)", "(?:", "[",
          "[^", "]", "[|]", "[]|]", "[[:alpha:]|]", "\\]", "^", "$", ".", "*", "+", "?", "{2}", "{0,1}", "{"]
SNARES = ["/a|/b", "/(a|b)", "/a(|b", "/a[^|]|b", "/ab*", "/ab?/", "/ab{0,1}", "/a\\.?b", "^/a", "^*/a", "(?i)/a", "/a(?i)B",
          "/ab(?i)*", "/ab\\E*", "/ab\\Q\\E?", "/a[(|]", "/a(b)|", "/a\\||b", "/a\\Q(\\E|b", "/a[[]|b", "/a[]]|b", "/a[](]|b",
          "/a[^](]|b", "/a[\\](]|b", "/a\\(|b", "/a[(]|b"]
EXPRESSION = st.lists(st.sampled_from(PIECES), min_size=1, max_size=7).map("".join) | st.sampled_from(SNARES)
ASKED = st.lists(st.sampled_from(["a", "b", "A", "/", "ab", "é", ".", "|", "(", "]", "1"]), max_size=5).map("".join)


def agreeing(path: str, *expressions: str) -> str | None:
    """The first expression that RE2 says matches, in tables so small that every route is asked."""
    for number, expression in enumerate(expressions):
        found = answer_of(path, [RouteMatch(StringMatch(MatchKind.REGEX, expression))])
        if found == "0":
            return str(number)
    return None


def answer_of(path: str, matches: list[RouteMatch]) -> str | None:
    routes = tuple(Route(str(i), match, (WeightedCluster(V1, 1),)) for i, match in enumerate(matches))
    tables = door.Tables()
    tables.load(transaction(PUTS["service"], PUTS["pod"], blobs.put_destination(
        replace(DESTINATION, http=(VirtualHost("h", ("*",), routes),), tcp=None))))
    found = tables.route(POD, VIP, 9080, asked_door.Request(path, "h"))
    return None if isinstance(found, str) else str(found["route"])


def compiles(expression: str) -> bool:
    try:
        answer_of("/", [RouteMatch(StringMatch(MatchKind.REGEX, expression))])
    except ValueError:
        return False
    return True


@settings(max_examples=1500, deadline=None)
@given(st.lists(EXPRESSION.filter(compiles), min_size=1, max_size=6), ASKED, st.booleans())
def test_an_expression_is_found_among_many_routes_as_if_it_were_asked_alone(expressions: list[str], path: str, rooted: bool) -> None:
    path = "/" + path if rooted else path
    many = [*expressions, *(f"/none/{i}" for i in range(8))]
    assert answer_of(path, [RouteMatch(StringMatch(MatchKind.REGEX, each)) for each in many]) == agreeing(path, *many)
