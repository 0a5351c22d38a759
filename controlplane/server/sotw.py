"""State-of-the-world ADS without I/O: every response of a type holds everything that the client asked for and that exists.

The next response of a type waits until the last one is answered; meanwhile changes add up. A request with an outdated nonce
was sent before the client saw our last response, so it is left: the client will answer that one too.
"""
from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from controlplane.server.session import WILDCARD, Heard, Interest, Named, TypeStatus
from controlplane.translate.catalog import ORDER, Catalog


@dataclass(frozen=True, slots=True)
class Request:
    """A DiscoveryRequest. `error` is the message of a NACK, None without one."""

    type_url: str
    names: tuple[str, ...] = ()
    version: str = ""
    nonce: str = ""
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Response:
    type_url: str
    version: str
    nonce: str
    resources: tuple[Named, ...]


@dataclass(slots=True)
class _Type:
    interest: Interest
    named: bool = False  # it has asked for names before: no names then means none, not all
    due: bool = False
    owed: bool = False  # a response must come even if nothing differs
    waiting: bool = False  # a response is not answered yet
    version: str = ""  # of what was sent last
    status: TypeStatus = field(default_factory=TypeStatus)


class SotwSession:
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
        rejected = None
        if kind is None:
            kind = self._types[request.type_url] = _Type(Interest(request.type_url), due=True, owed=True)
        elif request.nonce and request.nonce != kind.status.sent_nonce:
            return Heard(request.type_url)
        elif request.nonce:
            kind.waiting = False
            kind.status.acked_nonce = request.nonce
            kind.status.error = request.error or ""
            if request.error is not None:
                rejected = request.error
                kind.status.rejects += 1
        names = set(request.names) - {WILDCARD}
        kind.named = kind.named or bool(names)
        kind.interest.wildcard = WILDCARD in request.names or (not names and not kind.named)
        before = set(kind.interest.names)
        for name in before - names:
            kind.interest.remove(name)
        for name in sorted(names - before):
            if reason := kind.interest.add(name, self._scope):
                bad.append(reason)
            kind.due = kind.owed = True
        return Heard(request.type_url, rejected, tuple(bad))

    def touch(self, hosts: set[str], addresses: set[str], policies: set[str]) -> None:
        """These may have changed."""
        for kind in self._types.values():
            kind.due = kind.due or bool(kind.interest.touched(hosts, addresses, policies))

    def responses(self) -> Iterator[Response]:
        """What is to be sent now."""
        for type_url in [*ORDER, *(url for url in list(self._types) if url not in set(ORDER))]:
            kind = self._types.get(type_url)
            if kind is not None and kind.due and (kind.owed or not kind.waiting):
                response = self._make(type_url, kind)
                if response is not None:
                    yield response

    def status(self) -> Mapping[str, tuple[TypeStatus, int, bool]]:
        """Per type: status, number of names followed by name, whether everything is acknowledged."""
        return {url: (kind.status, len(kind.interest.names),
                      not kind.waiting and not kind.due) for url, kind in self._types.items()}

    # -- inside -----------------------------------------------------------------------------------------------------

    def _make(self, type_url: str, kind: _Type) -> Response | None:
        found = [Named(name, made) for name in sorted(kind.interest.everything(self._catalog))
                 if (made := kind.interest.find(self._catalog, name)) is not None]
        text = "\n".join(f"{one.name} {one.made.version}" for one in found)
        version = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        kind.due = False
        if version == kind.version and not kind.owed:
            return None
        kind.owed, kind.waiting, kind.version = False, True, version
        self._nonces += 1
        kind.status.sent_nonce = f"{self._nonces:x}"
        kind.status.responses += 1
        kind.status.resources += len(found)
        return Response(type_url, version, kind.status.sent_nonce, tuple(found))
