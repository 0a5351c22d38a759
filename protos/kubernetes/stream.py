"""The stream of a watch without I/O: bytes in, events out. One JSON object a line (API concepts, "Efficient detection of changes")."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

import msgspec

from protos.kubernetes.errors import ApiError, Malformed, from_status
from protos.kubernetes.objects import Item, ListMetadata, RawEvent, Status, Struct, item

T = TypeVar("T")
LINE_BOUND = 8 << 20  # bytes; etcd refuses objects beyond 1.5 MiB, and JSON is up to three times what protobuf is


@dataclass(frozen=True, slots=True)
class Changed(Generic[T]):
    """ADDED, MODIFIED (`deleted` False) or DELETED."""

    item: Item[T]
    deleted: bool


@dataclass(frozen=True, slots=True)
class Bookmark:
    """Everything up to this resourceVersion was told."""

    resource_version: str


@dataclass(frozen=True, slots=True)
class Failed:
    """An ERROR in the stream, or a line that is no event (Malformed). Nothing that follows can be relied on."""

    error: ApiError


@dataclass(frozen=True, slots=True)
class Skipped:
    """A line beyond the bound: one object was not read, and nobody can tell which."""

    size: int


Event = Changed[T] | Bookmark | Failed | Skipped


class _Versioned(Struct, frozen=True):
    metadata: ListMetadata = ListMetadata()


_EVENT = msgspec.json.Decoder(RawEvent)
_VERSIONED = msgspec.json.Decoder(_Versioned)
_STATUS = msgspec.json.Decoder(Status)


class Stream(Generic[T]):
    """Splits and decodes. An unfinished last line is forgotten with the stream: what was cut is told again after a resume."""

    def __init__(self, path: str, kind: type[T], bound: int = LINE_BOUND) -> None:
        self._path, self._kind, self._bound = path, kind, bound
        self._part = bytearray()
        self._skipping = 0  # bytes of the line that is left out

    def feed(self, data: bytes) -> list[Event[T]]:
        """The events that end in `data`."""
        events: list[Event[T]] = []
        start = 0
        while (end := data.find(b"\n", start)) >= 0:
            self._take(data[start:end])
            start = end + 1
            if self._skipping:
                events.append(Skipped(self._skipping))
                self._skipping = 0
                continue
            line = bytes(self._part).strip()
            self._part.clear()
            if line:
                events.append(self._event(line))
        self._take(data[start:])
        return events

    def _take(self, part: bytes) -> None:
        if self._skipping:
            self._skipping += len(part)
        elif len(self._part) + len(part) > self._bound:
            self._skipping = len(self._part) + len(part)
            self._part.clear()
        else:
            self._part += part

    def _event(self, line: bytes) -> Event[T]:
        try:
            event = _EVENT.decode(line)
            if event.type in ("ADDED", "MODIFIED", "DELETED"):
                return Changed(item(event.object, self._kind), event.type == "DELETED")
            if event.type == "BOOKMARK":
                return Bookmark(_VERSIONED.decode(event.object).metadata.resource_version)
            if event.type == "ERROR":
                return Failed(from_status("watch", self._path, 0, _STATUS.decode(event.object)))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            return Failed(Malformed("watch", self._path, 200, "", f"a line that is no event: {error}"))
        return Failed(Malformed("watch", self._path, 200, "", f"an event of the unknown type {event.type[:40]!r}"))
