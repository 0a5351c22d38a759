"""Runs a command for which the kernel refuses system calls with EPERM, as locked-down kernels and containers do: a seccomp filter.

    python -m tests.support.refuse bpf,mount COMMAND...
"""
from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys

NUMBERS = {"x86_64": {"bpf": 321, "mount": 165, "pidfd_getfd": 438}, "aarch64": {"bpf": 280, "mount": 40, "pidfd_getfd": 438}}
_LOAD_NUMBER, _IF_EQUAL, _RETURN = 0x20, 0x15, 0x06  # BPF_LD|W|ABS at 0 (seccomp_data.nr), BPF_JMP|JEQ|K, BPF_RET|K
_ALLOW, _EPERM = 0x7FFF0000, 0x00050001  # SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO | EPERM
_NO_NEW_PRIVS, _SECCOMP, _FILTER = 38, 22, 2  # PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def refuse(names: list[str]) -> None:
    """For this process and what it starts, for good."""
    lines = [(_LOAD_NUMBER, 0, 0, 0)]
    for name in names:
        lines += [(_IF_EQUAL, 0, 1, NUMBERS[platform.machine()][name]), (_RETURN, 0, 0, _EPERM)]
    code = b"".join(struct.pack("=HBBI", *line) for line in (*lines, (_RETURN, 0, 0, _ALLOW)))
    room = ctypes.create_string_buffer(code, len(code))
    program = ctypes.create_string_buffer(struct.pack("@HP", len(code) // 8, ctypes.addressof(room)))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(_SECCOMP, _FILTER, program, 0, 0):
        raise OSError(ctypes.get_errno(), "the filter is refused")


if __name__ == "__main__":
    refuse(sys.argv[1].split(","))
    os.execvp(sys.argv[2], sys.argv[2:])
