"""Routes and policy rules."""
from __future__ import annotations

import errno
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import Any

from agent.model.workload import IPAddress
from agent.netlink.inside import Namespace, NetlinkError
from agent.netlink.rtnetlink import ask, index_of, names_of, was_added

Network = IPv4Network | IPv6Network

MAIN_TABLE = 254

_RT_SCOPE_HOST, _RT_SCOPE_LINK = 254, 253
# linux/rtnetlink.h, rtm_type
_ROUTE_TYPES = {
    1: "unicast",
    2: "local",
    3: "broadcast",
    4: "anycast",
    5: "multicast",
    6: "blackhole",
    7: "unreachable",
    8: "prohibit",
}
_ROUTE_NUMBERS = {name: number for number, name in _ROUTE_TYPES.items()}


@dataclass(frozen=True, slots=True)
class Route:
    """A route. `type` is rtnetlink's (`unicast`, `local`, ...); no gateway: on the link itself."""

    destination: Network
    link: str
    gateway: IPAddress | None = None
    table: int = MAIN_TABLE
    type: str = "unicast"


@dataclass(frozen=True, slots=True)
class Rule:
    """A policy rule `fwmark mark/mask lookup table`; `family` is 4 or 6; mask 0 matches everything."""

    family: int
    priority: int
    table: int
    mark: int = 0
    mask: int = 0


def routes(namespace: Namespace, table: int = MAIN_TABLE) -> list[Route]:
    """Routes of one table, both families."""

    def read(ip: Any) -> list[Route]:
        names = names_of(ip)
        found = []
        for family in (socket.AF_INET, socket.AF_INET6):
            found += [
                _route(entry, names)
                for entry in ip.get_routes(family=family, table=table)
                if (entry.get_attr("RTA_TABLE") or entry["table"]) == table
            ]
        return found

    return ask(namespace, f"list routes of table {table}", read)


def add_route(
    namespace: Namespace,
    destination: str | Network,
    *,
    link: str | None = None,
    gateway: str | IPAddress | None = None,
    table: int = MAIN_TABLE,
    type: str = "unicast",
) -> None:
    """Add a route: through a gateway, on a link, or of `type` "local" on lo, "blackhole" and the like.

    `destination` is a network, `0.0.0.0/0` and `::/0` being the defaults. The same route twice is no error.
    """
    spec, label = _route_spec(destination, gateway, table, type)

    def add(ip: Any) -> None:
        if link is not None:
            spec["oif"] = index_of(ip, link)
        ip.route("add", **spec)

    ask(namespace, f"add route {label}" + (f" dev {link}" if link else ""), add, {errno.EEXIST})


def delete_route(
    namespace: Namespace,
    destination: str | Network,
    *,
    link: str | None = None,
    gateway: str | IPAddress | None = None,
    table: int = MAIN_TABLE,
    type: str = "unicast",
) -> None:
    """Delete a route, if it is there."""
    spec, label = _route_spec(destination, gateway, table, type)

    def delete(ip: Any) -> None:
        if link is not None:
            spec["oif"] = index_of(ip, link)
        ip.route("del", **spec)

    ask(namespace, f"delete route {label}", delete, {errno.ESRCH, errno.ENODEV, errno.ENOENT})


def rules(namespace: Namespace, family: int) -> list[Rule]:
    """Policy rules of a family (4 or 6), by priority; the kernel's own three are among them."""

    def read(ip: Any) -> list[Rule]:
        found = []
        for entry in ip.get_rules(family=_af(family)):
            mark = entry.get_attr("FRA_FWMARK") or 0
            mask = entry.get_attr("FRA_FWMASK") or 0
            found.append(
                Rule(
                    family,
                    entry.get_attr("FRA_PRIORITY") or 0,
                    entry.get_attr("FRA_TABLE") or entry["table"],
                    mark,
                    mask,
                )
            )
        return sorted(found, key=lambda rule: rule.priority)

    return ask(namespace, f"list IPv{family} rules", read)


def add_rule(namespace: Namespace, rule: Rule) -> None:
    """Add a policy rule, unless the very same is there."""
    ask(namespace, f"add {rule}", lambda ip: ip.rule("add", **_rule_spec(rule)), {errno.EEXIST})


def delete_rule(namespace: Namespace, rule: Rule) -> None:
    """Delete a policy rule, if it is there."""
    ask(
        namespace,
        f"delete {rule}",
        lambda ip: ip.rule("del", **_rule_spec(rule)),
        {errno.ENOENT, errno.ESRCH},
    )


def add_missing(namespace: Namespace, routes: Iterable[Route], rules: Iterable[Rule]) -> list[Route | Rule]:
    """Add what is not there, in one visit; returns what was added. Routes are on links, without a gateway."""

    def add(ip: Any) -> list[Route | Rule]:
        added: list[Route | Rule] = []
        indices: dict[str, int] = {}
        wishes: list[Route | Rule] = [*routes, *rules]
        for wish in wishes:
            if isinstance(wish, Rule):
                fresh = was_added(ip.rule, **_rule_spec(wish))
            else:
                index = indices.get(wish.link) or indices.setdefault(wish.link, index_of(ip, wish.link))
                fresh = was_added(ip.route, oif=index, **_route_spec(wish.destination, None, wish.table, wish.type)[0])
            if fresh:
                added.append(wish)
        return added

    return ask(namespace, "add routes and rules", add)


def _route(entry: Any, names: dict[int, str]) -> Route:
    any_address = "0.0.0.0" if entry["family"] == socket.AF_INET else "::"
    gateway = entry.get_attr("RTA_GATEWAY")
    return Route(
        ip_network((entry.get_attr("RTA_DST") or any_address, entry["dst_len"])),
        names.get(entry.get_attr("RTA_OIF") or 0, ""),
        ip_address(gateway) if gateway else None,
        entry.get_attr("RTA_TABLE") or entry["table"],
        _ROUTE_TYPES.get(entry["type"], str(entry["type"])),
    )


def _route_spec(
    destination: str | Network, gateway: str | IPAddress | None, table: int, type: str
) -> tuple[dict[str, Any], str]:
    network = ip_network(destination) if isinstance(destination, str) else destination
    if type not in _ROUTE_NUMBERS:
        raise NetlinkError(
            errno.EINVAL, f"route {network}: unknown type {type!r}, known are {', '.join(_ROUTE_NUMBERS)}"
        )
    spec: dict[str, Any] = {
        "family": _af(network.version),
        "dst": str(network.network_address),
        "dst_len": network.prefixlen,
        "table": table,
        "type": type,
    }
    if network.prefixlen == 0:
        del spec["dst"]
    if type == "local":
        spec["scope"] = _RT_SCOPE_HOST
    elif gateway is None and type == "unicast":
        spec["scope"] = _RT_SCOPE_LINK
    if network.version == 6:
        spec["scope"] = 0  # IPv6 has no scopes
    if gateway is not None:
        spec["gateway"] = str(gateway)
    return spec, f"{network}" + (f" via {gateway}" if gateway else "") + f" table {table}"


def _rule_spec(rule: Rule) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "family": _af(rule.family),
        "priority": rule.priority,
        "table": rule.table,
        "action": "to_tbl",
    }
    if rule.mark or rule.mask:
        spec |= {"fwmark": rule.mark, "fwmask": rule.mask}
    return spec


def _af(family: int) -> int:
    return int(socket.AF_INET if family == 4 else socket.AF_INET6)
