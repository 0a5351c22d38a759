"""What is known and wanted in force on this node, and the difference to what was handed over for a commit.

The store keeps one desired entry per blob. A change marks its entry dirty; `take` gives the dirty ones and nothing
else, so a commit costs what changed. `give_back` marks them again when a commit failed; `everything` is for a
difference against what a keeper already holds (`agent restarted`, `keeper restarted`).

A workload or service that goes keeps its number and labels for GRACE seconds without addresses, so that its counters
can be scraped a last time; then its blob and number go.
"""
from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from agent.model.identity import Certificate, Trust
from agent.model.policy import Policy
from agent.model.routing import Cluster, Destination
from agent.model.settings import ProxySettings
from agent.model.workload import IPAddress, Service, Workload, WorkloadPort
from agent.state.claims import Claims
from agent.state.entries import (
    Drop,
    Entry,
    Key,
    Put,
    PutCertificate,
    PutCluster,
    PutDestination,
    PutNote,
    PutPod,
    PutPolicy,
    PutResource,
    PutService,
    PutSettings,
    PutTrust,
    PutWorkload,
    Table,
    resource_key,
)
from agent.state.hosts import Hosts
from agent.state.notes import Notes
from agent.state.policies import Applicable

GRACE = 300.0  # seconds; Prometheus scrapes every 15 to 60 s and is declared down after some of them

# Within a transaction everything takes effect at once; the order only makes dumps readable, except that what gave an
# address up comes before who takes it over (the order of changes, which the sort keeps).
_ORDER = {table: place for place, table in enumerate(
    (Table.NOTE, Table.SETTINGS, Table.TRUST, Table.CERTIFICATE, Table.SERVICE, Table.WORKLOAD, Table.POLICY, Table.POD, Table.CLUSTER,
     Table.DESTINATION, Table.RESOURCE))}


class Store:
    """See the head of this file. `now` gives Unix seconds (a test's clock)."""

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._desired: dict[Key, Put] = {}
        self._dirty: dict[Key, None] = {}
        self._inherited: set[Key] = set()  # in force by an earlier agent, kept until we know better
        self.notes = Notes(self._note)
        self._workloads: dict[str, Workload] = {}
        self._services: dict[str, Service] = {}
        self._workload_addresses = Claims()
        self._service_addresses = Claims()
        self._policies = Applicable(self._place_policy)
        self.hosts = Hosts()
        self._service_users: Counter[str] = Counter()  # service key -> workload ports and clusters that name it
        self._by_index: dict[int, Workload | Service] = {}  # also what is gone but not yet forgotten

    # -- what is known ----------------------------------------------------------------------------------------------

    @property
    def workloads(self) -> Mapping[str, Workload]:
        """As the control plane said them, by uid."""
        return self._workloads

    @property
    def services(self) -> Mapping[str, Service]:
        """As the control plane said them, by `namespace/hostname`."""
        return self._services

    @property
    def policies(self) -> Mapping[str, Policy]:
        """As the control plane said them, by `namespace/name`; those that apply here have an entry."""
        return self._policies.known

    def entries(self, table: Table) -> list[Put]:
        return [put for (kind, _), put in self._desired.items() if kind is table]

    def entry(self, key: Key) -> Put | None:
        return self._desired.get(key)

    def workload_at(self, address: IPAddress) -> Workload | None:
        uid = self._workload_addresses.owner(address)
        return self._workloads.get(uid) if uid else None

    def service_at(self, address: IPAddress) -> Service | None:
        key = self._service_addresses.owner(address)
        return self._services.get(key) if key else None

    def by_index(self, index: int) -> Workload | Service | None:
        """Whose number this is, also for GRACE seconds after its removal. None: nobody's that is known."""
        return self._by_index.get(index)

    def service_index(self, key: str) -> int:
        """The number of a service, 0 when it has none."""
        return self.notes.known("service", key)

    # -- changes ----------------------------------------------------------------------------------------------------

    def put_settings(self, settings: ProxySettings) -> None:
        self._set(PutSettings(settings))

    def put_service(self, service: Service) -> str | None:
        """Take a service over. Returns a reason when a virtual address of it belongs to another one already.

        Such a service is in force without that address, and gets it when the other lets go.
        """
        self._services[service.key] = service
        self.hosts.put_service(service)
        refused, heirs = self._service_addresses.claim(service.key, service.addresses)
        self._place_service(service.key)
        for heir in sorted(heirs):
            self._place_service(heir)
        return _overlap("virtual address", "service", refused)

    def put_workload(self, workload: Workload) -> str | None:
        """Take a workload over. Returns a reason when an address of it belongs to another one; see `put_service`."""
        before = self._workloads.get(workload.uid)
        self._workloads[workload.uid] = workload
        self._refer(before.ports if before else (), workload.ports)
        self.hosts.change_workload(before, workload)
        self._policies.workload(workload.uid, workload.policies)
        refused, heirs = self._workload_addresses.claim(workload.uid, workload.addresses)
        self._place_workload(workload.uid)
        for heir in sorted(heirs):
            self._place_workload(heir)
        return _overlap("address", "workload", refused)

    def remove_service(self, key: str) -> None:
        service = self._services.pop(key, None)
        if service is None:
            return
        self.hosts.remove_service(service)
        _, heirs = self._service_addresses.claim(key, ())
        gone = replace(service, addresses=(), ports=())
        self._set(PutService(self.notes.index("service", key), gone))
        self.notes.retire("service", key, self._now(), gone)
        self._by_index[self.notes.known("service", key)] = gone
        for heir in sorted(heirs):
            self._place_service(heir)

    def remove_workload(self, uid: str) -> None:
        workload = self._workloads.pop(uid, None)
        if workload is None:
            return
        self._refer(workload.ports, ())
        self.hosts.change_workload(workload, None)
        _, heirs = self._workload_addresses.claim(uid, ())
        gone = replace(workload, addresses=(), ports=(), healthy=False)
        self._set(PutWorkload(self.notes.index("workload", uid), gone))
        self.notes.retire("workload", uid, self._now(), gone)
        self._by_index[self.notes.known("workload", uid)] = gone
        for heir in sorted(heirs):
            self._place_workload(heir)

    def publish(
        self,
        destinations: Iterable[Destination],
        clusters: Iterable[Cluster],
        dropped_destinations: Iterable[str] = (),
        dropped_clusters: Iterable[str] = (),
    ) -> None:
        """Destinations and clusters that became complete, changed or are wanted no more."""
        for cluster in clusters:
            before = self._desired.get((Table.CLUSTER, cluster.key))
            self._name_service(cluster.service)
            if isinstance(before, PutCluster):
                self._unname_service(before.cluster.service)
            self._set(PutCluster(cluster))
        for destination in destinations:
            self._set(PutDestination(destination))
        for key in dropped_destinations:
            self._unset((Table.DESTINATION, key))
        for key in dropped_clusters:
            before = self._desired.get((Table.CLUSTER, key))
            if isinstance(before, PutCluster):
                self._unname_service(before.cluster.service)
            self._unset((Table.CLUSTER, key))

    def put_pod(self, uid: str, workload: str, scope: str, addresses: tuple[IPAddress, ...], identity: str = "",
                excluded: tuple[int, ...] | None = None) -> int:
        """A pod that is to be known to the workers (`excluded`: see blobs.put_pod). Returns its handle."""
        handle = self.handle(uid)
        self._policies.pod(uid, scope, workload)
        self._set(PutPod(uid, handle, workload, scope, addresses, identity, excluded))
        return handle

    def handle(self, uid: str) -> int:
        """The number of a pod, given out now if it has none."""
        return self.notes.index("pod", uid)

    def remove_pod(self, uid: str) -> None:
        self._policies.no_pod(uid)
        self._unset((Table.POD, uid))
        self.notes.release("pod", uid)

    def put_trust(self, trust: Trust) -> None:
        self._set(PutTrust(trust))

    def put_certificate(self, certificate: Certificate) -> None:
        self._set(PutCertificate(certificate))

    def remove_certificate(self, identity: str) -> None:
        self._unset((Table.CERTIFICATE, identity))

    def put_policy(self, policy: Policy) -> None:
        """Take a policy over. It is in force while a pod here can be subject to it."""
        self._policies.put(policy)

    def remove_policy(self, key: str) -> None:
        self._policies.remove(key)

    def hold(self, type_url: str, name: str, version: str, body: bytes) -> None:
        """Remember a resource that was accepted, for the next agent."""
        self._set(PutResource(type_url, name, version, body))

    def let_go(self, type_url: str, name: str) -> None:
        self._unset(resource_key(type_url, name))

    def sweep(self) -> None:
        """Forget what went more than GRACE seconds ago. Call it now and then."""
        for kind, name in self.notes.retired(self._now() - GRACE):
            if kind == "service" and self._service_users[name] > 0:
                continue
            self._by_index.pop(self.notes.known(kind, name), None)
            if kind == "workload":
                self._policies.workload(name, ())
            self.notes.release(kind, name)
            self._unset((Table.WORKLOAD if kind == "workload" else Table.SERVICE, name))

    # -- commits ----------------------------------------------------------------------------------------------------

    def __bool__(self) -> bool:
        """Whether there is something to commit."""
        return bool(self._dirty)

    def take(self) -> list[Entry]:
        """Everything that changed since the last `take`, for one transaction."""
        keys, self._dirty = sorted(self._dirty, key=lambda key: _ORDER[key[0]]), {}
        return [self._desired.get(key) or Drop(key) for key in keys]

    def give_back(self, keys: Iterable[Key]) -> None:
        """These were not committed after all: the next `take` has them again, as they are then."""
        self._dirty = dict.fromkeys(keys) | self._dirty

    def everything(self) -> list[Put]:
        """What is to be in force, whole. What is dirty is no longer."""
        self._dirty = {}
        return sorted(self._desired.values(), key=lambda put: _ORDER[put.key[0]])

    def inherit(self, keys: Iterable[Key]) -> None:
        """These are in force by an earlier agent and not (yet) wanted here: they stay until they are removed or disowned."""
        self._inherited.update(key for key in keys if key not in self._desired)

    @property
    def inherited(self) -> frozenset[Key]:
        return frozenset(self._inherited)

    def disown(self, keys: Iterable[Key]) -> None:
        """What of `keys` was inherited and is still not wanted goes with the next commit."""
        for key in self._inherited & set(keys):
            self._unset(key)

    def restore_notes(self, notes: Iterable[tuple[str, bytes]]) -> list[str]:
        """Numbers and names of an earlier agent, before anything else is put. Returns complaints, in words."""
        complaints = self.notes.restore(notes)
        for (kind, name), number in self.notes.numbers.items():
            if number.gone and isinstance(number.was, Workload):
                self._set(PutWorkload(number.index, number.was))
                self._by_index[number.index] = number.was
            elif number.gone and isinstance(number.was, Service):
                self._set(PutService(number.index, number.was))
                self._by_index[number.index] = number.was
            elif not number.gone and kind != "pod":
                # perhaps gone while no agent looked; whoever puts it takes the number up again
                self.notes.retire(kind, name, self._now(), None)
        self.notes.rewrite()
        return complaints

    # -- inside -----------------------------------------------------------------------------------------------------

    def _place_service(self, key: str) -> None:
        service = self._services[key]
        index = self.notes.index("service", key)
        self._by_index[index] = service
        self._set(PutService(index, replace(service, addresses=self._service_addresses.granted(key))))

    def _place_policy(self, key: str, policy: Policy | None) -> None:
        if policy is None:
            self._unset((Table.POLICY, key))
        else:
            self._set(PutPolicy(policy))

    def _place_workload(self, uid: str) -> None:
        workload = self._workloads[uid]
        index = self.notes.index("workload", uid)
        self._by_index[index] = workload
        self._set(PutWorkload(index, replace(workload, addresses=self._workload_addresses.granted(uid))))

    def _refer(self, before: Iterable[WorkloadPort], after: Iterable[WorkloadPort]) -> None:
        for port in after:
            self._name_service(port.service)
        for port in before:
            self._unname_service(port.service)

    def _name_service(self, key: str) -> None:
        """Something names this service: it has a number from now on, known or not (workloads may come first)."""
        self._service_users[key] += 1
        self.notes.index("service", key)

    def _unname_service(self, key: str) -> None:
        self._service_users[key] -= 1
        if self._service_users[key] <= 0:
            del self._service_users[key]
            if key not in self._services and (number := self.notes.numbers.get(("service", key))) and not number.gone:
                self.notes.retire("service", key, self._now(), None)

    def _note(self, name: str, note: PutNote | None) -> None:
        if note is None:
            self._unset((Table.NOTE, name))
        else:
            self._set(note)

    def _set(self, put: Put) -> None:
        key = put.key
        self._inherited.discard(key)
        if self._desired.get(key) != put:
            self._desired[key] = put
            self._dirty.pop(key, None)  # to the end: see _ORDER
            self._dirty[key] = None

    def _unset(self, key: Key) -> None:
        inherited = key in self._inherited
        self._inherited.discard(key)
        if self._desired.pop(key, None) is not None or inherited:
            self._dirty.pop(key, None)
            self._dirty[key] = None


def _overlap(what: str, whose: str, refused: Mapping[IPAddress, str]) -> str | None:
    if not refused:
        return None
    return "; ".join(f"{what} {address} belongs to {whose} {owner} already" for address, owner in refused.items())
