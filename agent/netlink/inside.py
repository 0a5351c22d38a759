"""Into a namespace and out again: descriptors of namespaces, work in a thread of its own inside one, sysctls. Without pyroute2."""
from __future__ import annotations

import ctypes
import errno
import os
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
Namespace = str | os.PathLike[str] | int | None

CLONE_NEWNET = 0x40000000


class NetlinkError(OSError):
    """The kernel refused. `errno` is its number; the text names namespace, object and attempt."""

    def __str__(self) -> str:
        return str(self.strerror)


def open_namespace(namespace: str | os.PathLike[str]) -> int:
    """A close-on-exec descriptor of the namespace at a path. NetlinkError if it is none."""
    try:
        fd = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise NetlinkError(
            error.errno or 0,
            f"cannot open namespace {os.fspath(namespace)}: {error.strerror}; its pod is probably gone",
        ) from error
    if not is_namespace(fd):
        os.close(fd)
        raise NetlinkError(
            errno.EINVAL,
            f"{os.fspath(namespace)} is not a network namespace; if it is a file in "
            "/run/netns, its mount is gone and it can be removed",
        )
    return fd


def is_namespace(namespace: str | os.PathLike[str] | int) -> bool:
    """Whether a path or descriptor is a network namespace (ioctl NS_GET_NSTYPE)."""
    import fcntl

    fd = namespace if isinstance(namespace, int) else -1
    try:
        if not isinstance(namespace, int):
            fd = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
        return fcntl.ioctl(fd, 0xB703) == CLONE_NEWNET
    except OSError:
        return False
    finally:
        if not isinstance(namespace, int) and fd >= 0:
            os.close(fd)


def namespace_id(namespace: Namespace) -> tuple[int, int]:
    """(device, inode): equal for two paths or descriptors of the same namespace."""
    with opened(namespace) as fd:
        found = os.fstat(fd) if fd is not None else os.stat("/proc/thread-self/ns/net")
    if not stat.S_ISREG(found.st_mode):
        raise NetlinkError(errno.EINVAL, f"{where(namespace)} is not a network namespace")
    return found.st_dev, found.st_ino


def in_netns(namespace: Namespace, work: Callable[[], T]) -> T:
    """Run `work` in a fresh thread inside the namespace and return or raise what it does.

    Sockets that it makes stay in the namespace. `work` must not start threads or processes that outlive it.
    """
    with opened(namespace) as fd:

        def entered() -> T:
            if fd is not None:
                try:
                    libc_call("setns", ctypes.c_int(fd), ctypes.c_int(CLONE_NEWNET))
                except OSError as error:
                    raise NetlinkError(
                        error.errno or 0,
                        f"cannot enter {where(namespace)}: {error.strerror}; this needs CAP_SYS_ADMIN",
                    ) from error
            return work()

        return in_thread(entered)


def visit(paths: Iterable[str], work: Callable[[str], T]) -> dict[str, T]:
    """Run `work(path)` inside one namespace after the other, all in one fresh thread: a visit costs 10 us, not a thread.

    A namespace that cannot be entered is left out, and so is one where `work` raises an OSError.
    """
    found: dict[str, T] = {}

    def walk() -> None:
        for path in paths:
            try:
                fd = open_namespace(path)
                try:
                    libc_call("setns", ctypes.c_int(fd), ctypes.c_int(CLONE_NEWNET))
                finally:
                    os.close(fd)
                found[path] = work(path)
            except OSError:
                continue

    in_thread(walk)
    return found


def families(namespace: Namespace) -> tuple[int, ...]:
    """(4, 6), or (4,) when the namespace has no IPv6 or switched it off on lo."""
    try:
        off = read_sysctl(namespace, "net.ipv6.conf.lo.disable_ipv6") != "0"
    except NetlinkError as error:
        if error.errno != errno.ENOENT:
            raise
        off = True
    return (4,) if off else (4, 6)


# ---- sysctl ------------------------------------------------------------------------------------------


def read_sysctl(namespace: Namespace, name: str) -> str:
    """The value of `net.…` in the namespace, without its newline."""
    path = _sysctl(name)
    try:
        return in_netns(namespace, lambda: path.read_text().strip())
    except NetlinkError:
        raise
    except OSError as error:
        raise NetlinkError(
            error.errno or 0, f"{where(namespace)}: cannot read sysctl {name}: {error.strerror}"
        ) from error


def write_sysctl(namespace: Namespace, name: str, value: str | int) -> None:
    """Write `net.…` in the namespace."""
    path = _sysctl(name)
    try:
        in_netns(namespace, lambda: path.write_text(f"{value}\n"))
    except NetlinkError:
        raise
    except OSError as error:
        raise NetlinkError(
            error.errno or 0, f"{where(namespace)}: cannot set sysctl {name} to {value}: {error.strerror}"
        ) from error


def _sysctl(name: str) -> Path:
    parts = name.split(".")
    if parts[0] != "net" or any(part in ("", "..") or "\0" in part for part in parts):
        raise NetlinkError(errno.EINVAL, f"sysctl {name!r}: only net.* is per namespace")
    return Path("/proc/sys", *(part.replace("/", ".") for part in parts))


# ---- below: how it is done ---------------------------------------------------------------------------


def in_thread(work: Callable[[], T]) -> T:
    results: list[T] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # handed to the caller's thread, whatever it is
            failures.append(error)

    thread = threading.Thread(target=run, name="netns", daemon=True)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return results[0]


_libc: ctypes.CDLL | None = None


def libc_call(name: str, *arguments: Any) -> None:
    global _libc
    if _libc is None:
        _libc = ctypes.CDLL(None, use_errno=True)
    if getattr(_libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


@contextmanager
def opened(namespace: Namespace, *, own: bool = False) -> Iterator[int | None]:
    """The namespace as a descriptor. None stays None, or with `own` becomes the caller's own."""
    if isinstance(namespace, int):
        yield namespace
        return
    if namespace is None and not own:
        yield None
        return
    fd = open_namespace("/proc/thread-self/ns/net" if namespace is None else namespace)
    try:
        yield fd
    finally:
        os.close(fd)


def where(namespace: Namespace) -> str:
    if namespace is None:
        return "own namespace"
    return f"namespace fd {namespace}" if isinstance(namespace, int) else f"namespace {os.fspath(namespace)}"
