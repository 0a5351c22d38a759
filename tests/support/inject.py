"""Have a running process make one system call, as somebody would who took it over: by ptrace(2), x86_64 alone.

It is stopped where it waits in a call of its own; the instruction before is that call's, and runs once more with other registers.
"""
from __future__ import annotations

import ctypes
import os
import signal
from pathlib import Path

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_LIBC.ptrace.restype = ctypes.c_long
SYSCALL, GETREGS, SETREGS, DETACH, SEIZE, INTERRUPT, WALL = 24, 12, 13, 17, 0x4206, 0x4207, 0x40000000
NAMES = ["r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi", "orig_rax", "rip", "cs",
         "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs"]  # sys/user.h, user_regs_struct


class Registers(ctypes.Structure):
    _fields_ = [(name, ctypes.c_ulonglong) for name in NAMES]


def _ptrace(request: int, pid: int, at: int = 0, data: object = None) -> None:
    if _LIBC.ptrace(request, pid, at, data) < 0:  # type: ignore[arg-type]
        raise OSError(ctypes.get_errno(), f"ptrace({request:#x}): {os.strerror(ctypes.get_errno())}")


def system_call(pid: int, number: int, *arguments: int) -> int:
    """The signal that it has got for it (and soon dies of), or 0: the call was made, and it goes on as before."""
    assert os.uname().machine == "x86_64"
    _ptrace(SEIZE, pid)
    _ptrace(INTERRUPT, pid)
    os.waitpid(pid, WALL)
    before = Registers()
    _ptrace(GETREGS, pid, 0, ctypes.byref(before))
    now = Registers.from_buffer_copy(before)
    assert ctypes.c_longlong(before.orig_rax).value >= 0, "it is not inside a system call"
    now.rip, now.rax, now.orig_rax = before.rip - 2, number, (1 << 64) - 1
    for name, value in zip(("rdi", "rsi", "rdx", "r10", "r8", "r9"), (*arguments, *(0,) * 6), strict=False):
        setattr(now, name, value & (1 << 64) - 1)
    _ptrace(SETREGS, pid, 0, ctypes.byref(now))
    for _ in ("entry", "exit"):
        _ptrace(SYSCALL, pid)
        _, status = os.waitpid(pid, WALL)
        if not os.WIFSTOPPED(status):       # killed at once, not by a handler's way
            return os.WTERMSIG(status)
    refused = _pending(pid) >> signal.SIGSYS - 1 & 1
    if not refused:
        _ptrace(SETREGS, pid, 0, ctypes.byref(before))
    _ptrace(DETACH, pid)
    return signal.SIGSYS if refused else 0


def _pending(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("SigPnd:")), 16)
