"""A client's stream without I/O: requests in, responses out. What state of the world and delta have in common.

A session holds no resources, only versions of what it told its client; content comes from the catalog when a response is made. A
change only marks names as due, so a slow client costs nothing: what changed ten times meanwhile is sent once, as it is then.
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from controlplane.translate.catalog import Catalog, Made
from controlplane.translate.names import WHOLE, TypeUrl, Wanted, parse

WILDCARD = "*"
NAMES_BOUND = 100_000  # subscriptions of a type on one stream
DEFAULT_SCOPE = "default"


class SessionError(Exception):
    """The client broke the protocol or a bound; the text says how. The stream ends."""


@dataclass(slots=True)
class TypeStatus:
    """What an operator sees of one type of one stream. Versions and nonces are the last ones."""

    sent_nonce: str = ""
    acked_nonce: str = ""
    responses: int = 0
    resources: int = 0
    rejects: int = 0
    error: str = ""  # the client's words in its last NACK; empty again after an ACK


@dataclass(frozen=True, slots=True)
class Named:
    """A resource under the name by which the client asked for it."""

    name: str
    made: Made


@dataclass(frozen=True, slots=True)
class Heard:
    """What a request was beside its subscriptions."""

    type_url: str
    rejected: str | None = None  # a NACK, with the client's words
    malformed: tuple[str, ...] = ()  # names that cannot be, each with the reason


@dataclass(slots=True)
class Interest:
    """The names of one type that a client asked for; None instead of Wanted: a name that cannot be."""

    type_url: str
    names: dict[str, Wanted | None] = field(default_factory=dict)
    wildcard: bool = False
    _by_host: dict[str, set[str]] = field(default_factory=dict)

    def add(self, name: str, scope: str) -> str:
        """Returns why the name cannot be, "" when it can. Raises SessionError beyond NAMES_BOUND."""
        if name in self.names:
            return ""
        if len(self.names) >= NAMES_BOUND:
            raise SessionError(f"more than {NAMES_BOUND} subscriptions of {self.type_url}")
        wanted, reason = None, ""
        if self.type_url in set(TypeUrl) - WHOLE:
            try:
                wanted = parse(TypeUrl(self.type_url), name, scope)
                self._by_host.setdefault(wanted.host, set()).add(name)
            except ValueError as error:
                reason = str(error)
        self.names[name] = wanted
        return reason

    def remove(self, name: str) -> None:
        wanted = self.names.pop(name, None)
        if wanted is not None:
            held = self._by_host[wanted.host]
            held.discard(name)
            if not held:
                del self._by_host[wanted.host]

    def touched(self, hosts: set[str], addresses: set[str], policies: set[str]) -> set[str]:
        """The names that a change may concern."""
        if self.type_url in WHOLE:
            names = addresses if self.type_url == TypeUrl.ADDRESS else policies
            return set(names) if self.wildcard else names & self.names.keys()
        few, many = (hosts, self._by_host) if len(hosts) < len(self._by_host) else (self._by_host.keys(), hosts)
        return {name for host in few if host in many for name in self._by_host[host]}

    def find(self, catalog: Catalog, name: str) -> Made | None:
        if self.type_url == TypeUrl.ADDRESS:
            return catalog.address(name)
        if self.type_url == TypeUrl.AUTHORIZATION:
            return catalog.policy(name)
        wanted = self.names.get(name)
        return catalog.resource(wanted) if wanted is not None else None

    def everything(self, catalog: Catalog) -> Iterator[str]:
        """Every name that the client follows now. A wildcard means something for WHOLE only: the rest is on demand."""
        if self.wildcard and self.type_url in WHOLE:
            yield from catalog.addresses() if self.type_url == TypeUrl.ADDRESS else catalog.policies()
        yield from self.names
