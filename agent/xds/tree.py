"""What an on-demand destination needs: Listener -> RouteConfiguration -> Clusters -> endpoints. Sans-I/O.

A destination is **published** only when every part of it is here or is known not to exist; until a changed one is
complete again the last complete version stays (make before break), and the parts of both stay wanted. A Listener
that does not exist publishes a destination without routes, so that a worker can answer at once instead of waiting.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from agent.model.routing import Cluster, Destination, Endpoint, VirtualHost, WeightedCluster
from agent.xds.types import TypeUrl, parse_destination_key, xdstp


@dataclass(frozen=True, slots=True)
class ListenerPart:
    """A decoded API listener. `http` is a route table given inline, `rds` the name of one to be asked for."""

    scope: str
    authority: str
    http: tuple[VirtualHost, ...] | None
    rds: str | None  # full resource name
    tcp: tuple[WeightedCluster, ...] | None


@dataclass(frozen=True, slots=True)
class RoutePart:
    scope: str
    name: str
    hosts: tuple[VirtualHost, ...]


@dataclass(frozen=True, slots=True)
class ClusterPart:
    """A decoded cluster. `eds` is the full resource name of its endpoints; `endpoints` those given inline."""

    cluster: Cluster  # without endpoints
    eds: str | None
    endpoints: tuple[Endpoint, ...] = ()


@dataclass(frozen=True, slots=True)
class EndpointsPart:
    scope: str
    name: str
    endpoints: tuple[Endpoint, ...]


Part = ListenerPart | RoutePart | ClusterPart | EndpointsPart

PartName = tuple[TypeUrl, str]  # type and full resource name

NAMED = (TypeUrl.LISTENER, TypeUrl.ROUTE, TypeUrl.CLUSTER, TypeUrl.ENDPOINTS)


@dataclass(slots=True)
class _Demand:
    scope: str
    authority: str
    published: Destination | None = None
    needs: set[PartName] = field(default_factory=set)  # parts of the published version
    clusters: set[str] = field(default_factory=set)  # names of clusters that exist, of the published version
    missing: list[str] = field(default_factory=list)  # parts that the next version waits for


@dataclass(frozen=True, slots=True)
class Published:
    """What changed in what is complete: to be put in force as one."""

    destinations: tuple[Destination, ...] = ()
    clusters: tuple[Cluster, ...] = ()
    dropped_destinations: tuple[str, ...] = ()  # keys
    dropped_clusters: tuple[str, ...] = ()  # keys
    subscribe: frozenset[PartName] = frozenset()  # names wanted since the last call
    unsubscribe: frozenset[PartName] = frozenset()  # names wanted no more

    def __bool__(self) -> bool:
        """Whether something is to be put in force."""
        return bool(self.destinations or self.clusters or self.dropped_destinations or self.dropped_clusters)


class Tree:
    """See the head of this file. `demand`, `drop`, `put` and `remove`, then `publish` and `wanted`.

    The cost of `publish` is that of what was touched since the last one.
    """

    def __init__(self) -> None:
        self._demands: dict[str, _Demand] = {}
        self._parts: dict[PartName, Part | None] = {}  # None: it does not exist
        self._users: dict[PartName, set[str]] = {}  # part -> keys of the destinations that want it
        self._cluster_users: dict[str, set[str]] = {}  # cluster key -> keys of the destinations published with it
        self._clusters: dict[str, Cluster] = {}  # as published
        self._demand_parts: dict[str, set[PartName]] = {}  # the reverse of _users
        self._demand_clusters: dict[str, set[str]] = {}  # the reverse of _cluster_users
        self._stale: set[str] = set()
        self._wanted_more: set[PartName] = set()  # since the last publish
        self._wanted_less: set[PartName] = set()

    def __contains__(self, key: str) -> bool:
        return key in self._demands

    def __len__(self) -> int:
        return len(self._demands)

    def __iter__(self) -> Iterator[str]:
        return iter(self._demands)

    def demand(self, key: str) -> None:
        """From now on the destination `scope|host:port` is followed. Raises ValueError when the key is none."""
        if key not in self._demands:
            self._demands[key] = _Demand(*parse_destination_key(key))
            self._stale.add(key)

    def drop(self, key: str) -> None:
        """Follow it no more; parts that only it used are not wanted after the next `publish`."""
        if key in self._demands:
            self._stale.add(key)
            del self._demands[key]

    def put(self, type_url: TypeUrl, name: str, part: Part) -> None:
        self._set((type_url, name), part)

    def remove(self, type_url: TypeUrl, name: str) -> None:
        """The control plane says that there is no such resource."""
        self._set((type_url, name), None)

    def published(self, key: str) -> Destination | None:
        demand = self._demands.get(key)
        return demand.published if demand else None

    def clusters(self) -> Mapping[str, Cluster]:
        """Every published cluster by its key."""
        return self._clusters

    def missing(self, key: str) -> tuple[str, ...]:
        """Names of the parts that have not come, for an operator who asks why a destination is not there."""
        demand = self._demands.get(key)
        return tuple(demand.missing) if demand else ()

    def wanted(self) -> dict[TypeUrl, set[str]]:
        """Every name to be subscribed to, as of the last `publish`."""
        names: dict[TypeUrl, set[str]] = {url: set() for url in NAMED}
        for type_url, name in self._users:
            names[type_url].add(name)
        return names

    def unused(self) -> list[PartName]:
        """Parts that were put and that nothing wants, as of the last `publish`; they are forgotten by this call."""
        found = [part for part in self._parts if part not in self._users]
        for part in found:
            del self._parts[part]
        return found

    def publish(self) -> Published:
        """What became complete, changed, or was dropped since the last call; parts that nobody wants are forgotten."""
        destinations, dropped, touched = [], [], set()
        stale, self._stale = sorted(self._stale), set()
        for key in stale:
            demand = self._demands.get(key)
            if demand is None:
                dropped.append(key)
                touched |= self._recluster(key, set())
                self._use(key, set())
                continue
            needs, names, demand.missing, destination = self._assemble(demand)
            touched |= {cluster_key(demand.scope, name) for name in demand.clusters}
            if destination is None:
                self._use(key, demand.needs | needs)
                continue
            if destination != demand.published:
                destinations.append(destination)
            demand.published, demand.needs, demand.clusters = destination, needs, names
            touched |= self._recluster(key, {cluster_key(demand.scope, name) for name in names})
            self._use(key, needs)
        clusters, lost = [], []
        for name in sorted(touched):
            if not self._cluster_users.get(name):
                if self._clusters.pop(name, None):
                    lost.append(name)
            elif (cluster := self._cluster(*name.split("|", 1))) and cluster != self._clusters.get(name):
                self._clusters[name] = cluster
                clusters.append(cluster)
        more, less = frozenset(self._wanted_more - self._wanted_less), frozenset(self._wanted_less - self._wanted_more)
        self._wanted_more, self._wanted_less = set(), set()
        return Published(tuple(destinations), tuple(clusters), tuple(dropped), tuple(lost), more, less)

    # -- inside -----------------------------------------------------------------------------------------------------

    def _set(self, part: PartName, value: Part | None) -> None:
        self._parts[part] = value
        self._stale.update(self._users.get(part, ()))

    def _use(self, key: str, parts: set[PartName]) -> None:
        """Destination `key` wants exactly `parts` from now on."""
        before = self._demand_parts.pop(key, set())
        if parts:
            self._demand_parts[key] = parts
        for part in before - parts:
            users = self._users[part]
            users.discard(key)
            if not users:
                del self._users[part]
                self._parts.pop(part, None)
                self._wanted_less.add(part)
        for part in parts - before:
            if part not in self._users:
                self._wanted_more.add(part)
            self._users.setdefault(part, set()).add(key)

    def _recluster(self, key: str, names: set[str]) -> set[str]:
        """Destination `key` is published with exactly the clusters `names` from now on. Returns old and new ones."""
        before = self._demand_clusters.pop(key, set())
        if names:
            self._demand_clusters[key] = names
        for name in before - names:
            self._cluster_users[name].discard(key)
            if not self._cluster_users[name]:
                del self._cluster_users[name]
        for name in names - before:
            self._cluster_users.setdefault(name, set()).add(key)
        return before | names

    def _assemble(self, demand: _Demand) -> tuple[set[PartName], set[str], list[str], Destination | None]:
        """Parts needed, names of existing clusters, parts missing, and the destination when nothing is missing."""
        listener_name = (TypeUrl.LISTENER, xdstp(TypeUrl.LISTENER, demand.scope, demand.authority))
        needs: set[PartName] = {listener_name}
        missing: list[str] = []
        clusters: set[str] = set()
        if listener_name not in self._parts:
            return needs, clusters, [listener_name[1]], None
        listener = self._parts[listener_name]
        if listener is None:
            return needs, clusters, [], Destination(demand.scope, demand.authority, None, None)
        assert isinstance(listener, ListenerPart)
        hosts = listener.http
        if listener.rds is not None:
            route_name = (TypeUrl.ROUTE, listener.rds)
            needs.add(route_name)
            if route_name in self._parts:
                route = self._parts[route_name]
                assert route is None or isinstance(route, RoutePart)
                hosts = route.hosts if route else ()
            else:
                missing.append(route_name[1])
        for name in sorted({one.cluster for one in referenced(hosts, listener.tcp)}):
            cluster_name = (TypeUrl.CLUSTER, xdstp(TypeUrl.CLUSTER, demand.scope, name))
            needs.add(cluster_name)
            if cluster_name not in self._parts:
                missing.append(cluster_name[1])
                continue
            part = self._parts[cluster_name]
            if part is None:
                continue
            assert isinstance(part, ClusterPart)
            clusters.add(name)
            if part.eds is not None:
                needs.add((TypeUrl.ENDPOINTS, part.eds))
                if (TypeUrl.ENDPOINTS, part.eds) not in self._parts:
                    missing.append(part.eds)
        found = None if missing else Destination(demand.scope, demand.authority, hosts, listener.tcp)
        return needs, clusters, missing, found

    def _cluster(self, scope: str, name: str) -> Cluster | None:
        """The cluster with its endpoints, of the parts that are here; None when they are not all here now."""
        part = self._parts.get((TypeUrl.CLUSTER, xdstp(TypeUrl.CLUSTER, scope, name)))
        if not isinstance(part, ClusterPart):
            return None
        if part.eds is None:
            return replace(part.cluster, endpoints=part.endpoints)
        key = (TypeUrl.ENDPOINTS, part.eds)
        if key not in self._parts:
            return None
        endpoints = self._parts[key]
        assert endpoints is None or isinstance(endpoints, EndpointsPart)
        return replace(part.cluster, endpoints=endpoints.endpoints if endpoints else ())


def cluster_key(scope: str, name: str) -> str:
    """The key of a CLUSTER blob."""
    return f"{scope}|{name}"


def referenced(
    hosts: tuple[VirtualHost, ...] | None, tcp: tuple[WeightedCluster, ...] | None
) -> Iterator[WeightedCluster]:
    """Every cluster that a destination names."""
    for host in hosts or ():
        for route in host.routes:
            yield from route.clusters
    yield from tcp or ()
