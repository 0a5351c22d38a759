"""The clients that are connected, and what goes out to them when the mesh changes."""
from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from controlplane.model.mesh import Touched
from controlplane.server.delta import DeltaSession
from controlplane.server.session import Heard
from controlplane.server.sotw import SotwSession
from controlplane.translate.catalog import Catalog

log = logging.getLogger("narrows.controlplane.xds")

CLIENTS_BOUND = 10_000  # streams; a client more is told to come again


@dataclass(slots=True, eq=False)
class Client:
    """One stream. `changed_at` is when the oldest change came that is not written yet (monotonic), 0 without one."""

    number: int
    peer: str
    node: str
    scope: str
    protocol: str  # delta or sotw
    session: DeltaSession | SotwSession
    since: float = field(default_factory=time.time)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    changed_at: float = 0.0


@dataclass(slots=True)
class Counts:
    """What the hub has done, for metrics."""

    pushes: Counter[str] = field(default_factory=Counter)  # responses by type URL
    rejects: Counter[str] = field(default_factory=Counter)  # NACKs by type URL
    errors: Counter[str] = field(default_factory=Counter)  # streams ended by us, by reason
    streams: int = 0


class Hub:
    """See the head of this file. For one event loop. `converged` is told how long each change took to be written (s)."""

    def __init__(self, catalog: Catalog, converged: Callable[[float], None] = lambda _: None) -> None:
        self.catalog = catalog
        self.counts = Counts()
        self._converged = converged
        self._clients: set[Client] = set()
        self.ending = False

    def join(self, peer: str, node: str, scope: str, protocol: str) -> Client | None:
        """None: there are too many already."""
        if len(self._clients) >= CLIENTS_BOUND:
            return None
        self.counts.streams += 1
        session = DeltaSession(self.catalog, scope) if protocol == "delta" else SotwSession(self.catalog, scope)
        client = Client(self.counts.streams, peer, node, scope, protocol, session)
        self._clients.add(client)
        log.info("a client came", extra={
            "client": client.number, "peer": peer, "node": node, "scope": scope, "protocol": protocol})
        return client

    def leave(self, client: Client, reason: str) -> None:
        self._clients.discard(client)
        log.info("a client went", extra={"client": client.number, "node": client.node, "reason": reason})

    def publish(self, touched: Touched) -> int:
        """Follow a change of the mesh. Returns how many addresses differ; layer 7 is compared when it is sent."""
        addresses = self.catalog.update(touched)
        if touched.hosts or addresses or touched.policies:
            now = time.monotonic()
            for client in self._clients:
                client.session.touch(touched.hosts, addresses, touched.policies)
                client.changed_at = client.changed_at or now
                client.wake.set()
        return len(addresses)

    def end(self) -> None:
        """Tell every stream to end in order."""
        self.ending = True
        for client in self._clients:
            client.wake.set()

    def heard(self, client: Client, heard: Heard) -> None:
        """Take note of what a request said beside its subscriptions."""
        if heard.rejected is not None:
            self.counts.rejects[heard.type_url] += 1
            log.warning("a client rejects what it was sent; what it had stays there", extra={
                "client": client.number, "node": client.node, "type": heard.type_url, "reason": heard.rejected})
        for reason in heard.malformed:
            log.warning("a client asks for a name that cannot be", extra={
                "client": client.number, "node": client.node, "type": heard.type_url, "reason": reason})

    def wrote(self, client: Client, type_url: str) -> None:
        self.counts.pushes[type_url] += 1

    def caught_up(self, client: Client) -> None:
        """Everything that was due is written."""
        if client.changed_at:
            self._converged(time.monotonic() - client.changed_at)
            client.changed_at = 0.0

    def __iter__(self) -> Iterator[Client]:
        return iter(sorted(self._clients, key=lambda client: client.number))

    def __len__(self) -> int:
        return len(self._clients)
