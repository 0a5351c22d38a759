"""Callers by the tokens of their pods: Kubernetes' TokenReview says whose one is, and so on which node (what istiod does for ztunnel).

    token --shape--> known? --no--> one review for all who wait --> account of nodes? --> bound to a pod? --> its node --> Caller

Nobody is let in whom the server did not name: one that does not answer is told as `TokensUnavailableError` (ask again), and what it said
before counts KEPT_SECONDS, and never past the token's end. What a token says of itself is used to refuse it and to forget it, no more.
"""
from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from controlplane.ca.tokens import Caller, TokenError, TokensUnavailableError
from controlplane.model.objects import Pod
from protos.kubernetes.errors import ApiError
from protos.kubernetes.objects import TokenReviewStatus

AUDIENCE = "istio-ca"  # of the tokens that Istio's node proxies bring
REVIEW_SECONDS = 5.0  # of one review; an agent waits 10 for its answer
KEPT_SECONDS = 60.0  # a token whose pod was deleted is let in that long at most
REFUSED_SECONDS = 10.0  # so long a refused one is not asked about again
KEPT = 4096  # answers; of 1,000 nodes each has one
UNDER_WAY = 64  # reviews at once
_USER = "system:serviceaccount:"
_EXTRA = "authentication.kubernetes.io/"

log = logging.getLogger("narrows.controlplane.ca")


@dataclass(frozen=True, slots=True)
class _Who:
    """Whose token it is. `node` is empty where the server does not say it (before Kubernetes 1.32; 1.29 behind a gate)."""

    namespace: str
    account: str
    pod: str
    uid: str
    node: str


@dataclass(frozen=True, slots=True)
class _Answer:
    until: float
    who: _Who | None
    refusal: str


class TokenReviews:
    """`review` asks the API server, `pod` finds one (namespace, name) among those that are followed. `accounts`: `NAMESPACE/NAME` of those
    that nodes' agents run as; others are refused, since who is let in may ask for every account of its node. For one event loop."""

    def __init__(self, review: Callable[[str, Sequence[str]], Awaitable[TokenReviewStatus]], pod: Callable[[str, str], Pod | None],
                 accounts: frozenset[str], clock: Callable[[], float] = time.time) -> None:
        self._review, self._pod, self._accounts, self._clock = review, pod, accounts, clock
        self._answers: OrderedDict[bytes, _Answer] = OrderedDict()
        self._asking: dict[bytes, asyncio.Task[_Answer]] = {}
        self._problem = ""

    def __len__(self) -> int:
        return sum(one.who is not None for one in self._answers.values())

    async def caller(self, token: str) -> Caller:
        claims = _claims(token)
        digest = hashlib.sha256(token.encode()).digest()
        answer = self._answers.get(digest)
        if answer is None or answer.until <= self._clock():
            answer = await self._ask(digest, token, claims)
        if answer.who is None:
            raise TokenError(answer.refusal)
        return self._placed(answer.who)

    # -- inside -----------------------------------------------------------------------------------------------------

    async def _ask(self, digest: bytes, token: str, claims: dict[str, Any]) -> _Answer:
        task = self._asking.get(digest)
        if task is None:
            if len(self._asking) >= UNDER_WAY:
                raise TokensUnavailableError("too many tokens are being reviewed; ask again")
            task = self._asking[digest] = asyncio.create_task(self._reviewed(token, claims), name="token review")
            task.add_done_callback(lambda done: self._done(digest, done))
        return await asyncio.shield(task)  # that one of those who wait goes is no matter of the others

    def _done(self, digest: bytes, task: asyncio.Task[_Answer]) -> None:
        del self._asking[digest]
        if task.cancelled() or task.exception() is not None:
            return
        self._answers[digest] = task.result()
        self._answers.move_to_end(digest)
        while len(self._answers) > KEPT:
            self._answers.popitem(last=False)

    async def _reviewed(self, token: str, claims: dict[str, Any]) -> _Answer:
        begin = self._clock()
        try:
            async with asyncio.timeout(REVIEW_SECONDS):
                found = await self._review(token, (AUDIENCE,))
        except TimeoutError:
            raise self._unavailable(f"the API server did not review it within {REVIEW_SECONDS:g} s") from None
        except ApiError as error:
            raise self._unavailable(str(error)) from None
        if self._problem:
            self._problem = ""
            log.info("tokens are reviewed again")
        try:
            # begin: the time that the review took is the server's word's age, too
            return _Answer(min(begin + KEPT_SECONDS, _end(claims)), self._who(found), "")
        except TokenError as error:
            return _Answer(begin + REFUSED_SECONDS, None, str(error))

    def _unavailable(self, why: str) -> TokensUnavailableError:
        if why != self._problem:
            self._problem = why
            log.error("tokens cannot be reviewed, so nobody who is not known yet is let in", extra={"reason": why})
        return TokensUnavailableError("the token cannot be reviewed now; ask again (the control plane's log says why)")

    def _who(self, found: TokenReviewStatus) -> _Who:
        """Raises TokenError."""
        if not found.authenticated:
            raise TokenError(f"the API server does not accept the token: {found.error[:200] or 'it says no more'}")
        namespace, _, account = found.user.username.removeprefix(_USER).partition(":")
        if not found.user.username.startswith(_USER) or not namespace or not account:
            raise TokenError("the token is no service account's")
        if f"{namespace}/{account}" not in self._accounts:
            raise TokenError(f"the service account {namespace}/{account} is none that agents of nodes run as (--node-account)")
        extra = found.user.extra or {}
        pod, uid, node = ("".join(extra.get(f"{_EXTRA}{name}", ())[:1]) for name in ("pod-name", "pod-uid", "node-name"))
        if not pod or not uid:
            raise TokenError("the token is not bound to a pod; a projected one is expected")
        return _Who(namespace, account, pod, uid, node)

    def _placed(self, who: _Who) -> Caller:
        """Raises TokenError."""
        node = who.node
        if not node:
            pod = self._pod(who.namespace, who.pod)
            if pod is None or pod.meta.uid != who.uid or pod.service_account != who.account or pod.ended or not pod.node:
                raise TokenError(f"the pod {who.namespace}/{who.pod} is not known here, so nobody can tell its node (one that was made "
                                 "just now may not be known yet; ask again)")
            node = pod.node
        return Caller(node, f"node {node} (pod {who.namespace}/{who.pod})")


def _claims(token: str) -> dict[str, Any]:
    """Of a JSON Web Token, unverified (RFC 7519 4.1): only good for refusing what no API server would accept. Raises TokenError."""
    parts = token.split(".")
    try:
        found = json.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
        audience = found["aud"]
        _end(found)
    except (ValueError, IndexError, KeyError, TypeError):
        raise TokenError("the token is no projected one of a service account") from None
    if len(parts) != 3 or AUDIENCE not in (audience if isinstance(audience, list) else [audience]):
        raise TokenError(f"the token is not for {AUDIENCE}")
    return found  # type: ignore[no-any-return]


def _end(claims: dict[str, Any]) -> float:
    return float(claims["exp"])
