"""Writes, compares and removes our chains in the tables of the namespace it runs in: the only importer of iptc.

Runs in the capture child. One table is one commit: chains, rules and jumps appear or vanish together. What to write is
built in libiptc's copy of the table; the copy read before and the copy built are compared entry by entry in the
kernel's own form, and only a difference is committed. So the same plan twice writes nothing, and anything
else in our chains is replaced. Other people's chains, rules and counters stay as they are.
"""
from __future__ import annotations

import ctypes
import os
import socket
import struct
import sys
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

from agent.capture.rules import CHAIN_PREFIX, Chain, Rule, Table

ATTEMPTS = 5  # somebody else changed the table between our read and our write: EAGAIN, read again
ENCODED = 4096  # rules kept in the kernel's form, of some hundred bytes; a plan has thirty, most of them every pod's
_EXTENSIONS = ("/usr/lib/x86_64-linux-gnu/xtables", "/usr/lib/aarch64-linux-gnu/xtables", "/usr/lib64/xtables",
               "/usr/lib/xtables")


class TableError(Exception):
    """The kernel or a library refused; the text is for the operator and names family, table and likely cause."""


class Content(NamedTuple):
    """Our part of a table: chains with their entries, and the jumps into them with the built-in chain they stand in.

    A jump behind somebody else's rule is not the same as one before them all: what that rule accepts would never come to us.
    """

    chains: dict[str, list[bytes]]
    jumps: dict[str, list[bytes]]


def apply(tables: list[Table], prefix: str) -> list[str]:
    """Write what differs, in order; returns the labels of the tables that were written.

    Chains with `prefix` that the plan does not name are removed with the same commit.
    """
    return [table.label for table in tables if _write(table, prefix)]


def remove(families: list[int], names: list[str], prefix: str) -> list[str]:
    """Remove every chain that starts with `prefix`, and every jump into one, from the tables in this order.

    A table that the namespace never used is not touched (reading it would create it).
    """
    return [table.label for name in names for family in families
            if _in_use(family, name) and _write(table := Table(family, name, ()), prefix)]


def verify(tables: list[Table], prefix: str) -> list[str]:
    """How the kernel differs from the plan, one text each; empty when it does not."""
    return [text for table in tables for text in _differences(table, prefix)]


def chains(prefix: str = CHAIN_PREFIX) -> dict[str, list[str]]:
    """Our chains by table label, of every instance that matches the prefix; reads only tables in use."""
    found: dict[str, list[str]] = {}
    for family in (4, 6):
        for name in ("raw", "mangle", "filter", "nat"):
            if _in_use(family, name):
                handle = _open(family, name)
                if names := sorted(name for name in _names(handle) if name.startswith(prefix)):
                    found[Table(family, name, ()).label] = names
    return found


def _write(table: Table, prefix: str) -> bool:
    for attempt in range(1, ATTEMPTS + 1):
        handle = _open(table.family, table.name)
        before = _content(handle, prefix)
        try:
            _build(handle, table, prefix)
        except (iptc().IPTCError, ValueError) as error:
            raise TableError(f"{table.label} table: {_reason(error)}; is the iptables package of this machine "
                             "complete (extensions in xtables/)?") from error
        if _content(handle, prefix) == before:
            return False
        try:
            handle.commit()
            return True
        except iptc().IPTCError as error:
            if attempt == ATTEMPTS or "temporarily unavailable" not in _reason(error):
                raise TableError(f"{table.label} table: the kernel refused the rules: {_reason(error)}; "
                                 "a match or target of them may be missing in this kernel "
                                 "(xt_CT, xt_conntrack, xt_connmark, xt_mark, xt_REDIRECT, ipt_REJECT)") from error
    raise AssertionError("unreachable")


def _build(handle: Any, table: Table, prefix: str) -> None:
    """Bring libiptc's copy to the plan. A jump that is there once, as it should be and before other people's rules, stays."""
    wanted = {chain.name for chain in table.chains}
    present = {name for name in _names(handle) if name.startswith(prefix)}
    for name in present - wanted:
        _drop_jumps(handle, name)
    for name in present:
        handle.flush_entries(name)
    for name in present - wanted:
        handle.delete_chain(name)
    for chain in table.chains:
        if chain.name not in present:
            handle.create_chain(chain.name)
        for rule in chain.rules:
            handle.append_entry(chain.name, _encode(handle, table.family, rule))
    for chain in table.chains:
        jump = _encode(handle, table.family, chain.jump())
        handle.insert_entry(chain.hook, jump, 0)
        first, *others = [entry for entry in _entries(handle, chain.hook) if _target(handle, entry) == chain.name]
        in_front = _foreign_before(handle, chain.hook, chain.name, start=1)
        elsewhere = [name for name in _names(handle) if name != chain.hook and not name.startswith(prefix)
                     and any(_target(handle, entry) == chain.name for entry in _entries(handle, name))]
        if len(others) == 1 and not (elsewhere or in_front) and _plain(handle, others[0]) == _plain(handle, first):
            _delete(handle, chain.hook, 0)
            continue
        for name in [chain.hook, *elsewhere]:
            keep = 1 if name == chain.hook else 0
            positions = [at for at, entry in enumerate(_entries(handle, name)) if _target(handle, entry) == chain.name]
            for at in reversed(positions[keep:]):
                _delete(handle, name, at)


def _foreign_before(handle: Any, hook: str, target: str, start: int = 0) -> bool:
    """Whether a rule of somebody else stands before the first jump to `target`; chains of other instances do not count."""
    for entry in _entries(handle, hook)[start:]:
        name = _target(handle, entry)
        if name == target:
            return False
        if not name.startswith(CHAIN_PREFIX):
            return True
    return False


def _drop_jumps(handle: Any, target: str) -> None:
    for name in _names(handle):
        positions = [at for at, entry in enumerate(_entries(handle, name)) if _target(handle, entry) == target]
        for at in reversed(positions):
            _delete(handle, name, at)


def _differences(table: Table, prefix: str) -> Iterator[str]:
    if not _in_use(table.family, table.name):
        yield f"{table.label}: the table is empty"
        return
    handle = _open(table.family, table.name)
    found = _content(handle, prefix)
    _build(handle, table, prefix)
    wanted = _content(handle, prefix)
    for name in sorted(found.chains.keys() - wanted.chains.keys()):
        yield f"{table.label}: chain {name} is there and should not"
    for chain in table.chains:
        yield from (f"{table.label}: {text}" for text in _chain_differences(chain, found, wanted))


def _chain_differences(chain: Chain, found: Content, wanted: Content) -> Iterator[str]:
    if chain.name not in found.chains:
        yield f"chain {chain.name} is missing"
    else:
        have, want = found.chains[chain.name], wanted.chains[chain.name]
        for at, rule in enumerate(chain.rules):
            if at >= len(have) or have[at] != want[at]:
                yield f"rule {at + 1} is not `{rule.text(chain.name)}`"
                break
        if len(have) > len(want):
            yield f"chain {chain.name} has {len(have)} rules, {len(want)} are ours"
    if found.jumps.get(chain.name) != wanted.jumps.get(chain.name):
        yield f"chain {chain.hook} does not jump into {chain.name} first, exactly once and for everything"


# ---- libiptc's copy of a table ------------------------------------------------------------------------


def _content(handle: Any, prefix: str) -> Content:
    """Comparable: counters, offsets and what only the kernel fills in are left out."""
    ours: dict[str, list[bytes]] = {}
    jumps: dict[str, list[bytes]] = {}
    for name in _names(handle):
        if name.startswith(prefix):
            ours[name] = [_plain(handle, entry) for entry in _entries(handle, name)]
            continue
        for entry in _entries(handle, name):
            target = _target(handle, entry)
            if target.startswith(prefix):
                place = b" behind " if _foreign_before(handle, name, target) else b" "
                jumps.setdefault(target, []).append(name.encode() + place + _plain(handle, entry))
    return Content(ours, jumps)


def _names(handle: Any) -> list[str]:
    return [chain.name for chain in handle.chains]


def _entries(handle: Any, chain: str) -> list[Any]:
    found = []
    entry = handle.first_rule(chain)
    while entry:
        found.append(entry)
        entry = handle.next_rule(entry)
    return found


def _target(handle: Any, entry: Any) -> str:
    name = handle.get_target(entry)
    return name.decode() if name else ""


def _plain(handle: Any, entry: Any) -> bytes:
    raw = bytearray(ctypes.string_at(ctypes.addressof(entry), entry.next_offset))
    for field in ("nfcache", "comefrom", "counters"):
        place = getattr(type(entry), field)
        raw[place.offset:place.offset + place.size] = bytes(place.size)
    at = ctypes.sizeof(type(entry))
    while at < entry.target_offset:
        _end_name(raw, at)
        at += int.from_bytes(raw[at:at + 2], sys.byteorder)
    at, target = entry.target_offset, _target(handle, entry).encode()
    name = _end_name(raw, at)
    if name == b"" or (name == target and len(raw) - at == 40):
        # a standard target: the verdict is an offset or a number, and the name is there only before the commit
        raw[at + 2:at + 36] = bytes(34)
    return bytes(raw) + target


def _end_name(raw: bytearray, at: int) -> bytes:
    """The extension's name at `at` + 2; behind it the kernel leaves what was in the buffer."""
    name = bytes(raw[at + 2:at + 31]).split(b"\0")[0]
    raw[at + 2:at + 31] = name.ljust(29, b"\0")
    return name


def _delete(handle: Any, chain: str, at: int) -> None:
    library = handle._iptc
    if library.iptc_delete_num_entry(chain.encode(), ctypes.c_uint(at), handle._handle) != 1:
        raise TableError(f"cannot delete rule {at + 1} of {chain} in {handle.name}: {handle.strerror()}")


_encoded: dict[tuple[int, Rule], Any] = {}


def _encode(handle: Any, family: int, rule: Rule) -> Any:
    """The kernel's form of a rule, kept: libiptc copies it, and encoding is most of the time that a plan takes."""
    key = (family, rule)
    if key not in _encoded:
        if len(_encoded) >= ENCODED:
            _encoded.clear()
        _encoded[key] = _encode_anew(handle, family, rule)
    return _encoded[key]


def _encode_anew(handle: Any, family: int, rule: Rule) -> Any:
    """As the libraries encode it.

    The library asks every table whether a target's name is one of its chains, and asking creates the table in the
    kernel; this rule knows the table at hand alone.
    """
    base = iptc().Rule6 if family == 6 else iptc().Rule
    entry = type("OwnRule", (base,), {"tables": [handle]})()
    if rule.protocol:
        entry.protocol = rule.protocol
    if rule.source:
        entry.src = rule.source
    if rule.destination:
        entry.dst = rule.destination
    if rule.out_interface:
        entry.out_interface = rule.out_interface
        # iptc 1.2 gives IPv6 a mask of 0x01 bytes, which compares one bit of each character
        entry.get_ip().outiface_mask = b"\xff" * (len(rule.out_interface.lstrip("!")) + 1)
    for match in rule.matches:
        made_match = entry.create_match(match.name)
        for option, value in match.options:
            negation = ["!"] if option.startswith("!") else []
            made_match.set_parameter(option.lstrip("!"), negation + (value.split(" ") if value else [""]))
    if family == 6 and rule.target.name == "REDIRECT":
        entry.target = _Redirect6(int(dict(rule.target.options)["to-ports"]))
    else:
        target = entry.create_target(rule.target.name)
        for option, value in rule.target.options:
            target.set_parameter(option, value)
    entry.final_check()
    return entry.rule


class _Redirect6:
    """IPv6 REDIRECT as the kernel wants it, in the shape of iptc's Target.

    libxtables registers the extensions of a file for the family in force when it is loaded, and iptables 1.8 keeps
    REDIRECT of both families in libxt_NAT.so: a process that has it for IPv4 cannot have it for IPv6 (it ends with
    "already registered"). A second process would double the cost. Layout: xt_entry_target, then struct nf_nat_range
    of linux/netfilter/nf_nat.h (flags, two addresses, two ports).
    """

    _PROTO_SPECIFIED = 2

    def __init__(self, port: int) -> None:
        self.size = self.usersize = 72
        self._raw = bytearray(struct.pack("=H29sBI32sHH", self.size, b"REDIRECT", 0, self._PROTO_SPECIFIED, bytes(32),
                                          socket.htons(port), socket.htons(port)))
        self.target = ctypes.c_ubyte.from_buffer(self._raw)
        self.rule: Any = None

    def final_check(self) -> None:
        """Nothing to check: the port was."""


def _open(family: int, name: str) -> Any:
    """A fresh copy of the table; nothing is written without commit()."""
    kind = iptc().Table6 if family == 6 else iptc().Table
    kind._cache.pop(name, None)
    try:
        return kind(name, autocommit=False)
    except iptc().IPTCError as error:
        module = f"{'ip6table' if family == 6 else 'iptable'}_{name}"
        raise TableError(f"IPv{family} {name} table: {_reason(error)}; load the kernel module {module}, and check "
                         "that this runs as root with CAP_NET_ADMIN") from error


def _in_use(family: int, name: str) -> bool:
    try:
        with open(f"/proc/thread-self/net/{'ip6' if family == 6 else 'ip'}_tables_names", encoding="ascii") as names:
            return name in names.read().split()
    except FileNotFoundError:
        return False


def _reason(error: BaseException) -> str:
    """iptc formats the kernel's words as a bytes literal."""
    return str(error).replace("b'", "'").strip()


_library: Any = None


def iptc() -> Any:
    """python-iptables, imported without what it does not need here.

    As it is, the import takes 140 ms: it looks for its libraries with ldconfig and gcc, and for a directory through
    setuptools' distutils. We name the libraries, which leaves 22 ms. Source: iptc/util.py, iptc/xtables.py of 1.2.
    """
    global _library
    if _library is not None:
        return _library
    if "XTABLES_LIBDIR" not in os.environ and (found := [path for path in _EXTENSIONS if os.path.isdir(path)]):
        os.environ["XTABLES_LIBDIR"] = found[0]
    finder: Any = types.ModuleType("ctypes.util")
    finder.find_library = {"c": "libc.so.6", "xtables": "libxtables.so.12", "ip4tc": "libip4tc.so.2",
                           "ip6tc": "libip6tc.so.2"}.get
    replaced: dict[str, Any] = {"ctypes.util": finder, "distutils": None, "distutils.sysconfig": None}
    saved = {name: sys.modules.get(name) for name in replaced}
    known = vars(ctypes).get("util")
    sys.modules.update(replaced)
    vars(ctypes)["util"] = finder
    try:
        import iptc as library
    except Exception as error:
        raise TableError(f"python-iptables does not load: {error}; install the iptables package (libxtables12, "
                         "libip4tc2, libip6tc2 and the extensions in xtables/)") from error
    finally:
        vars(ctypes)["util"] = known
        for name, module in saved.items():
            if module is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module
    _library = library
    return library
