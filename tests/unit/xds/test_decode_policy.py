"""Policies from the wire: what is understood, and what is refused since it would say something else without it."""
from __future__ import annotations

from ipaddress import ip_address, ip_network
from typing import Any

import pytest
from google.protobuf.empty_pb2 import Empty

from agent.model.policy import Action, Match, Policy, Scope
from agent.model.routing import MatchKind, StringMatch
from agent.xds.decode import Refused, decode
from agent.xds.types import TypeUrl
from protos.gen.istio import security_pb2 as wire

NAME = "shop/only-web"


def policy(*matches: wire.Match, **changes: Any) -> bytes:
    fields = {"name": "only-web", "namespace": "shop", "rules": [wire.Rule(clauses=[wire.Clause(matches=matches)])]} | changes
    data: bytes = wire.Authorization(**fields).SerializeToString()
    return data


def test_a_policy_is_read_as_it_was_sent() -> None:
    one = wire.Match(
        namespaces=[wire.StringMatch(exact="web")], not_namespaces=[wire.StringMatch(prefix="x")],
        principals=[wire.StringMatch(suffix="/sa/front"), wire.StringMatch(presence=Empty())], destination_ports=[80],
        source_ips=[wire.Address(address=ip_address("10.1.2.3").packed, length=8)],
        not_destination_ips=[wire.Address(address=ip_address("fd00::1").packed, length=128)], not_destination_ports=[81, 65535],
        service_accounts=[wire.ServiceAccountMatch(namespace="web", service_account="front")])
    assert decode(TypeUrl.AUTHORIZATION, NAME, policy(one, wire.Match(), scope=2, action=1, dry_run=True)) == Policy(
        "shop", "only-web", Scope.WORKLOAD, Action.DENY,
        (((Match(
            namespaces=(StringMatch(MatchKind.EXACT, "web"),), not_namespaces=(StringMatch(MatchKind.PREFIX, "x"),),
            principals=(StringMatch(MatchKind.SUFFIX, "/sa/front"), StringMatch(MatchKind.PRESENT, "")), ports=(80,), not_ports=(81, 65535),
            sources=(ip_network("10.0.0.0/8"),), not_destinations=(ip_network("fd00::1/128"),),
            service_accounts=(("web", "front"),)), Match()),),), dry_run=True)


def test_empty_rules_clauses_and_policies_stay_what_they_are() -> None:
    assert decode(TypeUrl.AUTHORIZATION, NAME, policy(rules=[])) == Policy("shop", "only-web", Scope.GLOBAL, Action.ALLOW, ())
    rules = [wire.Rule(), wire.Rule(clauses=[wire.Clause()])]
    assert decode(TypeUrl.AUTHORIZATION, NAME, policy(rules=rules)) == Policy("shop", "only-web", Scope.GLOBAL, Action.ALLOW, ((), ((),)))


def unknown(where: bytes) -> bytes:
    """`where` and a field (number 13, a varint) that this version does not know."""
    return where + b"\x68\x01"


def nested(match: bytes) -> bytes:
    """A policy around the bytes of one match."""
    clause = b"\x12" + bytes([len(match)]) + match
    rule = b"\x0a" + bytes([len(clause)]) + clause
    return policy(rules=[]) + b"\x2a" + bytes([len(rule)]) + rule


@pytest.mark.parametrize(("body", "said"), [
    (b"\xff\xff", "its bytes are no Authorization"),
    (policy(name="other"), "it came under this name but is shop/other"),
    (policy(name=""), "its name is ''"),
    (policy(namespace="a/b"), "its namespace is 'a/b'"),
    (policy(scope=7), "scope 7 is not known"),
    (policy(action=2), "action 2 is not known"),
    (policy(wire.Match(principals=[wire.StringMatch()])), "of a kind that is not known"),
    (policy(wire.Match(source_ips=[wire.Address(address=b"abc", length=8)])), "an address of 3 bytes"),
    (policy(wire.Match(source_ips=[wire.Address(address=b"abcd", length=33)])), "the block 97.98.99.100/33"),
    (policy(wire.Match(destination_ports=[65536])), "port 65536"),
    (unknown(policy()), "field number 13 of Authorization is not supported"),
    (nested(unknown(b"\x48\x50")), "field number 13 of Match is not supported"),
])  # fmt: skip
def test_what_is_not_understood_is_refused(body: bytes, said: str) -> None:
    with pytest.raises(Refused, match=said):
        decode(TypeUrl.AUTHORIZATION, NAME, body)
