"""Where the authority's key lives: a folder of our own, or files that somebody plugged in.

The folder (0700) holds whole sets, and `current` is a link to the one in force, so that a reader sees a key and its certificate or the
ones before, never one of each:

    DIR/lock                     taken by whoever changes anything
    DIR/current -> v3
    DIR/v3/ca-key.pem ca-cert.pem root-cert.pem [cert-chain.pem] [next-key.pem next-cert.pem]     (0600, in 0700)

A set is written whole beside the others, then renamed, then linked; whoever dies in between leaves the set before in force.
"""
from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from controlplane.ca.material import Material, parse
from controlplane.ca.sign import make_root

KEY, CERTIFICATE, CHAIN, ROOTS = "ca-key.pem", "ca-cert.pem", "cert-chain.pem", "root-cert.pem"  # as in Istio's secret `cacerts`
NEXT_KEY, NEXT_CERTIFICATE = "next-key.pem", "next-cert.pem"
MOST_BYTES = 1 << 20  # of one file; a bundle of 100 roots has 100 KiB
_SET = re.compile(r"v([1-9][0-9]*)")


class StoreError(OSError):
    """The files of the authority cannot be used; the text says which, why, and what to do."""


@dataclass(frozen=True, slots=True)
class Files:
    """Plugged-in files. `chain` may be None when a root signs. The key must not be readable by everybody; a group may read it
    (Kubernetes' fsGroup)."""

    key: Path
    certificate: Path
    chain: Path | None
    roots: Path

    def stamp(self) -> object:
        """Differs when a file was changed or replaced."""
        return tuple(stamp_of(path) for path in (self.key, self.certificate, self.chain, self.roots) if path is not None)

    def read(self, now: datetime) -> Material:
        """Raises StoreError, MaterialError."""
        return parse(read_private(self.key, group_may_read=True), _read(self.certificate),
                     _read(self.chain) if self.chain is not None else b"", _read(self.roots), now)

    @property
    def where(self) -> str:
        return str(self.certificate)


class Folder:
    """See the head of this file. A root is made at the first `open`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def where(self) -> str:
        return str(self.path)

    def open(self, trust_domain: str, now: datetime) -> bool:
        """Make the folder, and a root in it, where there is none. Returns whether a root was made. Raises StoreError."""
        try:
            self.path.mkdir(mode=0o700)
        except FileExistsError:
            pass
        except FileNotFoundError:
            raise StoreError(f"{self.path.parent} is no folder; make it, or name another place for the authority") from None
        except OSError as error:
            raise StoreError(f"{self.path} cannot be made: {error.strerror}") from None
        check_folder(self.path)
        with self.locked():
            if self._current() is not None:
                return False
            sets = self._sets()
            if len(sets) > 1:
                raise StoreError(f"{self.path} has {', '.join(sets)} and no link that says which is in force; if it is the last one: "
                                 f"ln -s {sets[-1]} {self.path / 'current'}")
            if sets:  # whoever made it died before linking it
                self._link(sets[0])
                return False
            key, certificate = make_root(trust_domain, now)
            self._put("v1", {KEY: key, CERTIFICATE: certificate, ROOTS: certificate})
            self._link("v1")
            return True

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else changes the folder meanwhile. Raises StoreError."""
        try:
            file = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise StoreError(f"{self.path / 'lock'}: {error.strerror}") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
        finally:
            os.close(file)

    def stamp(self) -> object:
        return self._current(), *(stamp_of(self.path / "current" / name) for name in ("", KEY, CERTIFICATE, CHAIN, ROOTS))

    def files(self) -> dict[str, bytes]:
        """What the set in force holds, by name. Raises StoreError."""
        check_folder(self.path)
        for attempt in (True, False):
            name = self._current()
            if name is None:
                raise StoreError(f"{self.path} has no authority yet; a control plane with --ca-dir makes one at its first start")
            folder = self.path / name
            try:
                check_folder(folder)
                found = {one: read_private(folder / one) for one in sorted(os.listdir(folder)) if one.endswith(".pem")}
                missing = {KEY, CERTIFICATE, ROOTS} - found.keys()
                if missing:
                    raise StoreError(f"{folder} has no {', '.join(sorted(missing))}; put it back from a copy")
                return found
            except (StoreError, FileNotFoundError):
                if not attempt or self._current() == name:
                    raise
        raise AssertionError

    def read(self, now: datetime) -> Material:
        """Raises StoreError, MaterialError."""
        found = self.files()
        return parse(found[KEY], found[CERTIFICATE], found.get(CHAIN, b""), found[ROOTS], now)

    def changed_at(self) -> float:
        """When the set in force was put there (s since 1970)."""
        return (self.path / "current").lstat().st_mtime

    def replace(self, files: Mapping[str, bytes], now: datetime) -> None:
        """Put a set of these files in force, after checking that it may be; `locked` must be held. Raises StoreError, MaterialError."""
        parse(files[KEY], files[CERTIFICATE], files.get(CHAIN, b""), files[ROOTS], now)
        before = self._sets()
        number = max((int(name[1:]) for name in before), default=0) + 1
        self._put(f"v{number}", files)
        self._link(f"v{number}")
        for name in before:
            shutil.rmtree(self.path / name)

    # -- inside -----------------------------------------------------------------------------------------------------

    def _current(self) -> str | None:
        """The set in force; None when there is no link."""
        link = self.path / "current"
        try:
            name = os.readlink(link)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StoreError(f"{link} is no link to a set ({error.strerror}); controlplane/README.md says what the folder holds") from None
        if not _SET.fullmatch(name):
            raise StoreError(f"{link} leads to {name}; a set beside it (v1, v2, ...) is expected")
        return name

    def _sets(self) -> list[str]:
        return sorted((name for name in os.listdir(self.path) if _SET.fullmatch(name)), key=lambda name: int(name[1:]))

    def _put(self, name: str, files: Mapping[str, bytes]) -> None:
        for stale in self.path.glob(".making*"):
            shutil.rmtree(stale) if stale.is_dir() and not stale.is_symlink() else stale.unlink()
        making = self.path / ".making"
        making.mkdir(mode=0o700)
        for file_name, content in files.items():
            write_private(making / file_name, content)
        _sync(making)
        making.rename(self.path / name)

    def _link(self, name: str) -> None:
        fresh = self.path / ".making-link"
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(name)
        fresh.rename(self.path / "current")
        _sync(self.path)


def check_folder(path: Path) -> None:
    """Raises StoreError unless the folder is ours, and ours alone."""
    try:
        found = path.lstat()
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}") from None
    if not stat.S_ISDIR(found.st_mode):
        raise StoreError(f"{path} is no folder; remove it, or name another place for the authority")
    _check_owner(path, found)
    if found.st_mode & 0o077:
        raise StoreError(f"{path} may be entered by others (mode {stat.S_IMODE(found.st_mode):04o}); chmod 0700 {path}, and think about "
                         "whether somebody has read the key")


def read_private(path: Path, group_may_read: bool = False) -> bytes:
    """A file with a secret. Raises StoreError unless it is ours (or root's) and nobody else may read or write it."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if group_may_read else os.O_NOFOLLOW)  # Kubernetes' secrets are links
    try:
        file = os.open(path, flags)
    except FileNotFoundError:
        raise StoreError(f"{path} is not there") from None
    except OSError as error:
        reason = "it is a link; put the file itself there" if error.errno == errno.ELOOP else error.strerror
        raise StoreError(f"{path}: {reason}") from None
    with os.fdopen(file, "rb") as source:
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode):
            raise StoreError(f"{path} is no file")
        _check_owner(path, found)
        if found.st_mode & (0o037 if group_may_read else 0o077):
            mode = "0640" if group_may_read else "0600"
            raise StoreError(f"{path} is open to others (mode {stat.S_IMODE(found.st_mode):04o}); chmod {mode} {path}, and think about "
                             "whether somebody has read it")
        return _bounded(path, source.read(MOST_BYTES + 1))


def write_private(path: Path, content: bytes) -> None:
    """A new file, 0600 from its first moment, on the disk when this returns."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(file, "wb") as target:
        target.write(content)
        target.flush()
        os.fsync(file)


def _check_owner(path: Path, found: os.stat_result) -> None:
    if found.st_uid not in (os.geteuid(), 0):
        raise StoreError(f"{path} is owned by uid {found.st_uid}, and this process runs as uid {os.geteuid()}; chown it, or name another "
                         "place")


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as source:
            return _bounded(path, source.read(MOST_BYTES + 1))
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}") from None


def _bounded(path: Path, content: bytes) -> bytes:
    if len(content) > MOST_BYTES:
        raise StoreError(f"{path} has more than {MOST_BYTES} bytes")
    return content


def stamp_of(path: Path) -> object:
    """Differs when the file was changed, replaced, or given another owner or mode; None when it cannot be seen."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_ctime_ns, found.st_size


def _sync(folder: Path) -> None:
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)
