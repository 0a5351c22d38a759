"""Which policies are handed to the keeper: those that a pod of this node can be subject to, and no other."""
from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address

from agent.model.policy import Action, Policy, Scope
from agent.state.entries import Table
from agent.state.store import GRACE, Store
from tests.support.blobs import WORKLOAD


def policy(key: str, scope: Scope) -> Policy:
    namespace, name = key.split("/")
    return Policy(namespace, name, scope, Action.DENY, ((),))


def held(store: Store) -> set[str]:
    return {put.key[1] for put in store.entries(Table.POLICY)}


def store_with(*policies: Policy) -> Store:
    store = Store()
    for one in policies:
        store.put_policy(one)
    return store


def enrol(store: Store, namespace: str = "default", uid: str = "p1", workload: str = WORKLOAD.uid) -> None:
    store.put_pod(uid, workload, f"ns={namespace}", (ip_address("10.244.1.5"),))


def test_a_policy_for_all_is_always_there() -> None:
    assert held(store_with(policy("istio-system/g", Scope.GLOBAL))) == {"istio-system/g"}


def test_a_policy_of_a_namespace_is_there_while_a_pod_of_it_is() -> None:
    store = store_with(policy("default/n", Scope.NAMESPACE), policy("other/n", Scope.NAMESPACE))
    assert held(store) == set()
    enrol(store)
    enrol(store, uid="p2")
    assert held(store) == {"default/n"}
    store.put_policy(policy("default/later", Scope.NAMESPACE))
    assert held(store) == {"default/n", "default/later"}
    store.remove_pod("p1")
    assert held(store) == {"default/n", "default/later"}
    store.remove_policy("default/later")
    assert held(store) == {"default/n"}
    store.remove_pod("p2")
    assert held(store) == set()


def test_a_policy_with_a_selector_is_there_while_the_workload_of_a_pod_names_it() -> None:
    store = store_with(policy("default/a", Scope.WORKLOAD), policy("default/b", Scope.WORKLOAD))
    store.put_workload(replace(WORKLOAD, policies=("default/a",)))
    assert held(store) == set()  # no pod here is that workload
    enrol(store)
    assert held(store) == {"default/a"}
    store.put_workload(replace(WORKLOAD, policies=("default/b", "default/gone")))
    assert held(store) == {"default/b"}
    store.put_policy(policy("default/gone", Scope.WORKLOAD))
    assert held(store) == {"default/b", "default/gone"}
    store.put_workload(replace(WORKLOAD, policies=()))
    assert held(store) == set()


def test_a_pod_that_comes_before_its_workload_has_its_policies_with_it() -> None:
    store = store_with(policy("default/a", Scope.WORKLOAD))
    enrol(store)
    assert held(store) == set()
    store.put_workload(replace(WORKLOAD, policies=("default/a",)))
    assert held(store) == {"default/a"}


def test_a_workload_that_is_taken_back_keeps_its_policies_while_it_is_remembered() -> None:
    now = [1000.0]
    store = Store(lambda: now[0])
    store.put_policy(policy("default/a", Scope.WORKLOAD))
    store.put_workload(replace(WORKLOAD, policies=("default/a",)))
    enrol(store)
    store.remove_workload(WORKLOAD.uid)
    assert held(store) == {"default/a"}
    put = store.entry((Table.WORKLOAD, WORKLOAD.uid))
    assert put.workload.policies == ("default/a",)  # type: ignore[union-attr]
    now[0] += GRACE + 1
    store.sweep()
    assert held(store) == set()


def test_a_pod_that_changes_its_workload_changes_its_policies() -> None:
    store = store_with(policy("default/a", Scope.WORKLOAD), policy("default/b", Scope.WORKLOAD))
    store.put_workload(replace(WORKLOAD, policies=("default/a",)))
    store.put_workload(replace(WORKLOAD, uid="other", addresses=(), policies=("default/b",)))
    enrol(store)
    enrol(store, workload="other")
    assert held(store) == {"default/b"}
