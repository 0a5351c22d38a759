"""A node whose kernel has no legacy tables, for real: in a thread or process that calls `hide`, and in all that it starts, the
kernel answers every question about iptables' tables with ENOPROTOOPT, as it does where ip_tables is neither built in nor loadable.

    python tests/support/hidden.py COMMAND...      runs a command like that

A seccomp filter over setsockopt(2) and getsockopt(2), so that nothing of ours knows that it is a test.
Numbers: linux/netfilter_ipv4/ip_tables.h, linux/netfilter_ipv6/ip6_tables.h, linux/seccomp.h, linux/filter.h.
"""
from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import sys

_CALLS = {"x86_64": (0xC000003E, 54, 55), "aarch64": (0xC00000B7, 208, 209)}  # audit arch, setsockopt, getsockopt
_OPTIONS = {0: (64, 65, 66, 67), 41: (64, 65, 68, 69)}  # by level, SOL_IP and SOL_IPV6
_PR_SET_SECCOMP, _MODE_FILTER = 22, 2
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_NR, _ARCH, _LEVEL, _NAME = 0, 4, 24, 32  # offsets in struct seccomp_data, low halves of the arguments


def hide() -> None:
    """For this thread and what it starts, for ever. Needs CAP_SYS_ADMIN. Raises OSError."""
    program = _program()
    code = b"".join(struct.pack("=HBBI", *step) for step in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    filters = struct.pack("=H6xQ", len(program), ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_SECCOMP, _MODE_FILTER, ctypes.create_string_buffer(filters, len(filters)), 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"seccomp: {os.strerror(number)}")


def _program() -> list[tuple[int, int, int, int]]:
    """(code, jump if true, jump if false, operand); jumps count from the next step."""
    arch, setting, getting = _CALLS[platform.machine()]
    refuse, allow = (_RETURN, 0, 0, _ERRNO | errno.ENOPROTOOPT), (_RETURN, 0, 0, _ALLOW)
    steps = [(_LOAD, 0, 0, _ARCH), (_EQUAL, 1, 0, arch), allow, (_LOAD, 0, 0, _NR), (_EQUAL, 2, 0, setting),
             (_EQUAL, 1, 0, getting), allow]
    for level, names in _OPTIONS.items():
        steps += [(_LOAD, 0, 0, _LEVEL), (_EQUAL, 0, len(names) + 3, level), (_LOAD, 0, 0, _NAME)]
        steps += [(_EQUAL, len(names) - at, 0, name) for at, name in enumerate(names)]
        steps += [allow, refuse]
    return [*steps, allow]


if __name__ == "__main__":
    hide()
    os.execvp(sys.argv[1], sys.argv[1:])
