"""Who may talk to whom at layer 4: one `istio.security.Authorization`. docs/policy.md says how it is understood."""
from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from ipaddress import IPv4Network, IPv6Network

from agent.model.routing import StringMatch

Network = IPv4Network | IPv6Network
Texts = tuple[StringMatch, ...]  # exact, prefix, suffix or present
Accounts = tuple[tuple[str, str], ...]  # namespace, service account


class Scope(IntEnum):
    """Numbers of istio.security.Scope."""

    GLOBAL = 0
    NAMESPACE = 1
    WORKLOAD = 2  # those workloads that name it


class Action(IntEnum):
    """Numbers of istio.security.Action."""

    ALLOW = 0
    DENY = 1


@dataclass(frozen=True, slots=True)
class Match:
    """Agrees if every kind of field does: one of what must (if anything must), none of what must not. Saying nothing, it never agrees."""

    namespaces: Texts = ()
    not_namespaces: Texts = ()
    principals: Texts = ()  # without spiffe://
    not_principals: Texts = ()
    sources: tuple[Network, ...] = ()
    not_sources: tuple[Network, ...] = ()
    destinations: tuple[Network, ...] = ()
    not_destinations: tuple[Network, ...] = ()
    ports: tuple[int, ...] = ()
    not_ports: tuple[int, ...] = ()
    service_accounts: Accounts = ()
    not_service_accounts: Accounts = ()


Clause = tuple[Match, ...]  # any; none: agrees
Rule = tuple[Clause, ...]  # all; none: always matches


@dataclass(frozen=True, slots=True)
class Policy:
    namespace: str
    name: str
    scope: Scope
    action: Action
    rules: tuple[Rule, ...]  # any; none: never matches
    dry_run: bool = False

    @property
    def key(self) -> str:
        return f"{self.namespace}/{self.name}"
