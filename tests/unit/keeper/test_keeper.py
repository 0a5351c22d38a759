"""What the keeper does with transactions, agents and workers that misbehave: real processes, puppets for workers."""
from __future__ import annotations

import asyncio
import os
import shutil
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from agent.dataplane import blobs
from agent.dataplane.client import KeeperAway, KeeperClient, KeeperRefused, connect
from agent.dataplane.protocol import Message, WorkerChange, WorkerState
from agent.dataplane.readers import Readers
from tests.support.keeper import Keeper, Raw, running
from tests.support.wait import until


@pytest.fixture
def keeper(tmp_path: Path) -> Iterator[Keeper]:
    with running(tmp_path / "run", puppets=True) as one:
        yield one


@pytest.fixture
async def client(keeper: Keeper) -> AsyncIterator[KeeperClient]:
    one = await connect(keeper.path)
    yield one
    await one.close()


def pod(key: str) -> blobs.Put:
    return blobs.Put(blobs.Kind.POD, key, b"payload")


async def held(client: KeeperClient) -> dict[str, bytes]:
    return {put.key: put.payload for put in (await client.inventory()).blobs}


async def event(client: KeeperClient, state: WorkerState, index: int = 0) -> WorkerChange:
    async with asyncio.timeout(10):
        async for one in client.events():
            if isinstance(one, WorkerChange) and one.state is state and index in (0, one.index):
                return one
    raise AssertionError


async def test_what_is_committed_is_in_the_inventory_of_the_next_agent(keeper: Keeper, client: KeeperClient) -> None:
    await client.commit([pod("a"), pod("b"), blobs.put_note("n", b"1"), blobs.put_resource("type", "name", "v1", b"any")])
    await client.commit([blobs.Delete(blobs.Kind.POD, "a"), blobs.put_note("n", b"2")])
    await client.close()
    again = await connect(keeper.path)
    inventory = await again.inventory()
    found = {(put.kind, put.key): put.payload for put in inventory.blobs}
    assert found.keys() == {(6, "b"), (129, "n"), (128, "type\nname")}
    assert found[129, "n"] == b"2"
    assert inventory.transaction == 2
    assert await again.commit([pod("c")]) == 3
    await again.close()


async def test_what_workers_refuse_is_not_kept_and_their_text_is_told(client: KeeperClient) -> None:
    await client.commit([pod("good")])
    with pytest.raises(KeeperRefused, match="poison"):
        await client.commit([pod("poison"), blobs.put_note("with it", b"")])
    assert (await held(client)).keys() == {"good"}
    assert [worker.restarts for worker in await client.workers()] == [0, 0]


async def test_what_workers_had_no_room_to_take_may_be_tried_again(client: KeeperClient) -> None:
    with pytest.raises(KeeperAway, match="full"):
        await client.commit([pod("full")])
    await client.commit([pod("better")])
    assert (await held(client)).keys() == {"better"}
    assert [worker.restarts for worker in await client.workers()] == [0, 0]


async def test_resources_and_notes_never_reach_a_worker(client: KeeperClient) -> None:
    await client.commit([blobs.put_note("poison", b"poison"), blobs.put_resource("t", "crash", "1", b"")])
    await client.commit([blobs.put_note("poison", b"silence"), pod("beside")])
    assert (await held(client)).keys() == {"poison", "t\ncrash", "beside"}
    assert [worker.restarts for worker in await client.workers()] == [0, 0]


async def test_a_worker_that_refuses_alone_is_replaced(client: KeeperClient) -> None:
    await client.commit([pod("poison-only-1")])
    died = await event(client, WorkerState.DIED)
    assert (died.index, died.status) == (1, -signal.SIGKILL)
    assert "poison-only-1" in await held(client)


async def test_a_worker_that_does_not_answer_is_replaced_within_its_deadline(client: KeeperClient) -> None:
    began = time.monotonic()
    with pytest.raises(KeeperAway, match="no worker answered"):
        await client.commit([pod("silence")])
    assert 1.5 < time.monotonic() - began < 4
    await event(client, WorkerState.REPLACED, 1)
    assert await held(client) == {}
    await client.commit([pod("after")])


async def test_a_worker_that_ends_is_told_replaced_and_filled_from_what_is_in_force(client: KeeperClient) -> None:
    await client.commit([pod("before")])
    with pytest.raises(KeeperAway):
        await client.commit([pod("crash")])
    assert (await event(client, WorkerState.DIED)).status == 3
    await event(client, WorkerState.REPLACED)
    async with asyncio.timeout(5):
        while {worker.state for worker in await client.workers()} != {WorkerState.READY}:
            await asyncio.sleep(0.01)
    assert [worker.restarts for worker in await client.workers()] == [1, 1]
    assert await held(client) == {"before": b"payload"}


async def test_a_worker_killed_with_9_is_replaced_in_under_200_ms(client: KeeperClient) -> None:
    times = []
    for _ in range(5):
        victim = (await client.workers())[0]
        began = time.monotonic()
        os.kill(victim.pid, signal.SIGKILL)
        assert (await event(client, WorkerState.REPLACED, 1)).pid != victim.pid
        times.append(time.monotonic() - began)
    assert min(times) < 0.2, times  # the best: a loaded machine makes the others slow, not the keeper


async def test_a_worker_gets_no_sockets_of_pods_it_does_not_serve_and_lives_on(client: KeeperClient) -> None:
    await client.commit([pod("greedy")])
    await client.commit([pod("next")])
    assert [worker.restarts for worker in await client.workers()] == [0, 0]


async def test_counters_outlive_the_worker(client: KeeperClient) -> None:
    before = await client.shm()
    readers = Readers(before)
    os.kill((await client.workers())[0].pid, signal.SIGKILL)
    await event(client, WorkerState.REPLACED, 1)
    again = await client.shm()
    inodes = [[os.stat(f"/proc/self/fd/{fd}").st_ino for fd in (one.statistics, one.log)] for one in again]
    assert len({inode for pair in inodes for inode in pair}) == 4
    assert set(readers.headers()) == {1, 2}
    assert (readers.series(), readers.drain_log(), readers.damaged) == ({}, [], 0)
    readers.close()
    for one in again:
        one.close()


async def test_the_newest_agent_is_heard_and_the_older_one_is_told(keeper: Keeper, client: KeeperClient) -> None:
    newer = await connect(keeper.path)
    with pytest.raises(KeeperAway, match="newer agent"):
        async for _ in client.events():
            pass
    with pytest.raises(KeeperAway):
        await client.commit([pod("late")])
    await newer.commit([pod("mine")])
    await newer.close()


async def test_who_only_looks_disturbs_nobody(keeper: Keeper, client: KeeperClient) -> None:
    onlooker = await connect(keeper.path, hello=False)
    assert len(await onlooker.workers()) == 2
    with pytest.raises(KeeperRefused, match="HELLO"):
        await onlooker.commit([pod("x")])
    await onlooker.close()
    await client.commit([pod("still the agent")])


async def test_a_keeper_that_goes_away_ends_every_waiting_call_with_a_clean_error(keeper: Keeper, client: KeeperClient) -> None:
    commit = asyncio.create_task(client.commit([pod("silence")]))
    await asyncio.sleep(0)
    os.kill(keeper.pid, signal.SIGKILL)
    with pytest.raises(KeeperAway):
        await commit
    with pytest.raises(KeeperAway):
        await client.workers()
    keeper.process.wait(5)


async def test_no_keeper_is_a_clean_error(tmp_path: Path) -> None:
    with pytest.raises(KeeperAway, match="no keeper answers"):
        await connect(tmp_path / "keeper.sock")


def test_a_run_directory_has_one_keeper(keeper: Keeper) -> None:
    second = Keeper(keeper.run_dir, puppets=True)
    try:
        assert second.process.wait(5) == 75
    finally:
        second.stop()
    assert f"in use by the keeper with pid {keeper.pid}" in second.text
    assert Raw(keeper.path).ask(Message.WORKERS)[0] == Message.WORKERS


def test_the_socket_of_a_keeper_that_crashed_is_replaced(keeper: Keeper) -> None:
    os.kill(keeper.pid, signal.SIGKILL)
    keeper.process.wait(5)
    assert keeper.path.exists()
    second = Keeper(keeper.run_dir, puppets=True)
    try:
        second.wait()
        assert Raw(keeper.path).hello().ask(Message.WORKERS)[0] == Message.WORKERS
    finally:
        assert second.stop() == 0


def test_a_run_directory_that_was_removed_meanwhile_is_no_failure(keeper: Keeper) -> None:
    shutil.rmtree(keeper.run_dir)
    assert keeper.stop() == 0
    assert "Traceback" not in keeper.text


def test_sigterm_ends_it_with_0_and_leaves_nothing(keeper: Keeper) -> None:
    assert (keeper.run_dir.stat().st_mode & 0o777, keeper.path.stat().st_mode & 0o777) == (0o700, 0o600)
    children = Path(f"/proc/{keeper.pid}/task/{keeper.pid}/children").read_text().split()
    assert len(children) == 2
    assert keeper.stop() == 0
    assert list(keeper.run_dir.iterdir()) == []
    assert not any(Path(f"/proc/{child}").exists() for child in children)


def test_workers_that_cannot_start_are_not_started_in_a_busy_loop(tmp_path: Path) -> None:
    keeper = Keeper(tmp_path / "run", "--workers", "1", "--worker-module", "no_such_module").wait()
    try:
        until(lambda: "the next starts in 400 ms" in keeper.text, "the wait between starts doubles")
        assert keeper.text.count("worker 1 started") == 23  # 21 times at once, then after 100 and 200 ms
    finally:
        assert keeper.stop() == 0


@pytest.mark.parametrize("options, said", [
    (("--workers", "0"), "--workers 0: a number from 1 to 64"),
    (("--worker-uid", "0"), "--worker-uid 0: a number from 1"),
    (("--worker-uid", "x"), "--worker-uid x: a number from 1"),
    (("--nonsense", "1"), "unknown option --nonsense"),
    (("--workers",), "--workers needs a value"),
])
def test_options_that_make_no_sense_are_refused_before_anything_starts(tmp_path: Path, options: tuple[str, ...], said: str) -> None:
    keeper = Keeper(tmp_path / "run", *options)
    assert keeper.process.wait(5) != 0
    assert said in keeper.text
    assert not keeper.run_dir.exists()


async def test_no_child_of_the_agent_inherits_what_the_keeper_gave_it(client: KeeperClient) -> None:
    segments = await client.shm()
    try:
        assert [os.get_inheritable(fd) for one in segments for fd in (one.statistics, one.log)] == [False] * 4
    finally:
        for one in segments:
            one.close()
