"""Writes, compares and removes our nftables tables in the namespace it runs in: the only user of libnftables.

Runs in the capture child, in place of tables.py where the kernel has no legacy tables, with the same contract: `apply`, `verify`,
`remove`, `chains`, labels included. libnftables is what the `nft` command is made of: text in, text out, and one text is one
transaction, so that all tables of both families appear or vanish together. (pyroute2 builds single expressions and knows not
all of ours; `nft` itself would be a process more per pod; python-iptables cannot speak to iptables-nft's compatibility layer.)

What is wanted is loaded into a scratch namespace once and listed there: so the kernel's own form is compared with the kernel's
own form, whatever a version of the library makes of a rule when it prints it.
"""
from __future__ import annotations

import ctypes
import os
import socket
import struct
from typing import Any, NamedTuple

from agent.capture import nft
from agent.capture.rules import CHAIN_PREFIX, Table
from agent.capture.tables import TableError

_LIBRARY = "libnftables.so.1"
_STATELESS, _NUMERIC = 1 << 2, 1 << 7 | 1 << 8 | 1 << 9 | 1 << 10  # nft_ctx_output_set_flags: enum in nftables/libnftables.h
_CLONE_NEWNET = 0x40000000
_FAMILIES = {4: "ip", 6: "ip6"}
_KEPT = 256  # canonical forms; a node has as many as its pods have different settings
_NETLINK_NETFILTER, _GETGEN, _GEN_ID = 12, 10 << 8 | 16, 1  # linux/netfilter/nf_tables.h

REMOVAL = ("nat", "mangle", "filter", "raw")  # every table of the plan, in the order of removal
Chains = dict[str, list[str]]  # by name: the line of its hook, then its rules


class Content(NamedTuple):
    """Our table of one family as listed: its chains, and whatever else somebody put into it (sets, maps)."""

    chains: Chains
    others: list[str]


def apply(tables: list[Table], prefix: str) -> list[str]:
    """Write what differs, all in one transaction; returns the labels of the tables that were written."""
    wanted, found = _wanted(tables, prefix), _found(tables, prefix)
    changed = [table.label for table in tables if _differs(table, wanted, found)]
    if changed or wanted != found:
        _run(nft.script(tables, prefix))
    return changed or [f"{table.label}" for table in tables if wanted[table.family] != found[table.family]]


def verify(tables: list[Table], prefix: str) -> list[str]:
    """How the kernel differs from the plan, one text each; empty when it does not."""
    wanted, found = _wanted(tables, prefix), _found(tables, prefix)
    wrong = [text for table in tables for text in _differences(table, wanted[table.family], found[table.family])]
    for family in wanted:
        strange = sorted(found[family].chains.keys() - wanted[family].chains.keys()) + found[family].others
        wrong += [f"IPv{family} {nft.table_name(prefix)}: {what} is there and should not" for what in strange]
    return wrong


def remove(families: list[int], names: list[str], prefix: str) -> list[str]:
    """Remove the rules of these tables of iptables' (`nat`, ...) in one transaction; the whole table of ours when these are all.

    Otherwise the emptied chains stay: without any chain of type nat the kernel translates live connections no more.
    """
    script, gone = [], set()
    for family, table in _ours(families, prefix):
        content = _listed(family, table)
        ours = {chain: lines for chain, lines in content.chains.items() if chain.partition("_")[0] in names}
        label = f"{_FAMILIES[family]} {table}"
        if all(chain in ours or len(lines) <= 1 for chain, lines in content.chains.items()) and set(REMOVAL) <= set(names):
            script.append(f"delete table {label}")
        else:
            ours = {chain: lines for chain, lines in ours.items() if len(lines) > 1}
            script += [f"flush chain {label} {chain}" for chain in ours]
        gone |= {(names.index(chain.partition("_")[0]), family) for chain in ours}
    if script:
        _run("\n".join(script))
    return [Table(family, names[at], ()).label for at, family in sorted(gone)]


def chains(prefix: str = CHAIN_PREFIX) -> dict[str, list[str]]:
    """Our chains that have rules, by table label, named as in iptables, of every instance that matches the prefix."""
    found: dict[str, list[str]] = {}
    for family, table in _ours([4, 6], prefix):
        for chain, lines in _listed(family, table).chains.items():
            name, _, hook = chain.partition("_")
            if len(lines) > 1:
                found.setdefault(Table(family, name, ()).label, []).append(f"{table}_{hook}")
    return {label: sorted(names) for label, names in found.items()}


def generation() -> int:
    """The namespace's number of nftables transactions: another one after any change, whoever made it.

    1 (or 0) where nothing ever was. Raises OSError where the kernel has no nftables.
    """
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER) as link:
        link.settimeout(1.0)  # s; the kernel answers in microseconds
        link.send(struct.pack("=IHHIIBBH", 20, _GETGEN, 1, 1, 0, 0, 0, 0))
        data = link.recv(4096)
    (kind,) = struct.unpack_from("=H", data, 4)
    if kind == 2:  # NLMSG_ERROR
        (number,) = struct.unpack_from("=i", data, 16)
        raise OSError(-number, os.strerror(-number))
    at = 20
    while at + 4 <= len(data):
        length, attribute = struct.unpack_from("=HH", data, at)
        if attribute == _GEN_ID:
            return int.from_bytes(data[at + 4:at + 8], "big")
        at += max((length + 3) & ~3, 4)
    raise OSError("the kernel's answer has no generation")


def _differs(table: Table, wanted: dict[int, Content], found: dict[int, Content]) -> bool:
    names = [nft.chain_name(table, chain) for chain in table.chains]
    return any(wanted[table.family].chains[name] != found[table.family].chains.get(name) for name in names)


def _differences(table: Table, wanted: Content, found: Content) -> list[str]:
    wrong = []
    for chain in table.chains:
        name = nft.chain_name(table, chain)
        have, want = found.chains.get(name), wanted.chains[name]
        if have is None:
            wrong.append(f"{table.label}: chain {name} is missing")
            continue
        if have[:1] != want[:1]:
            wrong.append(f"{table.label}: chain {name} has not `{want[0]}`")
        if at := next((at for at in range(1, len(want)) if have[at:at + 1] != want[at:at + 1]), 0):
            wrong.append(f"{table.label}: rule {at} is not `{want[at]}`")
        elif len(have) > len(want):
            wrong.append(f"{table.label}: chain {name} has {len(have) - 1} rules, {len(want) - 1} are ours")
    return wrong


_canonical: dict[str, dict[int, Content]] = {}


def _wanted(tables: list[Table], prefix: str) -> dict[int, Content]:
    """The plan as this kernel and library list it."""
    try:
        text = nft.script(tables, prefix)
    except ValueError as error:
        raise TableError(str(error)) from error
    if text not in _canonical:
        here = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        libc = ctypes.CDLL(None, use_errno=True)
        try:
            if libc.unshare(_CLONE_NEWNET) != 0:
                raise TableError(f"cannot make a scratch namespace: {os.strerror(ctypes.get_errno())}; this needs root")
            try:
                _run(text)
                listed = _found(tables, prefix)
            finally:
                if libc.setns(here, _CLONE_NEWNET) != 0:
                    os._exit(70)  # whatever came next would be done in the wrong namespace
        finally:
            os.close(here)
        while len(_canonical) >= _KEPT:
            del _canonical[next(iter(_canonical))]
        _canonical[text] = listed
    return _canonical[text]


def _found(tables: list[Table], prefix: str) -> dict[int, Content]:
    there = set(_ours([4, 6], prefix))
    name = nft.table_name(prefix)
    return {family: _listed(family, name) if (family, name) in there else Content({}, [])
            for family in sorted({table.family for table in tables})}


def _ours(families: list[int], prefix: str) -> list[tuple[int, str]]:
    """(family, name) of the tables whose instance matches the prefix."""
    try:
        if generation() <= 1:
            return []
    except OSError:
        return []
    found = []
    for line in _run("list tables").splitlines():
        _, family, name = line.split(maxsplit=2)
        for version in families:
            if family == _FAMILIES[version] and f"{name}_".startswith(prefix):
                found.append((version, name))
    return found


def _listed(family: int, name: str) -> Content:
    chains: Chains = {}
    others: list[str] = []
    current: list[str] | None = None
    for line in (line.strip() for line in _run(f"list table {_FAMILIES[family]} {name}").splitlines()[1:-1]):
        if line.startswith("chain ") and current is None:
            current = chains.setdefault(line.split()[1], [])
        elif line == "}" and current is not None:
            current = None
        elif line and current is not None:
            current.append(line)
        elif line and line != "}" and (line.endswith("{") or line.startswith("flags")):
            others.append(line.removesuffix("{").strip())
    return Content(chains, others)


_library: Any = None


def library() -> Any:
    """libnftables, loaded once. Raises TableError when it is not installed."""
    global _library
    if _library is None:
        try:
            _library = ctypes.CDLL(_LIBRARY)
        except OSError as error:
            raise TableError(f"{_LIBRARY} does not load: {error}; install the nftables package (libnftables1)") from error
        _library.nft_ctx_new.restype = ctypes.c_void_p
        _library.nft_ctx_get_output_buffer.restype = _library.nft_ctx_get_error_buffer.restype = ctypes.c_char_p
    return _library


def _run(text: str) -> str:
    """What `nft -f -` would print for this text, here and now: the context's socket is of the namespace it is made in."""
    lib = library()
    context = ctypes.c_void_p(lib.nft_ctx_new(0))
    try:
        lib.nft_ctx_output_set_flags(context, _STATELESS | _NUMERIC)
        lib.nft_ctx_buffer_output(context)
        lib.nft_ctx_buffer_error(context)
        if lib.nft_run_cmd_from_buffer(context, text.encode()) != 0:
            said = (lib.nft_ctx_get_error_buffer(context) or b"").decode(errors="replace").strip().splitlines()
            raise TableError(f"nftables: the kernel refused the rules: {said[0] if said else 'no reason given'}; a part of "
                             "nf_tables may be missing in this kernel (nft_ct, nft_nat, nft_redir, nft_reject), or this needs root")
        return (lib.nft_ctx_get_output_buffer(context) or b"").decode()
    finally:
        lib.nft_ctx_free(context)
