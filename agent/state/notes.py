"""Numbers given out, and names in use, kept as NOTE blobs so that the next agent gives the same answers.

A number (u32, 1 and up) stands for one workload, service or pod for as long as the keeper lives and is never given to
another: counters in shared memory are named by it. Notes are JSON with a kind before a newline in their name:

    next                     {"next": 17}                      the next number to give out
    workload\\n<uid>          {"index": 3}                      in use; after its removal with "gone" (Unix seconds) and
    service\\n<ns/hostname>   {"index": 4}                      "was" (labels), until nobody needs the name any more
    pod\\n<uid>               {"index": 9}                      its handle
    destination\\n<key>       {}                                asked for by a pod here: subscribe to it at start
"""
from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from agent.model.workload import Service, Tunnel, Workload
from agent.state.entries import PutNote

LIMIT = 0xFFFFFFFF  # 0 is unknown, 0xffffffff the passthrough cluster


class NoteError(ValueError):
    """A note that this version cannot read; the text names it."""


@dataclass(slots=True)
class Number:
    index: int
    gone: float = 0.0  # Unix seconds of the removal; 0: in use
    was: Workload | Service | None = None  # names and labels of what is gone


class Notes:
    """The notes themselves. `changed(name, note or None)` is called for each that must be written or dropped."""

    def __init__(self, changed: Callable[[str, PutNote | None], None]) -> None:
        self._changed = changed
        self._next = 1
        self.numbers: dict[tuple[str, str], Number] = {}  # (kind, name)
        self.destinations: set[str] = set()

    def index(self, kind: str, name: str) -> int:
        """The number of `name`, given out now if it has none. A number of what was gone is taken up again."""
        number = self.numbers.get((kind, name))
        if number is None:
            if self._next >= LIMIT:
                raise NoteError("all numbers for workloads and services are used up; restart the keeper (drain first)")
            number = self.numbers[kind, name] = Number(self._next)
            self._next += 1
            self._changed("next", PutNote("next", _json({"next": self._next})))
        elif not number.gone:
            return number.index
        number.gone, number.was = 0.0, None
        self._write(kind, name)
        return number.index

    def known(self, kind: str, name: str) -> int:
        """The number of `name`, 0 when it has none."""
        number = self.numbers.get((kind, name))
        return number.index if number else 0

    def retire(self, kind: str, name: str, at: float, was: Workload | Service | None) -> None:
        """`name` is gone since `at`; its number stays known until `release`."""
        if number := self.numbers.get((kind, name)):
            number.gone, number.was = at, was
            self._write(kind, name)

    def release(self, kind: str, name: str) -> None:
        if self.numbers.pop((kind, name), None):
            self._changed(f"{kind}\n{name}", None)

    def retired(self, before: float) -> list[tuple[str, str]]:
        return [key for key, number in self.numbers.items() if 0 < number.gone <= before]

    def use(self, destination: str) -> None:
        if destination not in self.destinations:
            self.destinations.add(destination)
            self._changed(f"destination\n{destination}", PutNote(f"destination\n{destination}", b"{}"))

    def forget(self, destination: str) -> None:
        if destination in self.destinations:
            self.destinations.discard(destination)
            self._changed(f"destination\n{destination}", None)

    def restore(self, notes: Iterable[tuple[str, bytes]]) -> list[str]:
        """Take over the notes of an earlier agent. Returns what was unreadable, in words; the rest is taken.

        Reads all numbers first: `next` is never below a number that was given out, even if its own note is lost.
        """
        wrong, highest = [], 0
        for name, body in notes:
            try:
                highest = max(highest, self._read(name, body))
            except (ValueError, KeyError, TypeError) as error:
                wrong.append(f"note {name!r} of an earlier agent is not readable and is ignored: {error}")
        self._next = max(self._next, highest + 1)
        return wrong

    def rewrite(self) -> None:
        """Announce every note, for a keeper that starts empty."""
        self._changed("next", PutNote("next", _json({"next": self._next})))
        for kind, name in self.numbers:
            self._write(kind, name)
        for key in self.destinations:
            self._changed(f"destination\n{key}", PutNote(f"destination\n{key}", b"{}"))

    def _read(self, note: str, body: bytes) -> int:
        """The highest number that this note proves to have been given out."""
        value = json.loads(body)
        if note == "next":
            self._next = max(self._next, int(value["next"]))
            return 0
        kind, newline, name = note.partition("\n")
        if kind == "destination" and newline:
            self.destinations.add(name)
            return 0
        if kind not in ("workload", "service", "pod") or not newline:
            raise NoteError("unknown kind")
        number = Number(int(value["index"]), float(value.get("gone", 0.0)), _was(kind, value.get("was")))
        if not 0 < number.index < LIMIT:
            raise NoteError(f"number {number.index}")
        self.numbers[kind, name] = number
        return number.index

    def _write(self, kind: str, name: str) -> None:
        number = self.numbers[kind, name]
        value: dict[str, Any] = {"index": number.index}
        if number.gone:
            value["gone"] = round(number.gone, 3)
            if number.was is not None:
                value["was"] = {k: v for k, v in asdict(number.was).items() if k not in ("addresses", "ports")}
        self._changed(f"{kind}\n{name}", PutNote(f"{kind}\n{name}", _json(value)))


def _was(kind: str, value: dict[str, Any] | None) -> Workload | Service | None:
    if value is None:
        return None
    if kind == "service":
        return Service(**value, addresses=(), ports=())
    # a note of an earlier version has neither tunnel nor policies
    tunnel, policies = Tunnel(value.pop("tunnel", 0)), tuple(value.pop("policies", ()))
    return Workload(**value, addresses=(), ports=(), tunnel=tunnel, policies=policies)


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":"), sort_keys=True).encode()
