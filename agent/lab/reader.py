"""Reading one object of a file field by field, with every field accounted for.

A field is read, or quietly fine (it changes nothing here), or Kubernetes' but not done here (a warning that says what
happens instead), or unknown (an error with the nearest known name). So nobody's typing error is silently ignored.
"""
from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any

from agent.lab.manifest import Map, Problem

DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
DNS_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
MISSING: Any = object()


class Reader:
    """A map of a file, with the problems found in it. Asking for a field marks it as read."""

    def __init__(self, body: Map, where: str, path: str, problems: list[Problem]) -> None:
        self.body, self.where, self.path, self.problems = body, where, path, problems
        self._read: set[str] = set()

    def line(self, key: str = "") -> int:
        return self.body.lines.get(key, self.body.line)

    def skip(self, *keys: str) -> None:
        """Take fields as read that are said elsewhere, or that hold nothing for a lab."""
        self._read.update(keys)

    def error(self, key: str, text: str) -> None:
        self.problems.append(Problem(self.path, self.line(key), f"{self.where}: {text}"))

    def warn(self, key: str, text: str) -> None:
        self.problems.append(Problem(self.path, self.line(key), f"{self.where}: {text}", error=False))

    def _get(self, key: str, kinds: type | tuple[type, ...], what: str, default: Any) -> Any:
        self._read.add(key)
        value = self.body.get(key)
        if value is None:
            if default is MISSING:
                self.error(key, f"{key} is missing; it must be {what}")
                return None
            return default
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in _tuple(kinds)):
            self.error(key, f"{key} must be {what}, not {value!r}")
            return None if default is MISSING else default
        return value

    def string(self, key: str, default: Any = MISSING) -> str:
        value: str = self._get(key, str, "text", default)
        return value if value is not None else ""

    def name(self, key: str, default: Any = MISSING, pattern: re.Pattern[str] = DNS_NAME) -> str:
        value = self.string(key, default)
        if value and (not pattern.fullmatch(value) or len(value) > 253):
            self.error(key, f"{key} {value!r} is no valid name: lower-case letters, digits and - are expected")
        return value

    def integer(self, key: str, low: int, high: int, default: Any = MISSING) -> int:
        value = self._get(key, int, f"a number from {low} to {high}", default)
        if value is None:
            return low
        if isinstance(value, int) and not low <= value <= high:
            self.error(key, f"{key} must be a number from {low} to {high}, not {value}")
            return low
        return int(value)

    def flag(self, key: str, default: bool) -> bool:
        return bool(self._get(key, bool, "true or false", default))

    def strings(self, key: str) -> tuple[str, ...]:
        value = self._get(key, list, "a list of texts", [])
        good = [item for item in value if isinstance(item, str)]
        if len(good) != len(value):
            odd = next(item for item in value if not isinstance(item, str))
            self.error(key, f"{key} must be a list of texts; put quotes around {odd!r}")
        return tuple(good)

    def string_map(self, key: str) -> dict[str, str]:
        value = self._get(key, dict, "a map of texts", {})
        for name, item in value.items():
            if not isinstance(item, str):
                self.error(key, f"{key}.{name} must be text; put quotes around {item!r}")
        return {name: item for name, item in value.items() if isinstance(item, str)}

    def child(self, key: str, *, required: bool = False) -> Reader | None:
        value = self._get(key, Map, "a map", MISSING if required else None)
        return Reader(value, f"{self.where}: {key}", self.path, self.problems) if value is not None else None

    def children(self, key: str, *, required: bool = False) -> list[Reader]:
        value = self._get(key, list, "a list", MISSING if required else [])
        found = []
        for index, item in enumerate(value or []):
            if isinstance(item, Map):
                label = item.get("name") if isinstance(item.get("name"), str) else index
                found.append(Reader(item, f"{self.where}: {key}[{label}]", self.path, self.problems))
            else:
                self.error(key, f"{key}[{index}] must be a map")
        return found

    def port(self, key: str, default: Any = MISSING) -> int | str:
        value = self._get(key, (int, str), "a port number or a port's name", default)
        if isinstance(value, int) and not 1 <= value <= 65535:
            self.error(key, f"{key} must be a port number from 1 to 65535, not {value}")
            return 1
        return value if value is not None else 1

    def done(self, fine: Iterable[str] = (), *, not_done: dict[str, str] | None = None,
             refused: dict[str, str] | None = None) -> None:
        """Account for the fields that were not read. `not_done` and `refused` say what happens instead."""
        fine, not_done, refused = set(fine), not_done or {}, refused or {}
        for key in self.body:
            if key in self._read or key in fine:
                continue
            if key in refused:
                self.error(key, f"{key} {refused[key]}")
            elif key in not_done:
                self.warn(key, f"{key} {not_done[key]}")
            else:
                near = difflib.get_close_matches(key, [*self._read, *fine, *not_done, *refused], 1)
                self.error(key, f"unknown field {key}" + (f"; is {near[0]} meant?" if near else ""))


def _tuple(kinds: type | tuple[type, ...]) -> tuple[type, ...]:
    return kinds if isinstance(kinds, tuple) else (kinds,)
