"""Endpoints get their share; only healthy ones; the same randomness gives the same picks."""
from __future__ import annotations

from collections import Counter
from ipaddress import ip_address
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.model.routing import Balancer, Endpoint
from ext.route import door
from tests.support.blobs import CLUSTER, transaction, with_endpoints

RR, LEAST, RANDOM = Balancer.ROUND_ROBIN, Balancer.LEAST_REQUEST, Balancer.RANDOM
KEY = CLUSTER.key


def endpoint(i: int, weight: int = 1, healthy: bool = True) -> Endpoint:
    return Endpoint(ip_address(f"10.0.{i // 256}.{i % 256}"), 80, weight, healthy)


def cluster(balancer: Balancer, *weights: int, healthy: tuple[bool, ...] = (), seed: int = 9) -> Any:
    healthy = healthy or (True,) * len(weights)
    tables = door.Tables(seed)
    endpoints = (endpoint(i, weight, up) for i, (weight, up) in enumerate(zip(weights, healthy, strict=True)))
    tables.load(transaction(with_endpoints(*endpoints, balancer=balancer)))
    return tables


def picks(tables: Any, n: int, **kwargs: Any) -> list[int]:
    return [int(ip.rpartition(".")[2]) for ip, _port in tables.picks(KEY, n, **kwargs)]


@pytest.mark.parametrize("balancer", Balancer)
def test_without_a_healthy_endpoint_there_is_none(balancer: Balancer) -> None:
    assert cluster(balancer).picks(KEY, 2) == [None, None]
    assert cluster(balancer, 1, 2, healthy=(False, False)).picks(KEY, 2) == [None, None]


@pytest.mark.parametrize("balancer", Balancer)
def test_only_healthy_endpoints_are_picked(balancer: Balancer) -> None:
    for weights in ((1, 1, 1, 1), (1, 2, 3, 4)):
        assert set(picks(cluster(balancer, *weights, healthy=(True, False, True, False)), 200)) == {0, 2}
        assert set(picks(cluster(balancer, *weights, healthy=(False, False, True, False)), 20)) == {2}


def test_round_robin_takes_turns() -> None:
    order = picks(cluster(RR, 1, 1, 1), 9)
    assert order[:3] == order[3:6] == order[6:]
    assert sorted(order[:3]) == [0, 1, 2]


def test_round_robin_starts_somewhere_else_with_other_randomness() -> None:
    assert len({picks(cluster(RR, *[1] * 10, seed=seed), 1)[0] for seed in range(1, 60)}) > 5


def test_weighted_round_robin_is_smooth() -> None:
    assert picks(cluster(RR, 5, 1, 1), 7) == [0, 0, 0, 1, 2, 0, 0]
    assert picks(cluster(RR, 1, 2), 6) == [1, 0, 1, 1, 0, 1]


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=2, max_size=8))
def test_weighted_round_robin_gives_exactly_the_weights_each_round(weights: list[int]) -> None:
    tables = cluster(RR, *weights)
    counts = Counter(picks(tables, 3 * sum(weights)))
    for i, weight in enumerate(weights):
        assert abs(counts[i] - 3 * weight) <= 1


def test_weights_at_the_end_of_their_range_are_kept() -> None:
    counts = Counter(picks(cluster(RR, 2**31, 2**30, 1), 3000))
    assert abs(counts[0] - 2000) <= 2 and abs(counts[1] - 1000) <= 2
    with pytest.raises(door.Refused, match="more than 32 bits"):
        cluster(RR, 2**32 - 1, 1)


@pytest.mark.parametrize("balancer", [LEAST, RANDOM])
@pytest.mark.parametrize("weights", [(1, 1, 1, 1), (1, 2, 3), (10, 1)])
def test_idle_endpoints_get_their_weight(balancer: Balancer, weights: tuple[int, ...]) -> None:
    n = 20_000
    counts = Counter(picks(cluster(balancer, *weights), n))
    for i, weight in enumerate(weights):
        share = weight / sum(weights)
        assert abs(counts[i] - n * share) < 5 * (n * share * (1 - share)) ** 0.5


def test_least_request_avoids_the_busy_one() -> None:
    tables = cluster(LEAST, 1, 1, 1, 1)
    held = tables.hold(KEY)
    for _ in range(10):
        held.begin(2)
    assert 2 not in picks(tables, 500)
    for _ in range(10):
        held.end(2)
    assert 2 in picks(tables, 100)


def test_least_request_evens_out_what_is_in_flight() -> None:
    tables = cluster(LEAST, 1, 1, 1, 1, 1)
    held = tables.hold(KEY)
    for _ in range(500):
        held.begin(picks(tables, 1)[0])
    assert max(held.active) - min(held.active) <= 6  # two choices: the gap grows with log log n, not with n


def test_least_request_weighs_what_is_in_flight() -> None:
    tables = cluster(LEAST, 3, 1)
    held = tables.hold(KEY)
    for _ in range(400):
        held.begin(picks(tables, 1)[0])
    assert abs(held.active[0] - 300) <= 5


@pytest.mark.parametrize("balancer", Balancer)
@pytest.mark.parametrize("weights", [(1, 1, 1), (1, 2, 3), (50, 1, 1)])
def test_an_excluded_endpoint_is_not_picked_again(balancer: Balancer, weights: tuple[int, ...]) -> None:
    for excluded in range(3):
        found = set(picks(cluster(balancer, *weights), 300, exclude=excluded))
        assert found == {0, 1, 2} - {excluded}
    assert picks(cluster(balancer, 1), 2, exclude=0) == [0, 0], "the only one is better than none"
    assert picks(cluster(balancer, 1, 1, healthy=(True, False)), 2, exclude=0) == [0, 0]
    assert set(picks(cluster(balancer, 1, 1), 20, exclude=1)) == {0}


@pytest.mark.parametrize("balancer", Balancer)
def test_an_endpoint_of_a_replaced_version_can_be_excluded(balancer: Balancer) -> None:
    tables = cluster(balancer, 1, 1)
    held = tables.hold(KEY)
    tables.load(transaction(with_endpoints(endpoint(5), endpoint(1), endpoint(0), balancer=balancer)))
    assert set(picks(tables, 100, exclude=1, version=held)) == {0, 5}


def test_the_same_seed_picks_the_same() -> None:
    for balancer in Balancer:
        first, second = (picks(cluster(balancer, 1, 2, 3, 4, seed=77), 50) for _ in range(2))
        assert first == second


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(list(Balancer)),
    st.lists(st.tuples(st.integers(1, 5), st.booleans()), min_size=1, max_size=40),
    st.integers(0, 39),
)
def test_any_cluster_picks_a_healthy_endpoint_or_none(
    balancer: Balancer, endpoints: list[tuple[int, bool]], excluded: int
) -> None:
    weights, health = zip(*endpoints, strict=True)
    tables = cluster(balancer, *weights, healthy=health)
    excluded %= len(endpoints)
    ready = {i for i, up in enumerate(health) if up}
    for exclude in (None, excluded):
        found = tables.picks(KEY, 60, exclude=exclude)
        if not ready:
            assert set(found) == {None}
            continue
        allowed = ready - {exclude} or ready
        assert {int(ip.rpartition(".")[2]) for ip, _ in found} <= allowed
