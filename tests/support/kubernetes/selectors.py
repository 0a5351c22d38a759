"""Label and field selectors, as the API server reads them (labels.Parse, fields.ParseSelector)."""
from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from tests.support.kubernetes.table import FIELDS, Object, Served

Selector = Callable[[Object], bool]
_SET = re.compile(r"\s*([^\s!=,()]+)\s+(in|notin)\s*\(([^)]*)\)\s*")
_PAIR = re.compile(r"\s*([^\s!=,()]+)\s*(==|=|!=)\s*([^\s,()]*)\s*")
_BARE = re.compile(r"\s*(!?)\s*([^\s!=,()]+)\s*")


class SelectorError(Exception):
    pass


def labels(text: str) -> Selector:
    wanted: list[Callable[[Mapping[str, str]], bool]] = []
    rest = text
    while rest.strip():
        if match := _SET.match(rest):
            key, values, inside = match[1], {one.strip() for one in match[3].split(",")}, match[2] == "in"
            wanted.append(lambda has, k=key, v=values, i=inside: (has.get(k) in v) is i)  # type: ignore[misc]
        elif match := _PAIR.match(rest):
            wanted.append(lambda has, k=match[1], v=match[3], same=match[2] != "!=": (has.get(k) == v) is same)  # type: ignore[misc]
        elif match := _BARE.match(rest):
            wanted.append(lambda has, k=match[2], there=not match[1]: (k in has) is there)  # type: ignore[misc]
        else:
            raise SelectorError(f"unable to parse requirement: {rest!r}")
        rest = rest[match.end():]
        if rest and not rest.startswith(","):
            raise SelectorError(f"unable to parse requirement: found {rest!r}, expected: ','")
        rest = rest[1:]
    return lambda one: all(want(one["metadata"].get("labels") or {}) for want in wanted)


def fields(text: str, served: Served) -> Selector:
    known = {**FIELDS, **dict(served.fields)}
    wanted: list[tuple[Callable[[Object], str], str, bool]] = []
    for part in filter(None, text.split(",")):
        match = re.fullmatch(r"([^!=]+)(==|=|!=)(.*)", part)
        if match is None:
            raise SelectorError(f"invalid selector: '{part}'; can't understand '{part}'")
        if match[1] not in known:
            raise SelectorError(f"field label not supported: {match[1]}")
        wanted.append((known[match[1]], match[3], match[2] != "!="))
    return lambda one: all((read(one) == value) is same for read, value, same in wanted)
