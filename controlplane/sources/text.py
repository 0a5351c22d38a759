"""YAML and JSON text -> maps that remember their lines. Scalars are read as Kubernetes reads them.

PyYAML's own resolvers are YAML 1.1 in full: 12:30:45 is a number there, 2001-01-01 a date, 1e3 a text. Kubernetes' (Go's) are
not, so scalars are resolved here. Documents are split at `---` before they are parsed: one that is broken costs no other.
"""
from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

DEPTH_BOUND = 64  # maps within lists within maps; Kubernetes objects have about 15
NODES_BOUND = 200_000  # values of one document after aliases are expanded; a bomb of aliases ends here


class Map(dict[str, Any]):
    """A mapping of a file: `line` is where it starts, `lines` where each of its keys stands."""

    line: int = 0
    lines: dict[str, int]

    def __init__(self) -> None:
        super().__init__()
        self.lines = {}

    def line_of(self, key: str) -> int:
        return self.lines.get(key, self.line)


class Items(list[Any]):
    """A sequence of a file: `lines` is where each of its items starts."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[int] = []


@dataclass(frozen=True, slots=True)
class Broken:
    """A document that is no YAML, or no object. `line` is the file's."""

    line: int
    message: str
    hint: str = ""


class _BrokenError(Exception):
    def __init__(self, line: int, message: str, hint: str = "") -> None:
        self.broken = Broken(line, message, hint)


def documents(text: str) -> Iterator[Map | Broken]:
    """Every object of the text in order; an empty document is none. The items of a `kind: List` come one by one."""
    for first, part in _split(text):
        try:
            body = _parse(part, first)
        except _BrokenError as error:
            yield error.broken
            continue
        if body is None:
            continue
        if not isinstance(body, Map):
            line = body.lines[0] if isinstance(body, Items) and body else first + 1 + part.startswith("---")
            yield Broken(line, "an object with apiVersion, kind and metadata is expected here")
        elif body.get("kind") == "List" and isinstance(body.get("items"), Items):
            items = body["items"]
            for item, line in zip(items, items.lines, strict=True):
                yield item if isinstance(item, Map) else Broken(line, "an object is expected as item of a List")
        else:
            yield body


_SEPARATOR = re.compile(r"^(?:---(?=\s|$)|\.\.\.\s*$)", re.MULTILINE)


def _split(text: str) -> Iterator[tuple[int, str]]:
    """The documents of a stream with the number of lines before each. `---` at the start of a line ends a document wherever
    it stands (YAML 1.2.2, section 9.1.2)."""
    starts = [0, *(match.start() for match in _SEPARATOR.finditer(text))]
    line = 0
    for start, end in zip(starts, [*starts[1:], len(text)], strict=True):
        part = text[start:end]
        if part.strip() and part.strip() != "...":
            yield line, part
        line += part.count("\n")


def _parse(text: str, before: int) -> Any:
    try:
        node = yaml.compose(text.removeprefix("...") if text.startswith("...") else text, Loader=yaml.CSafeLoader)
    except yaml.YAMLError as error:
        mark, reason = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        line = before + (mark.line if mark is not None else 0) + 1
        if isinstance(error, yaml.reader.ReaderError):
            raise _BrokenError(before + 1, "a character that YAML does not allow", "save the file as UTF-8 text") from None
        context = getattr(error, "context", None)
        said = ", ".join(part for part in (context, reason) if part) or "it cannot be parsed"
        raise _BrokenError(line, f"broken YAML: {said}",
                           "look at the indentation and quotes of this line and the one above") from None
    return None if node is None else _Builder(before).build(node, 0)


class _Builder:
    def __init__(self, before: int) -> None:
        self._before = before
        self._left = NODES_BOUND

    def _line(self, node: yaml.Node) -> int:
        return int(node.start_mark.line) + self._before + 1

    def build(self, node: yaml.Node, depth: int) -> Any:
        self._left -= 1
        if self._left < 0:
            raise _BrokenError(self._line(node), f"more than {NODES_BOUND} values in one document",
                               "split it, or look for aliases (*name) that multiply")
        if depth > DEPTH_BOUND:
            raise _BrokenError(self._line(node), f"nested deeper than {DEPTH_BOUND} levels")
        if isinstance(node, yaml.ScalarNode):
            return _scalar(node, self._line(node))
        if isinstance(node, yaml.SequenceNode):
            items = Items()
            for item in node.value:
                items.append(self.build(item, depth + 1))
                items.lines.append(self._line(item))
            return items
        found = Map()
        found.line = self._line(node)
        merged: list[Map] = []
        for key_node, value_node in node.value:
            line = self._line(key_node)
            if not isinstance(key_node, yaml.ScalarNode):
                raise _BrokenError(line, "a key must be a text")
            key = str(key_node.value)
            value = self.build(value_node, depth + 1)
            if key == "<<" and not key_node.style:
                merged += value if isinstance(value, Items) else [value]
                continue
            if key in found:
                raise _BrokenError(line, f"the key {key!r} is here twice (first in line {found.lines[key]})",
                                   "remove one of them")
            found[key], found.lines[key] = value, line
        for other in merged:
            if not isinstance(other, Map):
                raise _BrokenError(found.line, "<< takes a map")
            for key, value in other.items():
                if key not in found:
                    found[key], found.lines[key] = value, other.lines[key]
        return found


_INT = re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0o?[0-7_]+|0b[01_]+)\Z")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?\Z")
_WORDS: dict[str, Any] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE", "yes", "Yes", "YES", "on", "On", "ON"), True),
    **dict.fromkeys(("false", "False", "FALSE", "no", "No", "NO", "off", "Off", "OFF"), False),
}
_TAGS = {"tag:yaml.org,2002:str", "tag:yaml.org,2002:int", "tag:yaml.org,2002:float", "tag:yaml.org,2002:bool",
         "tag:yaml.org,2002:null", "tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:value", "tag:yaml.org,2002:merge", "!"}


def _scalar(node: yaml.ScalarNode, line: int) -> Any:
    text = str(node.value)
    if node.tag not in _TAGS:
        raise _BrokenError(line, f"the tag {node.tag} is not supported", "write the plain value")
    if node.style:  # quoted or a block
        return text
    if text in _WORDS:
        return _WORDS[text]
    if _INT.match(text):
        digits, sign = text.replace("_", "").lstrip("+-"), -1 if text.startswith("-") else 1
        octal = len(digits) > 1 and digits[0] == "0" and digits[1].isdigit()
        try:
            return sign * (int(digits, 8) if octal else int(digits, 0))
        except ValueError:  # a number of thousands of digits
            raise _BrokenError(line, "a number that is too long") from None
    if _FLOAT.match(text):
        return float(text)
    return text
