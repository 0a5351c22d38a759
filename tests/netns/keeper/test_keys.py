"""Which worker has which private key: real keeper, real workers, pods in namespaces."""
from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from agent import netlink
from agent.dataplane.client import KeeperClient, connect
from agent.dataplane.protocol import WorkerState
from tests.support.keeper import Keeper, running
from tests.support.keys import held
from tests.support.netns import Namespaces, Netns

pytestmark = pytest.mark.netns
A, B = "spiffe://cluster.local/ns/default/sa/a", "spiffe://cluster.local/ns/default/sa/b"


@pytest.fixture
def keeper(tmp_path: Path) -> Iterator[Keeper]:
    with running(tmp_path / "run") as one:
        yield one


@pytest.fixture
async def client(keeper: Keeper) -> AsyncIterator[KeeperClient]:
    one = await connect(keeper.path)
    yield one
    await one.close()


async def add(client: KeeperClient, handle: int, pod: Netns, identity: str) -> None:
    fd = netlink.open_namespace(pod.path)
    try:
        await client.add_pod(handle, f"uid-{handle}", (4, 6), fd, identity)
    finally:
        os.close(fd)


async def make(keeper: Keeper, client: KeeperClient, identity: str) -> tuple[int, bytes]:
    """Number and bytes of a new key."""
    before = held(keeper.pid)
    number, _ = await client.make_key(identity)
    (key,) = held(keeper.pid) - before
    return number, key


async def workers(client: KeeperClient) -> list[set[bytes]]:
    """What each worker holds, in the order of their indexes."""
    return [held(one.pid) for one in await client.workers()]


async def has(client: KeeperClient, *wanted: set[bytes]) -> None:
    """Workers take a message when their loop turns; in which of them a pod is, is the keeper's choice."""
    async with asyncio.timeout(10):
        while sorted(map(sorted, await workers(client))) != sorted(map(sorted, wanted)):
            await asyncio.sleep(0.02)


async def test_a_worker_has_the_keys_of_its_pods_and_no_other(keeper: Keeper, client: KeeperClient, namespaces: Namespaces) -> None:
    _, early = await make(keeper, client, A)
    await has(client, set(), set())
    await add(client, 1, namespaces.make("pod-1"), A)
    await has(client, {early}, set())
    await add(client, 2, namespaces.make("pod-2"), B)
    await has(client, {early}, set())
    _, late = await make(keeper, client, B)
    await has(client, {early}, {late})
    _, second = await make(keeper, client, A)
    await has(client, {early, second}, {late})
    await add(client, 3, namespaces.make("pod-3"), "")
    await has(client, {early, second}, {late})


async def test_a_key_goes_with_its_identitys_last_pod_and_when_it_is_forgotten(
        keeper: Keeper, client: KeeperClient, namespaces: Namespaces) -> None:
    number, key = await make(keeper, client, A)
    await add(client, 1, namespaces.make("pod-1"), A)
    await add(client, 2, namespaces.make("pod-2"), A)
    await has(client, {key}, {key})
    await client.delete_pod(1)
    await has(client, {key}, set())
    await client.forget_key(number)
    await has(client, set(), set())
    assert held(keeper.pid) == set()


async def test_a_pod_that_gets_another_identity_loses_the_key_of_the_first(
        keeper: Keeper, client: KeeperClient, namespaces: Namespaces) -> None:
    pod = namespaces.make("pod")
    _, first = await make(keeper, client, A)
    _, second = await make(keeper, client, B)
    await add(client, 1, pod, A)
    await has(client, {first}, set())
    await add(client, 1, pod, B)
    await has(client, {second}, set())


async def test_a_worker_that_dies_leaves_its_keys_to_the_one_that_takes_its_pods(
        keeper: Keeper, client: KeeperClient, namespaces: Namespaces) -> None:
    _, first = await make(keeper, client, A)
    _, second = await make(keeper, client, B)
    await add(client, 1, namespaces.make("pod-1"), A)
    await add(client, 2, namespaces.make("pod-2"), B)
    await has(client, {first}, {second})
    for one in await client.workers():
        os.kill(one.pid, signal.SIGKILL)
        async with asyncio.timeout(10):
            while one.pid in {now.pid for now in await client.workers() if now.state is WorkerState.READY} or len(
                    [now for now in await client.workers() if now.state is WorkerState.READY]) < 2:
                await asyncio.sleep(0.02)
    found = await workers(client)
    assert found[0] | found[1] == {first, second}
    listings = await client.workers()
    assert sum(one.pods for one in listings) == 2
    for one, keys in zip(listings, found, strict=True):
        assert len(keys) >= one.pods


async def test_a_worker_keeps_the_key_of_a_pod_that_moved_because_its_connections_live_on(
        keeper: Keeper, client: KeeperClient, namespaces: Namespaces) -> None:
    """Two pods with one worker dead are both of the other; when one goes back its key stays with both."""
    first_worker, second_worker = await client.workers()
    _, key_a = await make(keeper, client, A)
    _, key_b = await make(keeper, client, B)
    await add(client, 1, namespaces.make("pod-1"), A)
    await add(client, 2, namespaces.make("pod-2"), B)
    await has(client, {key_a}, {key_b})
    os.kill(first_worker.pid, signal.SIGKILL)
    async with asyncio.timeout(10):
        while (now := await client.workers())[0].pid == first_worker.pid or [one.pods for one in now] != [1, 1]:
            await asyncio.sleep(0.02)
    survivor = next(one for one in await client.workers() if one.pid == second_worker.pid)
    assert held(survivor.pid) == {key_a, key_b}
