"""A real keeper under random and mutated datagrams, from its own socket and from a worker: nothing ends it, nothing of it changes.

Again with the same choices: NARROWS_KEEPER_SEED=... (the failing run prints it); what a worker says comes from it too. Longer:
NARROWS_KEEPER_SECONDS=600, which is all of it together: half of the time on the keeper's socket, half by a worker.

After it: the keeper lives, holds as many descriptors as before, the same pods and blobs, and answers the next agent's HELLO.
"""
from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import random
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ext.keeper.slot import Slot

from agent import netlink
from agent.dataplane import blobs
from agent.dataplane.client import KeeperClient, connect
from agent.dataplane.protocol import HEAD, Message, WorkerState, text
from tests.support.keeper import Keeper, running
from tests.support.netns import Namespaces
from tests.support.puppet import GOT
from tests.support.wait import until

pytestmark = [pytest.mark.netns, pytest.mark.timeout(900)]
SECONDS = float(os.environ.get("NARROWS_KEEPER_SECONDS") or 20)
SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
UID = 64_323
A_SECOND = 30_000  # sockets for one worker
CLOSES = (Message.DRAIN, Message.SHUTDOWN)  # do as they are told when they are well-formed: always sent with a byte too many


@pytest.fixture
def dice() -> random.Random:
    seed = int(os.environ.get("NARROWS_KEEPER_SEED") or random.SystemRandom().randrange(1 << 32))
    print(f"NARROWS_KEEPER_SEED={seed}")
    return random.Random(seed)


@pytest.fixture
def keeper(tmp_path: Path) -> Iterator[Keeper]:
    with running(tmp_path / "run", puppets=True) as one:
        yield one


def memfd(data: bytes, seals: int) -> int:
    fd = os.memfd_create("hostile", os.MFD_ALLOW_SEALING)
    os.write(fd, data)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def mutated(dice: random.Random, data: bytes) -> bytes:
    """Never what it was: one of a changed byte behind the id, a cut, something behind it."""
    way = dice.randrange(3)
    if way == 0:
        at = dice.choice([*range(8), *range(16, len(data))])
        return data[:at] + bytes((data[at] ^ dice.randint(1, 255),)) + data[at + 1:]
    return data[:dice.randrange(len(data))] if way == 1 else data + dice.randbytes(dice.randint(1, 64))


class Descriptors:
    """One of each kind that a peer could send; none of them may be taken."""

    def __init__(self, dice: random.Random) -> None:
        whole = blobs.encode_transaction(9, [blobs.put_note("hostile", b"x"), blobs.Put(6, "hostile", b"y")])
        left, right = socket.socketpair()
        self.held = [os.open("/dev/null", os.O_RDWR), os.open("/", os.O_RDONLY), os.epoll_create1(0) if hasattr(os, "epoll_create1")
                     else os.open("/dev/zero", os.O_RDONLY), *os.pipe(), left.detach(), right.detach(),
                     os.open("/proc/self/ns/mnt", os.O_RDONLY), os.open("/proc/self/ns/user", os.O_RDONLY), os.pidfd_open(os.getpid()),
                     memfd(whole, 0), memfd(whole, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW), memfd(b"", SEALS), memfd(b"x" * 27, SEALS)]
        self.held += [memfd(mutated(dice, whole), SEALS) for _ in range(20)]

    def close(self) -> None:
        for fd in self.held:
            os.close(fd)


def payload(dice: random.Random, kind: int) -> bytes:
    number = struct.pack("<I", dice.choice((0, 2, 77, 0xFFFFFFFF, dice.randrange(1 << 32)))).replace(b"\x01\0\0\0", b"\x02\0\0\0")
    good = {Message.HELLO: struct.pack("<HH", dice.randrange(3), dice.randrange(3)), Message.POD_DEL: number,
            Message.POD_ADD: number + text(dice.choice(("", "a", "x" * 129, "\N{SNOWMAN}"))) + bytes((dice.randrange(5),)),
            Message.DRAIN: number}.get(Message(kind) if kind in set(Message) else Message.OK, b"")
    if kind in CLOSES:
        return good + b"!"
    way = dice.randrange(4)
    if way == 0:
        return good
    if way == 1:
        return good[:dice.randrange(len(good) + 1)] if kind != Message.POD_DEL else b""
    return good + dice.randbytes(dice.choice((1, 7, 100, 5_000, 70_000))) if way == 2 else dice.randbytes(dice.randrange(5, 300))


def datagram(dice: random.Random) -> bytes:
    kind = dice.choice((*Message, *Message, *range(64, 73), dice.randrange(1 << 16)))
    whole = HEAD.pack(kind, dice.choice((1, 1, 1, 1, 0, 2, 65535)), dice.randrange(1 << 32)) + payload(dice, kind)
    return whole if dice.random() < 0.95 else whole[:dice.randrange(1, 8)]


def peer(path: Path) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    made.settimeout(5)
    made.connect(str(path))
    made.setblocking(False)
    return made


def swallow(noise: socket.socket) -> bool:
    """Everything that waits is read; False: the keeper closed it."""
    while True:
        try:
            data, fds, _, _ = socket.recv_fds(noise, 262144, 253)
        except BlockingIOError:
            return True
        except ConnectionResetError:            # with something unread
            return False
        for fd in fds:
            os.close(fd)
        if not data:
            return False


async def held(client: KeeperClient) -> tuple[object, object]:
    found = await client.inventory()
    return found.blobs, found.pods


async def furnish(keeper: Keeper, namespaces: Namespaces) -> tuple[object, object]:
    """A pod and blobs, so that there is something to lose; no connection is left."""
    pod = namespaces.make("pod")
    client = await connect(keeper.path)
    fd = netlink.open_namespace(pod.path)
    await client.add_pod(1, "pod-1", (4, 6), fd)
    os.close(fd)
    await client.commit([blobs.put_pod("pod-1", 1, "w", "ns=default", ()), blobs.put_note("n", b"x")])
    before = await held(client)
    await client.close()
    return before


async def unharmed(keeper: Keeper, before: tuple[object, object], descriptors: int) -> None:
    assert keeper.process.poll() is None, keeper.text[-2000:]
    client = await connect(keeper.path)         # HELLO is answered
    assert await held(client) == before
    await client.close()
    until(lambda: keeper.descriptors() == descriptors, f"{descriptors} descriptors, not {keeper.descriptors()}")
    assert "Traceback" not in keeper.text


async def test_random_datagrams_on_the_keepers_socket_change_nothing(
        keeper: Keeper, namespaces: Namespaces, dice: random.Random) -> None:
    before = await furnish(keeper, namespaces)
    until(lambda: "the agent is gone" in keeper.text, "the agent is gone")
    descriptors, given = keeper.descriptors(), Descriptors(dice)
    peers: list[socket.socket] = []
    said, end = 0, time.monotonic() + SECONDS / 2
    while time.monotonic() < end:
        if not peers or (len(peers) < 12 and dice.random() < 0.01):     # more than the keeper takes
            with contextlib.suppress(OSError):
                peers.append(peer(keeper.path))
            continue
        noise = dice.choice(peers)
        try:
            fds = dice.choices(given.held, k=dice.choice((0, 0, 0, 1, 1, 1, 2, 5, 253)))
            noise.sendmsg([datagram(dice)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))] if fds else [])
            said += 1
            alive = dice.random() < 0.3 or swallow(noise)
        except BlockingIOError:
            alive = swallow(noise)
        except OSError:
            alive = False
        if not alive or dice.random() < 0.002:
            noise.close()
            peers.remove(noise)
    for noise in peers:
        noise.close()
    given.close()
    assert said > 200, "hardly anything was tried"
    await unharmed(keeper, before, descriptors)


@pytest.mark.parametrize(("word", "share"), [("noise", 0.3), ("flood", 0.2)])
async def test_a_worker_that_sends_what_it_likes_harms_itself_alone(
        keeper: Keeper, namespaces: Namespaces, dice: random.Random, word: str, share: float) -> None:
    """The puppet of index 1 turns hostile by a transaction that the keeper passes on and that stays in force: so does each replacement.
    The number in it is its seed."""
    await furnish(keeper, namespaces)
    client = await connect(keeper.path)
    await client.commit([blobs.Put(6, f"{word}-only-1 {dice.randrange(1 << 30)}", b"y")])
    before = await held(client)
    slowest, asked, end = 0.0, 0, time.monotonic() + SECONDS * share
    while time.monotonic() < end:
        began = time.monotonic()
        workers = await client.workers()
        slowest, asked = max(slowest, time.monotonic() - began), asked + 1
        assert workers[1].restarts == 0 and workers[1].state is WorkerState.READY, workers
    assert asked > 20 and slowest < 3, (asked, slowest)      # the agent's own bound on a keeper that hangs
    if word == "noise":
        assert workers[0].restarts > 0, "nothing of the noise was refused"
    await client.commit([blobs.put_note("still", b"there")])
    await client.commit([blobs.Delete(129, "still")])
    assert await held(client) == before
    await client.close()
    assert keeper.process.poll() is None and "Traceback" not in keeper.text
    assert keeper.descriptors() < 64, "one set for each worker, and no more"


async def test_a_worker_gets_30000_sockets_a_second_and_no_more_however_many_it_asks_for(keeper: Keeper, namespaces: Namespaces) -> None:
    """Without a bound a hostile worker would have all of the keeper's time, which answers the agent meanwhile."""
    client = await connect(keeper.path)
    fd = netlink.open_namespace(namespaces.make("pod").path)
    await client.add_pod(1, "pod-1", (4, 6), fd)
    os.close(fd)
    served = next(worker.index for worker in await client.workers() if worker.pods)
    segments = await client.shm()
    statistics = next(one.statistics for one in segments if one.index == served)
    with mmap.mmap(statistics, mmap.PAGESIZE, prot=mmap.PROT_READ) as header:
        def got() -> int:
            return int(struct.unpack_from("<Q", header, GOT)[0])

        await client.commit([blobs.Put(6, f"flood-only-{served} 1", b"y")])
        first, began = until(got, "it gets some", timeout=20), time.monotonic()
        assert first <= A_SECOND
        seen = []
        while time.monotonic() < began + 4:
            await client.workers()
            seen.append((time.monotonic() - began, got()))
    for seconds, sockets in seen:
        assert sockets - first <= A_SECOND * (seconds + 1), "what it saves up is one second's"
    seconds, sockets = seen[-1]
    print(f"{(sockets - first) / seconds:,.0f} sockets a second")
    assert sockets > first + 1_000, "it was given some"
    assert [worker.restarts for worker in await client.workers()] == [0, 0]
    for one in segments:
        one.close()
    await client.close()


def test_the_bound_on_sockets_is_30000_a_second_and_what_was_not_asked_for_in_one_second() -> None:
    """The keeper's own count, by the real clock and asked as fast as can be."""
    slot = Slot(0)
    try:
        began = time.monotonic()
        given = slot.allowed(1 << 20)
        assert given == A_SECOND, "one second's is saved up"
        while (seconds := time.monotonic() - began) < 0.5:
            given += slot.allowed(253)
            assert given <= A_SECOND * (1 + time.monotonic() - began)
        given += slot.allowed(1 << 20)  # what came while this process waited for its turn
        assert given >= A_SECOND * (1 + seconds) - 2, "and nothing is lost"
    finally:
        slot.close()


def test_a_connection_of_another_user_is_refused_with_a_line_in_the_log(keeper: Keeper) -> None:
    """The directory and the socket's mode keep others out already; here both are opened, and the credentials are all there is."""
    os.chmod(keeper.run_dir, 0o755)
    os.chmod(keeper.path, 0o666)
    code = (f"import os, socket; os.setgid({UID}); os.setuid({UID}); s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
            f"os.fchdir({{}}); s.connect('keeper.sock'); print(s.recv(100) == b'')")
    directory = os.open(keeper.run_dir, os.O_PATH)
    try:
        done = subprocess.run([sys.executable, "-I", "-S", "-c", code.format(directory)], capture_output=True, text=True, check=False,
                              pass_fds=(directory,))
    finally:
        os.close(directory)
    assert done.stdout == "True\n", done.stderr
    until(lambda: f'"uid": {UID}' in keeper.text and "foreign user is refused" in keeper.text, "a line in the log")
