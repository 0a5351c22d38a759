"""A cursor over one map of a document: reads typed values, and notes everything that is wrong with file and line.

A field is read by name; `finish` then refuses every field that nobody read. Reading a value of the wrong type notes a problem and
gives the default, so that one pass finds every fault of a document.
"""
from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from controlplane.model.problems import Place, Problem, Severity
from controlplane.sources.text import Items, Map

NAME_BOUND = 253  # characters of a Kubernetes name (RFC 1123 subdomain)
_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*\Z")
_LABEL_VALUE = re.compile(r"(?:[A-Za-z0-9](?:[-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?\Z")


class Notes:
    """The problems of one document."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.object = ""  # who it is, once that is known
        self.problems: list[Problem] = []

    @property
    def refused(self) -> bool:
        return any(problem.severity is Severity.ERROR for problem in self.problems)

    def note(self, severity: Severity, line: int, message: str, hint: str = "") -> None:
        self.problems.append(Problem(Place(self.file, line), self.object, severity, message, hint))


class Fields:
    """See the head of this file. `path` is where the map stands in its document (`spec.http[0]`)."""

    def __init__(self, notes: Notes, body: Map, path: str = "") -> None:
        self._notes = notes
        self._body = body
        self._path = path
        self._read: set[str] = set()

    # -- where ------------------------------------------------------------------------------------------------------

    def path(self, key: str = "") -> str:
        return f"{self._path}.{key}" if self._path and key else key or self._path

    def line(self, key: str = "") -> int:
        return self._body.line_of(key)

    def place(self, key: str = "") -> Place:
        return Place(self._notes.file, self.line(key))

    def error(self, key: str, message: str, hint: str = "") -> None:
        self._notes.note(Severity.ERROR, self.line(key), f"{self.path(key)} {message}", hint)

    def warn(self, key: str, message: str, hint: str = "") -> None:
        self._notes.note(Severity.WARNING, self.line(key), f"{self.path(key)} {message}", hint)

    # -- reading ----------------------------------------------------------------------------------------------------

    def __contains__(self, key: str) -> bool:
        """Given, and not null."""
        return self._body.get(key) is not None

    def take(self, key: str) -> Any:
        self._read.add(key)
        return self._body.get(key)

    def names(self) -> Iterator[str]:
        return iter(self._body)

    def text(self, key: str, default: str = "", *, required: bool = False) -> str:
        value: object = self.take(key)
        if value is None:
            if required:
                self.error(key, "is missing")
            return default
        if not isinstance(value, str):
            self.error(key, f"is {describe(value)}, a text is expected", f'put it in quotes: "{value}"' if scalar(value) else "")
            return default
        if required and not value:
            self.error(key, "is empty")
        return value

    def choice(self, key: str, choices: Iterable[str], default: str = "") -> str:
        """One of `choices`, else a problem and the default."""
        value: str = self.text(key, default)
        known = list(choices)
        if value and value not in known:
            self.error(key, f"is {value!r}", f"it may be {', '.join(known)}{did_you_mean(value, known)}")
            return default
        return value

    def name(self, key: str, default: str = "", *, required: bool = False) -> str:
        """A Kubernetes name."""
        value = self.text(key, default, required=required)
        if value and (len(value) > NAME_BOUND or not _NAME.match(value)):
            self.error(key, f"is {value!r}, which is no name", "use lower-case letters, digits, '-' and '.'")
            return default
        return value

    def integer(self, key: str, low: int, high: int, default: int = 0, *, required: bool = False) -> int:
        value: object = self.take(key)
        if value is None:
            if required:
                self.error(key, "is missing")
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            self.error(key, f"is {describe(value)}, a whole number is expected")
            return default
        if not low <= value <= high:
            self.error(key, f"is {value}; {low} to {high} are expected")
            return default
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.take(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.error(key, f"is {describe(value)}, true or false is expected")
            return default
        return value

    def fields(self, key: str, *, required: bool = False) -> Fields | None:
        """The map at `key`; None when it is not given or is none."""
        value = self.take(key)
        if isinstance(value, Map):
            return Fields(self._notes, value, self.path(key))
        if value is not None:
            self.error(key, f"is {describe(value)}, a map is expected")
        elif required:
            self.error(key, "is missing")
        return None

    def list_of_fields(self, key: str) -> list[Fields]:
        """The maps of the list at `key`; an item that is none is a problem and left out."""
        found = []
        for number, (value, line) in enumerate(self._items(key)):
            if isinstance(value, Map):
                found.append(Fields(self._notes, value, f"{self.path(key)}[{number}]"))
            else:
                self._item(key, number, line, f"is {describe(value)}, a map is expected")
        return found

    def texts(self, key: str) -> list[tuple[str, Place]]:
        """The texts of the list at `key`, each with its place."""
        found = []
        for number, (value, line) in enumerate(self._items(key)):
            if isinstance(value, str):
                found.append((value, Place(self._notes.file, line)))
            else:
                self._item(key, number, line, f"is {describe(value)}, a text is expected")
        return found

    def text_map(self, key: str) -> dict[str, tuple[str, int]]:
        """Text to text and line, as in headers."""
        inner = self.fields(key)
        if inner is None:
            return {}
        return {name: (inner.text(name), inner.line(name)) for name in inner.names()}

    def labels(self, key: str) -> tuple[tuple[str, str], ...]:
        """Labels or a selector, sorted. A bad one is a problem."""
        found = []
        for name, (value, line) in self.text_map(key).items():
            if not name or not _LABEL_VALUE.match(value):
                self._notes.note(Severity.ERROR, line, f"{self.path(key)}.{name} is {value!r}, which is no value of a label",
                                 "at most 63 letters, digits, '-', '_' and '.', a letter or digit first and last")
            found.append((name, value))
        return tuple(sorted(found))

    # -- what nobody read -------------------------------------------------------------------------------------------

    def refuse(self, reasons: Mapping[str, str]) -> None:
        """Fields that are known and not done: refused by name, each with what it is or what to do instead."""
        for key, reason in reasons.items():
            if self.take(key) is not None:
                self.error(key, "is not supported yet", reason)

    def ignore(self, *keys: str) -> None:
        """Fields that change nothing for the mesh."""
        self._read.update(keys)

    def finish(self, *, severity: Severity = Severity.ERROR, known: Iterable[str] = ()) -> None:
        """Every field that was not read is unknown. `known` are further names to be proposed for a misspelt one."""
        for key in self._body:
            if key not in self._read:
                near = did_you_mean(key, [*self._read, *known])
                consequence = "" if severity is Severity.ERROR else "it is ignored"
                hint = "; ".join(part for part in (consequence, near.removeprefix("; ")) if part)
                self._notes.note(severity, self.line(key), f"unknown field {self.path(key)}",
                                 hint or "remove it, or look for its right name and place")

    # -- inside -----------------------------------------------------------------------------------------------------

    def _items(self, key: str) -> Iterator[tuple[Any, int]]:
        value = self.take(key)
        if value is None:
            return iter(())
        if not isinstance(value, Items):
            self.error(key, f"is {describe(value)}, a list is expected", "put '- ' before it")
            return iter(())
        return zip(value, value.lines, strict=True)

    def _item(self, key: str, number: int, line: int, message: str) -> None:
        self._notes.note(Severity.ERROR, line, f"{self.path(key)}[{number}] {message}")


def scalar(value: object) -> bool:
    return isinstance(value, bool | int | float)


def describe(value: object) -> str:
    if isinstance(value, Map):
        return "a map"
    if isinstance(value, Items):
        return "a list"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value!r}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, sorted(set(known)), n=1)
    return f"; did you mean {near[0]}?" if near else ""
