"""The certificate authority as an agent sees it: one call, and what its answer must be (Istio's CreateCertificate).

    request (PKCS#10) -> CreateCertificate -> leaf, intermediates, roots -> checked -> Signed

An answer is taken only if its leaf has exactly the identity that was asked for and the key of the request, is valid now, and each
certificate names the next as its issuer up to one of the roots.
"""
from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import grpc
import grpc.aio

from agent.identity import der
from protos.gen.istio import ca_pb2

METHOD = "/istio.v1.auth.IstioCertificateService/CreateCertificate"
IMPERSONATED = "ImpersonatedIdentity"
CALL_SECONDS = 10.0
CHAIN_MOST, ROOTS_MOST, CERTIFICATE_BYTES = 16, 32, 65_536  # what workers take (twin: ext/route/trust.pyx)
UNANSWERED = (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
SKEW = 120  # s by which the authority's clock may be ahead

Metadata = tuple[tuple[str, str], ...]
Call = Callable[[bytes], Awaitable[bytes]]


class SignError(Exception):
    """No certificate; the text says why, for an operator. `unanswered`: no authority was there to say so."""

    def __init__(self, text: str, unanswered: bool = False) -> None:
        super().__init__(text)
        self.unanswered = unanswered


@dataclass(frozen=True, slots=True)
class Signed:
    """`chain` without roots, leaf first; all DER."""

    chain: tuple[bytes, ...]
    roots: tuple[bytes, ...]
    not_before: int
    not_after: int


class Authority:
    """Asks over channels that `open_channel` gives (TLS or not is its business); `credentials` are read before each call."""

    def __init__(self, target: str, open_channel: Callable[[], Any], credentials: Callable[[], Metadata]) -> None:
        self._target = target
        self._open = open_channel
        self._credentials = credentials

    async def sign(self, identity: str, request: bytes, now: float) -> Signed:
        """Raises SignError."""
        message = ca_pb2.IstioCertificateRequest(csr=der.to_pem(request, "CERTIFICATE REQUEST"))  # for as long as the authority likes
        message.metadata.update({IMPERSONATED: identity})
        try:
            metadata = self._credentials()
            async with self._open() as channel:
                call = channel.unary_unary(METHOD, request_serializer=ca_pb2.IstioCertificateRequest.SerializeToString,
                                           response_deserializer=ca_pb2.IstioCertificateResponse.FromString)
                answer = await call(message, timeout=CALL_SECONDS, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            raise SignError(f"{self._target}: {error.code().name}: {error.details()}",
                            unanswered=error.code() in UNANSWERED) from None
        except (OSError, ValueError) as error:
            raise SignError(f"{self._target} cannot be asked: {error}") from None
        return check(identity, request, list(answer.cert_chain), now)


def check(identity: str, request: bytes, answer: list[str], now: float) -> Signed:
    """What an authority answered, taken apart. Raises SignError."""
    if len(answer) < 2:
        raise SignError(f"the authority answered with {len(answer)} parts; a leaf and the roots are needed")
    try:
        chain = [one for text in answer[:-1] for one in der.pem(text, "CERTIFICATE")]
        roots = tuple(dict.fromkeys(der.pem(answer[-1], "CERTIFICATE")))
        facts = [der.certificate(one) for one in chain]
        anchors = [der.certificate(one) for one in roots]
        asked = der.request_key(request)
    except der.DerError as error:
        raise SignError(f"the authority's answer: {error}") from None
    if not 1 <= len(chain) <= CHAIN_MOST or not 1 <= len(roots) <= ROOTS_MOST:
        raise SignError(f"the authority answered with {len(chain)} certificates and {len(roots)} roots; 1 to {CHAIN_MOST} and {ROOTS_MOST}")
    if max(map(len, (*chain, *roots))) > CERTIFICATE_BYTES:
        raise SignError(f"the authority answered with a certificate of more than {CERTIFICATE_BYTES} bytes")
    leaf = facts[0]
    if leaf.identity != identity:
        raise SignError(f"the authority signed for {leaf.identity or 'something that is not one identity'} instead of {identity}")
    if leaf.public_key != asked:
        raise SignError("the authority signed another key than the one that was asked for")
    if not leaf.not_before - SKEW <= now < leaf.not_after:
        raise SignError(f"the authority's certificate is valid from {leaf.not_before} to {leaf.not_after}, and now is {now:.0f}; "
                        "compare the clocks")
    for one, above in pairwise(facts):
        if one.issuer != above.subject:
            raise SignError("the authority's chain is broken: a certificate does not name the next as its issuer")
    if not any(anchor.subject == facts[-1].issuer for anchor in anchors):
        raise SignError("the authority's chain ends at none of its own roots")
    return Signed(tuple(chain), roots, leaf.not_before, leaf.not_after)
