"""The filter of a worker, tried: as the kernel runs it in processes of their own, and as a program for both machines."""
from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import re
import signal
import socket
import struct
import subprocess
from collections.abc import Iterator

import pytest
from ext.sys.seccomp import CALLS, py_program
from ext.sys.seccomp_door import confine, sanitized
from ext.sys.syscalls import numbers, told

MACHINE = os.uname().machine
LIBC = ctypes.CDLL(None, use_errno=True)
HIGHEST = 1024  # no table goes so far
UID = 64_322
ALLOW, TRAP, KILL = 0x7FFF0000, 0x00030000, 0x80000000
ARCHES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
HEADERS = {"x86_64": ("asm/unistd_64.h",), "aarch64": ("asm-generic/unistd.h", "-D__BITS_PER_LONG=64", "-D__ARCH_WANT_RENAMEAT",
                                                       "-D__ARCH_WANT_SET_GET_RLIMIT", "-D__ARCH_WANT_NEW_STAT",
                                                       "-D__ARCH_WANT_SYS_CLONE3", "-D__ARCH_WANT_MEMFD_SECRET")}
ALLOWED = {numbers(MACHINE)[name] for name, _ in CALLS if name in numbers(MACHINE)}
# uretprobe and uprobe: since 6.13 and 6.17 the kernel lets them pass every filter (kernel/seccomp.c, seccomp_uprobe_exception): they
# work only from a page that the kernel itself mapped for a probe, and fail elsewhere.
PROBES = {335, 336} if MACHINE == "x86_64" else set()
ANY = {numbers(MACHINE)[name] for name, rules in CALLS if not rules and name in numbers(MACHINE)}


def attempt(number: int, *arguments: int) -> tuple[int, int, int]:
    """(signal or 0, refused calls told, number told) of a process that is confined as a worker is and then makes this one call."""
    with mmap.mmap(-1, 4096) as told_here:
        pid = os.fork()
        if pid == 0:
            try:
                confine(told_here, UID)
                LIBC.syscall(ctypes.c_long(number), *(ctypes.c_long(one) for one in arguments))
                LIBC.syscall(ctypes.c_long(numbers(MACHINE)["exit_group"]), 0)
            finally:
                os._exit(99)
        _, status = os.waitpid(pid, 0)
        assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0, f"{number}: exit status {os.WEXITSTATUS(status)}"
        calls, last = struct.unpack_from("<QQ", told_here)
        return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0, calls, last


@pytest.mark.parametrize("first", range(0, HIGHEST, 128))
def test_every_number_that_is_not_on_the_list_is_death_by_sigsys_and_told(first: int) -> None:
    assert MACHINE in ARCHES
    for number in set(range(first, first + 128)) - ALLOWED - PROBES:
        assert attempt(number, -1, -1, -1, -1, -1, -1) == (signal.SIGSYS, 1, number), told(number)


def test_the_kernels_own_exception_does_nothing_for_a_worker() -> None:
    for number in PROBES:
        ended, calls, _ = attempt(number, -1, -1)
        assert (ended, calls) in {(0, 0), (signal.SIGILL, 0), (signal.SIGSEGV, 0), (signal.SIGSYS, 1)}


def test_what_is_on_the_list_without_a_rule_reaches_the_kernel() -> None:
    for number in ANY:
        first = 0 if number == numbers(MACHINE)["exit_group"] else -1
        assert attempt(number, first, 0, 0, 0, 0, 0)[:2] == (0, 0), told(number)


@pytest.mark.skipif(MACHINE != "x86_64", reason="x32 is a table of x86_64 alone")
def test_calls_of_x32_are_death_without_a_word() -> None:
    for number in (0, 1, 59, 45, 520):
        assert attempt(0x40000000 | number, -1) == (signal.SIGSYS, 0, 0)


@pytest.mark.skipif(MACHINE != "x86_64", reason="int 0x80 is an instruction of x86_64")
def test_calls_by_the_32_bit_door_are_death_without_a_word() -> None:
    with mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC) as page, mmap.mmap(-1, 4096) as told_here:
        page.write(bytes.fromhex("b814000000cd80c3"))       # mov eax, 20 (getpid there); int 0x80; ret
        at = ctypes.addressof(ctypes.c_char.from_buffer(page))
        pid = os.fork()
        if pid == 0:
            confine(told_here, UID)
            ctypes.CFUNCTYPE(ctypes.c_int)(at)()
            LIBC.syscall(ctypes.c_long(numbers(MACHINE)["exit_group"]), 0)
        _, status = os.waitpid(pid, 0)
        assert os.WTERMSIG(status) in (signal.SIGSYS, signal.SIGSEGV)       # SEGV: a kernel without that door
        assert struct.unpack_from("<QQ", told_here) == (0, 0)


def call(name: str, *arguments: int) -> tuple[str, tuple[int, ...]]:
    return name, arguments


SOCK = socket
CLOEXEC_NONBLOCK = os.O_CLOEXEC | os.O_NONBLOCK
REFUSED = [
    call("execve", 0, 0, 0), call("execveat", -1, 0, 0, 0, 0), call("ptrace", 16, 1), call("clone", 17, 0), call("clone3", 0, 0),
    call("openat", -100, 0, 0), call("openat2", -100, 0, 0, 0), call("open_by_handle_at", -1, 0, 0), call("unshare", 0x40000000),
    call("setns", -1, 0x40000000), call("mount", 0, 0, 0, 0, 0), call("bpf", 0, 0, 0), call("io_uring_setup", 1, 0),
    call("userfaultfd", 0), call("perf_event_open", 0, 0, 0, 0, 0), call("keyctl", 0), call("process_vm_writev", 1, 0, 0, 0, 0, 0),
    call("kill", 1, 0), call("tgkill", 1, 1, 0), call("pidfd_open", 1, 0), call("pidfd_getfd", -1, 0, 0), call("prctl", 4, 1),
    call("seccomp", 1, 0, 0), call("setuid", 0), call("capset", 0, 0), call("memfd_create", 0, 0), call("mprotect", 0, 4096, 1),
    call("rt_sigaction", 31, 0, 0, 8), call("rt_sigprocmask", 0, 0, 0, 8), call("rt_sigreturn"), call("sigaltstack", 0, 0),
    call("read", 0, 0, 0), call("write", 2, 0, 0), call("sendmmsg", -1, 0, 0, 0), call("recvmmsg", -1, 0, 0, 0, 0),
    call("ioctl", 0, 0x5401),
    call("dup", 0), call("tee", 0, 1, 1, 0), call("vmsplice", 1, 0, 0, 0), call("sendfile", 1, 0, 0, 1), call("listen", 3, 1),
    call("accept", 3, 0, 0),
    *(call("socket", family, kind, 0) for family in (SOCK.AF_UNIX, SOCK.AF_INET, SOCK.AF_INET6, SOCK.AF_NETLINK, SOCK.AF_PACKET, 38, 40)
      for kind in (SOCK.SOCK_STREAM, SOCK.SOCK_RAW)),
    call("socketpair", SOCK.AF_UNIX, SOCK.SOCK_STREAM, 0, 0),
    call("mmap", 0, 4096, 4, 0x22, -1, 0), call("mmap", 0, 4096, 7, 0x22, -1, 0), call("mmap", 0, 4096, 3, 0x21, -1, 0),
    call("mmap", 0, 4096, 3, 0x32, -1, 0), call("mmap", 0, 4096, 3, 0x20, -1, 0), call("mmap", 0, 4096, 1 << 24, 0x22, -1, 0),
    call("mremap", 0, 4096, 8192, 3, 0), call("mremap", 0, 4096, 8192, 0, 0), call("madvise", 0, 4096, 14), call("madvise", 0, 0, 8),
    *(call("fcntl", 0, command, 0) for command in (0, 1, 2, 3, 4, 8, 15, 1024, 1030, 1033, 1034)),
    call("pipe2", 0, 0), call("pipe2", 0, CLOEXEC_NONBLOCK | os.O_DIRECT), call("pipe2", 0, CLOEXEC_NONBLOCK | os.O_EXCL),
    call("setsockopt", 0, 1, 36, 0, 4), call("setsockopt", 0, 1, 26, 0, 4), call("setsockopt", 0, 1, 25, 0, 4),
    call("setsockopt", 0, 0, 19, 0, 4), call("setsockopt", 0, 0, 64, 0, 4), call("setsockopt", 0, 6, 31, 0, 4),
    call("setsockopt", 0, 6, 13, 0, 4), call("setsockopt", 0, 41, 75, 0, 4), call("setsockopt", 0, 6 | 1 << 8, 1, 0, 4),
    call("getsockopt", 0, 1, 17, 0, 0), call("getsockopt", 0, 1, 77, 0, 0), call("getsockopt", 0, 0, 64, 0, 0),
    *(call("getsockopt", 0, 6, option, 0, 0) for option in (1, 9, 13, 26, 31, 35)), call("getsockopt", 0, 1, 11, 0, 0),
    call("getsockopt", 0, 0, 11, 0, 0), call("getsockopt", 0, 41, 11, 0, 0), call("getsockopt", 0, 6 | 1 << 8, 11, 0, 0),
    call("lseek", 0, 0, 0), call("lseek", 0, 0, 3), call("clock_gettime", 2, 0), call("clock_gettime", -6, 0),
    call("futex", 0, 0, 0), call("futex", 0, 129 | 256, 0), call("futex", 0, 134, 0), call("epoll_pwait", -1, 0, 0, 0, 1, 8),
    call("epoll_pwait", -1, 0, 0, 0, 1 << 32, 8),
]


@pytest.mark.parametrize(("name", "arguments"), REFUSED, ids=lambda one: one if isinstance(one, str) else "-".join(f"{n:x}" for n in one))
def test_a_forbidden_call_is_death_by_sigsys_and_told(name: str, arguments: tuple[int, ...]) -> None:
    number = numbers(MACHINE)[name]
    assert attempt(number, *arguments) == (signal.SIGSYS, 1, number)
    assert told(number) == f"{name} ({number})"


@pytest.mark.parametrize(("name", "arguments"), [
    call("mmap", 0, 4096, 3, 0x22, -1, 0), call("mmap", 0, 4096, 1, 2, -1, 0), call("mmap", 0, 4096, 3, 0x4022, -1, 0),
    call("mremap", 0, 4096, 8192, 1, 0), call("madvise", 0, 4096, 4), call("fcntl", -1, 1031, 0), call("fcntl", -1, 1032),
    call("pipe2", 0, CLOEXEC_NONBLOCK), call("setsockopt", -1, 6, 1, 0, 4), call("setsockopt", -1, 1, 13, 0, 8),
    call("setsockopt", -1, 6 | 1 << 32, 1, 0, 4), call("getsockopt", -1, 0, 80, 0, 0), call("getsockopt", -1, 41, 80, 0, 0),
    call("getsockopt", -1, 1, 4, 0, 0), call("getsockopt", -1, 6, 11, 0, 0), call("lseek", -1, 0, 2), call("clock_gettime", 0, 0),
    call("clock_gettime", 1, 0), call("futex", 0, 129, 1), call("epoll_pwait", -1, 0, 0, 0, 0, 8),
], ids=lambda one: one if isinstance(one, str) else "-".join(f"{n:x}" for n in one))
def test_what_a_rule_allows_reaches_the_kernel(name: str, arguments: tuple[int, ...]) -> None:
    assert attempt(numbers(MACHINE)[name], *arguments)[:2] == (0, 0)


def test_every_row_of_the_list_with_a_rule_is_tried_both_ways() -> None:
    ruled = {name for name, rules in CALLS if rules}
    refused = {name for name, _ in REFUSED}
    assert ruled <= refused, "a rule that nothing is refused by"


# ---- the program, for the machine that is not here too ---------------------------------------------------------------


def run(program: bytes, number: int, arch: int, arguments: tuple[int, ...] = ()) -> int:
    """What it returns; an independent reading of linux/bpf_common.h and struct seccomp_data."""
    data = struct.pack("<IIQ6Q", number & 0xFFFFFFFF, arch, 0, *((*arguments, *(0,) * 6)[:6]))
    code = list(struct.iter_unpack("<HBBI", program))
    at = accumulator = 0
    while True:
        operation, true, false, value = code[at]
        at += 1
        if operation == 0x20:
            accumulator = struct.unpack_from("<I", data, value)[0]
        elif operation == 0x54:
            accumulator &= value
        elif operation == 0x15:
            at += true if accumulator == value else false
        elif operation == 0x35:
            at += true if accumulator >= value else false
        else:
            assert operation == 0x06
            return value


@pytest.mark.parametrize("machine", sorted(ARCHES))
def test_the_program_allows_exactly_the_list_on_either_machine(machine: str) -> None:
    program, known = py_program(machine), numbers(machine)
    free = {known[name] for name, rules in CALLS if not rules and name in known}
    assert {number for number in range(4096) if run(program, number, ARCHES[machine]) == ALLOW} - free <= \
        {known[name] for name in ("clock_gettime", "epoll_pwait")}, "with arguments that are zero"
    assert free <= {number for number in range(4096) if run(program, number, ARCHES[machine]) == ALLOW}
    for name, arguments in REFUSED:
        if name in known:
            assert run(program, known[name], ARCHES[machine], tuple(a & (1 << 64) - 1 for a in arguments)) == TRAP, name


@pytest.mark.parametrize("machine", sorted(ARCHES))
def test_another_architecture_and_x32_are_killed(machine: str) -> None:
    program = py_program(machine)
    for arch in (0, 0x40000003, 0x40000028, 0xC0000015, *(set(ARCHES.values()) - {ARCHES[machine]})):
        assert {run(program, number, arch) for number in range(512)} == {KILL}
    high = {run(program, number, ARCHES[machine]) for number in (0x40000000, 0x4000003B, 0x7FFFFFFF, 0xFFFFFFFF)}
    assert high == ({KILL} if machine == "x86_64" else {TRAP})


def test_a_machine_without_a_table_has_no_program() -> None:
    with pytest.raises(LookupError, match="no table of system calls for riscv64"):
        py_program("riscv64")


def header_numbers(machine: str) -> Iterator[tuple[str, int]]:
    header, *defines = HEADERS[machine]
    done = subprocess.run(["gcc", "-E", "-dM", *defines, "-x", "c", "-"], input=f"#include <{header}>\n", capture_output=True,
                          text=True, check=True)
    raw = dict(re.findall(r"#define (__NR\w*) +(\S+)", done.stdout))
    for name, value in raw.items():
        while value in raw:
            value = raw[value]
        if name.startswith("__NR_") and value.isdigit():
            yield name.removeprefix("__NR_"), int(value)


@pytest.mark.parametrize("machine", sorted(ARCHES))
def test_names_and_numbers_are_those_of_the_kernels_headers(machine: str) -> None:
    if machine == "x86_64" and machine != MACHINE:
        pytest.skip("asm/unistd_64.h is there on x86_64 alone")
    found = {name: number for name, number in header_numbers(machine) if name not in ("syscalls", "arch_specific_syscall")}
    assert len(found) > 300
    known = numbers(machine)
    assert {name: known.get(name) for name in found} == found


def test_no_sanitizer_is_loaded_here_so_workers_are_confined() -> None:
    assert sanitized() == ("asan" in os.environ.get("LD_PRELOAD", ""))
    assert fcntl.F_SETFD == 2       # the numbers of fcntl above are Linux's
