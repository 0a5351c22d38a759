"""Between the identities of this node and everything they need: authority, keeper, store, commits, revocation lists, and who asks."""
from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from agent.app.access import Access
from agent.app.commit import Committer
from agent.app.events import Events
from agent.app.keeper import KeeperLink
from agent.dataplane import blobs
from agent.identity import der
from agent.identity.authority import Authority
from agent.identity.identities import Entry, Identities
from agent.identity.lists import RevocationFile
from agent.model.identity import Certificate, Trust
from agent.state.entries import Table
from agent.state.store import Store
from agent.telemetry.identity import CertificateFigures

LISTS_SECONDS = 2.0  # between two looks at the file of revocation lists
OPTIONS = [
    ("grpc.enable_http_proxy", 0),  # http_proxy of the environment is not for the control plane
    ("grpc.enable_retries", 0),  # we have our own backoff
    ("grpc.use_local_subchannel_pool", 1),  # a new channel shall dial
]

log = logging.getLogger("narrows.identity")


class Certificates:
    """`hold` and `release` come from pods, `attach` from whoever follows the keeper."""

    def __init__(self, store: Store, committer: Committer, events: Events, *, access: Access, trust_domain: str,
                 lists: Path | None = None) -> None:
        self._store = store
        self._committer = committer
        self._events = events
        self._trust_domain = trust_domain
        self._file = RevocationFile(lists) if lists is not None else None
        self._lists_error = ""
        authority = Authority(access.target, lambda: access.open(OPTIONS), access.metadata)
        self.identities = Identities(trust_domain=trust_domain, sign=authority.sign, sink=self)

    # -- what Identities puts in force (agent.identity.identities.Sink) --------------------------------------------------

    def put_trust(self, trust: Trust) -> None:
        self._store.put_trust(trust)
        self._committer.nudge()

    def put_certificate(self, certificate: Certificate) -> None:
        self._store.put_certificate(certificate)
        self._committer.nudge()

    def remove_certificate(self, identity: str) -> None:
        self._store.remove_certificate(identity)
        self._committer.nudge()

    async def in_force(self, identity: str) -> str | None:
        refused = await self._committer.in_force()
        return refused.get((Table.CERTIFICATE, identity)) or refused.get((Table.TRUST, self._trust_domain))

    # -- life -----------------------------------------------------------------------------------------------------------

    async def attach(self, link: KeeperLink, puts: Iterable[blobs.Put]) -> None:
        """Raises ConnectionError when the keeper goes away."""
        certificates: list[Certificate] = []
        trusts: list[Trust] = []
        for put in puts:
            try:
                if put.kind == Table.CERTIFICATE:
                    certificates.append(blobs.decode_certificate(put))
                elif put.kind == Table.TRUST:
                    trusts.append(blobs.decode_trust(put))
            except blobs.BlobError as error:
                log.warning("restore: a certificate of an earlier agent is not readable; it is asked for again",
                            extra={"key": put.key, "reason": str(error)})
        self.identities.attach(link, await link.keys(), certificates, trusts)

    async def watch(self) -> None:
        """For ever: follow the file of revocation lists."""
        while True:
            self.look()
            await asyncio.sleep(LISTS_SECONDS)

    def look(self) -> None:
        """One look at the file of revocation lists."""
        if self._file is None:
            return
        try:
            found = self._file.read()
        except (OSError, ValueError) as error:
            if str(error) != self._lists_error:
                self._events.add("RevocationListsRefused", "revocation lists", f"{error}; the last good ones stay", warning=True)
            self._lists_error = str(error)
            return
        if found is not None:
            self._lists_error = ""
            self._events.add("RevocationLists", "revocation lists", f"{len(found)} lists are in force")
            self.identities.revoke(found)

    # -- questions ------------------------------------------------------------------------------------------------------

    def problems(self) -> list[str]:
        return self.identities.problems() + ([f"revocation lists: {self._lists_error}"] if self._lists_error else [])

    def figures(self) -> CertificateFigures:
        """For metrics; called from the thread that renders them."""
        return CertificateFigures({one.identity: one.certificate.not_after for one in self.identities.entries if one.certificate},
                                  self.identities.requests, self.identities.failures)

    def shown(self) -> list[dict[str, Any]]:
        """ztunnel's shape and what else an operator asks for."""
        trust = self.identities.trust
        roots = [_shown(one) for one in trust.roots] if trust else []
        return [self._show(one, roots, len(trust.lists) if trust else 0) for one in self.identities.entries]

    @staticmethod
    def _show(one: Entry, roots: list[dict[str, Any]], lists: int) -> dict[str, Any]:
        made = one.certificate
        return {
            "identity": one.identity,
            "state": one.state(time.time()),
            "pods": len(one.owners),
            "certChain": [_shown(der_) for der_ in made.chain] if made else [],
            "rootCerts": roots,
            "revocationLists": lists,
            "key": made.key if made else None,
            "renewal": _moment(one.due) if one.owners else None,
            "failures": one.failures,
            "error": one.error,
        }


def _shown(certificate: bytes) -> dict[str, Any]:
    try:
        facts = der.certificate(certificate)
    except der.DerError as error:
        return {"error": str(error)}
    return {"serialNumber": f"{facts.serial:x}", "validFrom": _moment(facts.not_before), "expirationTime": _moment(facts.not_after)}


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(max(seconds, 0.0), UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
