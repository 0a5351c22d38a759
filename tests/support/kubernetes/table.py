"""The kinds that are served, as data: a custom resource is one more line."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from protos.kubernetes import resources as known
from protos.kubernetes.resources import Resource

Object = dict[str, Any]


def _at(*path: str) -> Callable[[Object], str]:
    def read(one: Object) -> str:
        found: Any = one
        for part in path:
            found = (found or {}).get(part)
        return "" if found is None else str(found)
    return read


FIELDS = {"metadata.name": _at("metadata", "name"), "metadata.namespace": _at("metadata", "namespace")}
_POD = {f"{part}.{name}": _at(part, name) for part, name in (
    ("spec", "nodeName"), ("spec", "serviceAccountName"), ("spec", "restartPolicy"), ("spec", "schedulerName"), ("status", "phase"),
    ("status", "podIP"))}


@dataclass(frozen=True)
class Served:
    """`custom`: as a CRD is served; such objects have a generation, must be updated by resourceVersion and are listed with kind and
    apiVersion. `status`: it has the subresource. `fields`: what field selectors may name beside name and namespace."""

    resource: Resource
    custom: bool = False
    status: bool = False
    fields: tuple[tuple[str, Callable[[Object], str]], ...] = ()


def custom(group: str, version: str, plural: str, kind: str, *, namespaced: bool = True) -> Served:
    return Served(Resource(group, version, plural, kind, namespaced), custom=True, status=True)


TABLE = (
    Served(known.NAMESPACES, status=True, fields=(("status.phase", _at("status", "phase")),)),
    Served(known.NODES, status=True, fields=(("spec.unschedulable", _at("spec", "unschedulable")),)),
    Served(known.PODS, status=True, fields=tuple(_POD.items())),
    Served(known.SERVICES, status=True),
    Served(known.SERVICE_ACCOUNTS),
    Served(known.SECRETS, fields=(("type", _at("type")),)),
    Served(known.CONFIG_MAPS),
    Served(known.ENDPOINTS),
    Served(known.ENDPOINT_SLICES),
    Served(known.LEASES),
    Served(known.EVENTS, fields=(("reason", _at("reason")), ("type", _at("type")))),
    *(Served(one, custom=True, status=True) for one in (known.VIRTUAL_SERVICES, known.DESTINATION_RULES, known.PEER_AUTHENTICATIONS,
                                                        known.AUTHORIZATION_POLICIES)),
)
