"""All objects together, and what follows: who selects whom, which rule speaks for which host, who claims which address.

`apply` is the only writer. It answers with what it touched, so that the cost of an update is that of the change. An object
that claims an address which another has is held but not in force; when the address becomes free it comes into force.
"""
from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from controlplane.model.endpoints import Behind, Endpoints
from controlplane.model.hosts import HostIndex, matches
from controlplane.model.objects import (
    IPAddress,
    Labels,
    Namespace,
    Node,
    Pod,
    Protocol,
    Service,
    ServiceAccount,
    ServicePort,
    full_host,
    hostname_of,
)
from controlplane.model.problems import ObjectKey, Problem, error, warning
from controlplane.model.routing import DestinationRule, RouteDestination, VirtualService
from controlplane.model.security import ROOT_NAMESPACE, AuthorizationPolicy, PeerAuthentication, Policies

Object = (Namespace | Node | ServiceAccount | Service | Pod | VirtualService | DestinationRule | AuthorizationPolicy
          | PeerAuthentication | Endpoints)
Rule = VirtualService | DestinationRule
K = TypeVar("K")
V = TypeVar("V")


@dataclass(slots=True)
class Touched:
    """What an update may have changed: hosts (their routes, clusters and endpoints), names of Address and of Authorization resources."""

    hosts: set[str] = field(default_factory=set)
    addresses: set[str] = field(default_factory=set)
    policies: set[str] = field(default_factory=set)

    def __bool__(self) -> bool:
        return bool(self.hosts or self.addresses or self.policies)

    def add(self, other: Touched) -> None:
        self.hosts |= other.hosts
        self.addresses |= other.addresses
        self.policies |= other.policies


class Mesh:
    """See the head of this file. Queries see only what is in force. `root`: the namespace whose policies are for all."""

    def __init__(self, root: str = ROOT_NAMESPACE) -> None:
        self.policies = Policies(root)
        self.behind = Behind()
        self._objects: dict[ObjectKey, Object] = {}
        self._claims: dict[IPAddress, list[ObjectKey]] = {}  # the first one has it
        self._out: set[ObjectKey] = set()  # held, not in force: another has their address
        self._services: dict[str, Service] = {}  # by hostname
        self._pods: dict[str, Pod] = {}  # by uid
        self._pods_by_label: dict[tuple[str, str, str], set[str]] = {}  # namespace, label, value -> uids
        self._services_by_label: dict[tuple[str, str, str], set[str]] = {}  # by the first label of the selector -> hostnames
        self._pods_by_node: dict[str, set[str]] = {}
        self._pods_by_account: dict[tuple[str, str, str], set[str]] = {}  # node, namespace, service account -> uids
        self._virtual: HostIndex[VirtualService] = HostIndex()
        self._rules: HostIndex[DestinationRule] = HostIndex()
        self._referrers: dict[str, set[ObjectKey]] = {}  # host or pattern -> rules that name it
        self._problems: dict[ObjectKey, tuple[Problem, ...]] = {}

    # -- changes ----------------------------------------------------------------------------------------------------

    def apply(self, puts: Iterable[Object], deletes: Iterable[ObjectKey] = ()) -> Touched:
        """Put and delete objects as one change. Returns what it touched."""
        touched = Touched()
        recheck: set[ObjectKey] = set()
        pending = [(key, None) for key in deletes] + [(one.meta.key, one) for one in puts]
        for key, new in pending:
            old = self._objects.get(key)
            if old == new:
                continue
            recheck |= {ObjectKey("Service", key.namespace, one.service) for one in (old, new) if isinstance(one, Endpoints)}
            if isinstance(old, Endpoints) and isinstance(new, Endpoints) and old.service == new.service:
                self._objects[key] = new
                self._replace_endpoints(old, new, touched)
                continue
            claims = set(_claimed(new)) if new is not None else set()
            if old is not None:
                self._leave(old, touched)
                del self._objects[key]
                self._unclaim(old, set(_claimed(old)) - claims, touched)
            self._problems.pop(key, None)
            if new is not None:
                self._objects[key] = new
                self._claim(new)
                self._enter(new, touched)
                recheck.add(key)
            for one in (old, new):
                if isinstance(one, VirtualService | DestinationRule):
                    for name in _named_hosts(one):
                        recheck |= self._referrers.get(name, set())
                elif isinstance(one, AuthorizationPolicy | PeerAuthentication):
                    recheck |= self.policies.rivals(one)
        for host in touched.hosts:
            recheck |= self._referring(host)
        for key in recheck:
            self._check(key)
        return touched

    def _enter(self, one: Object, touched: Touched) -> None:
        """Bring a held object into force, unless another has its address."""
        key = one.meta.key
        if any(self._claims[address][0] != key for address in _claimed(one)):
            self._out.add(key)
            return
        self._out.discard(key)
        self._index(one, touched, True)

    def _leave(self, one: Object, touched: Touched) -> None:
        key = one.meta.key
        if key in self._out:
            self._out.discard(key)
            return
        self._index(one, touched, False)

    def _claim(self, one: Object) -> None:
        for address in _claimed(one):
            held = self._claims.setdefault(address, [])
            if one.meta.key not in held:
                held.append(one.meta.key)

    def _unclaim(self, one: Object, addresses: set[IPAddress], touched: Touched) -> None:
        """Give addresses back; who waited for them comes into force."""
        waiting: set[ObjectKey] = set()
        for address in addresses:
            held = self._claims[address]
            first = held[0] == one.meta.key
            held.remove(one.meta.key)
            if not held:
                del self._claims[address]
            elif first:
                waiting.add(held[0])
        for key in waiting & self._out:
            self._enter(self._objects[key], touched)
            self._check(key)

    def _index(self, one: Object, touched: Touched, add: bool) -> None:
        match one:
            case Service():
                self._index_service(one, touched, add)
            case Pod():
                self._index_pod(one, touched, add)
            case VirtualService():
                for host, _ in one.hosts:
                    (self._virtual.add if add else self._virtual.remove)(host, one)
                    touched.hosts |= self._concrete(host)
                self._refer(one, add)
            case DestinationRule():
                (self._rules.add if add else self._rules.remove)(one.host, one)
                touched.hosts |= self._concrete(one.host)
                self._refer(one, add)
            case AuthorizationPolicy() | PeerAuthentication():
                touched.policies |= self.policies.touched(one)
                (self.policies.add if add else self.policies.remove)(one)
                touched.policies |= self.policies.touched(one)
                touched.addresses |= {uid for uid, pod in self._pods.items() if self.policies.concerns(one, pod)}
            case Endpoints():
                self._index_endpoints(one, touched, add)
            case Node():
                touched.addresses |= self._pods_by_node.get(one.meta.key.name, set())
                touched.hosts |= {hostname_of(each.meta.key.namespace, each.service) for each in self.behind.on_node(one.meta.key.name)}
                for uid in self._pods_by_node.get(one.meta.key.name, ()):
                    touched.hosts |= {service.hostname for service in self.services_of(self._pods[uid])}

    def _index_service(self, one: Service, touched: Touched, add: bool) -> None:
        host = one.hostname
        if add:
            self._services[host] = one
        else:
            del self._services[host]
        if one.selector:
            _put(self._services_by_label, (one.meta.key.namespace, *one.selector[0]), host, add)
        touched.hosts.add(host)
        touched.addresses.add(one.address_name)
        touched.addresses |= {pod.uid for pod in self.selected(one.meta.key.namespace, one.selector)}
        touched.addresses |= {uid for each in self.behind.of(one.meta.key.namespace, one.meta.key.name) for uid in each.uids()}
        for key in self._referring(host):  # a route to this host may depend on its ports
            rule = self._objects[key]
            if isinstance(rule, VirtualService):
                for name, _ in rule.hosts:
                    touched.hosts |= self._concrete(name)

    def _index_pod(self, one: Pod, touched: Touched, add: bool) -> None:
        if one.node and not one.ended:
            _put(self._pods_by_account, (one.node, one.meta.key.namespace, one.service_account), one.uid, add)
        if not one.alive:
            return
        if add:
            self._pods[one.uid] = one
        else:
            del self._pods[one.uid]
        for label, value in one.meta.labels:
            _put(self._pods_by_label, (one.meta.key.namespace, label, value), one.uid, add)
        _put(self._pods_by_node, one.node, one.uid, add)
        touched.addresses.add(one.uid)
        touched.hosts |= {service.hostname for service in self.services_of(one)}

    def _index_endpoints(self, one: Endpoints, touched: Touched, add: bool) -> None:
        namespace, host = one.meta.key.namespace, hostname_of(one.meta.key.namespace, one.service)
        (self.behind.add if add else self.behind.remove)(one)
        touched.hosts.add(host)
        touched.addresses |= one.uids()
        service = self._services.get(host)
        if service and len(self.behind.of(namespace, one.service)) == add:  # the first came, or the last went: others decide from now on
            touched.addresses |= {pod.uid for pod in self.selected(namespace, service.selector)}

    def _replace_endpoints(self, old: Endpoints, new: Endpoints, touched: Touched) -> None:
        self.behind.remove(old)
        self.behind.add(new)
        touched.hosts.add(hostname_of(new.meta.key.namespace, new.service))
        touched.addresses |= old.differing(new)

    def _refer(self, rule: Rule, add: bool) -> None:
        for name in _named_hosts(rule):
            _put(self._referrers, name, rule.meta.key, add)

    def _referring(self, host: str) -> set[ObjectKey]:
        """Rules that name `host`, or a pattern that it matches."""
        found = set(self._referrers.get(host, ()))
        rest = host
        while rest:
            rest = rest.partition(".")[2]
            found |= self._referrers.get(f"*.{rest}", set())
        return found

    def _concrete(self, pattern: str) -> set[str]:
        if not pattern.startswith("*"):
            return {pattern}
        return {host for host in self._services if matches(pattern, host)}

    # -- queries ----------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._objects)

    def objects(self) -> Iterator[Object]:
        """Everything that is held; see `in_force`."""
        return iter(self._objects.values())

    def get(self, key: ObjectKey) -> Object | None:
        return self._objects.get(key)

    def in_force(self, key: ObjectKey) -> bool:
        return key in self._objects and key not in self._out

    def service(self, host: str) -> Service | None:
        return self._services.get(host)

    def services(self) -> Iterator[Service]:
        return iter(self._services.values())

    def pod(self, uid: str) -> Pod | None:
        return self._pods.get(uid)

    def pods(self) -> Iterator[Pod]:
        return iter(self._pods.values())

    def runs(self, node: str, namespace: str, account: str) -> bool:
        """Whether a pod of the service account is on the node: one that has not ended, with an address or not yet."""
        return (node, namespace, account) in self._pods_by_account

    def node(self, name: str) -> Node | None:
        found = self._objects.get(ObjectKey("Node", "", name))
        return found if isinstance(found, Node) else None

    def selected(self, namespace: str, selector: Labels) -> list[Pod]:
        """Living pods with all the labels, ready or not, by name. An empty selector selects nothing."""
        if not selector:
            return []
        sets = [self._pods_by_label.get((namespace, *one), set()) for one in selector]
        return [self._pods[uid] for uid in sorted(min(sets, key=len).intersection(*sets))]

    def slices(self, service: Service) -> list[Endpoints]:
        """What its own source says of who is behind the service: when it says anything, that counts, else the selector does. (A cluster
        knows nothing of who is behind a service that files have in place of its own.)"""
        key = service.meta.key
        return [one for one in self.behind.of(key.namespace, key.name) if one.meta.place.file == service.meta.place.file]

    def pods_of(self, service: Service) -> list[Pod]:
        """Living pods behind the service, ready or not, by name."""
        if slices := self.slices(service):
            return [self._pods[uid] for uid in sorted({uid for one in slices for uid in one.uids()} & self._pods.keys())]
        return self.selected(service.meta.key.namespace, service.selector)

    def services_of(self, pod: Pod) -> list[Service]:
        """Services that the pod is behind, by host name."""
        namespace, labels = pod.meta.key.namespace, set(pod.meta.labels)
        found = {host for one in labels for host in self._services_by_label.get((namespace, *one), ())
                 if labels.issuperset(self._services[host].selector) and not self.slices(self._services[host])}
        for one in self.behind.holding(pod.uid):
            service = self._services.get(hostname_of(namespace, one.service))
            if service and one in self.slices(service):
                found.add(service.hostname)
        return [self._services[host] for host in sorted(found)]

    def virtual_service(self, host: str) -> VirtualService | None:
        """The one that speaks for `host`."""
        return next(self._virtual.of(host), None)

    def destination_rule(self, host: str, scope: str) -> DestinationRule | None:
        """The one that speaks for `host` to clients of the namespace `scope`: one of their namespace, else one of the host's."""
        service = self._services.get(host)
        home = service.meta.key.namespace if service else ""
        found: dict[str, DestinationRule] = {}
        for rule in self._rules.of(host):
            found.setdefault(rule.meta.key.namespace, rule)
        return found.get(scope) or found.get(home)

    def problems(self) -> list[Problem]:
        """Everything that does not fit together, in the order of files and lines."""
        return sorted(problem for held in self._problems.values() for problem in held)

    # -- what does not fit together ---------------------------------------------------------------------------------

    def _check(self, key: ObjectKey) -> None:
        one = self._objects.get(key)
        found: list[Problem] = []
        match one:
            case Service() | Pod():
                found = self._check_addresses(one)
                if isinstance(one, Service) and not one.selector and not self.slices(one):
                    found.append(warning(one.meta.place, str(key), "selects nothing and no EndpointSlice is its, so it has no endpoints",
                                         "EndpointSlices are read from a cluster, not from files"))
            case VirtualService():
                found = self._check_virtual_service(one)
            case DestinationRule():
                found = self._check_destination_rule(one)
            case AuthorizationPolicy() | PeerAuthentication():
                found = self.policies.check(one, self._pods.values())
        if found:
            self._problems[key] = tuple(found)
        else:
            self._problems.pop(key, None)

    def _check_addresses(self, one: Service | Pod) -> list[Problem]:
        for address in _claimed(one):
            holder = self._claims[address][0]
            if holder != one.meta.key:
                place = self._objects[holder].meta.place
                return [error(one.meta.place, str(one.meta.key),
                              f"its address {address} is already that of {holder} ({place}); it is not in force",
                              "give one of them another address")]
        return []

    def _check_virtual_service(self, one: VirtualService) -> list[Problem]:
        found: list[Problem] = []
        who = str(one.meta.key)
        for host, place in one.hosts:
            concrete = [name for name in self._concrete(host) if name in self._services]
            if not concrete:
                found.append(warning(place, who, f"names the host {host}, and no service is called so; it has no effect",
                                     self._near(host, one.meta.key.namespace)))
            first = self._virtual.at(host)[0]
            if first.meta.key != one.meta.key:
                found.append(warning(place, who, f"the host {host} is already routed by {first.meta.key} ({first.meta.place}), "
                                                 "which is older or comes first by name; this one has no effect there",
                                     "put the routes into one of them"))
            for name in concrete:
                ports = self._services[name].ports
                if ports and not any(port.protocol in (Protocol.HTTP, Protocol.AUTO) for port in ports):
                    found.append(warning(place, who, f"no port of {name} carries HTTP/1, so its http routes have no effect",
                                         "name the port http-..., or set appProtocol: http"))
        for route in one.http:
            for target in route.destinations:
                found += self._check_target(who, target, one.meta.key.namespace)
        return found

    def _check_target(self, who: str, target: RouteDestination, namespace: str) -> list[Problem]:
        service = self._services.get(target.host)
        if service is None:
            return [warning(target.place, who, f"routes to {target.host}, and no service is called so; requests get 503",
                            self._near(target.host, namespace))]
        found = []
        if target.port and service.port(target.port) is None:
            found.append(warning(target.place, who, f"routes to port {target.port} of {target.host}, which has no such TCP port; "
                                                    "requests get 503", f"it has {_ports(service.ports)}"))
        if target.subset and not any(rule.subset(target.subset) for rule in self._rules.of(target.host)):
            known = sorted({subset.name for rule in self._rules.of(target.host) for subset in rule.subsets})
            found.append(warning(target.place, who, f"routes to the subset {target.subset} of {target.host}, which no "
                                                    "DestinationRule defines; requests get 503",
                                 f"defined are {', '.join(known)}" if known else "add a DestinationRule with this subset"))
        return found

    def _check_destination_rule(self, one: DestinationRule) -> list[Problem]:
        found: list[Problem] = []
        who = str(one.meta.key)
        concrete = [name for name in self._concrete(one.host) if name in self._services]
        if not concrete:
            found.append(warning(one.host_place, who, f"is for the host {one.host}, and no service is called so; "
                                                      "it has no effect",
                                 self._near(one.host, one.meta.key.namespace)))
        first = next(rule for rule in self._rules.at(one.host) if rule.meta.key.namespace == one.meta.key.namespace)
        if first.meta.key != one.meta.key:
            found.append(warning(one.host_place, who, f"the host {one.host} already has {first.meta.key} ({first.meta.place}), "
                                                      "which is older or comes first by name; this one has no effect",
                                 "put both into one"))
        return found

    def _near(self, host: str, namespace: str) -> str:
        """A service that may have been meant."""
        labels = host.split(".")
        for guess in (full_host(labels[0], labels[1]) if len(labels) > 1 else "", full_host(labels[0], namespace)):
            if guess in self._services:
                return f"write {guess}"
        return "look at the name and the namespace"


def _claimed(one: Object) -> tuple[IPAddress, ...]:
    """The addresses that nobody else may have."""
    if isinstance(one, Service):
        return one.addresses
    if isinstance(one, Pod) and one.alive and not one.host_network:
        return one.addresses
    return ()


def _named_hosts(rule: Rule) -> set[str]:
    if isinstance(rule, DestinationRule):
        return {rule.host}
    return {host for host, _ in rule.hosts} | {target.host for route in rule.http for target in route.destinations}


def _put(table: dict[K, set[V]], key: K, value: V, add: bool) -> None:
    if add:
        table.setdefault(key, set()).add(value)
        return
    held = table[key]
    held.discard(value)
    if not held:
        del table[key]


def _ports(ports: tuple[ServicePort, ...]) -> str:
    return ", ".join(str(port.port) for port in ports) or "none"

