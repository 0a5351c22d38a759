"""The delta session: tables of what comes in and what must go out."""
from __future__ import annotations

import pytest

from agent.xds.session import (
    TRANSITIONS,
    Event,
    Request,
    Resource,
    Response,
    Session,
    SessionError,
    TypeState,
    error_text,
)

ADDRESS, ROUTE, CLUSTER = "t/Address", "t/Route", "t/Cluster"


def resource(name: str, version: str, type_url: str = ROUTE) -> Resource:
    return Resource(type_url, name, version, b"body")


def response(nonce: str, *resources: Resource, removed: tuple[str, ...] = (), type_url: str = ROUTE) -> Response:
    return Response(type_url, nonce, resources, removed)


def session(*wanted: str) -> Session:
    fresh = Session([ADDRESS], [ROUTE, CLUSTER])
    fresh.want(ROUTE, wanted)
    return fresh


def settle(one: Session, answer: Response, **rejected: str) -> Request | None:
    update = one.received(answer)
    assert update is not None
    return one.settled(update, rejected)


def test_the_first_stream_asks_for_everything_wanted_and_the_wildcard_with_no_names() -> None:
    assert session("b", "a").opened() == [Request(ADDRESS), Request(ROUTE, subscribe=("a", "b"))]


def test_a_type_without_names_is_not_asked_for_because_no_names_would_mean_everything() -> None:
    one = session()
    assert [request.type_url for request in one.opened()] == [ADDRESS]
    assert one.want(CLUSTER, ["c"]) == [Request(CLUSTER, subscribe=("c",))]


def test_on_a_live_stream_only_differences_of_names_are_sent() -> None:
    one = session("a", "b")
    one.opened()
    assert one.want(ROUTE, ["b", "c"], ["a"]) == [Request(ROUTE, subscribe=("c",), unsubscribe=("a",))]
    assert one.want(ROUTE, ["c", "b"], ["a", "x"]) == []
    assert one.want(ROUTE, [], ["c", "b"]) == [Request(ROUTE, unsubscribe=("b", "c"))]
    assert one.want(ROUTE, ["b"]) == [Request(ROUTE, subscribe=("b",))]


def test_an_update_is_acknowledged_only_when_it_is_settled_and_under_its_nonce() -> None:
    one = session("a")
    one.opened()
    update = one.received(response("n1", resource("a", "1")))
    assert update is not None and [r.name for r in update.changed] == ["a"]
    assert one.held(ROUTE) == {}
    assert one.settled(update, {}) == Request(ROUTE, nonce="n1")
    assert one.held(ROUTE) == {"a": "1"}


def test_a_bad_resource_is_rejected_alone_and_the_good_ones_of_the_same_response_are_held() -> None:
    one = session("a", "b", "c")
    one.opened()
    answer = settle(one, response("n1", resource("a", "1"), resource("b", "1"), resource("c", "1")),
                    b="no cluster", a="bad regex")
    assert answer == Request(ROUTE, nonce="n1", error="a: bad regex; b: no cluster")
    assert one.held(ROUTE) == {"c": "1"}


def test_a_rejected_version_keeps_the_last_good_one_held() -> None:
    one = session("a")
    one.opened()
    settle(one, response("n1", resource("a", "1")))
    settle(one, response("n2", resource("a", "2")), a="bad")
    assert one.held(ROUTE) == {"a": "1"}


def test_types_answer_in_any_order() -> None:
    one = session("a")
    one.want(CLUSTER, ["c"])
    one.opened()
    clusters = one.received(response("c1", resource("c", "1", CLUSTER), type_url=CLUSTER))
    routes = one.received(response("r1", resource("a", "1")))
    assert clusters and routes
    assert one.settled(routes, {}) == Request(ROUTE, nonce="r1")
    assert one.settled(clusters, {}) == Request(CLUSTER, nonce="c1")


def test_updates_of_one_type_are_settled_in_their_order() -> None:
    one = session("a", "b")
    one.opened()
    first = one.received(response("n1", resource("a", "1")))
    second = one.received(response("n2", resource("b", "1")))
    assert first and second
    with pytest.raises(SessionError, match="not the next"):
        one.settled(second, {})
    assert one.settled(first, {}) and one.settled(second, {})
    with pytest.raises(SessionError, match="not the next"):
        one.settled(second, {})


def test_reconnecting_sends_held_versions_and_nothing_of_the_old_stream() -> None:
    one = session("a", "b")
    one.opened()
    settle(one, response("n1", resource("a", "1"), resource("b", "1")), b="bad")
    late = one.received(response("n2", resource("a", "2")))
    one.closed()
    assert one.opened()[1] == Request(ROUTE, subscribe=("a", "b"), initial_versions={"a": "1"})
    assert late is not None
    assert one.settled(late, {}) is None  # its stream is gone, yet it is in force
    assert one.held(ROUTE) == {"a": "2"}


def test_restored_versions_are_offered_on_the_first_stream() -> None:
    one = session("a")
    one.restore(ADDRESS, {"uid": "7"})
    assert one.opened()[0] == Request(ADDRESS, initial_versions={"uid": "7"})
    with pytest.raises(SessionError, match="before the first stream"):
        one.restore(ADDRESS, {})


def test_a_removal_is_told_even_for_a_name_that_never_came() -> None:
    one = session("a")
    one.opened()
    update = one.received(response("n1", removed=("a", "other", "a")))
    assert update is not None and update.removed == ("a",)
    assert one.settled(update, {}) == Request(ROUTE, nonce="n1")


def test_a_removed_name_is_not_held_any_more() -> None:
    one = session("a")
    one.opened()
    settle(one, response("n1", resource("a", "1")))
    settle(one, response("n2", removed=("a",)))
    assert one.held(ROUTE) == {}


def test_a_removal_right_behind_an_update_that_is_not_settled_counts() -> None:
    one = session()
    one.opened()
    first = one.received(response("n1", resource("w", "1", ADDRESS), type_url=ADDRESS))
    second = one.received(response("n2", removed=("w",), type_url=ADDRESS))
    assert first and second and second.removed == ("w",)
    one.settled(first, {})
    one.settled(second, {})
    assert one.held(ADDRESS) == {}


def test_going_back_to_the_held_version_while_another_is_being_applied_is_a_change() -> None:
    one = session("a")
    one.opened()
    settle(one, response("n1", resource("a", "1")))
    second = one.received(response("n2", resource("a", "2")))
    third = one.received(response("n3", resource("a", "1")))
    assert second and third and [r.version for r in third.changed] == ["1"]


def test_a_duplicate_nonce_is_neither_applied_nor_answered_again() -> None:
    one = session("a")
    one.opened()
    settle(one, response("n1", resource("a", "1")))
    assert one.received(response("n1", resource("a", "2"))) is None
    assert one.held(ROUTE) == {"a": "1"}


def test_the_same_nonce_on_a_new_stream_is_a_new_response() -> None:
    one = session("a")
    one.opened()
    settle(one, response("n1", resource("a", "1")))
    one.closed()
    one.opened()
    assert one.received(response("n1", resource("a", "2"))) is not None


def test_what_is_held_already_and_what_is_not_wanted_is_left_out_but_acknowledged() -> None:
    one = session("a")
    one.opened()
    settle(one, response("n1", resource("a", "1")))
    update = one.received(response("n2", resource("a", "1"), resource("stranger", "1")))
    assert update is not None and update.changed == ()
    assert one.settled(update, {}) == Request(ROUTE, nonce="n2")
    assert one.held(ROUTE) == {"a": "1"}


def test_a_name_that_is_not_wanted_any_more_is_forgotten_even_when_it_is_on_its_way() -> None:
    one = session("a")
    one.opened()
    update = one.received(response("n1", resource("a", "1")))
    one.want(ROUTE, [], ["a"])
    assert update is not None
    one.settled(update, {})
    assert one.held(ROUTE) == {}


@pytest.mark.parametrize(("bad", "said"), [
    ((resource("", "1"),), "(unnamed): a resource without a name"),
    ((resource("a", "1"), resource("a", "2")), "a: it is in the same response twice"),
    ((resource("a", "1", CLUSTER),), f"a: it is a {CLUSTER}"),
])
def test_malformed_resources_are_refused_by_name(bad: tuple[Resource, ...], said: str) -> None:
    one = session("a")
    one.opened()
    update = one.received(response("n1", *bad))
    assert update is not None and update.changed == ()
    assert one.settled(update, {}) == Request(ROUTE, nonce="n1", error=said)


@pytest.mark.parametrize(("answer", "said"), [
    (Response("t/Other", "n"), "not asked for"),
    (Response(CLUSTER, "n"), "response is not legal while silent"),
    (Response(ROUTE, ""), "without nonce"),
])
def test_a_server_that_breaks_the_protocol_is_told_so_and_nothing_changes(answer: Response, said: str) -> None:
    one = session("a")
    one.opened()
    with pytest.raises(SessionError, match=said):
        one.received(answer)
    assert one.state(ROUTE) is TypeState.ASKED and one.held(ROUTE) == {}


def test_a_response_without_a_stream_is_an_error() -> None:
    with pytest.raises(SessionError, match="while detached"):
        session("a").received(response("n"))


def test_every_state_can_end_and_no_transition_leads_out_of_the_table() -> None:
    assert set(TRANSITIONS.values()) == set(TypeState)
    for state in set(TypeState) - {TypeState.DETACHED}:
        assert TRANSITIONS[state, Event.CLOSE] is TypeState.DETACHED


def test_a_long_error_names_the_first_and_counts_the_rest() -> None:
    text = error_text({f"resource-{number:04}": "x" * 100 for number in range(1000)})
    assert text.startswith("resource-0000: xxx") and text.endswith("more")
    named = text.count("resource-")
    assert f"and {1000 - named} more" in text and len(text) < 4200
