"""Delta ADS without I/O (the "incremental" protocol of xDS).

Per type: which names are followed, which versions the client holds as far as we told it, and which names are due. A name is due
when it is subscribed to or touched; making a response compares versions, so what did not change is not sent. Nothing to say is
said only once, as answer to the first request of a type, so that the client knows that it has everything.
"""
from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from controlplane.server.session import WILDCARD, Heard, Interest, Named, TypeStatus
from controlplane.translate.catalog import ORDER, Catalog
from controlplane.translate.names import TypeUrl, is_workload

OPEN_BOUND = 8  # responses of a type that are not acknowledged yet; more wait as names that are due
RESPONSE_BYTES = 2 << 20  # a response is closed when it is larger; gRPC's default bound for a message is 4 MiB


@dataclass(frozen=True, slots=True)
class Request:
    """A DeltaDiscoveryRequest. `error` is the message of a NACK, None without one."""

    type_url: str
    subscribe: tuple[str, ...] = ()
    unsubscribe: tuple[str, ...] = ()
    held: Mapping[str, str] = field(default_factory=dict)  # initial_resource_versions
    nonce: str = ""
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Response:
    type_url: str
    nonce: str
    resources: tuple[Named, ...] = ()
    removed: tuple[str, ...] = ()


@dataclass(slots=True)
class _Type:
    interest: Interest
    held: dict[str, str] = field(default_factory=dict)  # name -> version, as told to the client
    due: set[str] = field(default_factory=set)
    unanswered: set[str] = field(default_factory=set)  # asked for and not yet told that it does not exist
    greeting: bool = True  # the first response of the type is sent even if it is empty
    open: set[str] = field(default_factory=set)  # nonces without answer
    status: TypeStatus = field(default_factory=TypeStatus)


class DeltaSession:
    """One stream. `scope` is the client's namespace, for names without xdstp."""

    def __init__(self, catalog: Catalog, scope: str) -> None:
        self._catalog = catalog
        self._scope = scope
        self._types: dict[str, _Type] = {}
        self._nonces = 0

    def receive(self, request: Request) -> Heard:
        """Raises SessionError when the stream must end."""
        kind = self._types.get(request.type_url)
        bad: list[str] = []
        if kind is None:
            kind = self._types[request.type_url] = _Type(Interest(request.type_url))
            kind.held = dict(request.held)
            kind.interest.wildcard = not request.subscribe and not request.unsubscribe
            if kind.interest.wildcard:
                self._all_due(kind)
        rejected = self._answered(kind, request)
        for name in request.unsubscribe:
            self._unsubscribe(kind, name)
        for name in request.subscribe:
            if name == WILDCARD:
                kind.interest.wildcard = True
                self._all_due(kind)
                continue
            again = name in kind.interest.names
            if reason := kind.interest.add(name, self._scope):
                bad.append(reason)
            if again:
                kind.held.pop(name, None)  # asked for again: it is sent again
            kind.due.add(name)
            kind.unanswered.add(name)
        if kind.greeting and not kind.interest.wildcard:
            # what the client held from before and does not follow now is nobody's business
            kind.held = {name: version for name, version in kind.held.items() if name in kind.interest.names}
        return Heard(request.type_url, rejected, tuple(bad))

    def touch(self, hosts: set[str], addresses: set[str], policies: set[str]) -> None:
        """These may have changed."""
        for kind in self._types.values():
            kind.due |= kind.interest.touched(hosts, addresses, policies)

    def responses(self) -> Iterator[Response]:
        """What is to be sent now, made when it is asked for: take one, send it, take the next."""
        for type_url in [*ORDER, *(url for url in list(self._types) if url not in set(ORDER))]:
            kind = self._types.get(type_url)
            while kind is not None and (kind.due or kind.greeting) and len(kind.open) < OPEN_BOUND:
                response = self._make(type_url, kind)
                if response is not None:
                    yield response

    def status(self) -> Mapping[str, tuple[TypeStatus, int, bool]]:
        """Per type: status, number of names followed by name, whether everything is acknowledged."""
        return {url: (kind.status, len(kind.interest.names),
                      not kind.open and not kind.due) for url, kind in self._types.items()}

    # -- inside -----------------------------------------------------------------------------------------------------

    def _answered(self, kind: _Type, request: Request) -> str | None:
        if not request.nonce or request.nonce not in kind.open:
            return None  # a change of subscriptions, or of a stream before this one
        kind.open.discard(request.nonce)
        kind.status.acked_nonce = request.nonce
        kind.status.error = request.error or ""
        if request.error is None:
            return None
        kind.status.rejects += 1
        return request.error

    def _all_due(self, kind: _Type) -> None:
        kind.due.update(kind.interest.everything(self._catalog))
        kind.due.update(kind.held)  # what vanished meanwhile

    def _unsubscribe(self, kind: _Type, name: str) -> None:
        if name == WILDCARD:
            kind.interest.wildcard = False
            keep = kind.interest.names
            kind.held = {one: version for one, version in kind.held.items() if one in keep}
            kind.due &= keep.keys()
            return
        kind.interest.remove(name)
        kind.unanswered.discard(name)
        if not kind.interest.wildcard:
            kind.held.pop(name, None)
            kind.due.discard(name)

    def _make(self, type_url: str, kind: _Type) -> Response | None:
        resources: list[Named] = []
        removed: list[str] = []
        size, done = 0, 0
        names = _ordered(type_url, kind.due)
        for name in names:
            done += 1
            made = kind.interest.find(self._catalog, name)
            if made is None:
                if kind.held.pop(name, None) is not None or name in kind.unanswered:
                    removed.append(name)
            elif kind.held.get(name) != made.version:
                kind.held[name] = made.version
                resources.append(Named(name, made))
                size += len(made.content)
            kind.unanswered.discard(name)
            if size > RESPONSE_BYTES:
                break
        kind.due.difference_update(names[:done])
        if not resources and not removed and not (kind.greeting and not kind.due):
            return None
        kind.greeting = False
        self._nonces += 1
        nonce = f"{self._nonces:x}"
        kind.open.add(nonce)
        kind.status.sent_nonce = nonce
        kind.status.responses += 1
        kind.status.resources += len(resources)
        return Response(type_url, nonce, tuple(resources), tuple(removed))


def _ordered(type_url: str, names: Iterable[str]) -> list[str]:
    """Services before workloads, which refer to them."""
    return sorted(names, key=lambda name: (is_workload(name), name)) if type_url == TypeUrl.ADDRESS else sorted(names)
