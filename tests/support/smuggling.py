"""The corpus of tests/wire as data: bytes, and what they are to us. The format is in tests/wire/README.md."""
from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

WIRE = Path(__file__).resolve().parent.parent / "wire"
MARK = b"CASE"  # in the bytes: four more of the same length, by which a request is known again wherever it arrives
NEXT = b"GET /%s/next HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"  # said behind a case: must be read as what it is, or not at all
FINAL = ("400", "414", "431", "501", "505", "close", "cut")
_ESCAPE = re.compile(rb"\\(r|n|t|0|\\|x[0-9a-fA-F]{2})")
_REPEAT = re.compile(rb"\{(\d+)\*([^{}]+)\}")
_PLAIN = {b"r": b"\r", b"n": b"\n", b"t": b"\t", b"0": b"\0", b"\\": b"\\"}


@dataclass(frozen=True)
class Sent:
    """A request as whoever reads it rightly must see it."""

    method: bytes
    target: bytes
    body: bytes = b""
    host: bytes = field(default=b"", compare=False)  # as the back end read it


@dataclass(frozen=True)
class Case:
    name: str
    file: str
    rfc: str
    bytes: bytes
    ours: tuple[Sent, ...]  # the requests in it that we pass on
    final: str  # "": all of it is passed on; a status: we refuse; "close": the last one ends the connection; "cut": no end came
    envoy: str  # directly: how many requests Envoy reads (the one behind included), and the status with which it refuses, or -

    def marked(self, number: int) -> tuple[bytes, list[Sent]]:
        """The bytes and the requests with a mark of this number."""
        sent = [Sent(one.method, one.target.replace(MARK, mark(number)), one.body.replace(MARK, mark(number))) for one in self.ours]
        return self.bytes.replace(MARK, mark(number)), sent


def mark(number: int) -> bytes:
    return b"c%03x" % number


def number(sent: Sent) -> int | None:
    """Whose mark a request carries."""
    found = re.search(rb"\bc([0-9a-f]{3})\b", sent.target + b" " + sent.host)
    return int(found[1], 16) if found else None


@dataclass(frozen=True)
class Answer:
    """What a hostile server says to `ask`, and what the client must see of it."""

    name: str
    rfc: str
    ask: bytes
    bytes: bytes
    seen: tuple[tuple[int, bytes], ...]  # status, body
    final: str  # "": and the next answer behind it; "502", "503": ours; "close"; "cut": the client sees that the body is not whole

    def numbered(self, number: int) -> bytes:
        return self.bytes.replace(MARK, mark(number))


def plain(text: bytes) -> bytes:
    """`{3*ab}` is ababab; escapes as in Python's bytes."""
    def escaped(found: re.Match[bytes]) -> bytes:
        code = found[1]
        return _PLAIN[code] if code in _PLAIN else bytes([int(code[1:], 16)])

    return _ESCAPE.sub(escaped, _REPEAT.sub(lambda found: found[2] * int(found[1]), text))


def _case(file: str, text: str) -> Case:
    name, _, rest = text.partition("\n")
    facts, parts, ours, final = {"rfc": "", "envoy": ""}, [], [], ""
    for line in rest.splitlines():
        key, _, value = line.partition(" ")
        if key == "|":
            parts.append(plain(value.encode()))
        elif key == ">" and value in FINAL:
            final = value
        elif key == ">":
            assert not final, f"{file} {name}: a request behind {final}"
            method, target, *body = value.encode().split(b" ", 2)
            ours.append(Sent(plain(method), plain(target), plain(body[0]) if body else b""))
        elif key in facts:
            facts[key] = value
        elif line and key != "#":
            raise AssertionError(f"{file} {name}: {line!r} is none of `|`, `>`, `rfc`, `envoy`, `#`")
    assert parts and facts["rfc"] and (ours or final), f"{file} {name}: no bytes, no RFC section or no expectation"
    return Case(name.strip(), file, facts["rfc"], b"".join(parts), tuple(ours), final, facts["envoy"])


def _answer(file: str, text: str) -> Answer:
    name, _, rest = text.partition("\n")
    rfc, ask, parts, seen, final = "", "GET", [], [], ""
    for line in rest.splitlines():
        key, _, value = line.partition(" ")
        if key == "|":
            parts.append(plain(value.encode()))
        elif key == ">" and value in ("502", "503", "close", "cut"):
            final = value
        elif key == ">":
            status, _, body = value.partition(" ")
            seen.append((int(status), plain(body.encode())))
        elif key == "rfc":
            rfc = value
        elif key == "ask":
            ask = value
        elif line and key != "#":
            raise AssertionError(f"{file} {name}: {line!r} is none of `|`, `>`, `rfc`, `ask`, `#`")
    assert parts and rfc and (seen or final), f"{file} {name}: no bytes, no RFC section or no expectation"
    return Answer(name.strip(), rfc, ask.encode(), b"".join(parts), tuple(seen), final)


def _read(folder: str) -> Iterator[tuple[str, str]]:
    for path in sorted((WIRE / folder).glob("*.txt")):
        head, *cases = re.split(r"^== ", path.read_text(), flags=re.M)
        assert all(line.startswith("#") for line in head.splitlines() if line), f"{path.name}: text before the first case"
        for text in cases:
            yield path.stem, text


def _once(names: list[str]) -> None:
    assert len(set(names)) == len(names), f"twice in the corpus: {sorted({n for n in names if names.count(n) > 1})}"


@cache
def requests() -> tuple[Case, ...]:
    found = tuple(_case(*one) for one in _read("requests"))
    _once([one.name for one in found])
    return found


@cache
def responses() -> tuple[Answer, ...]:
    found = tuple(_answer(*one) for one in _read("responses"))
    _once([one.name for one in found])
    return found


def by_name() -> dict[str, Case]:
    return {one.name: one for one in requests()}


def write_envoy(seen: dict[str, str]) -> None:
    """Puts what was seen of Envoy into the corpus, in place of what stood there."""
    for path in (WIRE / "requests").glob("*.txt"):
        text = re.sub(r"^envoy .*\n", "", path.read_text(), flags=re.M)
        path.write_text(re.sub(r"^== (.*)\n(rfc .*\n)", lambda found: f"{found[0]}envoy {seen[found[1]]}\n", text, flags=re.M))
