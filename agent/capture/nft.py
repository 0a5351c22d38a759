"""The plan in nftables' language: the same tables, chains and rules as rules.py has them, written for `nft -f`. Pure.

One nftables table per family holds all of ours, `table ip NARROWS_<instance>`, with a base chain for each chain of the plan, named
`<table>_<hook>`. What differs from iptables, and why it comes to the same:
- A base chain stands at its hook by itself; there are no jumps. It has the priority of the iptables table less one, so that it
  comes before other people's.
- `accept` ends our chain and not the table's other chains: what the plan lets past may still meet somebody's rules.
- OUTPUT of mangle is of type `route`: a changed mark looks up the route anew, as iptables' mangle does.
"""
from __future__ import annotations

from collections.abc import Iterable

from agent.capture.rules import Chain, Extension, Rule, Table

_FAMILY = {4: "ip", 6: "ip6"}
# iptables' own: NF_IP_PRI_RAW -300, MANGLE -150, NAT_DST -100, FILTER 0 (linux/netfilter_ipv4.h); nat is the same in both of its
# hooks here, as both of ours change destinations
_PRIORITY = {"raw": -301, "mangle": -151, "nat": -101, "filter": -1}
_ALL_BITS = 0xFFFFFFFF


def table_name(prefix: str) -> str:
    """The nftables table of the instance whose chains in iptables start with `prefix`."""
    return prefix.rstrip("_")


def chain_name(table: Table, chain: Chain) -> str:
    return f"{table.name}_{chain.hook}"


def script(tables: Iterable[Table], prefix: str) -> str:
    """Input for `nft -f` that puts these tables in place of what was there of the instance, in one transaction."""
    families: dict[int, list[str]] = {}
    for table in tables:
        families.setdefault(table.family, []).extend(_chain(table, chain) for chain in table.chains)
    return "".join(f"add table {label}\ndelete table {label}\ntable {label} {{\n{''.join(chains)}}}\n"
                   for family, chains in families.items() for label in [f"{_FAMILY[family]} {table_name(prefix)}"])


def _chain(table: Table, chain: Chain) -> str:
    kind = "nat" if table.name == "nat" else "route" if (table.name, chain.hook) == ("mangle", "OUTPUT") else "filter"
    try:
        priority = _PRIORITY[table.name]
    except KeyError:
        raise ValueError(f"{table.label} table: nftables has no such table of iptables'") from None
    rules = "".join(f"  {rule_text(table.family, rule)}\n" for rule in chain.rules)
    return (f" chain {chain_name(table, chain)} {{\n  type {kind} hook {chain.hook.lower()} priority {priority}; policy accept;\n"
            f"{rules} }}\n")


def rule_text(family: int, rule: Rule) -> str:
    """One rule. Raises ValueError for what nobody has translated: a rule less would be a hole."""
    words = [f"meta l4proto {rule.protocol}"] if rule.protocol else []
    words += [_address(family, "saddr", rule.source)] if rule.source else []
    words += [_address(family, "daddr", rule.destination)] if rule.destination else []
    words += [_interface(rule.out_interface)] if rule.out_interface else []
    return " ".join([*words, *(_match(match) for match in rule.matches), _target(rule.target)])


def _address(family: int, side: str, network: str) -> str:
    return f"{_FAMILY[family]} {side} {'!= ' if network.startswith('!') else ''}{network.lstrip('!')}"


def _interface(name: str) -> str:
    return f'oifname {"!= " if name.startswith("!") else ""}"{name.lstrip("!")}"'


def _match(match: Extension) -> str:
    match match:
        case Extension("mark", (("mark", value),)):
            return f"meta mark & {_masked(value, '==')}"
        case Extension("mark", (("!mark", value),)):
            return f"meta mark & {_masked(value, '!=')}"
        case Extension("connmark", (("mark", value),)):
            return f"ct mark & {_masked(value, '==')}"
        case Extension("tcp", (("tcp-flags", value),)):
            mask, _, flags = value.partition(" ")
            return f"tcp flags & ({mask.lower().replace(',', '|')}) == {flags.lower().replace(',', '|')}"
        case Extension("tcp", (("dport", value),)):
            return f"tcp dport {int(value)}"
        case Extension("tcp", (("dport", value), ("tcp-flags", flags))):
            return f"tcp dport {int(value)} {_match(Extension('tcp', (('tcp-flags', flags),)))}"
        case Extension("udp", (("dport", value),)):
            return f"udp dport {int(value)}"
        case Extension("conntrack", (("ctorigdstport", value),)):
            return f"ct original proto-dst {int(value)}"
    raise ValueError(f"the match `{match.text()}` has no translation to nftables")


def _target(target: Extension) -> str:
    match target:
        case Extension("ACCEPT" | "RETURN", ()):
            return target.name.lower()
        case Extension("REDIRECT", (("to-ports", port),)):
            return f"redirect to :{int(port)}"
        case Extension("REJECT", (("reject-with", "tcp-reset"),)):
            return "reject with tcp reset"
        case Extension("CT", (("zone-orig", zone),)):
            return f"ct original zone set {int(zone)}"
        case Extension("CONNMARK", (("set-xmark", value),)):
            number, mask = (int(part, 16) for part in value.split("/"))
            return f"ct mark set ct mark & {hex(_ALL_BITS & ~mask)} | {hex(number)}"
        case Extension("CONNMARK", (("restore-mark", ""), ("nfmask", "0xffffffff"), ("ctmask", "0xffffffff"))):
            return "meta mark set ct mark"
    raise ValueError(f"the target `{target.text()}` has no translation to nftables")


def _masked(value: str, operator: str) -> str:
    number, _, mask = value.partition("/")
    return f"{mask or hex(_ALL_BITS)} {operator} {number}"
