"""How many expressions of a VirtualService one request may have to be asked of, in turn.

A worker finds expressions by the plain text that they begin with (ext/route/index) and asks those that remain one by one: 4 ms for 512 of
them on a path of 4,000 bytes, during which it serves nobody else (tests/bench/README.md, Growth). RE2 has no cheaper way with a bound.
"""
from __future__ import annotations

import string
from collections import Counter

from controlplane.model.routing import HttpRoute, MatchKind
from controlplane.sources.fields import Fields

IN_TURN_BOUND = 100  # some 10 us on a short path, 0.8 ms on one of 4,000 bytes
_MARKS = frozenset(string.punctuation) - {"_"}
_SPECIAL = frozenset("\\^$.[]|()*+?{}")


def plain_beginning(expression: str) -> str:
    """What every path begins with that the whole expression matches; never longer than what `beginning` of ext/route/index.pyx finds."""
    rest = expression.removeprefix("^")
    if not _one_branch(rest):
        return ""
    text, at = "", 0
    while at < len(rest):
        if rest[at] == "\\" and rest[at + 1:at + 2] in _MARKS:
            at += 1
        elif rest[at] in _SPECIAL or not 32 < ord(rest[at]) < 127:
            break
        text += rest[at]
        at += 1
    behind = rest[at:at + 2]
    if behind and behind[0] not in ".[" and not (behind[0] == "(" and behind[1:] != "?"):
        text = text[:-1]  # what follows may say "no times": a*, a{0}
    return text


def _one_branch(rest: str) -> bool:
    """Every `|` is in parentheses or a class. What is not plain to see (quotes, classes in a class) is answered with no."""
    depth, inside, at = 0, False, 0
    while "|" in rest and at < len(rest):
        one, behind = rest[at], rest[at + 1:at + 2]
        if one == "\\":
            if behind in ("", "Q"):
                return False
            at += 1
        elif one == "[":
            if inside:
                return False
            inside = True
            at += behind == "^"
            at += rest[at + 1:at + 2] == "]"  # the first one of a class is a member
        elif inside:
            inside = one != "]"
        elif one == "|" and depth <= 0:
            return False
        else:
            depth += (one == "(") - (one == ")")
        at += 1
    return True


def in_turn(routes: tuple[HttpRoute, ...]) -> int:
    """The most expressions that one path can be asked of: those whose beginnings it has."""
    beginnings = Counter(plain_beginning(match.uri.value) for route in routes for match in route.matches
                         if match.uri is not None and match.uri.kind is MatchKind.REGEX)
    return max((sum(beginnings[one[:n]] for n in range(len(one) + 1)) for one in list(beginnings)), default=0)


def check_in_turn(spec: Fields, routes: tuple[HttpRoute, ...]) -> None:
    many = in_turn(routes)
    if many > IN_TURN_BOUND:
        spec.error("http", f"has {many} regex matches of a uri that one request may have to be tried on in turn, at most "
                   f"{IN_TURN_BOUND} are taken: they begin alike, or with no plain text",
                   "use prefix or exact where that does, or begin each regex with a plain text of its own, such as /api/v1/")
