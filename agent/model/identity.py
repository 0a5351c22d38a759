"""Who a pod is, as it proves to other nodes: certificates of this node's identities, and whom they believe."""
from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Certificate:
    """What an authority signed for one identity. The private key stays with keeper and workers; `key` is its number there."""

    identity: str  # SPIFFE ID
    key: int
    not_before: int  # s since 1970
    not_after: int
    chain: tuple[bytes, ...]  # DER, leaf first, without the root


@dataclass(frozen=True, slots=True)
class Trust:
    """Who may sign for a trust domain: any of the roots, as long as no revocation list names the certificate."""

    trust_domain: str
    roots: tuple[bytes, ...]  # DER
    lists: tuple[bytes, ...] = ()  # DER
