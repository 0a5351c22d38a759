"""How many expressions of one VirtualService a request may be tried on in turn is bounded, and said where it is written."""
from __future__ import annotations

import pytest

from controlplane.sources.expressions import IN_TURN_BOUND, plain_beginning
from controlplane.sources.folder import parse
from tests.support.manifests import virtual_service

HOSTS = "hosts: [reviews]\n"


def said(expressions: list[str]) -> list[str]:
    return said_of([f"uri: {{regex: '{one}'}}" for one in expressions])


def said_of(matches: list[str]) -> list[str]:
    http = "".join(f"- match: [{{{one}}}]\n  route: [{{destination: {{host: reviews}}}}]\n" for one in matches)
    found = parse("f.yaml", virtual_service("vs", f"{HOSTS}http:\n{http}")).problems
    return [str(problem) for problem in found if problem.severity == "error"]


@pytest.mark.parametrize(("expression", "beginning"), [
    ("/api/v1/.*", "/api/v1/"), ("^/api/v1/[0-9]+", "/api/v1/"), (r"/a\.b/(x|y)", "/a.b/"), ("/a*", "/"), ("/a{0}", "/"), ("/a?b", "/"),
    ("/a|/b", ""), ("[/]a", ""), (".*x", ""), ("(?i)/a", ""), (r"/a\d", "/"), ("/exactly", "/exactly"), ("/a[|]b", "/a"),
    (r"/a\|b", "/a|b"),
])
def test_the_plain_text_that_an_expression_begins_with(expression: str, beginning: str) -> None:
    assert plain_beginning(expression) == beginning


def test_expressions_that_begin_alike_are_taken_up_to_the_bound() -> None:
    assert said([f"/api/[^/]+/v{n}" for n in range(IN_TURN_BOUND)]) == []


@pytest.mark.parametrize("alike", ["/api/[^/]+/v{}", ".*/v{}"])
def test_more_than_the_bound_are_refused_with_what_to_do(alike: str) -> None:
    [problem] = said([alike.format(n) for n in range(IN_TURN_BOUND + 1)])
    assert f"spec.http has {IN_TURN_BOUND + 1} regex matches (of uris, headers, query parameters) that one request may have" in problem
    assert "begin the uri of each with a plain text of its own" in problem


def test_a_beginning_counts_for_the_longer_ones_behind_it() -> None:
    assert said(["/api/.*"] * IN_TURN_BOUND + ["/api/v1/.*"]) != []
    assert said(["/api/v2/.*"] * IN_TURN_BOUND + ["/api/v1/.*"]) == []


def test_thousands_that_begin_with_a_text_of_their_own_are_taken() -> None:
    assert said([f"/api/v{n}/items/[0-9]+" for n in range(1_000)]) == []


@pytest.mark.parametrize("match", [
    "headers: {{x-a: {{regex: 'a{}.*'}}}}", "withoutHeaders: {{x-a: {{regex: 'a{}.*'}}}}", "queryParams: {{a: {{regex: 'a{}.*'}}}}",
    "method: {{regex: 'A{}.*'}}", "authority: {{regex: 'a{}.*'}}", "uri: {{prefix: /A/}}, headers: {{x-a: {{regex: 'a{}.*'}}}}",
    "uri: {{prefix: '/a{}'}}, ignoreUriCase: true, headers: {{x-a: {{regex: 'a.*'}}}}",
])
def test_expressions_of_all_that_is_matched_count(match: str) -> None:
    assert said_of([match.format(n) for n in range(IN_TURN_BOUND)]) == []
    [problem] = said_of([match.format(n) for n in range(IN_TURN_BOUND + 1)])
    assert f"spec.http has {IN_TURN_BOUND + 1} regex matches" in problem


def test_expressions_of_headers_behind_uris_of_their_own_are_taken() -> None:
    assert said_of([f"uri: {{prefix: /v{n}/}}, headers: {{x-a: {{regex: 'a.*'}}}}" for n in range(500)]) == []
    assert said_of([f"uri: {{exact: /{'v' * n}}}, headers: {{x-a: {{regex: 'a.*'}}}}" for n in range(500)]) == []


def test_matches_for_different_ports_do_not_add_up() -> None:
    match = "port: {}, headers: {{x-a: {{regex: 'a.*'}}}}"
    assert said_of([match.format(port) for port in (80, 8080) for _ in range(IN_TURN_BOUND)]) == []
    assert said_of(["headers: {x-a: {regex: 'a.*'}}", *[match.format(80)] * IN_TURN_BOUND]) != []
