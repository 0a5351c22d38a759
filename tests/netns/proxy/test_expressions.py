"""The most expressions that a configuration may have a request asked of: a worker answers, and refuses one more."""
from __future__ import annotations

import pytest

from agent.model.routing import MatchKind, NamedMatch, Route, RouteMatch, StringMatch, WeightedCluster
from controlplane.sources.expressions import IN_TURN_BOUND
from tests.support.mesh import HTTP_PORT, Mesh, ask, destination, read_message, request, start
from tests.support.wait import until
from tests.support.worker import FAILED

pytestmark = pytest.mark.netns
LONG = "ab" * 15_000  # of the 60 KiB that a head may have


def asked(many: int) -> tuple[Route, ...]:
    """Routes by one header, none of whose expressions can say no before the end of its value."""
    return tuple(Route(f"r{i}", RouteMatch(StringMatch(MatchKind.PREFIX, "/"), (
        NamedMatch("x-long", StringMatch(MatchKind.REGEX, f"(a|b)*{i}")),)), (WeightedCluster("all", 1),)) for i in range(many))


def test_a_request_may_be_asked_of_as_many_expressions_of_a_header_as_the_bound_says(mesh: Mesh) -> None:
    start(mesh)
    mesh.worker.commit(destination(HTTP_PORT, http=asked(IN_TURN_BOUND)))
    # two clients: one request has everything asked and finds nothing, the other one finds the last
    none, last = mesh.dial(), mesh.dial()
    none.sendall(request("/", f"x-long: {LONG}"))
    last.sendall(request("/", f"x-long: {LONG}{IN_TURN_BOUND - 1}"))
    assert read_message(none).status == 404
    assert read_message(last).status == 200


def test_one_expression_more_is_refused_with_words_and_what_was_in_force_stays(mesh: Mesh) -> None:
    start(mesh)
    sequence = mesh.worker.offer(destination(HTTP_PORT, http=asked(IN_TURN_BOUND + 1)))
    kind, payload = until(lambda: mesh.worker.answers.get(sequence), "an answer")
    assert kind == FAILED
    assert f"virtual host v: one request may be tried on {IN_TURN_BOUND + 1} regular expressions" in payload[12:].decode()
    assert ask(mesh).status == 200
