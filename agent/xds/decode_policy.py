"""`istio.security.Authorization` -> Policy. Strict: a part of a rule that is not understood would be a rule that says something else."""
from __future__ import annotations

from ipaddress import ip_address, ip_network
from typing import Any

from agent.model.policy import Accounts, Action, Match, Network, Policy, Scope, Texts
from agent.model.routing import MatchKind, StringMatch
from agent.xds.strict import Refused, check

NAME_BOUND = 253  # characters of a namespace, and of a name in Kubernetes
KINDS = {"exact": MatchKind.EXACT, "prefix": MatchKind.PREFIX, "suffix": MatchKind.SUFFIX}


def decode_policy(name: str, message: Any) -> Policy:
    """`message` is an istio.security.Authorization that came under `name`. Raises Refused with a reason for an operator."""
    check(message)
    for what, value in (("namespace", message.namespace), ("name", message.name)):
        # an exception by port is named converted_peer_authentication_<name>
        if not value or len(value) > NAME_BOUND + 40 or "/" in value:
            raise Refused(f"its {what} is {value[:80]!r}")
    if name != f"{message.namespace}/{message.name}":
        raise Refused(f"it came under this name but is {message.namespace}/{message.name}")
    if message.scope not in set(Scope):
        raise Refused(f"scope {message.scope} is not known: to whom it applies cannot be said")
    if message.action not in set(Action):
        raise Refused(f"action {message.action} is not known")
    rules = tuple(tuple(tuple(_match(match) for match in clause.matches) for clause in rule.clauses) for rule in message.rules)
    return Policy(message.namespace, message.name, Scope(message.scope), Action(message.action), rules, message.dry_run)


def _match(one: Any) -> Match:
    return Match(
        _texts(one.namespaces), _texts(one.not_namespaces), _texts(one.principals), _texts(one.not_principals),
        _networks(one.source_ips), _networks(one.not_source_ips), _networks(one.destination_ips), _networks(one.not_destination_ips),
        _ports(one.destination_ports), _ports(one.not_destination_ports),
        _accounts(one.service_accounts), _accounts(one.not_service_accounts))


def _texts(many: Any) -> Texts:
    return tuple(_text(one) for one in many)


def _text(one: Any) -> StringMatch:
    kind = one.WhichOneof("match_type")
    if kind is None:
        raise Refused("a match on text of a kind that is not known")
    return StringMatch(MatchKind.PRESENT, "") if kind == "presence" else StringMatch(KINDS[kind], getattr(one, kind))


def _networks(many: Any) -> tuple[Network, ...]:
    return tuple(_network(one) for one in many)


def _network(one: Any) -> Network:
    if len(one.address) not in (4, 16):
        raise Refused(f"an address of {len(one.address)} bytes; IPv4 has 4, IPv6 16")
    address = ip_address(one.address)
    if one.length > address.max_prefixlen:
        raise Refused(f"the block {address}/{one.length}")
    return ip_network((address, one.length), strict=False)


def _ports(many: Any) -> tuple[int, ...]:
    for port in many:
        if port > 65535:
            raise Refused(f"port {port}")
    return tuple(many)


def _accounts(many: Any) -> Accounts:
    return tuple((one.namespace, one.service_account) for one in many)
