"""`istio.v1.auth.IstioCertificateService/CreateCertificate`: who calls, may they, is it in order; then a certificate and its record.

    token -> Caller (its node) -> rate -> identity (ImpersonatedIdentity) -> a pod of it on that node -> request -> sign -> audit -> answer

Each step may refuse, with a gRPC status and a text for whoever reads the agent's log. The token is looked at before a byte of the request
is read (the handler takes a stream of one message, which is the same on the wire), so that who has none costs no memory.
"""
from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import grpc

from controlplane.ca import sign
from controlplane.ca.audit import Audit
from controlplane.ca.authority import Authority
from controlplane.ca.identity import Identity, IdentityError, parse
from controlplane.ca.limit import Limit
from controlplane.ca.material import fingerprint, pem, public_bytes, show
from controlplane.ca.tokens import Caller, TokenError, TokenSource, TokensUnavailableError, bearer
from protos.gen.istio import ca_pb2

SERVICE, METHOD = "istio.v1.auth.IstioCertificateService", "CreateCertificate"
IMPERSONATED = "ImpersonatedIdentity"
DEFAULT_LIFETIME = timedelta(hours=24)  # Istio's and ztunnel's
MOST_LIFETIME = timedelta(days=90)  # Istio's
# reasons, in the order of the steps
REFUSALS = ("token", "review", "rate", "identity", "impersonation", "lifetime", "request", "expired", "audit")
READ_SECONDS = 30.0  # from the call to its message

Metadata = Iterable[tuple[str, str | bytes]] | None
Code = grpc.StatusCode

log = logging.getLogger("narrows.controlplane.ca")


class Refusal(Exception):
    """No certificate. `reason` is a short word for metrics and the audit, the text is for people."""

    def __init__(self, code: grpc.StatusCode, reason: str, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.reason = reason


@dataclass(slots=True)
class Counts:
    """Since the start. `refused` by reason."""

    requests: int = 0
    issued: int = 0
    refused: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True)
class _Asked:
    """What is known of a call when it is refused."""

    peer: str
    caller: Caller | None = None
    identity: str = ""


class CertificateService:
    """`runs(node, namespace, service account)` says whether such a pod is on the node. For one event loop."""

    def __init__(self, authority: Authority, tokens: TokenSource, runs: Callable[[str, str, str], bool], audit: Audit,
                 trust_domain: str, lifetime: timedelta = DEFAULT_LIFETIME, limit: Limit | None = None) -> None:
        self.authority = authority
        self.tokens = tokens
        self.trust_domain = trust_domain
        self.lifetime = lifetime
        self.counts = Counts()
        self._runs = runs
        self._audit = audit
        self._limit = limit or Limit()

    def handler(self) -> Any:
        """For `grpc.aio.Server.add_generic_rpc_handlers`."""
        method = grpc.stream_unary_rpc_method_handler(self._serve, ca_pb2.IstioCertificateRequest.FromString,
                                                      ca_pb2.IstioCertificateResponse.SerializeToString)
        return grpc.method_handlers_generic_handler(SERVICE, {METHOD: method})

    async def create(self, read: Callable[[], Any], metadata: Metadata, peer: str) -> Any:
        """The answer to a call; `read` awaits its request. Raises Refusal."""
        self.counts.requests += 1
        asked = _Asked(peer)
        try:
            return await self._create(read, metadata, asked)
        except Refusal as refusal:
            self.counts.refused[refusal.reason] += 1
            node = asked.caller.node if asked.caller else ""
            try:
                self._audit.refused(node, peer=peer, identity=asked.identity, code=refusal.code.name, reason=refusal.reason,
                                    text=str(refusal))
            except OSError as error:
                log.error("a refusal cannot be recorded", extra={"reason": str(error), "node": node, "text": str(refusal)})
            raise

    # -- inside -----------------------------------------------------------------------------------------------------

    async def _serve(self, requests: AsyncIterator[Any], context: Any) -> Any:
        async def read() -> Any:
            try:
                async with asyncio.timeout(READ_SECONDS):
                    return await anext(requests)
            except (TimeoutError, StopAsyncIteration):
                raise Refusal(Code.INVALID_ARGUMENT, "request", "no certificate request came with the call") from None

        try:
            return await self.create(read, context.invocation_metadata(), context.peer())
        except Refusal as refusal:
            await context.abort(refusal.code, str(refusal))

    async def _create(self, read: Callable[[], Any], metadata: Metadata, asked: _Asked) -> Any:
        try:
            asked.caller = caller = await self.tokens.caller(bearer(metadata))
        except TokensUnavailableError as error:
            raise Refusal(Code.UNAVAILABLE, "review", str(error)) from None
        except TokenError as error:
            raise Refusal(Code.UNAUTHENTICATED, "token", str(error)) from None
        if wait := self._limit.take(caller.node):
            raise Refusal(Code.RESOURCE_EXHAUSTED, "rate", f"{caller.name} asks for too many certificates; ask again in {wait:.1f} s")
        request = await read()
        identity = self._identity(request, caller, asked)
        lifetime = self._lifetime(request, identity)
        try:
            key = sign.read_request(request.csr, identity)
        except sign.RequestError as error:
            raise Refusal(Code.INVALID_ARGUMENT, "request", f"{error} (for {identity}, from {caller.name})") from None
        return self._issue(key, identity, lifetime, caller, asked)

    def _identity(self, request: Any, caller: Caller, asked: _Asked) -> Identity:
        fields = request.metadata.fields
        asked.identity = text = fields[IMPERSONATED].string_value[:sign.REQUEST_BYTES] if IMPERSONATED in fields else ""
        if not text:
            raise Refusal(Code.INVALID_ARGUMENT, "identity", f"{caller.name} does not say for whom: the request's metadata has no "
                          f"{IMPERSONATED}; a node has no certificate of its own")
        try:
            identity = parse(text)
        except IdentityError as error:
            raise Refusal(Code.INVALID_ARGUMENT, "identity", f"{caller.name} asks for somebody who cannot be: {error}") from None
        if identity.trust_domain != self.trust_domain:
            raise Refusal(Code.PERMISSION_DENIED, "impersonation",
                          f"{caller.name} may not have a certificate for {identity}: the trust domain here is {self.trust_domain}")
        if not self._runs(caller.node, identity.namespace, identity.account):
            raise Refusal(Code.PERMISSION_DENIED, "impersonation",
                          f"{caller.name} may not have a certificate for {identity}: no pod of that service account is on this node "
                          "(one that was made just now may not be known yet; ask again)")
        return identity

    def _lifetime(self, request: Any, identity: Identity) -> timedelta:
        """What was asked for; Istio's rule: nothing, or less, is the default, and too much is refused."""
        seconds = int(request.validity_duration)
        if seconds <= 0:
            return self.lifetime
        if seconds > MOST_LIFETIME.total_seconds():
            raise Refusal(Code.INVALID_ARGUMENT, "lifetime", f"a certificate of {seconds} s is asked for {identity}; at most "
                          f"{MOST_LIFETIME.total_seconds():.0f} s are given")
        return timedelta(seconds=seconds)

    def _issue(self, key: sign.PublicKey, identity: Identity, lifetime: timedelta, caller: Caller, asked: _Asked) -> Any:
        material, now = self.authority.material, self.authority.clock()
        try:
            made = sign.leaf(material, key, identity, lifetime, now)
        except sign.ExpiredError:
            raise Refusal(Code.FAILED_PRECONDITION, "expired", f"no certificate for {identity}: the authority's own one ended at "
                          f"{show(material.not_after)}; give the control plane another") from None
        try:
            self._audit.issued(node=caller.node, peer=asked.peer, identity=str(identity), serial=f"{made.serial_number:x}",
                               notBefore=show(made.not_valid_before_utc), notAfter=show(made.not_valid_after_utc),
                               key=hashlib.sha256(public_bytes(key)).hexdigest(), issuer=fingerprint(material.certificate))
        except OSError as error:
            log.error("a certificate cannot be recorded, so it is not given out", extra={"reason": str(error), "identity": str(identity)})
            raise Refusal(Code.UNAVAILABLE, "audit",
                          f"no certificate for {identity}: the control plane cannot write its audit log; see its log") from None
        self.counts.issued += 1
        return ca_pb2.IstioCertificateResponse(cert_chain=[pem(made), *material.above_pem])

    # -- for an operator --------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """The form of /debug/ca; an interface."""
        material = self.authority.material
        return {
            "trustDomain": self.trust_domain, "where": self.authority.source.where, "problem": self.authority.problem,
            "signing": _described(material.certificate), "intermediates": [_described(one) for one in material.intermediates],
            "roots": [_described(one) for one in material.roots], "expires": show(material.not_after),
            "lifetimeSeconds": int(self.lifetime.total_seconds()), "tokens": len(self.tokens), "auditLog": str(self._audit.path),
            "requests": self.counts.requests, "issued": self.counts.issued, "refused": dict(sorted(self.counts.refused.items()))}


def _described(one: Any) -> dict[str, Any]:
    subject: str = one.subject.rfc4514_string()
    begin: datetime = one.not_valid_before_utc
    end: datetime = one.not_valid_after_utc
    return {"subject": subject, "sha256": fingerprint(one), "notBefore": show(begin), "notAfter": show(end)}
