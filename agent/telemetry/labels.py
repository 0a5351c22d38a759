"""Istio's metric labels for a series. Names and defaults: Istio's standard metrics reference; missing is `unknown`."""
from __future__ import annotations

from typing import Protocol

from agent.model.telemetry import PASSTHROUGH, SeriesKey
from agent.model.workload import Service, Workload

UNKNOWN = "unknown"

WORKLOAD_LABELS = ("workload", "canonical_service", "canonical_revision", "workload_namespace", "principal", "app",
                   "version", "cluster", "region", "zone")
COMMON = (
    "reporter",
    *(f"source_{name}" for name in WORKLOAD_LABELS),
    "destination_service", "destination_service_name", "destination_service_namespace",
    *(f"destination_{name}" for name in WORKLOAD_LABELS),
    "request_protocol", "response_flags", "connection_security_policy",
)
HTTP = (*COMMON, "response_code", "grpc_response_status")
TCP = COMMON


class Names(Protocol):
    """Who stands behind an index. None: not known (any more)."""

    def workload(self, index: int) -> Workload | None: ...

    def service(self, index: int) -> Service | None: ...


def _workload(workload: Workload | None, mutual_tls: bool) -> tuple[str, ...]:
    if workload is None:
        return (UNKNOWN,) * len(WORKLOAD_LABELS)
    values = (
        workload.workload_name,
        workload.canonical_name,
        workload.canonical_revision,
        workload.namespace,
        workload.identity if mutual_tls else "",  # a principal comes from a handshake, never from an address
        workload.canonical_name,
        workload.canonical_revision,
        workload.cluster_id,
        workload.region,
        workload.zone,
    )
    return tuple(value or UNKNOWN for value in values)


def _service(index: int, names: Names) -> tuple[str, str, str]:
    if index == PASSTHROUGH:
        return (UNKNOWN, "PassthroughCluster", UNKNOWN)
    service = names.service(index)
    if service is None:
        return (UNKNOWN, UNKNOWN, UNKNOWN)
    return (service.hostname, service.name, service.namespace)


def security_policy(key: SeriesKey) -> str:
    """Only the destination can tell that nothing protected a connection (Istio's standard metrics)."""
    if key.mutual_tls:
        return "mutual_tls"
    return "none" if key.reporter == "destination" else UNKNOWN


def values(key: SeriesKey, names: Names) -> tuple[str, ...]:
    """Label values in the order of HTTP or TCP above, by the key's protocol."""
    common = (
        key.reporter,
        *_workload(names.workload(key.source), key.mutual_tls),
        *_service(key.service, names),
        *_workload(names.workload(key.destination), key.mutual_tls),
        key.protocol,
        key.flag,
        security_policy(key),
    )
    if key.protocol == "tcp":
        return common
    return (*common, str(key.code), "" if key.grpc_status is None else str(key.grpc_status))
