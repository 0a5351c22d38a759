"""What happened to pods, workers and resources on this node, for whoever asks later: a bounded, numbered list."""
from __future__ import annotations

import logging
import time
from collections import deque
from dataclasses import asdict, dataclass
from typing import Any

KEPT = 1000
log = logging.getLogger("narrows.events")


@dataclass(frozen=True, slots=True)
class Event:
    """`kind` is a CamelCase reason as Kubernetes' events have; `about` names the object (`pod default/reviews-v1-0`)."""

    number: int
    time: float  # Unix seconds
    warning: bool
    kind: str
    about: str
    message: str


class Events:
    def __init__(self) -> None:
        self._kept: deque[Event] = deque(maxlen=KEPT)
        self._number = 0

    def add(self, kind: str, about: str, message: str, warning: bool = False) -> None:
        """Keep and log it. The same as the last about this object is not repeated (a retry every few seconds)."""
        last = next((event for event in reversed(self._kept) if event.about == about), None)
        if last is not None and (last.kind, last.message) == (kind, message):
            return
        self._number += 1
        self._kept.append(Event(self._number, time.time(), warning, kind, about, message))
        log.log(logging.WARNING if warning else logging.INFO, message, extra={"event": kind, "about": about})

    def since(self, number: int = 0) -> list[dict[str, Any]]:
        return [asdict(event) for event in self._kept if event.number > number]

    def about(self, about: str) -> list[dict[str, Any]]:
        return [asdict(event) for event in self._kept if event.about == about]
