"""Which resources of the API server we know, and the paths they are at (Kubernetes API concepts, "Resource URIs")."""
from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import quote

# wide, since names of RBAC may hold ":"; a slash or dots alone would lead elsewhere (the API server's path segment validation)
_SEGMENT = re.compile(r"(?!\.{1,2}$)[^/%\x00-\x20\x7f]{1,253}")


@dataclass(frozen=True, slots=True)
class Resource:
    """One kind as it is served: `group` is "" for the core group, `plural` the name in paths."""

    group: str
    version: str
    plural: str
    kind: str
    namespaced: bool = True

    def __str__(self) -> str:
        return f"{self.plural}.{self.group}" if self.group else self.plural

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    def path(self, namespace: str = "", name: str = "", subresource: str = "") -> str:
        """The path, percent-encoded. Without `namespace` all namespaces. Raises ValueError for a name that cannot be one."""
        parts = ["apis", self.group, self.version] if self.group else ["api", self.version]
        if self.namespaced and namespace:
            parts += ["namespaces", namespace]
        elif self.namespaced and name:
            raise ValueError(f"{self.kind} {name!r} needs a namespace")
        parts += [part for part in (self.plural, name, subresource) if part]
        for part in parts:
            if not _SEGMENT.fullmatch(part):
                raise ValueError(f"{part!r} cannot be part of a path of the API server")
        return "/" + "/".join(quote(part, safe=":") for part in parts)


NAMESPACES = Resource("", "v1", "namespaces", "Namespace", namespaced=False)
NODES = Resource("", "v1", "nodes", "Node", namespaced=False)
PODS = Resource("", "v1", "pods", "Pod")
SERVICES = Resource("", "v1", "services", "Service")
SERVICE_ACCOUNTS = Resource("", "v1", "serviceaccounts", "ServiceAccount")
SECRETS = Resource("", "v1", "secrets", "Secret")
CONFIG_MAPS = Resource("", "v1", "configmaps", "ConfigMap")
ENDPOINTS = Resource("", "v1", "endpoints", "Endpoints")
ENDPOINT_SLICES = Resource("discovery.k8s.io", "v1", "endpointslices", "EndpointSlice")
ENDPOINT_SLICES_V1BETA1 = Resource("discovery.k8s.io", "v1beta1", "endpointslices", "EndpointSlice")
LEASES = Resource("coordination.k8s.io", "v1", "leases", "Lease")
EVENTS = Resource("events.k8s.io", "v1", "events", "Event")
TOKEN_REVIEWS = Resource("authentication.k8s.io", "v1", "tokenreviews", "TokenReview", namespaced=False)
VIRTUAL_SERVICES = Resource("networking.istio.io", "v1", "virtualservices", "VirtualService")
DESTINATION_RULES = Resource("networking.istio.io", "v1", "destinationrules", "DestinationRule")
PEER_AUTHENTICATIONS = Resource("security.istio.io", "v1", "peerauthentications", "PeerAuthentication")
AUTHORIZATION_POLICIES = Resource("security.istio.io", "v1", "authorizationpolicies", "AuthorizationPolicy")
