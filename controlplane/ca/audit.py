"""The record of every certificate and every refusal: JSON lines in a file of ours (0600), which turns over at a size.

A certificate is given out only after its line is written. Refusals come as fast as somebody sends nonsense: of each caller the first
ones of a second get a line each, and the rest of that second one line together, with their number, so that noise cannot push the past
out of the files.
"""
from __future__ import annotations

import contextlib
import json
import os
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from controlplane.ca.store import StoreError

FILE_BYTES = 16 << 20  # then `audit.log` becomes `audit.log.1`, and so on
FILES = 5  # older ones beside it; with 400 bytes a line, 250,000 lines in all
REFUSALS = 10  # lines a second and caller


@dataclass(slots=True)
class _Second:
    """What a caller was refused within one second (monotonic)."""

    began: float
    lines: int = 0
    more: int = 0


class Audit:
    """For one event loop."""

    def __init__(self, path: Path, file_bytes: int = FILE_BYTES, clock: Callable[[], float] = time.time) -> None:
        """Raises StoreError."""
        self.path = path
        self._file_bytes = file_bytes
        self._clock = clock
        self._file = -1
        self._size = 0
        self._seconds: dict[str, _Second] = {}
        try:
            self._open()
        except OSError as error:
            raise StoreError(f"the audit log {path} cannot be written: {error.strerror or error}") from None

    def issued(self, **fields: object) -> None:
        """Raises OSError: then the certificate must not be given out."""
        self._write("issued", fields)

    def refused(self, caller: str, **fields: object) -> None:
        """`caller` is the node, empty for whoever has no token. Raises OSError."""
        now = time.monotonic()
        second = self._seconds.get(caller)
        if second is None or now - second.began >= 1:
            self._close_second(caller)
            second = self._seconds[caller] = _Second(now)
        if second.lines >= REFUSALS:
            second.more += 1
            return
        second.lines += 1
        self._write("refused", {"node": caller, **fields})

    def settle(self) -> None:
        """Write what seconds that are over still owe; to be called now and then. Raises OSError."""
        now = time.monotonic()
        for caller in [caller for caller, second in self._seconds.items() if now - second.began >= 1]:
            self._close_second(caller)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            for caller in list(self._seconds):
                self._close_second(caller)
        os.close(self._file)
        self._file = -1

    # -- inside -----------------------------------------------------------------------------------------------------

    def _close_second(self, caller: str) -> None:
        second = self._seconds.pop(caller, None)
        if second is not None and second.more:
            self._write("refused", {"node": caller, "more": second.more, "reason": f"{second.more} refusals more within the second before"})

    def _write(self, event: str, fields: dict[str, object]) -> None:
        now = self._clock()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1000):03}Z"
        line = json.dumps({"time": stamp, "event": event, **fields}).encode() + b"\n"
        self._follow(len(line))
        if os.write(self._file, line) < len(line):
            os.ftruncate(self._file, self._size)
            raise OSError(f"{self.path}: only a part of a line could be written; is the disk full?")
        self._size += len(line)

    def _follow(self, more: int) -> None:
        """The file is still the one at our path, and has room."""
        try:
            there = os.stat(self.path)
            moved = (there.st_dev, there.st_ino) != (os.fstat(self._file).st_dev, os.fstat(self._file).st_ino)
        except FileNotFoundError:
            moved = True
        if not moved and self._size + more > self._file_bytes:
            for number in range(FILES - 1, 0, -1):
                with contextlib.suppress(FileNotFoundError):
                    os.rename(f"{self.path}.{number}", f"{self.path}.{number + 1}")
            os.rename(self.path, f"{self.path}.1")
            moved = True
        if moved:
            before = self._file
            self._open()
            os.close(before)

    def _open(self) -> None:
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
            os.close(file)
            raise OSError(f"{self.path} is not a file of ours alone; chmod 0600 it, or name another place")
        self._file, self._size = file, found.st_size
