"""One delta-ADS session, sans-I/O: responses in, requests out; no stream, no clock, no protobuf.

Theory. The session outlives its streams. Per type it knows which names are wanted and which versions are held. A
stream begins with one request per type that carries everything wanted (none at all means wildcard) and the held
versions, so that the server sends only what differs and names what vanished. On a live stream only differences of
the wanted names are sent.

A response is an `Update` until the caller settles it. The caller says that what was good is in force, and what was
rejected and why; only then there is an ACK (or a NACK that names the bad ones alone; the good ones count as held).
Several updates of a type may be open at a time; they are settled in the order they came, each under its own nonce.
What was rejected is not recorded as held, so the next stream asks for it again, and the last good version stays.

The protocol is the xDS one (delta, "incremental"): an ACK or NACK carries the nonce that it answers; a request
without nonce changes subscriptions only.
"""
from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto

WILDCARD = "*"
NONCES_REMEMBERED = 64  # per type and stream, to recognise a response that is delivered twice
ERROR_TEXT = 4096  # characters of a NACK; the first bad resources are named, then how many more


class TypeState(Enum):
    DETACHED = auto()  # no stream
    SILENT = auto()  # a stream, and nothing of this type asked for
    ASKED = auto()  # asked, no response on this stream yet
    FOLLOWING = auto()  # at least one response came


class Event(Enum):
    OPEN = auto()  # a stream began
    ASK = auto()  # the first request of this type on this stream
    RESPONSE = auto()
    CLOSE = auto()  # the stream ended


TRANSITIONS: dict[tuple[TypeState, Event], TypeState] = {
    (TypeState.DETACHED, Event.OPEN): TypeState.SILENT,
    (TypeState.SILENT, Event.ASK): TypeState.ASKED,
    (TypeState.ASKED, Event.RESPONSE): TypeState.FOLLOWING,
    (TypeState.FOLLOWING, Event.RESPONSE): TypeState.FOLLOWING,
    (TypeState.SILENT, Event.CLOSE): TypeState.DETACHED,
    (TypeState.ASKED, Event.CLOSE): TypeState.DETACHED,
    (TypeState.FOLLOWING, Event.CLOSE): TypeState.DETACHED,
}


class SessionError(Exception):
    """The server (or our own caller) did what the protocol forbids here. Nothing changed; drop the stream."""


@dataclass(frozen=True, slots=True)
class Resource:
    """One resource as it came: `body` is the serialized message of `type_url`, not yet looked at."""

    type_url: str
    name: str
    version: str
    body: bytes


@dataclass(frozen=True, slots=True)
class Response:
    type_url: str
    nonce: str
    resources: tuple[Resource, ...] = ()
    removed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Request:
    """A DeltaDiscoveryRequest: of a subscription (`nonce` empty), or an ACK or NACK (`error` not empty)."""

    type_url: str
    subscribe: tuple[str, ...] = ()
    unsubscribe: tuple[str, ...] = ()
    initial_versions: Mapping[str, str] = field(default_factory=dict)
    nonce: str = ""
    error: str = ""


@dataclass(frozen=True, slots=True)
class Update:
    """What one response changes, until it is settled. Unwanted names and versions already held are left out."""

    type_url: str
    nonce: str
    stream: int  # which stream it came on: an update of an earlier one is recorded, but not answered
    changed: tuple[Resource, ...]
    removed: tuple[str, ...]
    malformed: Mapping[str, str]  # name -> reason; refused before anyone looked inside


@dataclass(slots=True)
class _Type:
    wildcard: bool = False
    state: TypeState = TypeState.DETACHED
    wanted: set[str] = field(default_factory=set)
    held: dict[str, str] = field(default_factory=dict)  # name -> version
    nonces: deque[str] = field(default_factory=lambda: deque(maxlen=NONCES_REMEMBERED))
    open: deque[str] = field(default_factory=deque)  # nonces of this stream's updates that are not settled, in order
    moving: Counter[str] = field(default_factory=Counter)  # name -> open updates (of any stream) that touch it

    def step(self, type_url: str, event: Event) -> None:
        after = TRANSITIONS.get((self.state, event))
        if after is None:
            raise SessionError(f"{type_url}: {event.name.lower()} is not legal while {self.state.name.lower()}")
        self.state = after

    @property
    def asks(self) -> bool:
        return self.wildcard or bool(self.wanted)


class Session:
    """See the head of this file. Not for several threads.

    `wildcards` are types of which everything is wanted, `named` those of which names are wanted.
    """

    def __init__(self, wildcards: Iterable[str], named: Iterable[str]) -> None:
        self._types = {url: _Type(wildcard=True) for url in wildcards} | {url: _Type() for url in named}
        self.stream = 0
        self.connected = False

    # -- what is wanted and held ------------------------------------------------------------------------------------

    def state(self, type_url: str) -> TypeState:
        return self._types[type_url].state

    def held(self, type_url: str) -> Mapping[str, str]:
        """Name -> version of what is in force (as far as the caller said so)."""
        return self._types[type_url].held

    def wanted(self, type_url: str) -> frozenset[str]:
        return frozenset(self._types[type_url].wanted)

    def restore(self, type_url: str, versions: Mapping[str, str]) -> None:
        """Take over what an earlier life held; only before the first stream."""
        if self.stream:
            raise SessionError(f"{type_url}: versions are restored before the first stream, not after")
        self._types[type_url].held.update(versions)

    def want(self, type_url: str, more: Iterable[str], less: Iterable[str] = ()) -> list[Request]:
        """From now on `more` of `type_url` are wanted and `less` are not. Returns what to send now, if anything.

        What is not wanted any more is forgotten at once; a response that still carries it is ignored.
        """
        kind = self._types[type_url]
        if kind.wildcard:
            raise SessionError(f"{type_url}: subscribed by wildcard, not by name")
        added, dropped = set(more) - kind.wanted, set(less) & kind.wanted
        kind.wanted |= added
        kind.wanted -= dropped
        for name in dropped:
            kind.held.pop(name, None)
        if not self.connected or not (added or dropped):
            return []
        if kind.state is TypeState.SILENT:
            return [self._first(type_url)] if kind.asks else []
        return [Request(type_url, subscribe=tuple(sorted(added)), unsubscribe=tuple(sorted(dropped)))]

    # -- the stream -------------------------------------------------------------------------------------------------

    def opened(self) -> list[Request]:
        """A stream stands. Returns its first requests, wildcard types first."""
        if self.connected:
            raise SessionError("a stream is open already")
        self.connected = True
        self.stream += 1
        for url, kind in self._types.items():
            kind.step(url, Event.OPEN)
            kind.nonces.clear()
            kind.open.clear()
        return [self._first(url) for url, kind in self._types.items() if kind.asks]

    def closed(self) -> None:
        """The stream ended. Updates that are still open may be settled; they are recorded and not answered."""
        if self.connected:
            self.connected = False
            for url, kind in self._types.items():
                kind.step(url, Event.CLOSE)

    def received(self, response: Response) -> Update | None:
        """What `response` changes; None when it was delivered before (then there is nothing to do or answer).

        Raises SessionError on a response without nonce, of a type not asked for, or when there is no stream.
        """
        kind = self._types.get(response.type_url)
        if kind is None:
            raise SessionError(f"the control plane sent {response.type_url}, which was not asked for")
        if not response.nonce:
            raise SessionError(f"{response.type_url}: a response without nonce cannot be answered")
        if response.nonce in kind.nonces:
            return None
        kind.step(response.type_url, Event.RESPONSE)
        kind.nonces.append(response.nonce)
        kind.open.append(response.nonce)
        changed: dict[str, Resource] = {}
        malformed: dict[str, str] = {}
        for resource in response.resources:
            if not resource.name:
                malformed["(unnamed)"] = "a resource without a name"
            elif resource.type_url != response.type_url:
                malformed[resource.name] = f"it is a {resource.type_url or 'message without type'}"
            elif resource.name in changed:
                malformed[resource.name] = "it is in the same response twice"
            elif not kind.wildcard and resource.name not in kind.wanted:
                continue  # unsubscribed while it was on its way
            elif resource.version and kind.held.get(resource.name) == resource.version \
                    and not kind.moving[resource.name]:
                continue
            else:
                changed[resource.name] = resource
        for name in malformed:
            changed.pop(name, None)
        removed = tuple(name for name in dict.fromkeys(response.removed)
                        if name not in changed and (kind.wildcard or name in kind.wanted))
        kind.moving.update((*changed, *removed))
        return Update(response.type_url, response.nonce, self.stream, tuple(changed.values()), removed, malformed)

    def settled(self, update: Update, rejected: Mapping[str, str]) -> Request | None:
        """What of `update` was not `rejected` (name -> reason) is in force. Returns the ACK or NACK to send.

        None when the stream that brought it is gone: the next one says by versions what is held.
        Raises SessionError when it was settled before, or an earlier one of its type was not.
        """
        kind = self._types[update.type_url]
        here = self.connected and update.stream == self.stream
        if here and (not kind.open or kind.open[0] != update.nonce):
            raise SessionError(f"{update.type_url}: nonce {update.nonce!r} is not the next to be answered")
        touched = (*(resource.name for resource in update.changed), *update.removed)
        kind.moving.subtract(touched)
        for name in touched:
            if not kind.moving[name]:
                del kind.moving[name]
        for resource in update.changed:
            if resource.name not in rejected and (kind.wildcard or resource.name in kind.wanted):
                kind.held[resource.name] = resource.version
        for name in update.removed:
            kind.held.pop(name, None)
        if not here:
            return None
        kind.open.popleft()
        return Request(update.type_url, nonce=update.nonce, error=error_text({**update.malformed, **rejected}))

    def _first(self, type_url: str) -> Request:
        kind = self._types[type_url]
        kind.step(type_url, Event.ASK)
        return Request(type_url, subscribe=tuple(sorted(kind.wanted)), initial_versions=dict(kind.held))


def error_text(rejected: Mapping[str, str]) -> str:
    """`name: reason; name: reason`, cut to whole entries within ERROR_TEXT characters; "" when nothing is rejected."""
    text, left = "", len(rejected)
    for name in sorted(rejected):
        entry = f"{name}: {rejected[name]}"
        if text and len(text) + len(entry) > ERROR_TEXT:
            return f"{text}; and {left} more"
        text = (f"{text}; {entry}" if text else entry)[:ERROR_TEXT]
        left -= 1
    return text
