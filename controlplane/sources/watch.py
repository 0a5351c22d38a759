"""Which files changed, by inotify: folders are watched, not files, because manifests are replaced by renaming.

A mounted ConfigMap changes by renaming its hidden link `..data`; then every file below counts as changed. So does everything when
the kernel's queue overflowed, when a folder appeared or went, and every RESCAN seconds, for file systems that send no events.
"""
from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import struct
import time
from collections.abc import Iterable
from pathlib import Path

QUIET = 0.01  # s without an event before changes are handed over: a writer of many files is one change
LONGEST = 0.1  # s after which they are handed over all the same
RESCAN = 30.0  # s

IN_CLOSE_WRITE, IN_MOVED_FROM, IN_MOVED_TO, IN_CREATE, IN_DELETE = 0x8, 0x40, 0x80, 0x100, 0x200
IN_DELETE_SELF, IN_MOVE_SELF, IN_Q_OVERFLOW, IN_IGNORED, IN_ISDIR = 0x400, 0x800, 0x4000, 0x8000, 0x40000000
IN_ATTRIB, IN_ONLYDIR = 0x4, 0x01000000
_MASK = (IN_CLOSE_WRITE | IN_MOVED_FROM | IN_MOVED_TO | IN_CREATE | IN_DELETE | IN_DELETE_SELF | IN_MOVE_SELF | IN_ATTRIB
         | IN_ONLYDIR)
_EVENT = struct.Struct("iIII")
_LINK_NAME = "..data"


class Watch:
    """Changes below `paths`. Used in one event loop; `close` ends it."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._paths = tuple(paths)
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = int(self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "inotify is not to be had; raise fs.inotify.max_user_instances")
        self._folders: dict[int, Path] = {}
        self._changed: set[Path] = set()
        self._all = False
        self._woken = asyncio.Event()
        self._last = 0.0
        self._add_folders()
        asyncio.get_running_loop().add_reader(self._fd, self._readable)

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._fd)
        os.close(self._fd)

    async def changes(self) -> set[Path] | None:
        """Waits for changes. Returns the files, or None when everything is to be looked at again."""
        try:
            async with asyncio.timeout(RESCAN):
                await self._woken.wait()
        except TimeoutError:
            self._all = True
        deadline = time.monotonic() + LONGEST
        while (now := time.monotonic()) < min(deadline, self._last + QUIET):
            await asyncio.sleep(min(deadline, self._last + QUIET) - now)
        self._woken.clear()
        changed, everything = self._changed, self._all
        self._changed, self._all = set(), False
        if everything:
            self._add_folders()
            return None
        return changed

    # -- inside -----------------------------------------------------------------------------------------------------

    def _add_folders(self) -> None:
        wanted: set[Path] = set()
        for path in self._paths:
            if path.is_dir():
                wanted.add(path)
                for root, names, _ in os.walk(path, followlinks=True):
                    names[:] = [name for name in names if not name.startswith(".")]
                    wanted.update(Path(root, name) for name in names)
            else:
                wanted.add(path.parent)
        for folder in sorted(wanted):  # watching what is watched already gives the same number
            number = int(self._libc.inotify_add_watch(self._fd, os.fsencode(folder), _MASK))
            if number >= 0:
                self._folders[number] = folder
            elif ctypes.get_errno() == errno.ENOSPC:
                raise OSError(errno.ENOSPC, "too many folders to watch; raise fs.inotify.max_user_watches", str(folder))

    def _readable(self) -> None:
        while True:
            try:
                data = os.read(self._fd, 65536)
            except BlockingIOError:
                break
            offset = 0
            while offset < len(data):
                number, mask, _, length = _EVENT.unpack_from(data, offset)
                name = data[offset + _EVENT.size: offset + _EVENT.size + length].rstrip(b"\0")
                offset += _EVENT.size + length
                self._event(number, mask, os.fsdecode(name))
        if self._changed or self._all:
            self._last = time.monotonic()
            self._woken.set()

    def _event(self, number: int, mask: int, name: str) -> None:
        if mask & IN_IGNORED:
            self._folders.pop(number, None)
        elif mask & (IN_Q_OVERFLOW | IN_DELETE_SELF | IN_MOVE_SELF) or name == _LINK_NAME:
            self._all = True
        elif number not in self._folders or not name or name.startswith("."):
            return
        elif mask & IN_ISDIR:
            self._all = self._all or bool(mask & (IN_CREATE | IN_MOVED_TO | IN_MOVED_FROM | IN_DELETE))
        elif mask & IN_CREATE and not Path(self._folders[number], name).is_symlink():
            return  # it is empty still; closing it is the event that counts
        else:
            path = Path(self._folders[number], name)
            if path in self._paths or any(root in path.parents for root in self._paths):
                self._changed.add(path)
