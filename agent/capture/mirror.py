"""What stands in maps whose keys belong to pods, kept here as well, so that a change costs what it changes and not a walk over a map."""
from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path

from agent.capture import bpf_call
from agent.capture.links import opened

_YES = b"\1"


class Mirror:
    """Of maps below `folder`: how a key of each is written, and where in it the namespace's cookie is. OSError when the kernel refuses,
    `error` when a pin is not there."""

    def __init__(self, folder: Path, shapes: Mapping[str, tuple[struct.Struct, int]], error: type[Exception]) -> None:
        self._folder = folder
        self._shapes = shapes
        self._error = error
        self._known: dict[str, dict[int, set[bytes]]] | None = None

    def read(self) -> dict[str, dict[int, frozenset[bytes]]]:
        """By map and cookie the keys that the kernel has now, whoever wrote them."""
        known: dict[str, dict[int, set[bytes]]] = {name: {} for name in self._shapes}
        for name, (shape, at) in self._shapes.items():
            with opened(self._folder / name, self._error) as fd:
                for key in bpf_call.keys(fd, shape.size):
                    known[name].setdefault(shape.unpack(key)[at], set()).add(key)
        self._known = known
        return {name: {cookie: frozenset(keys) for cookie, keys in of.items()} for name, of in known.items()}

    def set(self, name: str, cookie: int, wanted: set[bytes], *, remove: bool = True) -> None:
        """Of one pod: what is missing is added, then what is too much removed."""
        if self._known is None:
            self.read()
        assert self._known is not None
        known = self._known[name]
        there = known.get(cookie, set())
        if there == wanted:
            return
        try:
            with opened(self._folder / name, self._error) as fd:
                for key in wanted - there:
                    bpf_call.update(fd, key, _YES)
                for key in there - wanted if remove else ():
                    bpf_call.delete(fd, key)
        except BaseException:
            self._known = None  # how far it came is not known
            raise
        if left := wanted if remove else wanted | there:
            known[cookie] = set(left)
        else:
            known.pop(cookie, None)
