"""Which kinds there are, and what becomes of a document: an object, nothing, or problems."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from controlplane.model.mesh import Object
from controlplane.model.objects import Metadata
from controlplane.model.problems import ObjectKey, Place, Problem, Severity
from controlplane.sources import endpoints, kubernetes, security
from controlplane.sources.destination_rule import destination_rule
from controlplane.sources.fields import Fields, Notes, did_you_mean
from controlplane.sources.text import Map
from controlplane.sources.virtual_service import virtual_service

ISTIO = "networking.istio.io"
ISTIO_VERSIONS = ("v1", "v1beta1", "v1alpha3")
SECURITY = "security.istio.io"
SECURITY_VERSIONS = ("v1", "v1beta1")


@dataclass(frozen=True, slots=True)
class Kind:
    group: str
    versions: tuple[str, ...]
    parse: Callable[[Fields, Metadata], Object | None]
    namespaced: bool = True


KINDS = {
    "Namespace": Kind("", ("v1",), kubernetes.namespace, namespaced=False),
    "Node": Kind("", ("v1",), kubernetes.node, namespaced=False),
    "ServiceAccount": Kind("", ("v1",), kubernetes.service_account),
    "Service": Kind("", ("v1",), kubernetes.service),
    "Pod": Kind("", ("v1",), kubernetes.pod),
    "VirtualService": Kind(ISTIO, ISTIO_VERSIONS, virtual_service),
    "DestinationRule": Kind(ISTIO, ISTIO_VERSIONS, destination_rule),
    "AuthorizationPolicy": Kind(SECURITY, SECURITY_VERSIONS, security.authorization_policy),
    "PeerAuthentication": Kind(SECURITY, SECURITY_VERSIONS, security.peer_authentication),
}
# of a cluster only, whose controllers say who is behind a service; of files the selector does
CLUSTER_KINDS = {
    **KINDS,
    "EndpointSlice": Kind("discovery.k8s.io", ("v1", "v1beta1"), endpoints.endpoint_slice),
    "Endpoints": Kind("", ("v1",), endpoints.endpoints),
}
# kinds that a cluster has and that change nothing here; Deployments and the like speak through their Pods
IGNORED = frozenset([
    "ClusterRole", "ClusterRoleBinding", "ConfigMap", "ControllerRevision", "CronJob", "CustomResourceDefinition",
    "DaemonSet", "Deployment", "EndpointSlice", "Endpoints", "Event", "HorizontalPodAutoscaler", "Ingress",
    "IngressClass", "Job", "Lease", "LimitRange", "MutatingWebhookConfiguration", "NetworkPolicy", "PersistentVolume",
    "PersistentVolumeClaim", "PodDisruptionBudget", "PodMonitor", "PodTemplate", "PriorityClass", "ReplicaSet",
    "ReplicationController", "ResourceQuota", "Role", "RoleBinding", "RuntimeClass", "Secret", "ServiceMonitor",
    "StatefulSet", "StorageClass", "ValidatingWebhookConfiguration", "VolumeAttachment",
])
# kinds of meshes that this version does not do; leaving one out silently could open what it closes
NOT_YET = frozenset([
    "EnvoyFilter", "GRPCRoute", "Gateway", "GatewayClass", "HTTPRoute", "ProxyConfig", "ReferenceGrant", "RequestAuthentication",
    "ServiceEntry", "Sidecar", "TCPRoute", "TLSRoute", "Telemetry", "UDPRoute", "WasmPlugin", "WorkloadEntry", "WorkloadGroup",
])
_METADATA = [
    "annotations", "creationTimestamp", "deletionGracePeriodSeconds", "deletionTimestamp", "finalizers", "generateName",
    "generation", "managedFields", "ownerReferences", "resourceVersion", "selfLink",
]


@dataclass(frozen=True, slots=True)
class Read:
    """What became of a document. Without `key` nobody can tell which object it was to be; `object` None: refused or ignored."""

    key: ObjectKey | None
    object: Object | None
    problems: tuple[Problem, ...]
    place: Place
    ignored: bool = False


def read(file: str, body: Map, kinds: Mapping[str, Kind] = KINDS) -> Read:
    """One document of `file`, whose source has these `kinds`. Never raises for what is in it."""
    notes = Notes(file)
    top = Fields(notes, body)
    place = Place(file, body.line)
    name = top.text("kind", required=True)
    version = top.text("apiVersion", required=True)
    if not name or not version:
        return Read(None, None, tuple(notes.problems), place)
    notes.object = name
    if name in IGNORED and name not in kinds and not version.startswith((ISTIO, SECURITY)):
        return Read(None, None, (), place, ignored=True)
    kind = kinds.get(name)
    group, _, short = version.rpartition("/")
    if kind is None or group != kind.group:
        _refuse_kind(top, name, version)
        return Read(None, None, tuple(notes.problems), place)
    meta = _metadata(top, name, kind, notes)
    if meta is None:
        return Read(None, None, tuple(notes.problems), place)
    notes.object = str(meta.key)
    if short not in kind.versions:
        top.error("apiVersion", f"is {version!r}", f"{name} is known as {', '.join(_versions(kind))}")
    found = kind.parse(top, meta)
    top.finish()
    return Read(meta.key, None if notes.refused else found, tuple(notes.problems), place)


def _versions(kind: Kind) -> list[str]:
    return [f"{kind.group}/{version}" if kind.group else version for version in kind.versions]


def _refuse_kind(top: Fields, name: str, version: str) -> None:
    if name in NOT_YET:
        top.error("kind", f"{name} is not supported yet", "remove it; it would have no effect")
    elif name in KINDS:
        top.error("apiVersion", f"is {version!r}", f"{name} is known as {', '.join(_versions(KINDS[name]))}")
    else:
        top.error("kind", f"{name!r} of {version} is unknown",
                  f"known are {', '.join(sorted(KINDS))}{did_you_mean(name, [*KINDS, *IGNORED, *NOT_YET])}")


def _metadata(top: Fields, name: str, kind: Kind, notes: Notes) -> Metadata | None:
    """None when the object cannot be named. Problems beside its name are noted under the name."""
    one = top.fields("metadata", required=True)
    if one is None:
        return None
    given = one.name("name", required=True)
    namespace = one.name("namespace", "default") if kind.namespaced else ""
    if not given:
        return None
    key = ObjectKey(name, namespace, given)
    notes.object = str(key)
    if not kind.namespaced:
        one.ignore("namespace")
    labels = one.labels("labels")
    created, uid = one.text("creationTimestamp"), one.text("uid")
    one.ignore(*_METADATA)
    one.finish(severity=Severity.WARNING)
    return Metadata(key, one.place("name"), created, labels, uid)
