"""How many expressions one request may be asked of is bounded where they are read, and the control plane counts as the worker does."""
from __future__ import annotations

import re

from hypothesis import given, settings
from hypothesis import strategies as st

from agent.model.routing import MatchKind, NamedMatch, Route, RouteMatch, StringMatch, WeightedCluster
from controlplane.model import routing
from controlplane.model.problems import Place
from controlplane.sources.expressions import IN_TURN_BOUND, in_turn
from ext.route import door
from tests.support.blobs import DESTINATION, V1, transaction, with_routes

TO_V1 = (WeightedCluster(V1, 1),)
KINDS = {MatchKind.EXACT: routing.MatchKind.EXACT, MatchKind.PREFIX: routing.MatchKind.PREFIX, MatchKind.REGEX: routing.MatchKind.REGEX}
ROOT = StringMatch(MatchKind.PREFIX, "/")


def named(many: int) -> tuple[NamedMatch, ...]:
    return tuple(NamedMatch(f"x-{i}", StringMatch(MatchKind.REGEX, f"a{i}.*")) for i in range(many))


def routed(path: StringMatch, headers: int, query: int = 0) -> Route:
    return Route("r", RouteMatch(path, named(headers), named(query)), TO_V1)


def refusal(*routes: Route) -> str:
    """What the worker's tables say against these routes, or nothing."""
    try:
        door.Tables().load(transaction(with_routes(*routes)))
    except door.Refused as error:
        return str(error)
    return ""


def test_expressions_of_headers_and_query_are_taken_up_to_the_bound_and_refused_with_what_to_do_above() -> None:
    assert refusal(routed(ROOT, IN_TURN_BOUND)) == ""
    assert refusal(routed(ROOT, 0, IN_TURN_BOUND)) == ""
    for above in ([routed(ROOT, IN_TURN_BOUND + 1)], [routed(ROOT, 1)] * (IN_TURN_BOUND + 1), [routed(ROOT, 50, 51)],
                  [routed(StringMatch(MatchKind.REGEX, "/a/.*"), 0, IN_TURN_BOUND)],
                  [routed(StringMatch(MatchKind.REGEX, f".*/{i}"), 0) for i in range(IN_TURN_BOUND + 1)]):
        said = refusal(*above)
        assert said.startswith(f"DESTINATION {DESTINATION.key}: virtual host "), said
        assert f"tried on {IN_TURN_BOUND + 1} regular expressions (path, headers, query) in turn, at most {IN_TURN_BOUND}; " in said
        assert said.endswith("let the paths of their routes begin with plain text of their own")


def test_expressions_of_routes_that_no_path_has_in_common_do_not_add_up() -> None:
    assert refusal(*(routed(StringMatch(MatchKind.PREFIX, f"/v{i}/"), 50) for i in range(10, 30))) == ""
    assert refusal(*(routed(StringMatch(MatchKind.EXACT, "/" * i), 60) for i in range(1, 30))) == ""
    assert refusal(*(routed(StringMatch(MatchKind.PREFIX, "/" * i), 60) for i in range(1, 30))) != ""


PATHS = st.sampled_from(["/", "/a", "/a/", "/a/b", "/b", "/A", "/é", "/" + "c" * 1022, "/" + "c" * 1023])
EXPRESSIONS = st.sampled_from(["/a.*", "/a/[a-z]", "/a|/b", ".*", "/a/b", "/é.", "(?i)/a"])
ONE = (st.tuples(st.sampled_from([MatchKind.EXACT, MatchKind.PREFIX]), PATHS, st.booleans(), st.integers(0, 60))
       | st.tuples(st.just(MatchKind.REGEX), EXPRESSIONS, st.booleans(), st.integers(0, 60)))


@settings(max_examples=300, deadline=None)
@given(st.lists(ONE, min_size=1, max_size=12))
def test_the_control_plane_counts_what_the_worker_counts(described: list[tuple[MatchKind, str, bool, int]]) -> None:
    said = refusal(*(routed(StringMatch(kind, text, ignore_case), many) for kind, text, ignore_case, many in described))
    matches = tuple(routing.HttpMatch(
        uri=routing.StringMatch(KINDS[kind], text), ignore_uri_case=ignore_case,
        headers=tuple((f"x-{i}", routing.StringMatch(routing.MatchKind.REGEX, "a")) for i in range(many)))
        for kind, text, ignore_case, many in described)
    counted = in_turn((routing.HttpRoute("", matches, (), routing.Headers(), 0, Place("f.yaml", 1)),))
    found = re.search(r"tried on (\d+) regular", said)
    assert (int(found[1]) if found else 0) == (counted if counted > IN_TURN_BOUND else 0)
