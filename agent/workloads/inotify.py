"""A directory's changes from inotify(7), as names. Linux only, through libc; watches one directory, not its children."""
from __future__ import annotations

import ctypes
import errno
import os
import struct
from pathlib import Path
from typing import NamedTuple

IN_CLOSE_WRITE, IN_MOVED_FROM, IN_MOVED_TO, IN_DELETE = 0x8, 0x40, 0x80, 0x200
IN_DELETE_SELF, IN_MOVE_SELF, IN_Q_OVERFLOW, IN_IGNORED = 0x400, 0x800, 0x4000, 0x8000
IN_ONLYDIR = 0x1000000
CHANGED, REMOVED = IN_CLOSE_WRITE | IN_MOVED_TO, IN_MOVED_FROM | IN_DELETE
GONE = IN_DELETE_SELF | IN_MOVE_SELF | IN_IGNORED

_HEADER = struct.Struct("iIII")  # watch, mask, cookie, length of the name with its padding
_READ = 64 * 1024  # bytes; an event is at most 16 + 256


class Event(NamedTuple):
    """`name` is "" when the event is about the directory or the queue."""

    mask: int
    name: str


class Watch:
    """Events of one directory. `fileno()` is readable when there are some; `read()` never blocks."""

    def __init__(self, folder: Path) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd: int = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            number = ctypes.get_errno()
            hint = "; raise fs.inotify.max_user_instances" if number == errno.EMFILE else ""
            raise OSError(number, f"cannot watch {folder}: {os.strerror(number)}{hint}")
        if libc.inotify_add_watch(self._fd, os.fsencode(folder), CHANGED | REMOVED | GONE | IN_ONLYDIR) < 0:
            number = ctypes.get_errno()
            self.close()
            hint = "; raise fs.inotify.max_user_watches" if number == errno.ENOSPC else ""
            raise OSError(number, f"cannot watch {folder}: {os.strerror(number)}{hint}")

    def fileno(self) -> int:
        return self._fd

    def read(self) -> list[Event]:
        """What has happened since; empty when nothing has."""
        try:
            raw = os.read(self._fd, _READ)
        except BlockingIOError:
            return []
        found, at = [], 0
        while at < len(raw):
            _, mask, _, length = _HEADER.unpack_from(raw, at)
            name = raw[at + _HEADER.size:at + _HEADER.size + length].rstrip(b"\0")
            found.append(Event(mask, os.fsdecode(name)))
            at += _HEADER.size + length
        return found

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
