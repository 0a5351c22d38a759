"""A real worker that makes a system call it may not make: it dies, is replaced, and everybody is told which call it was."""
from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from ext.sys.syscalls import numbers

from agent.dataplane.client import connect
from agent.dataplane.protocol import WorkerChange, WorkerState
from agent.dataplane.readers import Readers, refused_call, seccomp
from tests.support.inject import system_call
from tests.support.keeper import Keeper, running

pytestmark = [pytest.mark.netns, pytest.mark.skipif(os.uname().machine != "x86_64", reason="tests/support/inject.py knows x86_64 alone")]
NUMBER = numbers("x86_64")
ANOTHER_WAY = [("execve", ()), ("socket", (2, 1, 0)), ("openat", (-100, 0, 0)), ("ptrace", (16, 1)), ("clone", (17,)), ("setuid", (0,)),
               ("mmap", (0, 4096, 7, 0x22, -1, 0)), ("mprotect", (0, 4096, 5)), ("ioctl", (0, 0x5401)), ("kill", (1, 0)),
               ("setsockopt", (3, 1, 26, 0, 4)), ("prctl", (4, 1)), ("read", (0, 0, 0)), ("rt_sigreturn", ())]


def status_field(pid: int, name: str) -> str:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(line.partition(":")[2].strip() for line in lines if line.startswith(f"{name}:"))


@pytest.fixture
def keeper(tmp_path: Path) -> Iterator[Keeper]:
    with running(tmp_path / "run", workers=1) as one:
        yield one


async def test_a_running_worker_is_under_the_filter_and_a_call_on_the_list_goes_through(keeper: Keeper) -> None:
    client = await connect(keeper.path)
    worker = (await client.workers())[0]
    assert (status_field(worker.pid, "Seccomp"), status_field(worker.pid, "NoNewPrivs")) == ("2", "1")
    assert status_field(worker.pid, "SigBlk") == f"{(1 << 64) - 1 & ~(1 << signal.SIGSYS - 1) & ~(1 << 8) & ~(1 << 18) & ~(3 << 31):016x}"
    assert system_call(worker.pid, NUMBER["lseek"], -1, 0, 2) == 0
    assert (await client.workers())[0] == worker
    readers = Readers(await client.shm())
    assert [seccomp(header) for header in readers.headers().values()] == ["on"]
    readers.close()
    await client.close()


@pytest.mark.parametrize(("name", "arguments"), ANOTHER_WAY, ids=[name for name, _ in ANOTHER_WAY])
async def test_a_worker_that_makes_another_call_is_replaced_and_the_call_is_told(
        keeper: Keeper, name: str, arguments: tuple[int, ...]) -> None:
    client = await connect(keeper.path)
    readers = Readers(await client.shm())
    worker = (await client.workers())[0]
    before = readers.headers()[1]["refused_calls"]
    logged = len(keeper.text)
    assert system_call(worker.pid, NUMBER[name], *arguments) == signal.SIGSYS
    states = []
    async for event in client.events():
        if isinstance(event, WorkerChange):
            states.append((event.state, event.status))
            if event.state is WorkerState.REPLACED:
                break
    assert states[0] == (WorkerState.DIED, -signal.SIGSYS)
    header = readers.headers()[1]
    assert (header["refused_calls"], refused_call(header)) == (before + 1, f"{name} ({NUMBER[name]})")
    lines = [json.loads(line) for line in keeper.text[logged:].splitlines()]
    said = f"was killed for a system call that workers may not make: {name} ({NUMBER[name]})"
    assert any(said in line["message"] for line in lines), lines
    assert (await client.workers())[0].pid != worker.pid
    readers.close()
    await client.close()


async def test_seccomp_off_is_said_in_the_log_and_in_the_statistics(tmp_path: Path) -> None:
    with running(tmp_path / "run", "--seccomp", "off", workers=1) as one:
        client = await connect(one.path)
        readers = Readers(await client.shm())
        assert status_field((await client.workers())[0].pid, "Seccomp") == "0"
        assert [seccomp(header) for header in readers.headers().values()] == ["off: --seccomp off"]
        assert "runs without seccomp: --seccomp off" in one.text
        readers.close()
        await client.close()
