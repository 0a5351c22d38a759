"""What capture does to one pod, as pure data: the iptables rules, policy rules and routes, in the order of application.

The rules are ztunnel's, with five differences:
- A redirect takes SYNs alone. In a pod without rules nothing is tracked, so the next packet of a connection that lives
  when the pod is enrolled is new to conntrack; redirecting it would end the connection.
- Our own connections have a conntrack zone of their own on the way out (`_raw`).
- A filter rule refuses (reset) every connection whose original destination is 15001 or 15006, from outside and from
  the pod itself alike: what REDIRECT brings there still has its own original port.
- A connection to an IPv6 link-local address is not captured on its way out, and is on its way in: see LINK_LOCAL.
- What an application itself dials at 15008 is captured like any other connect; what comes to 15008 is a tunnel and goes to its listener.

    app -> OUTPUT      nat: REDIRECT 15001, unless ours (mark), on lo, excluded, or a probe's answer
    peer -> PREROUTING nat: REDIRECT 15006, unless ours, excluded, or from a probe
    proxy -> app       raw: a conntrack zone of our own, so that two connections of one client are never taken for one;
                       over lo with the peer's address as source and mark 0x539: PREROUTING marks the connection 0x111;
    app -> proxy       OUTPUT restores 0x111 on the answer; `ip rule` sends it to table 100, where everything is local

A pod that calls itself through its service: the call is captured on its way to the service's address; the
worker connects to the pod's own address with mark 0x539, goes over lo and reaches the application, not 15006
(a connection made inside a pod to that pod never meets PREROUTING's nat). So it is reported by the source alone.
"""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from ipaddress import IPv4Network, IPv6Network, ip_network

from agent import netlink
from agent.capture.rules import CHAIN_NAME_LIMIT, CHAIN_PREFIX, MARK_LOCAL, MARK_OURS, Chain, Extension, Rule, Table
from agent.model.pod import CaptureSettings, Network
from agent.model.reserved import DNS_PORT

OUTBOUND_PORT = 15001
INBOUND_PORT = 15006
HBONE_PORT = 15008
ROUTE_TABLE = 100
RULE_PRIORITY = 32764
OUR_ZONE = "1337"  # conntrack zone; Istio uses 1 for DNS

# Source of probes: the node rewrites the kubelet's (and the lab's) address to it. Istio's values.
PROBE_SOURCES = {4: "169.254.7.127/32", 6: "fd16:9254:7127:1337:ffff:ffff:ffff:ffff/128"}
LOCALHOST = {4: "127.0.0.1/32", 6: "::1/128"}
# RFC 4291 2.5.6. REDIRECT sends a connection to ::1, where a link-local source is not accepted: captured it would time out
LINK_LOCAL = "fe80::/10"
EVERYTHING = {4: ip_network("0.0.0.0/0"), 6: ip_network("::/0")}

_OURS = Extension("mark", (("mark", MARK_OURS),))
_NOT_OURS = Extension("mark", (("!mark", MARK_OURS),))
_SYN = Extension("tcp", (("tcp-flags", "FIN,SYN,RST,ACK SYN"),))
_ACCEPT, _RETURN = Extension("ACCEPT"), Extension("RETURN")


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything of ours in one pod's namespace.

    `marks` (raw, mangle and filter) and `rules`, `routes` make the way back to the proxy; `redirects` (nat) turn connections
    to it, so they come last and go first.
    """

    instance: str
    marks: tuple[Table, ...]
    redirects: tuple[Table, ...]
    rules: tuple[netlink.Rule, ...]
    routes: tuple[netlink.Route, ...]

    @property
    def tables(self) -> tuple[Table, ...]:
        return self.marks + self.redirects

    @property
    def families(self) -> tuple[int, ...]:
        return tuple(rule.family for rule in self.rules)

    @property
    def prefix(self) -> str:
        """What every chain of this instance starts with."""
        return chain_prefix(self.instance)

    def text(self, family: int) -> str:
        """For people and for `iptables-restore --noflush` (`ip6tables-restore` for family 6)."""
        flag = "-6 " if family == 6 else ""
        lines = [f"# ip {flag}rule add fwmark {hex(rule.mark)}/{hex(rule.mask)} priority {rule.priority} "
                 f"table {rule.table}" for rule in self.rules if rule.family == family]
        lines += [f"# ip {flag}route add {route.type} {route.destination} dev {route.link} table {route.table}"
                  for route in self.routes if route.destination.version == family]
        return "\n".join([*lines, *(table.text() for table in self.tables if table.family == family)]) + "\n"


def chain_prefix(instance: str) -> str:
    """`NARROWS_<8 hex digits of the instance>_`: short enough for a chain's name, whatever the instance is called."""
    return f"{CHAIN_PREFIX}{blake2b(instance.encode(), digest_size=4).hexdigest()}_"


def plan(settings: CaptureSettings, families: Iterable[int], instance: str, *, redirect: bool = True, hooks: bool = False,
         inbound: bool = True, dns: bool = False) -> Plan:
    """The plan of a pod. `families` (4, 6) are those of its namespace; the same input gives the same plan.

    `hooks`: socket hooks (egress.py) send what the pod connects to to 15001, so nothing here resets it; what no hook has sent there is
    reset by the worker. `redirect` False: what goes out is left to them. A pod that changes from one way to the other has both meanwhile.
    `inbound` False: what comes in is left to sk_lookup (ingress.py). With all left to hooks there is no table, and nothing is tracked;
    otherwise the marks are all there, since connections that were redirected in before may live on.
    `dns`: port 53, UDP and TCP, goes to 15053, whatever captures TCP; socket hooks have to leave port 53 alone then.
    """
    versions = sorted(set(families))
    if not versions or not set(versions) <= {4, 6}:
        raise ValueError(f"families of a pod are 4 and 6, not {versions}")
    prefix = chain_prefix(instance)
    mark, mask = (int(part, 16) for part in MARK_LOCAL.split("/"))
    refused = (INBOUND_PORT,) if hooks else (OUTBOUND_PORT, INBOUND_PORT)
    tabled = versions if redirect or inbound or dns else []
    return Plan(
        instance,
        marks=tuple(table for family in tabled for table in (
            _raw(family, prefix, dns), _mangle(family, prefix), _filter(family, prefix, refused))),
        redirects=tuple(_nat(family, prefix, settings, redirect, inbound, dns) for family in tabled),
        rules=tuple(netlink.Rule(family, RULE_PRIORITY, ROUTE_TABLE, mark, mask) for family in versions),
        routes=tuple(netlink.Route(EVERYTHING[family], "lo", table=ROUTE_TABLE, type="local") for family in versions))


def _raw(family: int, prefix: str, dns: bool) -> Table:
    """Our connections are looked up apart, on the way out alone.

    The last hop has the client's address; when it also gets the port of one of the client's live connections, both
    would be one entry of conntrack, and the live connection would die. A question of ours to a resolver with the port that a question of
    the pod had would be taken for that one, and come back to us.
    """
    apart = Extension("CT", (("zone-orig", OUR_ZONE),))
    rules = [Rule(apart, protocol=protocol, matches=(_OURS,)) for protocol in (("tcp", "udp") if dns else ("tcp",))]
    return Table(family, "raw", (_chain(prefix, "OUTPUT", rules),))


def _mangle(family: int, prefix: str) -> Table:
    set_mark = Extension("CONNMARK", (("set-xmark", MARK_LOCAL),))
    # a link-local hop keeps no client's address (ext/proxy/upstream.pxd, kept_source), and rerouting its answer would lose the link
    where = f"!{LINK_LOCAL}" if family == 6 else ""
    restore = Extension("CONNMARK", (("restore-mark", ""), ("nfmask", "0xffffffff"), ("ctmask", "0xffffffff")))
    return Table(family, "mangle", (
        _chain(prefix, "PREROUTING", [Rule(set_mark, destination=where, matches=(_OURS,))]),
        _chain(prefix, "OUTPUT", [Rule(restore, matches=(Extension("connmark", (("mark", MARK_LOCAL),)),))])))


def _filter(family: int, prefix: str, ports: tuple[int, ...]) -> Table:
    """Only SYNs are looked up in conntrack, so that the packets of a bulk transfer pay one comparison."""
    reset = Extension("REJECT", (("reject-with", "tcp-reset"),))
    return Table(family, "filter", (_chain(prefix, "INPUT", [
        Rule(reset, protocol="tcp", matches=(_SYN, Extension("conntrack", (("ctorigdstport", str(port)),))))
        for port in ports]),))


def _nat(family: int, prefix: str, settings: CaptureSettings, redirect_out: bool, redirect_in: bool, dns: bool) -> Table:
    probe, local = PROBE_SOURCES[family], LOCALHOST[family]
    inbound = [Rule(_ACCEPT, source=probe, protocol="tcp")]
    inbound += [_port(port) for port in (HBONE_PORT, *settings.exclude_inbound_ports)]
    inbound += [Rule(_redirect(INBOUND_PORT), destination=f"!{local}", protocol="tcp", matches=(_SYN, _NOT_OURS))]
    questions = _dns(family) if dns else []
    if not redirect_out:
        chains = [*([("PREROUTING", inbound)] if redirect_in else []), *([("OUTPUT", questions)] if questions else [])]
        return Table(family, "nat", tuple(_chain(prefix, hook, rules) for hook, rules in chains))
    outbound = [
        *questions,
        Rule(_ACCEPT, destination=probe, protocol="tcp"),
        Rule(_ACCEPT, protocol="tcp", matches=(Extension("mark", (("mark", MARK_LOCAL),)),)),
        Rule(_ACCEPT, destination=f"!{local}", out_interface="lo"),
    ]
    if family == 6:
        outbound.append(Rule(_RETURN, destination=LINK_LOCAL, protocol="tcp"))
    outbound += [_port(port) for port in settings.exclude_outbound_ports]
    outbound += [Rule(_RETURN, destination=_written(network), protocol="tcp")
                 for network in _of(family, settings.exclude_outbound_ranges)]
    redirect = _redirect(OUTBOUND_PORT)
    if settings.include_outbound_ranges is None:
        outbound += [Rule(redirect, destination=f"!{local}", protocol="tcp", matches=(_SYN, _NOT_OURS))]
    elif included := _of(family, settings.include_outbound_ranges):
        outbound += [Rule(_RETURN, destination=local, protocol="tcp")]
        outbound += [Rule(redirect, destination=_written(network), protocol="tcp", matches=(_SYN, _NOT_OURS))
                     for network in included]
    return Table(family, "nat", (*((_chain(prefix, "PREROUTING", inbound),) if redirect_in else ()), _chain(prefix, "OUTPUT", outbound)))


def _dns(family: int) -> list[Rule]:
    """Questions of the pod to a resolver that is not on lo (its own, which may ask another one in turn)."""
    redirect = _redirect(DNS_PORT)
    udp = Extension("udp", (("dport", "53"),))
    tcp = Extension("tcp", (("dport", "53"), ("tcp-flags", "FIN,SYN,RST,ACK SYN")))
    where = f"!{LINK_LOCAL}" if family == 6 else ""
    return [Rule(redirect, destination=where, out_interface="!lo", protocol="udp", matches=(udp, _NOT_OURS)),
            Rule(redirect, destination=where, out_interface="!lo", protocol="tcp", matches=(tcp, _NOT_OURS))]


def _chain(prefix: str, hook: str, rules: list[Rule]) -> Chain:
    name = prefix + hook
    assert len(name) <= CHAIN_NAME_LIMIT, name
    return Chain(name, hook, tuple(rules))


def _port(port: int) -> Rule:
    return Rule(_RETURN, protocol="tcp", matches=(Extension("tcp", (("dport", str(port)),)),))


def _redirect(port: int) -> Extension:
    return Extension("REDIRECT", (("to-ports", str(port)),))


def _of(family: int, networks: Iterable[Network]) -> list[IPv4Network | IPv6Network]:
    return [network for network in networks if network.version == family]


def _written(network: Network) -> str:
    """iptables-save leaves out a network of everything."""
    return "" if network.prefixlen == 0 else str(network)
