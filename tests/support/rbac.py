"""Policies as Envoy's RBAC network filter has them, and an Envoy that answers who is let in: the oracle of what we decide.

A rule of ours is clauses of alternatives, one of Envoy's a permission and a principal: so each rule is multiplied out. Namespaces and
service accounts, which Envoy does not know, are expressions on the certificate's SPIFFE ID, as Istio has them for sidecars.
"""
from __future__ import annotations

import itertools
import json
import re
import socket
import ssl
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from agent.model.policy import Action, Match, Network, Policy, Rule
from agent.model.routing import MatchKind, StringMatch
from tests.support.authority import Pair, authority
from tests.support.policies import Asked

Json = dict[str, Any]
PORTS = 4  # of each set of policies
FIRST_PORT = 20000
SAID = b"long enough to be known as no TLS"  # a single byte would be waited behind


def rbac(policies: Iterable[Policy]) -> list[Json]:
    """The network filters that stand for these policies, which all apply."""
    held = list(policies)
    filters = [_filter("deny", "DENY", [one for one in held if one.action is Action.DENY])]
    if opening := [one for one in held if one.action is Action.ALLOW]:
        filters.append(_filter("allow", "ALLOW", opening))
    return filters


def _filter(name: str, action: str, policies: Sequence[Policy]) -> Json:
    made = {f"{policy.key}-{number}-{part}": one for policy in policies for number, rule in enumerate(policy.rules)
            for part, one in enumerate(_products(rule))}
    return {"name": f"envoy.filters.network.rbac.{name}", "typed_config": {
        "@type": "type.googleapis.com/envoy.extensions.filters.network.rbac.v3.RBAC", "stat_prefix": name,
        "rules": {"action": action, "policies": made}}}


def _products(rule: Rule) -> list[Json]:
    """Each way of taking one match of every clause. An empty match is none; an empty clause asks for nothing."""
    ways = itertools.product(*([match for match in clause if match != Match()] for clause in rule if clause))
    return [{"permissions": [_all("and_rules", [one for match in way for one in _permissions(match)])],
             "principals": [_all("and_ids", [one for match in way for one in _principals(match)])]} for way in ways]


def _all(kind: str, parts: list[Json]) -> Json:
    return {kind: {("rules" if kind == "and_rules" else "ids"): parts}} if parts else {"any": True}


def _permissions(match: Match) -> list[Json]:
    found = []
    for must, must_not, make in ((match.destinations, match.not_destinations, lambda block: {"destination_ip": _block(block)}),
                                 (match.ports, match.not_ports, lambda port: {"destination_port": port})):
        if must:
            found.append({"or_rules": {"rules": [make(value) for value in must]}})
        if must_not:
            found.append({"not_rule": {"or_rules": {"rules": [make(value) for value in must_not]}}})
    return found


def _principals(match: Match) -> list[Json]:
    found = []
    for must, must_not, make in (
            (match.sources, match.not_sources, lambda block: {"direct_remote_ip": _block(block)}),
            (match.principals, match.not_principals, lambda value: _named(f"spiffe://{_expression(value)}")),
            (match.namespaces, match.not_namespaces, lambda value: _named(f"spiffe://[^/]+/ns/{_expression(value, '[^/]')}/sa/[^/]+")),
            (match.service_accounts, match.not_service_accounts,
             lambda pair: _named(f"spiffe://[^/]+/ns/{re.escape(pair[0])}/sa/{re.escape(pair[1])}"))):
        if must:
            found.append({"or_ids": {"ids": [make(value) for value in must]}})
        if must_not:
            found.append({"not_id": {"or_ids": {"ids": [make(value) for value in must_not]}}})
    return found


def _named(expression: str) -> Json:
    return {"authenticated": {"principal_name": {"safe_regex": {"regex": expression}}}}


def _expression(match: StringMatch, any_character: str = ".") -> str:
    text = re.escape(match.value)
    return {MatchKind.EXACT: text, MatchKind.PREFIX: f"{text}{any_character}*", MatchKind.SUFFIX: f"{any_character}*{text}",
            MatchKind.PRESENT: f"{any_character}+"}[match.kind]


def _block(block: Network) -> Json:
    return {"address_prefix": str(block.network_address), "prefix_len": block.prefixlen}


# ---- an Envoy that asks them ---------------------------------------------------------------------------------------------

def at(number: int, policies: Iterable[Policy]) -> list[Policy]:
    """The policies of set `number` with its own ports for 1 to PORTS."""
    def ports(match: Match) -> Match:
        return replace(match, ports=tuple(port_of(number, port) for port in match.ports),
                       not_ports=tuple(port_of(number, port) for port in match.not_ports))

    return [replace(one, rules=tuple(tuple(tuple(map(ports, clause)) for clause in rule) for rule in one.rules)) for one in policies]


def port_of(number: int, port: int) -> int:
    return FIRST_PORT + number * PORTS + port - 1


@dataclass
class Certificates:
    """A root, the server's certificate and one for each identity, as files."""

    folder: Path
    root: Pair

    @classmethod
    def make(cls, folder: Path) -> Certificates:
        made = cls(folder, authority("root"))
        (folder / "root.pem").write_bytes(made.root.pem)
        made.issue("spiffe://td/ns/server/sa/server", "server")
        return made

    def issue(self, identity: str, name: str) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.now(UTC)
        certificate = (
            x509.CertificateBuilder().subject_name(x509.Name([])).issuer_name(self.root.certificate.subject)
            .public_key(key.public_key()).serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1)).not_valid_after(now + timedelta(days=1))
            .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(identity)]), critical=True)
            .sign(self.root.key, hashes.SHA256()))
        pair = Pair(key, certificate)
        (self.folder / f"{name}.key").write_bytes(pair.key_pem)
        (self.folder / f"{name}.pem").write_bytes(pair.pem)

    def context(self, name: str) -> ssl.SSLContext:
        made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        made.check_hostname = False
        made.load_verify_locations(self.folder / "root.pem")
        made.load_cert_chain(self.folder / f"{name}.pem", self.folder / f"{name}.key")
        return made


def configuration(sets: Sequence[Sequence[Policy]], certificates: Certificates) -> str:
    """A listener for each set, on its PORTS ports of every address: with a client's certificate, or in plain text. Who is let in
    gets back what they say."""
    def listener(number: int) -> Json:
        filters = [*rbac(sets[number]), {"name": "envoy.filters.network.echo", "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.network.echo.v3.Echo"}}]
        first, *others = ({"socket_address": {"address": "0.0.0.0", "port_value": port_of(number, port)}} for port in range(1, PORTS + 1))
        return {
            "name": f"set-{number}", "address": first, "additional_addresses": [{"address": one} for one in others],
            "listener_filters": [{"name": "envoy.filters.listener.tls_inspector", "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector"}}],
            "filter_chains": [
                {"filter_chain_match": {"transport_protocol": "tls"}, "filters": filters, "transport_socket": _tls(certificates.folder)},
                {"filter_chain_match": {"transport_protocol": "raw_buffer"}, "filters": filters}]}

    return json.dumps({"static_resources": {"listeners": [listener(number) for number in range(len(sets))]}})


def _tls(folder: Path) -> Json:
    return {"name": "envoy.transport_sockets.tls", "typed_config": {
        "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
        "require_client_certificate": True,
        "common_tls_context": {
            "tls_certificates": [{"certificate_chain": {"filename": f"{folder}/server.pem"},
                                  "private_key": {"filename": f"{folder}/server.key"}}],
            "validation_context": {"trusted_ca": {"filename": f"{folder}/root.pem"}}}}}


def lets_in(asked: Asked, context: ssl.SSLContext | None) -> bool:
    """Ask Envoy by connecting as `asked` says: True if what was said came back, False if the connection was ended."""
    plain = socket.create_connection((asked.destination, asked.port), timeout=10, source_address=(asked.source, 0))
    try:
        connection = context.wrap_socket(plain) if context is not None else plain
        with connection:
            connection.sendall(SAID)
            return connection.recv(1) == SAID[:1]
    except (ConnectionError, ssl.SSLEOFError, ssl.SSLZeroReturnError):
        return False
    finally:
        plain.close()
