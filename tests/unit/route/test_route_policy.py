"""Policies as the workers decide them: a table of promises, random ones against a second reading, and what a change does."""
from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from random import Random

import pytest

from agent.dataplane import blobs
from agent.dataplane.authorize import verdict
from agent.model.policy import Policy, Scope
from ext.route import door
from tests.support.blobs import transaction
from tests.support.policies import (
    EMPTY,
    POD,
    ROWS,
    WEB,
    Row,
    allow,
    allowed,
    deny,
    match,
    rule,
    server,
    some_policy,
    some_question,
    static_strict,
    tables,
)


@pytest.fixture(autouse=True)
def no_block_is_lost() -> Iterator[None]:
    before = door.live_blocks()
    yield
    assert door.live_blocks() == before


def test_there_are_at_least_a_hundred_promises_and_none_is_there_twice() -> None:
    assert len(ROWS) >= 100 and len({row[0] for row in ROWS}) == len(ROWS)
    page = (Path(__file__).resolve().parents[3] / "docs" / "policy.md").read_text()
    assert f"({len(ROWS)} of them)" in page


@pytest.mark.parametrize("row", ROWS, ids=[row[0].replace(" ", "-") for row in ROWS])
def test_a_promise_is_kept(row: Row) -> None:
    _, policies, named, asked, expected, by = row
    answer = tables(policies, named).authorize(POD, asked.who, asked.source, asked.destination, asked.port)
    assert (answer["allowed"], answer["policy"]) == (expected, by)
    # the second reading must know the same promises, or it would be no oracle for random ones
    known = {policy.key: policy for policy in policies if not policy.dry_run}
    applying = [policy for policy in known.values() if policy.scope is Scope.GLOBAL or policy.key in named
                or (policy.scope is Scope.NAMESPACE and policy.namespace == "shop")]
    assert allowed(applying, asked) is expected


@pytest.mark.parametrize("seed", range(20))
def test_random_policies_are_decided_as_the_documentation_says(seed: int) -> None:
    random, seen = Random(seed), set()
    for _ in range(30):
        policies = [some_policy(random, number) for number in range(random.randrange(4))]
        known = tables(policies)
        for _ in range(20):
            asked = some_question(random)
            answer = known.authorize(POD, asked.who, asked.source, asked.destination, asked.port)
            assert answer["allowed"] is allowed(policies, asked), (policies, asked)
            seen.add(answer["allowed"])
    assert seen == {True, False}


# ---- on trial ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("policies", "expected"), [
    ((), (True, True, None)),
    ((deny(EMPTY, dry_run=True),), (True, False, "shop/p")),
    ((deny(rule(ports=[1]), dry_run=True),), (True, True, None)),
    ((allow(dry_run=True),), (True, False, None)),
    ((allow(EMPTY, dry_run=True),), (True, True, None)),
    ((allow(EMPTY, name="a"), allow(name="b", dry_run=True)), (True, True, None)),
    ((allow(name="a"), allow(EMPTY, name="b", dry_run=True)), (False, True, None)),
    ((allow(EMPTY, name="a"), deny(EMPTY, name="d", dry_run=True)), (True, False, "shop/d")),
])  # fmt: skip
def test_policies_on_trial_say_what_would_be(policies: tuple[Policy, ...], expected: tuple[bool, bool, str | None]) -> None:
    answer = tables(policies).authorize(POD, WEB, "10.0.1.5", "10.0.2.6", 80)
    assert (answer["allowed"], answer["would"], answer["would_policy"]) == expected


# ---- why ---------------------------------------------------------------------------------------------------------------

def test_an_answer_says_which_rule_matched_and_why_others_did_not() -> None:
    policies = [deny(rule(namespaces=["db"]), ((match(ports=[1]), match(not_sources=["10.0.0.0/8"])), (match(ports=[80]),)), name="d"),
                allow(rule(ports=[9]), rule(principals=["*/sa/front"]), name="a", scope=Scope.WORKLOAD)]
    entries = [*map(blobs.put_policy, policies), *server(["shop/a"])]
    found = verdict(entries, POD, WEB, "10.0.1.5", "10.0.2.6", 80)
    assert (found["allowed"], found["policy"], found["rule"]) == (True, "shop/a", 1)
    assert found["applies"] == [
        {"policy": "shop/d", "action": "deny", "scope": "namespace", "dry_run": False, "matches": None,
         "rules": [[["namespaces"]], [["destinationPorts", "notSourceIps"], [None]]]},
        {"policy": "shop/a", "action": "allow", "scope": "workload", "dry_run": False, "matches": 1,
         "rules": [[["destinationPorts"]], [[None]]]}]


def test_what_cannot_be_asked_is_said() -> None:
    known = tables(())
    with pytest.raises(LookupError, match="no pod 9"):
        known.authorize(9, None, "10.0.0.1", "10.0.0.2", 80)
    with pytest.raises(ValueError, match="'alice' is not spiffe"):
        known.authorize(POD, "alice", "10.0.0.1", "10.0.0.2", 80)
    known.load(transaction(blobs.Delete(blobs.Kind.WORKLOAD, "Kubernetes//Pod/shop/cart-0")))
    with pytest.raises(LookupError):
        known.authorize(POD, None, "10.0.0.1", "10.0.0.2", 80)


# ---- changes -----------------------------------------------------------------------------------------------------------

def test_a_policy_comes_changes_and_goes() -> None:
    known = tables(())

    def answer() -> bool:
        said: bool = known.authorize(POD, WEB, "10.0.1.5", "10.0.2.6", 80)["allowed"]
        return said

    for change, expected in ((deny(EMPTY), False), (deny(rule(ports=[1])), True), (allow(), False),
                             (allow(EMPTY, scope=Scope.GLOBAL), True), (deny(EMPTY, scope=Scope.WORKLOAD), True)):
        known.load(transaction(blobs.put_policy(change)))
        assert answer() is expected
    known.load(transaction(*server(["shop/p"])))
    assert not answer()
    known.load(transaction(blobs.Delete(blobs.Kind.POLICY, "shop/p")))
    assert answer()


def test_only_what_may_decide_otherwise_has_connections_asked_again() -> None:
    known = tables((static_strict(),))

    def again(*entries: blobs.Entry) -> bool:
        before = known.judgement
        known.load(transaction(*entries))
        return bool(known.judgement != before)

    assert not again(*server()[:1])  # the same workload, the same list
    assert again(blobs.put_policy(deny(EMPTY)))
    assert again(*server(["shop/p"])[:1])
    assert not again(*server(["shop/p"])[:1])
    assert again(blobs.Delete(blobs.Kind.POLICY, "shop/p"))
    assert again(blobs.Delete(blobs.Kind.WORKLOAD, "Kubernetes//Pod/shop/cart-0"))
    assert not again(*server()[:1])  # it comes anew: nobody can have been let in meanwhile
    assert again(server()[1])


def test_a_pod_of_the_node_is_known_by_its_addresses() -> None:
    known = tables(())
    assert known.pod_by_address("10.0.2.6") == known.pod_by_address("::ffff:10.0.2.6") == POD
    assert known.pod_by_address("10.0.2.7") == 0
    moved = blobs.put_pod("pod", POD, "w", "ns=shop", (ip_address("10.0.2.7"), ip_address("fd00::7")), "")
    known.load(transaction(moved))
    assert (known.pod_by_address("10.0.2.6"), known.pod_by_address("10.0.2.7"), known.pod_by_address("fd00::7")) == (0, POD, POD)


def test_a_change_that_is_refused_leaves_the_policy_in_force() -> None:
    known = tables((deny(EMPTY),))
    good = blobs.put_policy(allow(EMPTY))
    for payload in (good.payload[:-1], good.payload + b"\0", b"\x03" + good.payload[1:], good.payload[:1] + b"\x02" + good.payload[2:],
                    good.payload[:2] + b"\x02" + good.payload[3:]):
        with pytest.raises(door.Refused, match="POLICY shop/p"):
            known.load(transaction(blobs.Put(blobs.Kind.POLICY, "shop/p", payload)))
    for key in ("shop", "/p", "shop/"):
        with pytest.raises(door.Refused, match="key is not `namespace/name`"):
            known.load(transaction(blobs.Put(blobs.Kind.POLICY, key, good.payload)))
    assert not known.authorize(POD, WEB, "10.0.1.5", "10.0.2.6", 80)["allowed"]


def test_every_allocation_may_fail_and_nothing_changes() -> None:
    known = tables((deny(EMPTY),))
    data = transaction(blobs.put_policy(allow(rule(principals=["*a"], sources=["10.0.0.0/8"], service_accounts=[("a", "b")]))))
    for number in range(1, 100):
        door.fail_block(number)
        try:
            known.prepare(data)
        except (door.Refused, MemoryError):
            assert not known.authorize(POD, WEB, "10.0.1.5", "10.0.2.6", 80)["allowed"]
            continue
        finally:
            door.fail_block(0)
        known.abandon()
        break
    assert 1 < number < 99
