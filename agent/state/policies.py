"""Which policies pods of this node can be subject to: those for all, those of their namespaces, those that their workloads name."""
from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from agent.model.policy import Policy, Scope


class Applicable:
    """`changed(key, policy or None)` is told which policies are to be in force; it may be told the same twice.

    Of a workload that the control plane has taken back the list stays: what it closed stays closed while its pod is there.
    """

    def __init__(self, changed: Callable[[str, Policy | None], None]) -> None:
        self._changed = changed
        self.known: dict[str, Policy] = {}
        self._lists: dict[str, tuple[str, ...]] = {}  # workload uid -> policies that it names
        self._pods: dict[str, tuple[str, str]] = {}  # pod uid -> namespace, workload uid
        self._namespaces: Counter[str] = Counter()
        self._workloads: Counter[str] = Counter()
        self._named: Counter[str] = Counter()

    def put(self, policy: Policy) -> None:
        self.known[policy.key] = policy
        self._look(policy.key)

    def remove(self, key: str) -> None:
        self.known.pop(key, None)
        self._look(key)

    def workload(self, uid: str, policies: tuple[str, ...]) -> None:
        before = self._lists.get(uid, ())
        if before == policies:
            return
        if policies:
            self._lists[uid] = policies
        else:
            del self._lists[uid]
        if self._workloads[uid]:
            self._name(policies, 1)
            self._name(before, -1)

    def pod(self, uid: str, scope: str, workload: str) -> None:
        place = scope.removeprefix("ns="), workload
        if self._pods.get(uid) == place:
            return
        self._use(place, 1)
        if uid in self._pods:
            self._use(self._pods[uid], -1)
        self._pods[uid] = place

    def no_pod(self, uid: str) -> None:
        place = self._pods.pop(uid, None)
        if place is not None:
            self._use(place, -1)

    def applies(self, policy: Policy) -> bool:
        return (policy.scope is Scope.GLOBAL or self._named[policy.key] > 0
                or (policy.scope is Scope.NAMESPACE and self._namespaces[policy.namespace] > 0))

    # -- inside -----------------------------------------------------------------------------------------------------

    def _use(self, place: tuple[str, str], by: int) -> None:
        namespace, workload = place
        self._namespaces[namespace] += by
        self._workloads[workload] += by
        if self._workloads[workload] == max(by, 0):  # the first, or the last
            self._name(self._lists.get(workload, ()), by)
        if self._namespaces[namespace] == max(by, 0):
            for key, policy in self.known.items():
                if policy.scope is Scope.NAMESPACE and policy.namespace == namespace:
                    self._look(key)

    def _name(self, policies: tuple[str, ...], by: int) -> None:
        for key in policies:
            self._named[key] += by
            self._look(key)

    def _look(self, key: str) -> None:
        policy = self.known.get(key)
        self._changed(key, policy if policy is not None and self.applies(policy) else None)
