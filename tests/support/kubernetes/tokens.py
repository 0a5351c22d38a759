"""Service accounts' tokens: TokenRequest makes them, TokenReview says whose they are (authentication/v1)."""
from __future__ import annotations

import base64
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from tests.support.kubernetes.store import Refused, Store
from tests.support.kubernetes.table import Object

ISSUER = "https://kubernetes.default.svc"
SHORTEST = 600  # s
Bound = tuple[str, str, str, str]  # plural, namespace, name, uid


@dataclass(frozen=True)
class Token:
    """What a TokenReview says of it, while what it is `bound` to is there."""

    username: str
    groups: tuple[str, ...] = ("system:serviceaccounts", "system:authenticated")
    uid: str = "u"
    audiences: tuple[str, ...] = (ISSUER,)
    extra: Mapping[str, tuple[str, ...]] | None = None
    bound: tuple[Bound, ...] = ()


def shaped(claims: Mapping[str, object]) -> str:
    """A JSON Web Token (RFC 7519) with these claims, unlike any other; only who made it could check its signature."""
    parts = (b'{"alg":"RS256"}', json.dumps(claims).encode(), secrets.token_bytes(16))
    return ".".join(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in parts)


def _there(store: Store, one: Bound) -> Object | None:
    plural, namespace, name, uid = one
    try:
        found = store.get(store.served["", "v1", plural], namespace, name)
    except Refused:
        return None
    return found if found["metadata"]["uid"] == uid else None


def request(store: Store, tokens: dict[str, Token], namespace: str, account: str, body: Object) -> Object:
    """The answer to a TokenRequest; the token is in `tokens` then."""
    of, spec = store.get(store.served["", "v1", "serviceaccounts"], namespace, account), body.get("spec") or {}
    seconds, audiences = spec.get("expirationSeconds", 3600), tuple(spec.get("audiences") or [ISSUER])
    if seconds < SHORTEST:
        raise Refused(422, "Invalid", f"spec.expirationSeconds: Invalid value: {seconds}: may not specify a duration less than 10 minutes")
    bound: list[Bound] = [("serviceaccounts", namespace, account, of["metadata"]["uid"])]
    extra: dict[str, tuple[str, ...]] = {}
    if to := spec.get("boundObjectRef"):
        pod = store.get(store.served["", "v1", "pods"], namespace, to["name"])
        uid = pod["metadata"]["uid"]
        if to.get("uid") and to["uid"] != uid:
            raise Refused(409, "Conflict", f"the UID in the bound object reference ({to['uid']}) does not match the UID in record ({uid})")
        if pod["spec"].get("serviceAccountName", "default") != account:
            raise Refused(400, "BadRequest", f"cannot bind token for serviceaccount {account!r} to pod running with another")
        bound.append(("pods", namespace, to["name"], uid))
        extra = {"authentication.kubernetes.io/pod-name": (to["name"],), "authentication.kubernetes.io/pod-uid": (uid,)}
    until = datetime.now(UTC) + timedelta(seconds=seconds)
    text = shaped({"iss": ISSUER, "aud": audiences, "exp": int(until.timestamp()), "sub": f"system:serviceaccount:{namespace}:{account}"})
    groups = ("system:serviceaccounts", f"system:serviceaccounts:{namespace}", "system:authenticated")
    tokens[text] = Token(f"system:serviceaccount:{namespace}:{account}", groups, of["metadata"]["uid"], audiences, extra or None,
                         tuple(bound))
    return {"kind": "TokenRequest", "apiVersion": "authentication.k8s.io/v1", "metadata": {"name": account, "namespace": namespace},
            "spec": {**spec, "audiences": list(audiences), "expirationSeconds": seconds},
            "status": {"token": text, "expirationTimestamp": until.strftime("%Y-%m-%dT%H:%M:%SZ")}}


def review(store: Store, tokens: Mapping[str, Token], body: Object, audience_aware: bool) -> Object:
    spec = body.get("spec") or {}
    token, wanted = tokens.get(spec.get("token", "")), spec.get("audiences") or [ISSUER]
    status: Object = {"authenticated": False, "user": {}, "error": "[invalid bearer token]"}
    if token is not None and all(_there(store, one) for one in token.bound):
        common = [one for one in wanted if one in token.audiences]
        if common or not audience_aware:
            user = {"username": token.username, "uid": token.uid, "groups": list(token.groups)}
            if token.extra:
                user["extra"] = {key: list(values) for key, values in token.extra.items()}
            status = {"authenticated": True, "user": user, **({"audiences": common} if audience_aware else {})}
    return {"kind": "TokenReview", "apiVersion": "authentication.k8s.io/v1", "metadata": {}, "spec": spec, "status": status}
