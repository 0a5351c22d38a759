"""What is wrong with the configuration, in words for the person who wrote it."""
from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple


class Severity(StrEnum):
    ERROR = "error"  # the object is refused; its last good version, if any, stays in force
    WARNING = "warning"  # the object is in force, and probably not as meant


class Place(NamedTuple):
    """Where something stands. `line` is 1 and up, 0 for the whole file; the empty file is nowhere."""

    file: str = ""
    line: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


class ObjectKey(NamedTuple):
    """`namespace` is empty for objects that have none."""

    kind: str
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.namespace}/{self.name}" if self.namespace else f"{self.kind} {self.name}"


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """`file:line: object: message; hint`. `about` is the object, empty when the text does not say which it is."""

    place: Place
    about: str
    severity: Severity
    message: str
    hint: str = ""

    def __str__(self) -> str:
        where = f"{self.place}: " if self.place.file else ""
        what = f"{self.about}: " if self.about else ""
        kind = "" if self.severity is Severity.ERROR else "warning: "
        return f"{where}{kind}{what}{self.message}" + (f"; {self.hint}" if self.hint else "")

    def as_json(self) -> dict[str, object]:
        """The form of `-o json` and of /debug/problems; an interface."""
        return {"severity": str(self.severity), "file": self.place.file, "line": self.place.line,
                "object": self.about, "message": self.message, "hint": self.hint}


def error(place: Place, what: str, message: str, hint: str = "") -> Problem:
    return Problem(place, what, Severity.ERROR, message, hint)


def warning(place: Place, what: str, message: str, hint: str = "") -> Problem:
    return Problem(place, what, Severity.WARNING, message, hint)
