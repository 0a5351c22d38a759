"""YAML files as maps that remember their lines, so that every problem can say file:line."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

MAX_FILE = 8 << 20  # bytes; larger is a mistake, not a manifest
MAX_DEPTH = 64  # nesting; a deeper document is a loop of aliases or an attack on the parser


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with a file. `line` is 1 and up, 0 for the whole file; an `error` refuses the file."""

    path: str
    line: int
    text: str
    error: bool = True

    def __str__(self) -> str:
        where = f"{self.path}:{self.line}" if self.line else self.path
        return f"{where}: {'' if self.error else 'warning: '}{self.text}"


class Map(dict[str, Any]):
    """A mapping of a file: `line` is where it starts, `lines` where each of its keys stands."""

    line = 0
    lines: dict[str, int]


@dataclass(frozen=True, slots=True)
class Document:
    """One object of a file; `first` and `last` are its lines, the separator not included."""

    path: str
    first: int
    last: int
    body: Map


@dataclass(slots=True)
class Source:
    """One file as it was read: the path to name in messages, its folder, its text, its documents and its problems."""

    path: str
    folder: str
    text: str
    documents: list[Document] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def find(path: Path) -> list[Path]:
    """The manifests that a path names: itself, or every *.yaml, *.yml and *.json under a folder, sorted."""
    if path.is_dir():
        return sorted(p for p in path.rglob("*") if p.suffix in {".yaml", ".yml", ".json"} and p.is_file())
    return [path]


def read(path: Path) -> Source:
    """Read and parse one file. What is wrong with it is in `problems`; nothing is raised."""
    shown, folder = str(path), str(path.resolve().parent)
    try:
        if path.stat().st_size > MAX_FILE:
            return Source(shown, folder, "", problems=[Problem(shown, 0, f"larger than {MAX_FILE >> 20} MiB")])
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        return Source(shown, folder, "", problems=[Problem(shown, 0, f"cannot be read: {error.strerror}")])
    except UnicodeDecodeError:
        return Source(shown, folder, "", problems=[Problem(shown, 0, "is not UTF-8 text")])
    return parse(shown, folder, text)


def parse(path: str, folder: str, text: str) -> Source:
    """Parse the text of a file named `path`."""
    source = Source(path, folder, text)
    try:
        for node in yaml.compose_all(text, Loader=yaml.CSafeLoader):
            if node is None or (isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null"):
                continue
            line = node.start_mark.line + 1
            if not isinstance(node, yaml.MappingNode):
                source.problems.append(Problem(path, line, "an object with apiVersion, kind and metadata is expected"))
                continue
            for body in _items(_build(node, path, source.problems, 0)):
                source.documents.append(Document(path, line, max(node.end_mark.line, line), body))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        what = getattr(error, "problem", None) or "cannot be parsed"
        source.problems.append(Problem(path, mark.line + 1 if mark else 0, f"broken YAML: {what}"))
    except _TooDeep as error:
        source.problems.append(Problem(path, error.line, f"nested deeper than {MAX_DEPTH} levels"))
    return source


class _TooDeep(Exception):
    def __init__(self, line: int) -> None:
        self.line = line


def _items(body: Map) -> Iterator[Map]:
    """An object, or the objects of a `kind: List` as kubectl prints it."""
    if body.get("kind") == "List" and isinstance(body.get("items"), list):
        yield from (item for item in body["items"] if isinstance(item, Map))
    else:
        yield body


def _build(node: yaml.Node, path: str, problems: list[Problem], depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise _TooDeep(node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        result = Map()
        result.line, result.lines = node.start_mark.line + 1, {}
        for key_node, value_node in node.value:
            key = str(key_node.value) if isinstance(key_node, yaml.ScalarNode) else "?"
            line = key_node.start_mark.line + 1
            if key in result:
                problems.append(Problem(path, line, f"{key} is given twice; the first is in line {result.lines[key]}"))
            result[key], result.lines[key] = _build(value_node, path, problems, depth + 1), line
        return result
    if isinstance(node, yaml.SequenceNode):
        return [_build(item, path, problems, depth + 1) for item in node.value]
    if node.tag == "tag:yaml.org,2002:timestamp":
        return str(node.value)  # Kubernetes has no dates of YAML's kind
    return yaml.constructor.SafeConstructor().construct_object(node)
