"""`/config_dump`: what is in force, in the JSON that ztunnel's dump has, with what layer 7 adds beside it.

Keys are ztunnel's (`istioctl ztunnel-config` reads them): workloads, services, policies, certificates. Ours beside
them: destinations (with their routes), clusters (with their endpoints), listeners, tunnels. Lists are sorted by name.
"""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from agent.model.policy import Match, Policy, Scope
from agent.model.routing import Cluster, Destination, HeaderEdit, MatchKind, NamedMatch, Route, StringMatch, WeightedCluster
from agent.model.telemetry import TunnelRow
from agent.model.workload import Service, Tunnel, Workload
from agent.state.entries import Table
from agent.state.store import Store

Json = dict[str, Any]
LATEST = 253_402_300_799  # s since 1970: the end of year 9999
SCOPES = {Scope.GLOBAL: "Global", Scope.NAMESPACE: "Namespace", Scope.WORKLOAD: "WorkloadSelector"}
MATCHES = {"namespaces": "namespaces", "not_namespaces": "notNamespaces", "principals": "principals", "not_principals": "notPrincipals",
           "sources": "sourceIps", "not_sources": "notSourceIps", "destinations": "destinationIps",
           "not_destinations": "notDestinationIps", "ports": "destinationPorts", "not_ports": "notDestinationPorts",
           "service_accounts": "serviceAccounts", "not_service_accounts": "notServiceAccounts"}


def workload(one: Workload) -> Json:
    return {
        "uid": one.uid,
        "workloadIps": [str(address) for address in one.addresses],
        "protocol": "HBONE" if one.tunnel is Tunnel.HBONE else "TCP",
        "name": one.name,
        "namespace": one.namespace,
        "trustDomain": one.trust_domain,
        "serviceAccount": one.service_account,
        "workloadName": one.workload_name,
        "workloadType": one.workload_type,
        "canonicalName": one.canonical_name,
        "canonicalRevision": one.canonical_revision,
        "node": one.node,
        "status": "Healthy" if one.healthy else "Unhealthy",
        "clusterId": one.cluster_id,
        "locality": {"region": one.region, "zone": one.zone, "subzone": ""},
        "services": sorted({port.service for port in one.ports}),
        "authorizationPolicies": list(one.policies),
    }


def service(one: Service, endpoints: Iterable[Workload]) -> Json:
    return {
        "name": one.name,
        "namespace": one.namespace,
        "hostname": one.hostname,
        "vips": [f"/{address}" for address in one.addresses],  # network (ours is unnamed) / address
        "ports": {str(port.port): port.target_port for port in one.ports},
        "appProtocols": {str(port.port): str(port.protocol) for port in one.ports},
        "endpoints": {
            workload.uid: {
                "workloadUid": workload.uid,
                "port": {str(port.service_port): port.target_port for port in workload.ports
                         if port.service == one.key},
            }
            for workload in endpoints
        },
    }


def policy(one: Policy, applies: bool) -> Json:
    """`applies`: a pod of this node can be subject to it; only then the workers have it."""
    return {"name": one.name, "namespace": one.namespace, "scope": SCOPES[one.scope], "action": one.action.name.capitalize(),
            "dryRun": one.dry_run, "applies": applies,
            "rules": [[[_policy_match(match) for match in clause] for clause in rule] for rule in one.rules]}


def _policy_match(one: Match) -> Json:
    shape: Json = {}
    for name, key in MATCHES.items():
        if values := getattr(one, name):
            shape[key] = [_value(value) for value in values]
    return shape


def _value(value: Any) -> Any:
    if isinstance(value, StringMatch):
        return "Presence" if value.kind is MatchKind.PRESENT else {value.kind.value.capitalize(): value.value}
    if isinstance(value, tuple):
        return {"namespace": value[0], "serviceAccount": value[1]}
    return value if isinstance(value, int) else str(value)


def destination(one: Destination) -> Json:
    shape: Json = {"key": one.key, "scope": one.scope, "authority": one.authority,
                   "known": one.http is not None or one.tcp is not None}
    if one.http is not None:
        shape["http"] = [{"name": host.name, "domains": list(host.domains), "routes": [_route(r) for r in host.routes]}
                         for host in one.http]
    if one.tcp is not None:
        shape["tcp"] = [_weighted(cluster) for cluster in one.tcp]
    return shape


def cluster(one: Cluster) -> Json:
    return {
        "key": one.key,
        "scope": one.scope,
        "name": one.name,
        "service": one.service,
        "balancer": str(one.balancer),
        "connectTimeoutMs": one.connect_timeout_ms,
        "endpoints": [{"address": str(end.address), "port": end.port, "weight": end.weight,
                       "status": "Healthy" if end.healthy else "Unhealthy"} for end in one.endpoints],
    }


def everything(store: Store, destinations: Iterable[Destination], clusters: Iterable[Cluster]) -> Json:
    members: dict[str, dict[str, Workload]] = {}
    for one in store.workloads.values():
        for port in one.ports:
            members.setdefault(port.service, {})[one.uid] = one
    return {
        "workloads": [workload(one) for _, one in sorted(store.workloads.items())],
        "services": [service(one, members.get(key, {}).values()) for key, one in sorted(store.services.items())],
        "policies": [policy(one, store.entry((Table.POLICY, key)) is not None) for key, one in sorted(store.policies.items())],
        "destinations": [destination(one) for one in sorted(destinations, key=lambda one: one.key)],
        "clusters": [cluster(one) for one in sorted(clusters, key=lambda one: one.key)],
    }


def _route(route: Route) -> Json:
    shape: Json = {"name": route.name, "match": {"path": _match(route.match.path)},
                   "clusters": [_weighted(cluster) for cluster in route.clusters]}
    if route.match.headers:
        shape["match"]["headers"] = [_named(match) for match in route.match.headers]
    if route.match.query:
        shape["match"]["query"] = [_named(match) for match in route.match.query]
    if route.timeout_ms:
        shape["timeoutMs"] = route.timeout_ms
    return shape | _edits(route.request, route.response)


def _weighted(one: WeightedCluster) -> Json:
    return {"cluster": one.cluster, "weight": one.weight} | _edits(one.request, one.response)


def _edits(request: HeaderEdit, response: HeaderEdit) -> Json:
    return {name: {"remove": list(edit.remove), "set": dict(edit.set), "add": [list(pair) for pair in edit.add]}
            for name, edit in (("request", request), ("response", response)) if edit != HeaderEdit()}


def _match(match: StringMatch) -> Json:
    flags = {name: True for name, on in (("ignoreCase", match.ignore_case), ("invert", match.invert)) if on}
    return {str(match.kind): match.value, **flags}


def _named(named: NamedMatch) -> Json:
    return {"name": named.name, **_match(named.match)}


def tunnels(found: Mapping[int, tuple[list[TunnelRow], int]], pods: Mapping[int, tuple[str, str]], now: float) -> Json:
    """`found`: worker index -> its tunnels and how many it has; `pods`: handle -> name and identity. A pod that has left has neither."""
    return {
        "tunnels": [_tunnel(row, index, *pods.get(row.pod, ("", "")), now) for index, (rows, _) in sorted(found.items()) for row in rows],
        "tunnelsNotShown": sum(max(total - len(rows), 0) for rows, total in found.values()),
    }


def _tunnel(row: TunnelRow, worker: int, pod: str, identity: str, now: float) -> Json:
    return {"pod": pod, "direction": row.direction, "state": row.state, "identity": identity, "peer": row.peer, "address": row.address,
            "streams": row.streams, "streamsEver": row.streams_ever, "bytes": row.bytes, "worker": worker,
            "ageSeconds": round(max(now - row.opened_us / 1e6, 0.0), 1), "certificateExpiration": _moment(row.until),
            "peerCertificateExpiration": _moment(row.peer_until)}


def _moment(seconds: int) -> str | None:
    """None: not known, or beyond what a calendar has."""
    if not 0 < seconds <= LATEST:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
