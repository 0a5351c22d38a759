"""Istio's kinds as the smallest definitions that a real API server takes: any field goes, with the status subresource."""
from __future__ import annotations

from collections.abc import Iterable

from protos.kubernetes import resources
from protos.kubernetes.resources import Resource
from tests.support.kubernetes.real import Cluster
from tests.support.wait import until

ISTIO = (resources.VIRTUAL_SERVICES, resources.DESTINATION_RULES, resources.PEER_AUTHENTICATIONS, resources.AUTHORIZATION_POLICIES)


def definition(one: Resource) -> dict[str, object]:
    anything = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    return {
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition", "metadata": {"name": str(one)},
        "spec": {"group": one.group, "scope": "Namespaced" if one.namespaced else "Cluster",
                 "names": {"kind": one.kind, "listKind": f"{one.kind}List", "plural": one.plural, "singular": one.kind.lower()},
                 "versions": [{"name": one.version, "served": True, "storage": True, "subresources": {"status": {}},
                               "schema": {"openAPIV3Schema": {"type": "object", "properties": {"spec": anything, "status": anything}}}}]}}


def install(cluster: Cluster, kinds: Iterable[Resource] = ISTIO) -> None:
    """Make them, and wait until they are served."""
    for one in kinds:
        status, told = cluster.ask("POST", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", definition(one))
        assert status in (201, 409), told
    until(lambda: all(cluster.ask("GET", one.path())[0] == 200 for one in kinds), "Istio's kinds are served", 60, 0.1)
