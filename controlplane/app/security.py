"""The certificate authority beside the mesh: made from options, kept current, and what the doors ask of it."""
from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import grpc

from controlplane.app.plane import Plane
from controlplane.ca.audit import Audit
from controlplane.ca.authority import Authority, OwnCertificate, utc_now
from controlplane.ca.identity import DEFAULT_TRUST_DOMAIN
from controlplane.ca.reviews import TokenReviews
from controlplane.ca.secret import SecretStore
from controlplane.ca.service import DEFAULT_LIFETIME, CertificateService
from controlplane.ca.sign import ExpiredError, Serving
from controlplane.ca.store import Files, Folder, StoreError
from controlplane.ca.tokens import Either, NodeTokens, TokenError, TokenSource, TokensUnavailableError, bearer
from controlplane.model.objects import Pod
from controlplane.model.problems import ObjectKey
from controlplane.server.grpc_server import Metadata, Network, UnknownCallerError
from protos.kubernetes.client import Client
from protos.kubernetes.errors import ApiError

LOOK_SECONDS = 2.0  # between two looks at the authority's files
OPEN_FIRST, OPEN_MOST = 0.5, 15.0  # s between two tries to open the authority's Secret, growing
DRAIN_SECONDS = 0.5  # twice a day; see Handshakes
WILDCARDS = ("", "0.0.0.0", "::")

log = logging.getLogger("narrows.controlplane.ca")


@dataclass(frozen=True, slots=True)
class SecurityOptions:
    """`source` makes the authority; `tokens` is the file of node tokens; `accounts` are those whose tokens the API server reviews;
    `names` are those under which agents call our ports."""

    source: Folder | Files | SecretStore
    tokens: Path | None
    audit: Path
    trust_domain: str = DEFAULT_TRUST_DOMAIN
    lifetime: timedelta = DEFAULT_LIFETIME
    names: tuple[str, ...] = field(default=())
    accounts: frozenset[str] = frozenset()


class Handshakes:
    """Gives the handshakes of one port our certificate, and another one when it was renewed.

    gRPC asks before each handshake, in a thread of its own and holding the port's lock; right after that, without the lock, the handshake
    takes hold of what was set before. An answer other than "nothing new" frees that, under the hands of whoever is at that point (gRPC
    issue 36693: answering every time, a hundred connections that are closed at once end the process). So we answer at a renewal only,
    and then make new handshakes wait until those that are under way are past that point; it takes them microseconds.
    """

    def __init__(self, own: OwnCertificate, drain: float = DRAIN_SECONDS) -> None:
        self._own = own
        self._drain = drain
        self._given = own.serving

    def credentials(self) -> grpc.ServerCredentials:
        return grpc.dynamic_ssl_server_credentials(_configuration(self._given), self.fresh)

    def fresh(self) -> grpc.ServerCertificateConfiguration | None:
        """None: nothing new."""
        serving = self._own.serving
        if serving is self._given:
            return None
        time.sleep(self._drain)  # without the GIL: the loop goes on
        self._given = serving
        return _configuration(serving)


def _configuration(serving: Serving) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(serving.key, serving.chain)])


class Security:
    """Authority, tokens and audit of one control plane."""

    def __init__(self, options: SecurityOptions, plane: Plane, client: Client | None = None) -> None:
        """`client` is needed where tokens are reviewed. Raises StoreError, MaterialError."""
        if isinstance(options.source, Folder) and options.source.open(options.trust_domain, utc_now()):
            log.info("made a new root", extra={"where": options.source.where, "trust_domain": options.trust_domain})
        self._authority = Authority(options.source)
        self._tokens: TokenSource = _tokens(options, plane, client)
        self._audit = Audit(options.audit)
        self.service = CertificateService(self._authority, self._tokens, plane.mesh.runs, self._audit, options.trust_domain,
                                          options.lifetime)
        self._names = options.names
        self._own: OwnCertificate | None = None

    async def follow_secret(self, client: Client) -> None:
        """Where the authority is in a Secret: keeps it current; never returns."""
        if isinstance(self._authority.source, SecretStore):
            await self._authority.source.follow(client)
        await asyncio.Event().wait()

    def network(self, ports: Iterable[str]) -> Network:
        """For these ports (HOST:PORT). Raises StoreError when the authority's certificate has ended."""
        try:
            own = self._own = OwnCertificate(self._authority, _names(self._names, ports))
        except ExpiredError:
            raise StoreError(f"the certificate of the authority in {self._authority.source.where} has ended; give another") from None

        return Network(lambda: Handshakes(own).credentials(), self._admit)

    async def follow(self) -> None:
        """Keeps authority, own certificate and audit current; never returns."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            self.look()

    def look(self) -> None:
        """One round of `follow`."""
        self._authority.refresh()
        try:
            if self._own is not None and self._own.renew():
                log.info("our own certificate was renewed", extra={"names": list(self._own.names)})
        except ExpiredError:
            log.error("our own certificate cannot be renewed: the authority's has ended", extra={"where": self._authority.source.where})
        try:
            self._audit.settle()
        except OSError as error:
            log.error("the audit log cannot be written", extra={"reason": str(error)})

    def close(self) -> None:
        self._audit.close()

    async def _admit(self, metadata: Metadata) -> str:
        try:
            return (await self._tokens.caller(bearer(metadata))).node
        except TokenError as error:
            raise UnknownCallerError(str(error), isinstance(error, TokensUnavailableError)) from None


def _tokens(options: SecurityOptions, plane: Plane, client: Client | None) -> TokenSource:
    def pod(namespace: str, name: str) -> Pod | None:
        found = plane.mesh.get(ObjectKey("Pod", namespace, name))
        return found if isinstance(found, Pod) else None

    sources: list[TokenSource] = [NodeTokens(options.tokens)] if options.tokens else []
    if client is not None and options.accounts:
        sources.append(TokenReviews(client.review_token, pod, options.accounts))
    return sources[0] if len(sources) == 1 else Either(*sources)


def _names(given: Iterable[str], ports: Iterable[str]) -> tuple[str, ...]:
    """What our own certificate says we are called."""
    hosts = [port.rpartition(":")[0].strip("[]") for port in ports]
    names = [*given, *(host for host in hosts if host not in WILDCARDS), "localhost", "127.0.0.1", "::1", socket.gethostname().lower()]
    return tuple(dict.fromkeys(name for name in names if name.isascii()))


async def opened(source: SecretStore, client: Client, trust_domain: str, ending: asyncio.Task[bool]) -> bool:
    """Open the Secret, however long the API server takes; False when the process is to end first. Raises StoreError."""
    wait = OPEN_FIRST
    while True:
        try:
            if await source.open(client, trust_domain, utc_now()):
                log.info("made a new root", extra={"where": source.where, "trust_domain": trust_domain})
            return True
        except ApiError as error:
            log.error("the authority's Secret cannot be had yet", extra={"where": source.where, "reason": str(error)})
        await asyncio.wait({ending}, timeout=wait)
        if ending.done():
            return False
        wait = min(wait * 2, OPEN_MOST)
