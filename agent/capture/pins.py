"""Where programs, links and maps of an instance are kept: its directory in bpffs.

    <bpffs>/narrows/<instance>/v<layout>/    0700, root's
        maps/<name>   programs/<hook>   links/<cgroup id>_<hook>, links/in-<cgroup id or cookie of a namespace>-<hook>

The layout is NARROWS_LAYOUT of bpf/narrows.h: a version with other maps never meets those of an earlier one. A cgroup's id is its
directory's inode number, which the kernel gives out once. When a link's pin is removed, the kernel takes the program off its cgroup
a moment later.
"""
from __future__ import annotations

import ctypes
import fcntl
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

USUAL = Path("/sys/fs/bpf")
OWN = Path("/run/narrows/bpf")  # mounted by us where there is no other
_MOUNT_FLAGS = 2 | 4 | 8  # MS_NOSUID | MS_NODEV | MS_NOEXEC


class PinError(Exception):
    """Says which path, what is wrong with it and what to do."""


@dataclass(frozen=True, slots=True)
class Pins:
    """The directory of one instance. Making this object touches nothing."""

    root: Path

    @property
    def maps(self) -> Path:
        return self.root / "maps"

    @property
    def programs(self) -> Path:
        return self.root / "programs"

    @property
    def links(self) -> Path:
        return self.root / "links"

    def make(self) -> None:
        """PinError when somebody else's directory or pin is in the way: what runs in the kernel for us must be ours."""
        layout = self.root
        for folder in (layout.parents[1], layout.parent, layout, self.maps, self.programs, self.links):
            folder.mkdir(mode=0o700, exist_ok=True)
            _ours(folder, 0o077)
        for folder in (self.maps, self.programs, self.links):
            for pin in folder.iterdir():
                _ours(pin, 0o022)

    def remove(self) -> None:
        """Links first, so that no program runs without its maps. What is not there is no error."""
        for folder in (self.links, self.programs, self.maps):
            if folder.is_dir():
                for pin in folder.iterdir():
                    pin.unlink()
                folder.rmdir()
        for folder in (self.root, self.root.parent, self.root.parents[1]):
            try:
                folder.rmdir()
            except OSError:  # never made, or another layout or instance lives in it
                return


def pins_of(bpffs: Path, instance: str, layout: int, part: str = "") -> Pins:
    """`part`: of what is loaded and removed apart from capture, beside it (`v1-observe`)."""
    return Pins(bpffs / "narrows" / _written(instance) / (f"v{layout}-{part}" if part else f"v{layout}"))


def claim(instance: str, layout: int, usual: Path = USUAL, own: Path = OWN, *, part: str = "") -> Pins:
    """The instance's directory, made where a bpffs is mounted, or is mounted for it. PinError says what is in the way."""
    with _alone(own):
        pins = pins_of(bpffs(usual, own), instance, layout, part)
        pins.make()  # and as long as it stands nobody unmounts what it is in
        return pins


def found(instance: str | None, places: tuple[Path, ...] = (USUAL, OWN), *, below: bool = False) -> list[Pins]:
    """What is pinned of an instance, or of every one: all layouts, wherever a bpffs is mounted. `below`: of every one whose name begins so.
    """
    mounted = _mounted()
    pattern = "*" if instance is None else _written(instance) + ("*" if below else "")
    return [Pins(layout) for place in places if str(place) in mounted
            for name in sorted(place.glob(f"narrows/{pattern}")) for layout in sorted(name.glob("v*"))]


def clean(pins: Pins, own: Path = OWN) -> None:
    """Remove them, and our own bpffs when nothing else is pinned there. OSError when that may not be."""
    with _alone(own):
        pins.remove()
    unmount(own)


def unmount(own: Path = OWN) -> bool:
    """Take our own bpffs away when nothing is pinned there; False when there is none or it is in use."""
    if str(own) not in _mounted():
        return False
    with _alone(own):
        if (own / "narrows").exists():
            return False
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.umount2(os.fsencode(own), 0) != 0:
            return False
        own.rmdir()
        return True


@contextmanager
def _alone(own: Path) -> Iterator[None]:
    """Of two agents that find no bpffs both would mount one, and one of the two mounts would hide the other."""
    own.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = own.parent / f".{own.name}.lock"
    while True:
        fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            try:
                if os.fstat(fd).st_ino != lock.stat().st_ino:
                    continue  # whoever had it removed it
            except FileNotFoundError:
                continue
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
            return
        finally:
            os.close(fd)


def _written(instance: str) -> str:
    """bpffs reserves dots in names, so one is written as %2e."""
    return re.sub(r"[^A-Za-z0-9_-]", lambda part: "".join(f"%{byte:02x}" for byte in part[0].encode()), instance)


def _mounted() -> list[str]:
    return [fields[1] for line in Path("/proc/self/mounts").read_text().splitlines()
            if len(fields := line.split()) > 2 and fields[2] == "bpf"]


def bpffs(usual: Path = USUAL, own: Path = OWN) -> Path:
    """A mounted bpffs: `usual`, `own`, or `own` mounted now. PinError when that fails too."""
    mounted = _mounted()
    for place in (usual, own):
        if str(place) in mounted:
            return place
    own.mkdir(mode=0o700, parents=True, exist_ok=True)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"bpf", os.fsencode(own), b"bpf", _MOUNT_FLAGS, b"mode=0700") != 0:
        error = ctypes.get_errno()
        raise PinError(f"no bpffs is mounted at {usual}, and mounting one at {own} failed: {os.strerror(error)}; "
                       f"`mount -t bpf bpf {usual}` as root, on a kernel with CONFIG_BPF_SYSCALL")
    return own


def _ours(path: Path, forbidden: int) -> None:
    status = path.lstat()
    if status.st_uid != 0 or stat.S_ISLNK(status.st_mode) or status.st_mode & forbidden:
        raise PinError(f"{path} belongs to uid {status.st_uid} with mode {stat.S_IMODE(status.st_mode):o}: not made by us, so it is not "
                       "used; find out who made it and remove it")
