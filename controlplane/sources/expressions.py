"""How many expressions of a VirtualService one request may have to be asked of, in turn.

A worker finds routes by the plain text that their paths begin with (ext/route/index) and asks those that remain one by one, expressions of
paths, headers and query alike: 4 ms for 512 of them on a text of 4,000 bytes, during which it serves nobody else (tests/bench/README.md,
Growth). RE2 has no cheaper way with a bound. The worker itself refuses what is above the bound, whichever control plane it comes from.
"""
from __future__ import annotations

import string
from collections import Counter

from controlplane.model.routing import HttpMatch, HttpRoute, MatchKind
from controlplane.sources.fields import Fields

IN_TURN_BOUND = 100  # some 10 us on short texts, 0.8 ms on ones of 4,000 bytes; twin: IN_TURN_MAX of ext/route/index.pxd, which refuses too
INDEX_LONGEST = 1023  # bytes; longer texts are found by nothing; twin: ext/route/index.pxd
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


def _many(match: HttpMatch) -> int:
    """Its expressions: of the path, the pseudo headers, headers and query parameters."""
    plain = (match.uri, match.method, match.authority)
    named = (one for pairs in (match.headers, match.without_headers, match.query) for _, one in pairs)
    return sum(one is not None and one.kind is MatchKind.REGEX for one in (*plain, *named))


def _found_by(match: HttpMatch) -> tuple[str, bool]:
    """The text by which a worker finds it ("": it asks it whatever the path), and whether only the path that is just that text goes on
    from there to the headers."""
    if match.uri is None:
        return "/", False
    if match.uri.kind is MatchKind.REGEX:
        return plain_beginning(match.uri.value), False
    if match.ignore_uri_case or len(match.uri.value.encode()) > INDEX_LONGEST:
        return "", False
    return match.uri.value, match.uri.kind is MatchKind.EXACT


def in_turn(routes: tuple[HttpRoute, ...]) -> int:
    """The most expressions that one request can be asked of: those of the matches whose beginnings its path has, for its port."""
    matches = [match for route in routes for match in route.matches if _many(match)]
    return max((_in_turn([match for match in matches if match.port in (0, port)]) for port in {match.port for match in matches}), default=0)


def _in_turn(matches: list[HttpMatch]) -> int:
    shared: Counter[str] = Counter()
    exact: Counter[str] = Counter()
    for match in matches:
        text, alone = _found_by(match)
        (exact if alone else shared)[text] += _many(match)
    return max((exact[one] + sum(shared[one[:n]] for n in range(len(one) + 1)) for one in {*shared, *exact}), default=0)


def check_in_turn(spec: Fields, routes: tuple[HttpRoute, ...]) -> None:
    many = in_turn(routes)
    if many > IN_TURN_BOUND:
        spec.error("http", f"has {many} regex matches (of uris, headers, query parameters) that one request may have to be tried on "
                   f"in turn, at most {IN_TURN_BOUND} are taken: their uris begin alike, or with no plain text",
                   "use prefix or exact where that does, or begin the uri of each with a plain text of its own, such as /api/v1/")
