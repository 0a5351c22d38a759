"""AuthorizationPolicy and PeerAuthentication, and what follows: which policies a pod has, and how strict it is."""
from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from controlplane.model.objects import Labels, Metadata, Pod
from controlplane.model.problems import ObjectKey, Place, Problem, warning

ROOT_NAMESPACE = "istio-system"  # Istio's: policies there are for the whole mesh
STATIC_STRICT = "istio_converted_static_strict"  # istiod's names; Kubernetes has no names with `_`
CONVERTED = "converted_peer_authentication_"


class Action(StrEnum):
    ALLOW = "ALLOW"
    DENY = "DENY"


class Mode(StrEnum):
    UNSET = "UNSET"  # as the next wider one says
    DISABLE = "DISABLE"
    PERMISSIVE = "PERMISSIVE"
    STRICT = "STRICT"


@dataclass(frozen=True, slots=True)
class Source:
    """`layer7` names what is given and cannot be known at layer 4. Texts may begin or end with `*`."""

    principals: tuple[str, ...] = ()
    not_principals: tuple[str, ...] = ()
    namespaces: tuple[str, ...] = ()
    not_namespaces: tuple[str, ...] = ()
    service_accounts: tuple[tuple[str, str], ...] = ()  # namespace, name
    not_service_accounts: tuple[tuple[str, str], ...] = ()
    blocks: tuple[str, ...] = ()  # addresses or CIDR
    not_blocks: tuple[str, ...] = ()
    layer7: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Operation:
    ports: tuple[int, ...] = ()
    not_ports: tuple[int, ...] = ()
    layer7: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Condition:
    """`values` and `not_values` are checked for the key: addresses for `source.ip`, numbers for `destination.port`."""

    key: str
    values: tuple[str, ...]
    not_values: tuple[str, ...]
    layer7: bool


@dataclass(frozen=True, slots=True)
class Rule:
    """Any of the sources, any of the operations, all of the conditions; what is empty is any."""

    sources: tuple[Source, ...]
    operations: tuple[Operation, ...]
    conditions: tuple[Condition, ...]
    place: Place


def layer7(rule: Rule) -> list[str]:
    """What of a rule cannot be known at layer 4."""
    found = [name for source in rule.sources for name in source.layer7]
    found += [name for operation in rule.operations for name in operation.layer7]
    return sorted({*found, *(one.key for one in rule.conditions if one.layer7)})


@dataclass(frozen=True, slots=True)
class AuthorizationPolicy:
    """`selector` None: every pod of the namespace (of the root namespace: of the mesh). `unsent`: why it is not for layer 4, or ""."""

    meta: Metadata
    selector: Labels | None
    action: Action
    dry_run: bool
    rules: tuple[Rule, ...]
    unsent: str = ""

    @property
    def name(self) -> str:
        """Of its `istio.security.Authorization`."""
        return f"{self.meta.key.namespace}/{self.meta.key.name}"


@dataclass(frozen=True, slots=True)
class PeerAuthentication:
    meta: Metadata
    selector: Labels  # empty: every pod of the namespace, or of the mesh
    mode: Mode
    ports: tuple[tuple[int, Mode], ...]  # only with a selector

    @property
    def converted(self) -> str:
        """The name of the policy that its exceptions by port make."""
        return f"{self.meta.key.namespace}/{CONVERTED}{self.meta.key.name}"


@dataclass(frozen=True, slots=True)
class Strictness:
    """What is in force for a pod: the mode of all ports, and of those that differ."""

    mode: Mode
    ports: dict[int, Mode]
    source: PeerAuthentication | None  # the one for this very pod

    @property
    def exceptions(self) -> list[int]:
        """Ports that are strict while the rest is not, or the other way round."""
        strict = self.mode is Mode.STRICT
        return sorted(port for port, mode in self.ports.items() if (mode is Mode.STRICT) is not strict)


class Policies:
    """Both kinds by namespace. Not for objects that change in place: remove and add."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._authorizations: dict[str, dict[str, AuthorizationPolicy]] = {}  # namespace -> name
        self._authentications: dict[str, list[PeerAuthentication]] = {}  # oldest first

    # -- changes ----------------------------------------------------------------------------------------------------

    def add(self, one: AuthorizationPolicy | PeerAuthentication) -> None:
        namespace = one.meta.key.namespace
        if isinstance(one, AuthorizationPolicy):
            self._authorizations.setdefault(namespace, {})[one.meta.key.name] = one
        else:
            held = self._authentications.setdefault(namespace, [])
            held.append(one)
            held.sort(key=lambda each: each.meta.age)

    def remove(self, one: AuthorizationPolicy | PeerAuthentication) -> None:
        namespace = one.meta.key.namespace
        if isinstance(one, AuthorizationPolicy):
            del self._authorizations[namespace][one.meta.key.name]
            if not self._authorizations[namespace]:
                del self._authorizations[namespace]
            return
        held = self._authentications[namespace]
        held[:] = [each for each in held if each.meta.key != one.meta.key]
        if not held:
            del self._authentications[namespace]

    def touched(self, one: AuthorizationPolicy | PeerAuthentication) -> set[str]:
        """Names of Authorization resources that may differ with `one`."""
        if isinstance(one, AuthorizationPolicy):
            return {one.name}
        wide = one.meta.key.namespace == self.root
        return {f"{self.root}/{STATIC_STRICT}", one.converted} | {
            each.converted for namespace, held in self._authentications.items() if wide or namespace == one.meta.key.namespace
            for each in held if each.ports}

    def concerns(self, one: AuthorizationPolicy | PeerAuthentication, pod: Pod) -> bool:
        """Whether the pod's list of policies, or its tunnel, may differ with `one`."""
        if one.meta.key.namespace not in (self.root, pod.meta.key.namespace):
            return False
        return one.selector is not None and set(pod.meta.labels).issuperset(one.selector)

    # -- queries ----------------------------------------------------------------------------------------------------

    def __bool__(self) -> bool:
        """Whether there is any PeerAuthentication."""
        return bool(self._authentications)

    def names(self) -> Iterator[str]:
        """Names under which there may be an Authorization."""
        for held in self._authorizations.values():
            yield from (one.name for one in held.values())
        for several in self._authentications.values():
            yield from (one.converted for one in several if one.ports)
        if self._authentications:
            yield f"{self.root}/{STATIC_STRICT}"

    def authorization(self, namespace: str, name: str) -> AuthorizationPolicy | None:
        return self._authorizations.get(namespace, {}).get(name)

    def exceptions(self, namespace: str, name: str) -> Strictness | None:
        """What the PeerAuthentication whose `converted` is `namespace/name` comes to; None: it makes no policy."""
        for one in self._authentications.get(namespace, ()):
            if one.ports and f"{CONVERTED}{one.meta.key.name}" == name:
                found = self._resolve(namespace, one)
                return found if found.exceptions else None
        return None

    def of(self, pod: Pod) -> list[str]:
        """The policies that select the pod by its labels, sorted: istiod's `authorization_policies`."""
        labels, namespace = set(pod.meta.labels), pod.meta.key.namespace
        found = {one.name for where in {self.root, namespace} for one in self._authorizations.get(where, {}).values()
                 if one.selector is not None and not one.unsent and labels.issuperset(one.selector)}
        strictness = self.strictness(pod)
        if strictness.source is not None and strictness.exceptions:
            found.add(strictness.source.converted)
        elif strictness.mode is Mode.STRICT:
            found.add(f"{self.root}/{STATIC_STRICT}")
        return sorted(found)

    def strictness(self, pod: Pod) -> Strictness:
        namespace = pod.meta.key.namespace
        own = None
        if namespace != self.root:
            own = next((one for one in self._authentications.get(namespace, ())
                        if one.selector and set(pod.meta.labels).issuperset(one.selector)), None)
        return self._resolve(namespace, own)

    def _resolve(self, namespace: str, own: PeerAuthentication | None) -> Strictness:
        mode = Mode.PERMISSIVE
        for where in dict.fromkeys((self.root, namespace)):
            wide = next((one for one in self._authentications.get(where, ()) if not one.selector), None)
            if wide is not None and wide.mode is not Mode.UNSET:
                mode = wide.mode
        if own is None:
            return Strictness(mode, {}, None)
        if own.mode is not Mode.UNSET:
            mode = own.mode
        return Strictness(mode, {port: each for port, each in own.ports if each is not Mode.UNSET}, own)

    # -- what does not fit together ---------------------------------------------------------------------------------

    def check(self, one: AuthorizationPolicy | PeerAuthentication, pods: Iterable[Pod]) -> list[Problem]:
        who, place = str(one.meta.key), one.meta.place
        if isinstance(one, AuthorizationPolicy):
            if one.unsent:
                return [warning(place, who, f"has no effect: {one.unsent}")]
            return []
        found: list[Problem] = []
        if one.selector and one.meta.key.namespace == self.root:
            found.append(warning(place, who, f"has a selector, which in the root namespace {self.root} has no effect",
                                 "put it into the pods' namespace"))
        elif first := next((each for each in self._authentications[one.meta.key.namespace]
                            if not each.selector and not one.selector and each.meta.key != one.meta.key
                            and each.meta.age < one.meta.age), None):
            found.append(warning(place, who, f"has no effect: {first.meta.key} ({first.meta.place}) is for the same pods and older, or "
                                             "comes first by name", "put both into one"))
        elif one.selector and not any(self.concerns(one, pod) for pod in pods):
            found.append(warning(place, who, "selects no pod"))
        return found

    def rivals(self, one: AuthorizationPolicy | PeerAuthentication) -> set[ObjectKey]:
        """Others whose problems may differ with `one`."""
        if isinstance(one, AuthorizationPolicy):
            return set()
        return {each.meta.key for each in self._authentications.get(one.meta.key.namespace, ()) if each.meta.key != one.meta.key}
