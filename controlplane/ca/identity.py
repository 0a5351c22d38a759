"""SPIFFE identities of workloads, parsed once: `spiffe://<trust domain>/ns/<namespace>/sa/<service account>`."""
from __future__ import annotations

import re
from dataclasses import dataclass

DEFAULT_TRUST_DOMAIN = "cluster.local"
LONGEST = 2048  # bytes of a SPIFFE ID (SPIFFE-ID 2.3)

_TRUST_DOMAIN = re.compile(r"[a-z0-9._-]{1,255}")  # SPIFFE-ID 2.1
_LABEL = r"[a-z0-9](?:[-a-z0-9]{0,61}[a-z0-9])?"
_NAMESPACE = re.compile(_LABEL)  # RFC 1123 label
_ACCOUNT = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")  # RFC 1123 subdomain, of 253 characters at most


class IdentityError(ValueError):
    """The text is no identity of a workload; it says why."""


@dataclass(frozen=True, slots=True)
class Identity:
    """`str` of it is the URI."""

    trust_domain: str
    namespace: str
    account: str

    def __str__(self) -> str:
        return f"spiffe://{self.trust_domain}/ns/{self.namespace}/sa/{self.account}"


def check_trust_domain(text: str) -> str:
    """The text itself. Raises IdentityError."""
    if not _TRUST_DOMAIN.fullmatch(text):
        raise IdentityError(f"{text!r} is no trust domain: 1 to 255 lower-case letters, digits, dots, dashes and underscores")
    return text


def parse(text: str) -> Identity:
    """Raises IdentityError."""
    shown = repr(text[:200])
    if len(text) > LONGEST or not text.startswith("spiffe://"):
        raise IdentityError(f"{shown} is no SPIFFE ID; spiffe://TRUST_DOMAIN/ns/NAMESPACE/sa/SERVICE_ACCOUNT is expected")
    parts = text.removeprefix("spiffe://").split("/")
    if len(parts) != 5 or parts[1] != "ns" or parts[3] != "sa":
        raise IdentityError(f"{shown} names no workload; spiffe://TRUST_DOMAIN/ns/NAMESPACE/sa/SERVICE_ACCOUNT is expected")
    domain, _, namespace, _, account = parts
    check_trust_domain(domain)
    if not _NAMESPACE.fullmatch(namespace):
        raise IdentityError(f"{shown}: {namespace[:100]!r} can be no namespace")
    if len(account) > 253 or not _ACCOUNT.fullmatch(account):
        raise IdentityError(f"{shown}: {account[:100]!r} can be no service account")
    return Identity(domain, namespace, account)
