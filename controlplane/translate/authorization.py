"""AuthorizationPolicy and PeerAuthentication -> istio.security.Authorization, as istiod makes them for ztunnel.

What layer 4 cannot know (docs/policy.md): a rule of an ALLOW policy that names it is left out, so it allows nothing. In a DENY policy
it is left out of the rule, which then denies more; a rule of which only that was there denies nothing, and the problem says so.
"""
from __future__ import annotations

from ipaddress import ip_address, ip_network

from google.protobuf.empty_pb2 import Empty

from controlplane.model.mesh import Mesh
from controlplane.model.security import (
    STATIC_STRICT,
    Action,
    AuthorizationPolicy,
    Condition,
    Mode,
    Operation,
    Rule,
    Source,
    Strictness,
    layer7,
)
from protos.gen.istio import security_pb2 as wire


def authorization(mesh: Mesh, resource: str) -> wire.Authorization | None:
    """The policy of that name (`namespace/name`), or None: there is none, or it is not for layer 4."""
    namespace, _, name = resource.partition("/")
    policies = mesh.policies
    policy = policies.authorization(namespace, name)
    if policy is not None:
        return None if policy.unsent else _policy(policy, policies.root)
    if (namespace, name) == (policies.root, STATIC_STRICT):
        return _strict(namespace, name, [wire.Match(not_principals=[_presence()])]) if policies else None
    found = policies.exceptions(namespace, name)
    return _strict(namespace, name, *_exceptions(found)) if found is not None else None


def _policy(policy: AuthorizationPolicy, root: str) -> wire.Authorization:
    key = policy.meta.key
    scope = wire.WORKLOAD_SELECTOR if policy.selector is not None else wire.GLOBAL if key.namespace == root else wire.NAMESPACE
    rules = [made for rule in policy.rules if (made := _rule(rule, policy.action)) is not None]
    return wire.Authorization(name=key.name, namespace=key.namespace, scope=scope,
                              action=wire.DENY if policy.action is Action.DENY else wire.ALLOW, rules=rules, dry_run=policy.dry_run)


def _rule(rule: Rule, action: Action) -> wire.Rule | None:
    """None: it never matches."""
    if action is Action.ALLOW and layer7(rule):
        return None
    clauses = [_clause([_operation(one) for one in rule.operations]), _clause([_source(one) for one in rule.sources]),
               *(_clause([_condition(one)]) for one in rule.conditions)]
    given = [clause for clause in clauses if clause is not None]
    if not any(lost for _, lost in given):
        return wire.Rule(clauses=[wire.Clause(matches=matches) for matches, _ in given])
    whole = [matches for matches, lost in given if not lost]
    kept = whole or [matches for matches, _ in given]
    if not all(kept):
        return None
    return wire.Rule(clauses=[wire.Clause(matches=matches) for matches in kept])


def _clause(entries: list[wire.Match]) -> tuple[list[wire.Match], bool] | None:
    """The matches that say something, and whether one says nothing any more since only layer 7 was in it: then it is any."""
    if not entries:
        return None
    nothing = wire.Match()
    matches = [match for match in entries if match != nothing]
    return matches, len(matches) < len(entries)


def _source(one: Source) -> wire.Match:
    return wire.Match(
        principals=map(_text, one.principals), not_principals=map(_text, one.not_principals),
        namespaces=map(_text, one.namespaces), not_namespaces=map(_text, one.not_namespaces),
        service_accounts=[wire.ServiceAccountMatch(namespace=space, service_account=name) for space, name in one.service_accounts],
        not_service_accounts=[wire.ServiceAccountMatch(namespace=space, service_account=name)
                              for space, name in one.not_service_accounts],
        source_ips=map(_block, one.blocks), not_source_ips=map(_block, one.not_blocks))


def _operation(one: Operation) -> wire.Match:
    return wire.Match(destination_ports=one.ports, not_destination_ports=one.not_ports)


def _condition(one: Condition) -> wire.Match:
    match one.key:
        case "source.ip":
            return wire.Match(source_ips=map(_block, one.values), not_source_ips=map(_block, one.not_values))
        case "source.namespace":
            return wire.Match(namespaces=map(_text, one.values), not_namespaces=map(_text, one.not_values))
        case "source.principal":
            return wire.Match(principals=map(_text, one.values), not_principals=map(_text, one.not_values))
        case "destination.ip":
            return wire.Match(destination_ips=map(_block, one.values), not_destination_ips=map(_block, one.not_values))
        case "destination.port":
            return wire.Match(destination_ports=map(int, one.values), not_destination_ports=map(int, one.not_values))
    return wire.Match()


def _text(text: str) -> wire.StringMatch:
    if text == "*":
        return _presence()
    if text.startswith("*"):
        return wire.StringMatch(suffix=text[1:])
    return wire.StringMatch(prefix=text[:-1]) if text.endswith("*") else wire.StringMatch(exact=text)


def _block(text: str) -> wire.Address:
    if "/" in text:
        network = ip_network(text, strict=False)
        return wire.Address(address=network.network_address.packed, length=network.prefixlen)
    address = ip_address(text)
    return wire.Address(address=address.packed, length=address.max_prefixlen)


def _presence() -> wire.StringMatch:
    return wire.StringMatch(presence=Empty())


def _strict(namespace: str, name: str, *clauses: list[wire.Match]) -> wire.Authorization:
    """Denies who proved no identity."""
    return wire.Authorization(name=name, namespace=namespace, scope=wire.WORKLOAD_SELECTOR, action=wire.DENY,
                              rules=[wire.Rule(clauses=[wire.Clause(matches=matches) for matches in clauses])])


def _exceptions(found: Strictness) -> list[list[wire.Match]]:
    nobody = wire.Match(not_principals=[_presence()])
    if found.mode is Mode.STRICT:
        return [[nobody], [wire.Match(not_destination_ports=found.exceptions)]]
    return [[nobody], [wire.Match(destination_ports=found.exceptions)]]
