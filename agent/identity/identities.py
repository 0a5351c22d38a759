"""The certificates of the identities that pods of this node have: one request at a time for each, renewed at half the lifetime.

    hold (a pod came) --> key in the keeper --> signed --> in force in the workers --> wait until renewal --> again, old key forgotten
                             ^------------- failed: 1 s, 2 s ... 150 s; the last good certificate serves on
    release (the last pod went) --> certificate out of force --> keys forgotten

What an earlier agent left in the keeper is taken over: nothing is asked for again. Everything here is on one event loop.
"""
from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

from agent.identity import schedule
from agent.identity.authority import Signed, SignError
from agent.model.identity import Certificate, Trust

IN_FLIGHT = 8  # requests of a node at once: ztunnel's
LOOK_SECONDS = 60.0  # the wall clock may jump: nobody sleeps longer without a look at it

log = logging.getLogger("narrows.identity")

Sign = Callable[[str, bytes, float], Awaitable[Signed]]
Wait = Callable[[asyncio.Event, float], Awaitable[None]]


class KeyKeeper(Protocol):
    """What the keeper does for keys. Each raises ConnectionError when it is away, and an OSError when it refuses."""

    async def make_key(self, identity: str) -> tuple[int, bytes]: ...

    async def forget_key(self, key: int) -> None: ...


class Sink(Protocol):
    """Where certificates are put in force."""

    def put_trust(self, trust: Trust) -> None: ...

    def put_certificate(self, certificate: Certificate) -> None: ...

    def remove_certificate(self, identity: str) -> None: ...

    async def in_force(self, identity: str) -> str | None:
        """Returns when all that was put is in force; the reason when the data path refuses this identity's."""


@dataclass(slots=True)
class Entry:
    """One identity. `owners`: pods that have it; none: left by an earlier agent, and nobody has claimed it yet."""

    identity: str
    owners: set[str] = field(default_factory=set)
    certificate: Certificate | None = None
    in_force: bool = False  # it, or one before it, whose key this keeper has
    keys: set[int] = field(default_factory=set)  # in the keeper
    pending: tuple[int, bytes] | None = None  # a key that was not signed yet, with its request
    due: float = 0.0  # s since 1970: when to ask next
    failures: int = 0  # in a row
    error: str = ""
    unanswered: bool = False  # the last failure was nobody's answer: the authority is away, or there is none
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None

    def state(self, now: float) -> str:
        if self.certificate is None or not self.in_force:
            return "failed" if self.failures else "requested"
        if now >= self.certificate.not_after:
            return "expired"
        return "ending" if schedule.ending(self.certificate.not_before, self.certificate.not_after, now) else "valid"


class Identities:
    """See the head of this file. `sign(identity, request, now)` raises SignError."""

    def __init__(self, *, trust_domain: str, sign: Sign, sink: Sink, now: Callable[[], float] = time.time,
                 uniform: schedule.Uniform = random.uniform, wait: Wait | None = None) -> None:
        self._trust_domain = trust_domain
        self._sign = sign
        self._sink = sink
        self._now = now
        self._uniform = uniform
        self._wait = wait or _wait
        self._keeper: KeyKeeper | None = None
        self._entries: dict[str, Entry] = {}
        self._owned: dict[str, str] = {}  # owner -> identity
        self._going: dict[str, asyncio.Task[None]] = {}  # identity -> its keys are being forgotten
        self._slots = asyncio.Semaphore(IN_FLIGHT)
        self._restored = False
        self.trust: Trust | None = None
        self._lists: tuple[bytes, ...] | None = None  # None: as they are
        self.requests = 0
        self.failures = 0

    # -- pods -------------------------------------------------------------------------------------------------------

    def hold(self, owner: str, identity: str) -> None:
        """This pod has that identity: its certificate is asked for now, unless it is there."""
        if self._owned.get(owner) == identity:
            return
        self.release(owner)
        self._owned[owner] = identity
        entry = self._entries.setdefault(identity, Entry(identity))
        entry.owners.add(owner)
        if entry.task is None:
            entry.task = asyncio.create_task(self._keep(entry), name=f"certificate {identity}")

    def release(self, owner: str) -> None:
        """The pod is gone; its identity with it when it was the last."""
        identity = self._owned.pop(owner, None)
        entry = self._entries.get(identity) if identity is not None else None
        if entry is not None:
            entry.owners.discard(owner)
            if not entry.owners:
                self._drop(entry)

    def settle(self) -> None:
        """Every pod of the node has been looked at: what an earlier agent left and nobody holds goes."""
        for entry in [one for one in self._entries.values() if not one.owners]:
            self._drop(entry)

    # -- the keeper -------------------------------------------------------------------------------------------------

    def attach(self, keeper: KeyKeeper, keys: Mapping[int, str], certificates: Iterable[Certificate], trusts: Iterable[Trust]) -> None:
        """A keeper is there, with these keys (number -> identity) and, from an earlier agent, certificates and trust in force.

        A certificate whose key this keeper does not have is worth nothing: it goes, and another is asked for.
        """
        self._keeper = keeper
        if not self._restored:
            self._restored = True
            self._restore(certificates, trusts)
        for identity in keys.values():
            self._entries.setdefault(identity, Entry(identity))
        for entry in self._entries.values():
            entry.keys = {key for key, identity in keys.items() if identity == entry.identity}
            if entry.pending is not None and entry.pending[0] not in entry.keys:
                entry.pending = None
            if entry.certificate is not None and entry.certificate.key not in entry.keys:
                entry.certificate, entry.in_force, entry.due = None, False, 0.0
                self._sink.remove_certificate(entry.identity)
            entry.changed.set()

    def detach(self) -> None:
        """The keeper is away; its workers serve on with what they have."""
        self._keeper = None

    def revoke(self, lists: tuple[bytes, ...]) -> None:
        """From now on these revocation lists (DER) hold for the trust domain."""
        self._lists = lists
        if self.trust is not None:
            self._believe(self.trust.roots)

    async def close(self) -> None:
        """Stop asking. Nothing that is in force changes."""
        tasks = [*self._going.values(), *(one.task for one in self._entries.values() if one.task)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- questions --------------------------------------------------------------------------------------------------

    @property
    def entries(self) -> list[Entry]:
        # a copy first: metrics are rendered in another thread
        return sorted([*self._entries.values()], key=lambda one: one.identity)

    def problems(self) -> list[str]:
        """What is wrong with certificates of pods here, in words; a certificate is told of before it ends."""
        found, now = [], self._now()
        for one in self.entries:
            state, why = one.state(now), f": {one.error}" if one.error else ""
            if not one.owners or state in ("valid", "requested"):
                continue
            if one.certificate is None and one.unanswered:
                continue  # where the control plane is away, that is told already; where nobody signs, nobody needs to
            if one.certificate is None:
                found.append(f"{one.identity} has no certificate{why}")
            elif state == "expired":
                found.append(f"the certificate of {one.identity} has expired{why}")
            else:
                found.append(f"the certificate of {one.identity} ends in {one.certificate.not_after - now:.0f} s{why}")
        return found

    # -- one identity -----------------------------------------------------------------------------------------------

    async def _keep(self, entry: Entry) -> None:
        going = self._going.get(entry.identity)
        if going is not None:  # its keys of before: there is room for two
            await asyncio.gather(going, return_exceptions=True)
        while True:
            entry.changed.clear()
            delay = entry.due - self._now()
            if self._keeper is None or delay > 0:
                await self._wait(entry.changed, LOOK_SECONDS if self._keeper is None else min(delay, LOOK_SECONDS))
                continue
            try:
                async with self._slots:
                    if self._keeper is not None:
                        await self._renew(entry, self._keeper)
            except ConnectionError:
                self._keeper = None  # whoever follows the keeper attaches the next
            except (SignError, OSError) as error:
                self._failed(entry, error)

    async def _renew(self, entry: Entry, keeper: KeyKeeper) -> None:
        identity, before = entry.identity, entry.certificate
        used = {before.key} if before else set()
        if entry.pending is None:
            for key in entry.keys - used:
                await keeper.forget_key(key)
                entry.keys.discard(key)
            entry.pending = await keeper.make_key(identity)
            entry.keys.add(entry.pending[0])
        key, request = entry.pending
        self.requests += 1
        signed = await self._sign(identity, request, self._now())
        if entry.pending != (key, request):
            return  # a keeper without this key took over meanwhile
        made = Certificate(identity, key, signed.not_before, signed.not_after, signed.chain)
        entry.certificate, entry.pending = made, None
        entry.due = schedule.renewal(made.not_before, made.not_after, self._uniform)
        self._believe(signed.roots)
        self._sink.put_certificate(made)
        refused = await self._sink.in_force(identity)
        if entry.certificate is not made:
            return
        if refused is not None:
            entry.certificate = before
            if before is not None:
                self._sink.put_certificate(before)
            else:
                self._sink.remove_certificate(identity)
            raise SignError(f"the data path refuses the certificate: {refused}")
        entry.in_force, entry.failures, entry.error, entry.unanswered = True, 0, "", False
        log.info("a certificate is in force", extra={"identity": identity, "key": key, "until": made.not_after})
        for old in entry.keys - {key}:
            await keeper.forget_key(old)
            entry.keys.discard(old)

    def _failed(self, entry: Entry, error: Exception) -> None:
        self.failures += 1
        entry.failures += 1
        entry.error, entry.unanswered = str(error), isinstance(error, SignError) and error.unanswered
        until = entry.certificate.not_after if entry.certificate else None
        entry.due = schedule.retry(entry.failures, self._now(), until, self._uniform)
        log.log(logging.INFO if entry.unanswered else logging.WARNING, "no certificate; the last good one stays, and it is asked for again",
                extra={"identity": entry.identity, "reason": entry.error, "failures": entry.failures,
                       "again": round(entry.due - self._now(), 1)})

    def _drop(self, entry: Entry) -> None:
        """Out of force, then its keys go: as long as a worker has the certificate it needs the key."""
        identity = entry.identity
        del self._entries[identity]
        if entry.task is not None:
            entry.task.cancel()
        self._sink.remove_certificate(identity)
        before = self._going.get(identity)
        self._going[identity] = asyncio.create_task(self._forget(entry, before), name=f"forget {identity}")

    async def _forget(self, entry: Entry, before: asyncio.Task[None] | None) -> None:
        try:
            await asyncio.gather(*(one for one in (entry.task, before) if one is not None), return_exceptions=True)
            await self._sink.in_force(entry.identity)
            for key in sorted(entry.keys):
                if self._keeper is not None:
                    with suppress(OSError):  # away: the next connection's list of keys shows what is left
                        await self._keeper.forget_key(key)
        finally:
            if self._going.get(entry.identity) is asyncio.current_task():
                del self._going[entry.identity]

    # -- inside -----------------------------------------------------------------------------------------------------

    def _restore(self, certificates: Iterable[Certificate], trusts: Iterable[Trust]) -> None:
        for trust in trusts:
            if trust.trust_domain == self._trust_domain:
                self.trust = trust
                self._believe(trust.roots)
        for one in certificates:
            entry = self._entries.setdefault(one.identity, Entry(one.identity))
            if entry.certificate is None:
                entry.certificate, entry.in_force = one, True
                entry.due = schedule.renewal(one.not_before, one.not_after, self._uniform)
                self._sink.put_certificate(one)

    def _believe(self, roots: tuple[bytes, ...]) -> None:
        """The roots of the newest answer: an authority that changes its root gives out both before it signs with the new one."""
        lists = self._lists if self._lists is not None else self.trust.lists if self.trust is not None else ()
        self.trust = Trust(self._trust_domain, roots, lists)
        self._sink.put_trust(self.trust)


async def _wait(event: asyncio.Event, seconds: float) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
