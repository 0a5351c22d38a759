"""Which rule speaks for a host: an exact name before `*.suffix`, a longer suffix before a shorter, an older rule first."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

from controlplane.model.objects import Metadata


class _Rule(Protocol):
    @property
    def meta(self) -> Metadata: ...


R = TypeVar("R", bound=_Rule)


class HostIndex(Generic[R]):
    """Rules by host pattern. Not for rules that change in place: remove and add."""

    def __init__(self) -> None:
        self._exact: dict[str, list[R]] = {}
        self._suffixes: dict[str, list[R]] = {}  # `.default.svc.cluster.local` for `*.default.svc.cluster.local`

    def add(self, pattern: str, rule: R) -> None:
        held = self._of(pattern).setdefault(pattern.removeprefix("*"), [])
        held.append(rule)
        held.sort(key=lambda one: one.meta.age)

    def remove(self, pattern: str, rule: R) -> None:
        table, key = self._of(pattern), pattern.removeprefix("*")
        table[key].remove(rule)
        if not table[key]:
            del table[key]

    def of(self, host: str) -> Iterator[R]:
        """Every rule that speaks for `host`, the one that counts first."""
        yield from self._exact.get(host, ())
        rest = host
        while self._suffixes and rest:
            rest = rest.partition(".")[2]
            yield from self._suffixes.get(f".{rest}", ())

    def at(self, pattern: str) -> list[R]:
        """The rules with exactly this pattern, the one that counts first."""
        return self._of(pattern).get(pattern.removeprefix("*"), [])

    def _of(self, pattern: str) -> dict[str, list[R]]:
        return self._suffixes if pattern.startswith("*") else self._exact


def matches(pattern: str, host: str) -> bool:
    return host.endswith(pattern[1:]) if pattern.startswith("*") else host == pattern
