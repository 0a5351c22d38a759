"""Who calls, from the token that they bring. A caller is on a node, and the token alone says on which.

`TokenSource` is what a source has to be; `reviews.TokenReviews` is that of a cluster. `NodeTokens` is a file, for labs and
machines without a cluster: lines `NODE sha256:HEX`, the hash of each node's token, so that nobody who reads the file can call. A node
may have several.
"""
from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from controlplane.ca.store import StoreError, read_private, stamp_of

LONGEST = 16 << 10  # bytes of a token; a projected one of Kubernetes has 1 to 2 KiB
_LINE = re.compile(r"([a-z0-9](?:[-a-z0-9.]{0,251}[a-z0-9])?)[ \t]+sha256:([0-9a-f]{64})")

log = logging.getLogger("narrows.controlplane.ca")


class TokenError(Exception):
    """The caller is not let in; the text is for them, and says nothing of what would be accepted."""


class TokensUnavailableError(TokenError):
    """Nobody can tell now whether the caller is let in, so they are not; it may be otherwise in a moment."""


@dataclass(frozen=True, slots=True)
class Caller:
    """`name` is for people: what the token stands for."""

    node: str
    name: str


class TokenSource(Protocol):
    async def caller(self, token: str) -> Caller:
        """Raises TokenError."""

    def __len__(self) -> int:
        """How many tokens are known; 0 where that cannot be said."""


def bearer(metadata: Iterable[tuple[str, str | bytes]] | None) -> str:
    """The token of gRPC metadata (`authorization: Bearer TOKEN`, RFC 6750 2.1). Raises TokenError."""
    found = [value for key, value in metadata or () if key == "authorization"]
    if not found:
        raise TokenError("no token came with the call (metadata `authorization: Bearer TOKEN`); give the agent its --ca-token")
    value = found[0] if isinstance(found[0], str) else ""
    scheme, _, token = value.partition(" ")
    if len(found) > 1 or scheme.lower() != "bearer" or not token or len(token) > LONGEST:
        raise TokenError("what came as `authorization` is not one bearer token")
    return token


class NodeTokens:
    """The file is read again when it changes; one that cannot be used changes nothing, and the log says so."""

    def __init__(self, path: Path) -> None:
        """Raises StoreError."""
        self._path = path
        self._secret = secrets.token_bytes(32)
        self._nodes: dict[bytes, tuple[bytes, str]] = {}
        self._stamp = stamp_of(path)
        self._read()

    async def caller(self, token: str) -> Caller:
        self._follow()
        digest = hashlib.sha256(token.encode()).digest()
        found = self._nodes.get(self._index(digest))
        if found is None or not hmac.compare_digest(found[0], digest):
            raise TokenError("the token is not known here; was it renewed, or is it another mesh's?")
        return Caller(found[1], f"node {found[1]}")

    def __len__(self) -> int:
        return len(self._nodes)

    def _index(self, digest: bytes) -> bytes:
        """Where a hash stands in the table: nobody can choose tokens by how long looking them up takes."""
        return hashlib.blake2b(digest, key=self._secret, digest_size=16).digest()

    def _follow(self) -> None:
        stamp = stamp_of(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._read()
            log.info("the tokens of the nodes were read again", extra={"file": str(self._path), "tokens": len(self)})
        except StoreError as error:
            log.error("the tokens of the nodes cannot be read; those known before stay", extra={"reason": str(error)})

    def _read(self) -> None:
        try:
            text = read_private(self._path).decode()
        except UnicodeDecodeError:
            raise StoreError(f"{self._path} is no text") from None
        fresh: dict[bytes, tuple[bytes, str]] = {}
        for number, whole in enumerate(text.splitlines(), 1):
            line = whole.partition("#")[0].strip()
            if not line:
                continue
            match = _LINE.fullmatch(line)
            if match is None:
                raise StoreError(f"{self._path}:{number}: `NODE sha256:HEX` is expected, the hash of the node's token "
                                 "(printf %s \"$TOKEN\" | sha256sum)")
            digest = bytes.fromhex(match[2])
            if fresh.get(self._index(digest), (b"", match[1]))[1] != match[1]:
                raise StoreError(f"{self._path}:{number}: {match[1]} has the token of another node; make one for each")
            fresh[self._index(digest)] = digest, match[1]
        self._nodes = fresh


class Either:
    """Several sources, asked in order: who is not known to one may be to the next, and what the last says is said."""

    def __init__(self, *sources: TokenSource) -> None:
        self._sources = sources

    async def caller(self, token: str) -> Caller:
        for one in self._sources[:-1]:
            try:
                return await one.caller(token)
            except TokenError:
                continue
        return await self._sources[-1].caller(token)

    def __len__(self) -> int:
        return sum(len(one) for one in self._sources)
