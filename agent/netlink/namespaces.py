"""Namespaces that have a name, under /run/netns, as iproute2 keeps them."""
from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

from agent.netlink.inside import CLONE_NEWNET, NetlinkError, in_thread, is_namespace, libc_call
from agent.netlink.links import set_link

NAMESPACES = Path("/run/netns")

_MS_BIND, _MS_REC, _MS_SHARED, _MNT_DETACH = 0x1000, 0x4000, 0x100000, 2


def create_namespace(name: str) -> str:
    """Make the named namespace if it is missing, bring its lo up, and return its path."""
    path = _named(name)
    _share_directory()
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444))
    except FileExistsError:
        if is_namespace(path):
            return str(path)

    def make() -> None:
        libc_call("unshare", ctypes.c_int(CLONE_NEWNET))
        libc_call(
            "mount", b"/proc/thread-self/ns/net", os.fsencode(path), None, ctypes.c_ulong(_MS_BIND), None
        )

    try:
        in_thread(make)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise NetlinkError(
            error.errno or 0, f"cannot make namespace {name}: {error.strerror}; this needs root"
        ) from error
    set_link(path, "lo", up=True)
    return str(path)


def delete_namespace(name: str) -> bool:
    """Unname a namespace; the kernel frees it with its last process and socket. False if it was not there."""
    path = _named(name)
    while True:  # one mount lies over another when two makers raced; every one of them must go
        try:
            libc_call("umount2", os.fsencode(path), ctypes.c_int(_MNT_DETACH))
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ENOENT):
                break
            raise NetlinkError(
                error.errno or 0, f"cannot delete namespace {name}: {error.strerror}"
            ) from error
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    return True


def list_namespaces(prefix: str = "") -> list[str]:
    """Names under /run/netns that start with `prefix`, sorted."""
    try:
        return sorted(entry.name for entry in NAMESPACES.iterdir() if entry.name.startswith(prefix))
    except FileNotFoundError:
        return []


def _share_directory() -> None:
    """Make /run/netns a shared mount, as iproute2 does, so that names appear in other mount namespaces."""
    NAMESPACES.mkdir(mode=0o755, parents=True, exist_ok=True)
    target = os.fsencode(NAMESPACES)
    try:
        libc_call("mount", b"", target, b"none", ctypes.c_ulong(_MS_SHARED | _MS_REC), None)
    except OSError as error:
        if error.errno != errno.EINVAL:  # EINVAL: not a mount point yet
            raise NetlinkError(
                error.errno or 0, f"cannot share {NAMESPACES}: {error.strerror}; this needs root"
            ) from error
        libc_call("mount", target, target, b"none", ctypes.c_ulong(_MS_BIND | _MS_REC), None)
        libc_call("mount", b"", target, b"none", ctypes.c_ulong(_MS_SHARED | _MS_REC), None)


def _named(name: str) -> Path:
    if not name or "/" in name or name in (".", "..") or len(os.fsencode(name)) > 255:
        raise NetlinkError(
            errno.EINVAL, f"{name!r} cannot name a namespace: one path component of 1 to 255 bytes"
        )
    return NAMESPACES / name
