"""The vocabulary of iptables as data: tables, chains, rules, and how iptables-save writes them.

Named tuples and not dataclasses, because the capture child imports this and lives for 50 ms: `dataclasses` alone would
cost it 10. They travel to the child as JSON arrays.
"""
from __future__ import annotations

from typing import Any, NamedTuple

from agent.model.reserved import SOCKET_MARK

MARK_OURS = f"{SOCKET_MARK:#x}/0xfff"  # and mask: the other bits are the application's
MARK_LOCAL = "0x111/0xfff"  # connection and packet mark: answer to the proxy, delivered on lo
CHAIN_PREFIX = "NARROWS_"
CHAIN_NAME_LIMIT = 28  # characters: XT_EXTENSION_MAXNAMELEN less its end


class Extension(NamedTuple):
    """A match or a target with its options in order; an option whose name starts with `!` is negated."""

    name: str
    options: tuple[tuple[str, str], ...] = ()

    def text(self) -> str:
        words = [self.name]
        for option, value in self.options:
            words += ["!", f"--{option[1:]}"] if option.startswith("!") else [f"--{option}"]
            words += [value] if value else []
        return " ".join(words)


class Rule(NamedTuple):
    """One rule of a chain. Addresses are networks; a leading `!` negates (an interface too); "" is any."""

    target: Extension
    source: str = ""
    destination: str = ""
    out_interface: str = ""
    protocol: str = ""
    matches: tuple[Extension, ...] = ()

    def text(self, chain: str) -> str:
        """As iptables-save prints it."""
        words = ["-A", chain]
        for flag, value in (("-s", self.source), ("-d", self.destination), ("-o", self.out_interface),
                            ("-p", self.protocol)):
            if value:
                words += ["!", flag, value[1:]] if value.startswith("!") else [flag, value]
        for match in self.matches:
            words += ["-m", match.text()]
        return " ".join([*words, "-j", self.target.text()])


class Chain(NamedTuple):
    """A chain of ours and the built-in chain that jumps into it."""

    name: str
    hook: str
    rules: tuple[Rule, ...]

    def jump(self) -> Rule:
        return Rule(Extension(self.name))


class Table(NamedTuple):
    """What we own of one table of one family (4 or 6)."""

    family: int
    name: str
    chains: tuple[Chain, ...]

    @property
    def label(self) -> str:
        return f"IPv{self.family} {self.name}"

    def text(self) -> str:
        """Input for `iptables-restore --noflush`: our chains, the jumps at the head of the built-in ones."""
        lines = [f"*{self.name}", *(f":{chain.name} - [0:0]" for chain in self.chains)]
        lines += [f"-I {chain.hook} -j {chain.name}" for chain in self.chains]
        lines += [rule.text(chain.name) for chain in self.chains for rule in chain.rules]
        return "\n".join([*lines, "COMMIT"])


def table_from_json(value: Any) -> Table:
    """A table as `json.loads` gives it back after `json.dumps` of the tuple. Trusts its source: our own parent."""
    family, name, chains = value
    return Table(family, name, tuple(Chain(chain, hook, tuple(_rule(rule) for rule in rules))
                                     for chain, hook, rules in chains))


def _rule(value: Any) -> Rule:
    target, source, destination, out_interface, protocol, matches = value
    return Rule(_extension(target), source, destination, out_interface, protocol,
                tuple(_extension(match) for match in matches))


def _extension(value: Any) -> Extension:
    name, options = value
    return Extension(name, tuple((option, argument) for option, argument in options))
