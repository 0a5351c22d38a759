"""Routes are found as Envoy finds them: virtual host, then the first route all of whose matches agree, then a cluster by weight.

Envoy's rules are quoted from its docs: config.route.v3 (VirtualHost.domains, RouteMatch, HeaderMatcher, QueryParameterMatcher).
"""
from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.dataplane import blobs
from agent.model.routing import (
    HeaderEdit,
    MatchKind,
    NamedMatch,
    Route,
    RouteMatch,
    StringMatch,
    VirtualHost,
    WeightedCluster,
)
from ext.route import asked_door, door
from tests.support.blobs import DESTINATION, HOST, POD, PUTS, SCOPE, V1, V2, VIP, transaction, with_routes

EXACT, PREFIX, SUFFIX, REGEX = MatchKind.EXACT, MatchKind.PREFIX, MatchKind.SUFFIX, MatchKind.REGEX
PRESENT, CONTAINS, PATH = MatchKind.PRESENT, MatchKind.CONTAINS, MatchKind.PATH_SEPARATED_PREFIX
ANY = StringMatch(PREFIX, "/")
TO_V1 = (WeightedCluster(V1, 1),)


def tables_with(put: blobs.Put) -> Any:
    tables = door.Tables(3)
    tables.load(transaction(PUTS["service"], PUTS["pod"], put))
    return tables


def answer(match: RouteMatch, request: asked_door.Request) -> bool:
    found = tables_with(with_routes(Route("r", match, TO_V1))).route(POD, VIP, 9080, request)
    return bool(found != "NR")


@pytest.mark.parametrize(
    ("kind", "value", "path", "expected"),
    [
        (EXACT, "/a", "/a", True),
        (EXACT, "/a", "/a?x=1", True),  # "the path without the query string"
        (EXACT, "/a", "/a/", False),
        (EXACT, "/a", "/A", False),
        (PREFIX, "/a", "/a", True),
        (PREFIX, "/a", "/ab", True),
        (PREFIX, "/a", "/a/b?c", True),
        (PREFIX, "/a", "/", False),
        (PREFIX, "/", "/anything", True),
        (PREFIX, "/a?x", "/a?x", False),
        (PATH, "/a", "/a", True),
        (PATH, "/a", "/a/b", True),
        (PATH, "/a", "/a/", True),
        (PATH, "/a", "/ab", False),
        (PATH, "/a/", "/a", True),
        (PATH, "/", "/x", True),
        (REGEX, "/v[0-9]+/.*", "/v12/x", True),
        (REGEX, "/v[0-9]+", "/v12/x", False),  # "the entire path must match"
        (REGEX, "v1", "/v1", False),
        (REGEX, "(?i)/ABC", "/abc", True),
        (REGEX, "/a", "/a?q=1", True),
    ],
)
def test_path_match(kind: MatchKind, value: str, path: str, expected: bool) -> None:
    assert answer(RouteMatch(StringMatch(kind, value)), asked_door.Request(path, "x")) is expected


@pytest.mark.parametrize("kind", [EXACT, PREFIX, PATH])
def test_a_path_match_may_ignore_case(kind: MatchKind) -> None:
    assert answer(RouteMatch(StringMatch(kind, "/AbC", ignore_case=True)), asked_door.Request("/aBc", "x"))


def test_a_regex_is_not_touched_by_ignore_case() -> None:
    assert not answer(RouteMatch(StringMatch(REGEX, "/ABC", ignore_case=True)), asked_door.Request("/abc", "x"))


def match(kind: MatchKind, value: str = "", ignore_case: bool = False, invert: bool = False) -> StringMatch:
    return StringMatch(kind, value, ignore_case, invert)


@pytest.mark.parametrize(
    ("wanted", "missing_is_empty", "headers", "expected"),
    [
        (match(EXACT, "on"), False, [("x-a", "on")], True),
        (match(EXACT, "on"), False, [("X-A", "on")], True),
        (match(EXACT, "on"), False, [("x-a", "On")], False),
        (match(EXACT, "oN", ignore_case=True), False, [("x-a", "On")], True),
        (match(EXACT, "on"), False, [("x-ab", "on")], False),
        (match(EXACT, "on"), False, [], False),
        (match(PREFIX, "Fo"), False, [("x-a", "Foo")], True),
        (match(PREFIX, "Fo"), False, [("x-a", "F")], False),
        (match(SUFFIX, "oo"), False, [("x-a", "foo")], True),
        (match(SUFFIX, "OO", ignore_case=True), False, [("x-a", "foo")], True),
        (match(SUFFIX, "oo"), False, [("x-a", "foo ")], False),
        (match(CONTAINS, "b"), False, [("x-a", "abc")], True),
        (match(CONTAINS, "B"), False, [("x-a", "abc")], False),
        (match(CONTAINS, "BC", ignore_case=True), False, [("x-a", "abc")], True),
        (match(CONTAINS, ""), False, [("x-a", "")], True),
        (match(CONTAINS, "abcd", ignore_case=True), False, [("x-a", "abc")], False),
        (match(REGEX, "a.c"), False, [("x-a", "abc")], True),
        (match(REGEX, "a.c"), False, [("x-a", "xabc")], False),
        (match(PRESENT), False, [("x-a", "")], True),
        (match(PRESENT), False, [], False),
        (match(PRESENT, invert=True), False, [], True),
        (match(PRESENT, invert=True), False, [("x-a", "1")], False),
        (match(EXACT, "on", invert=True), False, [("x-a", "off")], True),
        (match(EXACT, "on", invert=True), False, [("x-a", "on")], False),
        (match(EXACT, "on", invert=True), False, [], False),  # "the match rule will not match"
        (match(EXACT, "on", invert=True), True, [], True),  # treat_missing_header_as_empty
        (match(EXACT, ""), True, [], True),
        (match(EXACT, "on"), True, [], False),
        # several fields of one name are one value, joined by commas
        (match(EXACT, "a,b"), False, [("x-a", "a"), ("other", "z"), ("X-A", "b")], True),
        (match(EXACT, "a,b,c"), False, [("x-a", "a"), ("x-a", "b"), ("x-a", "c")], True),
        (match(EXACT, "a"), False, [("x-a", "a"), ("x-a", "b")], False),
        (match(EXACT, "a,"), False, [("x-a", "a"), ("x-a", "")], True),
        (match(EXACT, ",a"), False, [("x-a", ""), ("x-a", "a")], True),
        (match(REGEX, "a,b"), False, [("x-a", "a"), ("x-a", "b")], True),
    ],
)
def test_header_match(
    wanted: StringMatch, missing_is_empty: bool, headers: list[tuple[str, str]], expected: bool
) -> None:
    named = NamedMatch("X-A", wanted, missing_is_empty)
    assert answer(RouteMatch(ANY, (named,)), asked_door.Request("/", "x", headers=headers)) is expected


@pytest.mark.parametrize(
    ("name", "wanted", "expected"),
    [
        (":method", match(EXACT, "POST"), True),
        (":method", match(EXACT, "post"), False),
        (":method", match(EXACT, "GET", invert=True), True),
        (":authority", match(EXACT, "reviews:9080"), True),
        ("Host", match(PREFIX, "reviews"), True),
        (":scheme", match(EXACT, "http"), True),
        (":scheme", match(EXACT, "https"), False),
        (":path", match(EXACT, "/a?b=c"), True),
    ],
)
def test_pseudo_header_match(name: str, wanted: StringMatch, expected: bool) -> None:
    request = asked_door.Request("/a?b=c", "reviews:9080", "POST")
    assert answer(RouteMatch(ANY, (NamedMatch(name, wanted),)), request) is expected


@pytest.mark.parametrize(
    ("wanted", "target", "expected"),
    [
        (match(EXACT, "1"), "/?q=1", True),
        (match(EXACT, "1"), "/?a=2&q=1&b", True),
        (match(EXACT, "1"), "/?Q=1", False),
        (match(EXACT, "1"), "/?q=1&q=2", True),  # the first decides
        (match(EXACT, "2"), "/?q=1&q=2", False),
        (match(EXACT, "1"), "/?qq=1", False),
        (match(EXACT, "1"), "/", False),
        (match(EXACT, "1"), "/?", False),
        (match(EXACT, ""), "/?q", True),
        (match(EXACT, ""), "/?q=", True),
        (match(EXACT, "a=b"), "/?q=a=b", True),
        (match(EXACT, "a b"), "/?q=a%20b", False),  # nothing is decoded
        (match(PRESENT), "/?q", True),
        (match(PRESENT), "/?x&q", True),
        (match(PRESENT), "/?x&&y", False),
        (match(PRESENT, invert=True), "/?x", True),
        (match(PREFIX, "ab"), "/?q=abc", True),
        (match(REGEX, "[0-9]+"), "/?q=42", True),
        (match(REGEX, "[0-9]+"), "/?q=42x", False),
    ],
)
def test_query_match(wanted: StringMatch, target: str, expected: bool) -> None:
    assert answer(RouteMatch(ANY, query=(NamedMatch("q", wanted),)), asked_door.Request(target, "x")) is expected


def test_every_part_of_a_match_has_to_agree() -> None:
    rule = RouteMatch(StringMatch(EXACT, "/a"), (NamedMatch("h", match(EXACT, "1")),), (NamedMatch("q", match(EXACT, "2")),))
    assert answer(rule, asked_door.Request("/a?q=2", "x", headers=[("h", "1")]))
    assert not answer(rule, asked_door.Request("/b?q=2", "x", headers=[("h", "1")]))
    assert not answer(rule, asked_door.Request("/a?q=3", "x", headers=[("h", "1")]))
    assert not answer(rule, asked_door.Request("/a?q=2", "x", headers=[("h", "2")]))


def test_the_first_route_that_matches_wins_even_if_a_later_one_is_closer() -> None:
    routes = [Route(name, RouteMatch(StringMatch(kind, path)), TO_V1)
              for name, kind, path in (("wide", PREFIX, "/a"), ("exact", EXACT, "/a/b"), ("rest", PREFIX, "/"))]
    tables = tables_with(with_routes(*routes))
    assert [tables.route(POD, VIP, 9080, asked_door.Request(path, "x"))["route"] for path in ("/a/b", "/c")] == ["wide", "rest"]
    tables = tables_with(with_routes(*reversed(routes)))
    assert tables.route(POD, VIP, 9080, asked_door.Request("/a/b", "x"))["route"] == "rest"


HOSTS = ("foo.com", "*.foo.com", "*-bar.foo.com", "*.a.foo.com", "foo.*", "foo.c*", "[::1]")


@pytest.mark.parametrize(
    ("authority", "expected"),
    [
        ("foo.com", "foo.com"),
        ("FOO.com", "foo.com"),
        ("foo.com:8080", "foo.com"),
        ("www.foo.com", "*.foo.com"),
        ("www.Foo.com:80", "*.foo.com"),
        ("x.a.foo.com", "*.a.foo.com"),  # "the longest wildcards match first"
        ("baz-bar.foo.com", "*-bar.foo.com"),
        ("-bar.foo.com", "*.foo.com"),  # "the wildcard will not match the empty string"
        (".foo.com", None),
        ("foo.net", "foo.*"),
        ("foo.co", "foo.c*"),
        ("foo.", None),
        ("[::1]", "[::1]"),
        ("[::1]:80", "[::1]"),
        ("bar.com", None),
        ("", None),
    ],
)
def test_virtual_host_selection_follows_envoys_order(authority: str, expected: str | None) -> None:
    for order in (HOSTS, tuple(reversed(HOSTS))):
        hosts = tuple(VirtualHost(host, (host,), ()) for host in order)
        tables = tables_with(blobs.put_destination(replace(DESTINATION, http=hosts)))
        assert tables.virtual_host(POD, VIP, 9080, authority) == expected
        tables = tables_with(blobs.put_destination(replace(DESTINATION, http=(VirtualHost("any", ("*",), ()), *hosts))))
        assert tables.virtual_host(POD, VIP, 9080, authority) == (expected or "any")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("ab.", min_size=1, max_size=4), unique=True, min_size=1, max_size=30), st.text("abAB.", max_size=6))
def test_exact_hosts_are_found_among_many(names: list[str], asked: str) -> None:
    hosts = tuple(VirtualHost(name, (name,), ()) for name in names)
    tables = tables_with(blobs.put_destination(replace(DESTINATION, http=hosts)))
    assert tables.virtual_host(POD, VIP, 9080, asked) == (asked.lower() if asked.lower() in names else None)


def test_no_virtual_host_and_no_route_are_nr_and_no_table_is_nc() -> None:
    tables = tables_with(with_routes(Route("r", RouteMatch(StringMatch(EXACT, "/a")), TO_V1), domains=("x",)))
    assert tables.route(POD, VIP, 9080, asked_door.Request("/a", "y")) == "NR"
    assert tables.route(POD, VIP, 9080, asked_door.Request("/b", "x")) == "NR"
    tables.load(transaction(blobs.put_destination(replace(DESTINATION, http=()))))
    assert tables.route(POD, VIP, 9080, asked_door.Request("/a", "x")) == "NR"
    tables.load(transaction(blobs.put_unknown_destination(SCOPE, f"{HOST}:9080")))
    assert tables.route(POD, VIP, 9080, asked_door.Request("/a", "x")) == "NC"


# ---- clusters by weight


def shares(weights: list[int], draws: list[int]) -> list[int]:
    clusters = tuple(WeightedCluster(f"c{i}", weight) for i, weight in enumerate(weights))
    tables = tables_with(with_routes(Route("r", RouteMatch(ANY), clusters)))
    counts = [0] * len(weights)
    request = asked_door.Request("/", "x")
    for random in draws:
        counts[int(tables.route(POD, VIP, 9080, request, random)["cluster"].rpartition("c")[2])] += 1
    return counts


@pytest.mark.parametrize("weights", [[90, 10], [50, 50], [1, 2, 7], [0, 1], [1, 0], [2**31, 2**31 - 1]])
def test_even_randomness_gives_exactly_the_weights(weights: list[int]) -> None:
    steps = 1000
    counts = shares(weights, [i * 2**32 // steps for i in range(steps)])
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - steps * weight / sum(weights)) <= 1
        assert (count > 0) == (weight > 0)


def test_the_tables_own_randomness_keeps_to_the_weights() -> None:
    tables = door.Tables(42)
    n = 20_000
    counts = shares([80, 19, 1], [tables.random() & 0xFFFFFFFF for _ in range(n)])
    for count, share in zip(counts, (0.80, 0.19, 0.01), strict=True):
        sigma = (n * share * (1 - share)) ** 0.5
        assert abs(count - n * share) < 5 * sigma


def test_the_same_seed_gives_the_same_randomness() -> None:
    first, second, other = door.Tables(5), door.Tables(5), door.Tables(6)
    numbers = [first.random() for _ in range(10)]
    assert numbers == [second.random() for _ in range(10)] != [other.random() for _ in range(10)]


def test_tcp_clusters_are_drawn_by_weight() -> None:
    tcp = (WeightedCluster(V1, 1), WeightedCluster(V2, 3))
    tables = tables_with(blobs.put_destination(replace(DESTINATION, http=None, tcp=tcp)))
    picked = [tables.tcp(POD, VIP, 9080, i << 30) for i in range(4)]
    assert picked == [f"{SCOPE}|{name}" for name in (V1, V2, V2, V2)]
    assert tables.destination(POD, VIP, 9080) == "tcp"


# ---- header edits


def test_edits_come_in_envoys_order_first_the_clusters_then_the_routes() -> None:
    edit = HeaderEdit(remove=("A",), set=(("B", "1"),), add=(("C", "2"), ("C", "3")))
    route = Route("r", RouteMatch(ANY), (WeightedCluster(V1, 1, HeaderEdit(set=(("b", "0"),)), edit),), 0, edit,
                  HeaderEdit(remove=("z",)))
    found = tables_with(with_routes(route)).route(POD, VIP, 9080, asked_door.Request("/", "x"))
    ops = [("remove", "a"), ("set", "b", "1"), ("add", "c", "2"), ("add", "c", "3")]
    assert found["request"] == [("set", "b", "0"), *ops]
    assert found["response"] == [*ops, ("remove", "z")]


def test_a_requests_host_may_be_set() -> None:
    route = Route("r", RouteMatch(ANY), TO_V1, request=HeaderEdit(set=(("Host", "other.example"),)))
    found = tables_with(with_routes(route)).route(POD, VIP, 9080, asked_door.Request("/", "x"))
    assert found["request"] == [("set", "host", "other.example")]


def rule(**parts: Any) -> Route:
    return replace(Route("r", RouteMatch(ANY), TO_V1), **parts)


@pytest.mark.parametrize(
    ("route", "words"),
    [
        (rule(request=HeaderEdit(set=(("x y", "1"),))), "not a header name: x y"),
        (rule(request=HeaderEdit(remove=("",))), "not a header name"),
        (rule(request=HeaderEdit(add=((":path", "/"),))), "not a header name: :path"),
        (rule(response=HeaderEdit(set=(("Content-Length", "1"),))), "may not change header: content-length"),
        (rule(request=HeaderEdit(remove=("transfer-encoding",))), "may not change header: transfer-encoding"),
        (rule(request=HeaderEdit(add=(("connection", "close"),))), "may not change header: connection"),
        (rule(request=HeaderEdit(remove=("host",))), "only a request's host"),
        (rule(response=HeaderEdit(set=(("host", "x"),))), "only a request's host"),
        (rule(request=HeaderEdit(set=(("host", " "),))), "not a host"),
        (rule(request=HeaderEdit(add=(("x", "a\r\nb: c"),))), "control character in the value of header: x"),
        (rule(request=HeaderEdit(add=(("x", "a\0"),))), "control character in the value of header: x"),
        (rule(request=HeaderEdit(add=tuple((f"x{i}", "") for i in range(129)))), "header edits of one direction: 129"),
        (rule(request=HeaderEdit(remove=("a",) * 65), clusters=(WeightedCluster(V1, 1, HeaderEdit(remove=("a",) * 64)),)),
         "too many header edits"),
        (rule(clusters=()), "weights of the clusters add up to: 0"),
        (rule(clusters=(WeightedCluster(V1, 0),)), "weights of the clusters add up to: 0"),
        (rule(clusters=(WeightedCluster(V1, 2**32 - 1), WeightedCluster(V2, 1))), "add up to: 4294967296"),
        (rule(clusters=(WeightedCluster("", 1),)), "name of a cluster"),
        (rule(match=RouteMatch(StringMatch(SUFFIX, "/"))), "kind of the path match of route: r"),
        (rule(match=RouteMatch(StringMatch(REGEX, "(a"))), "regular expression (a: missing )"),
        (rule(match=RouteMatch(StringMatch(REGEX, "a{1001}"))), "regular expression a{1001}"),
        (rule(match=RouteMatch(StringMatch(REGEX, r"(a)\1"))), "invalid escape sequence"),
        (rule(match=RouteMatch(StringMatch(REGEX, "((a{100}){100}){100}"))), "regular expression ((a{100}"),
        (rule(match=RouteMatch(StringMatch(REGEX, "a{1000}" * 10))), "instructions, at most 8192"),
        (rule(match=RouteMatch(StringMatch(REGEX, "a" * 4097))), "pattern of 4097 bytes, at most 4096"),
        (rule(match=RouteMatch(ANY, (NamedMatch("a b", match(PRESENT)),))), "not a header name: a b"),
        (rule(match=RouteMatch(ANY, (NamedMatch("a", match(PATH, "/")),))), "a path match on: a"),
    ],
)
def test_a_route_that_cannot_be_followed_is_refused_with_words(route: Route, words: str) -> None:
    tables = door.Tables()
    with pytest.raises(door.Refused) as failure:
        tables.load(transaction(with_routes(route)))
    assert words in str(failure.value)
    assert str(failure.value).startswith(f"DESTINATION {DESTINATION.key}: ")


@pytest.mark.parametrize(
    ("domains", "words"),
    [
        ((("a.com",), ("A.com",)), "domain in two virtual hosts: a.com"),
        ((("a.com:80",), ("a.com",)), "domain in two virtual hosts: a.com"),
        ((("*",), ("*",)), "domain * in two virtual hosts"),
        ((("*.x",), ("*.X",)), "domain in two virtual hosts: .x"),
        ((("a*b",),), "domain that is no name"),
        ((("*a*",),), "domain that is no name"),
        ((("",),), "domain that is no name"),
    ],
)
def test_domains_that_contradict_each_other_are_refused(domains: tuple[tuple[str, ...], ...], words: str) -> None:
    hosts = tuple(VirtualHost(f"h{i}", names, ()) for i, names in enumerate(domains))
    with pytest.raises(door.Refused) as failure:
        door.Tables().load(transaction(blobs.put_destination(replace(DESTINATION, http=hosts))))
    assert words in str(failure.value)


def test_the_same_domain_twice_in_one_virtual_host_is_no_contradiction() -> None:
    host = VirtualHost("h", ("a.com", "a.com:80", "A.com", "*", "*"), ())
    tables = tables_with(blobs.put_destination(replace(DESTINATION, http=(host,))))
    assert tables.virtual_host(POD, VIP, 9080, "a.com") == "h"
