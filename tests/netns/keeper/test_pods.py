"""Real keeper, real workers, real namespaces: listeners, sockets, privileges and what a death of each process does."""
from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from agent import netlink
from agent.dataplane import blobs
from agent.dataplane.client import KeeperClient, KeeperRefused, connect
from agent.dataplane.protocol import WorkerChange, WorkerState
from tests.support.keeper import Keeper, running
from tests.support.netns import Namespaces, Netns
from tests.support.wait import until

pytestmark = pytest.mark.netns
UID = 15001
PORTS = ["15001", "15006", "15008"]


@pytest.fixture
def keeper(tmp_path: Path) -> Iterator[Keeper]:
    with running(tmp_path / "run") as one:
        yield one


@pytest.fixture
def puppets(tmp_path: Path) -> Iterator[Keeper]:
    """A keeper whose workers accept and say who they are."""
    with running(tmp_path / "puppets", puppets=True) as one:
        yield one


@pytest.fixture
async def client(keeper: Keeper) -> AsyncIterator[KeeperClient]:
    one = await connect(keeper.path)
    yield one
    await one.close()


async def add(client: KeeperClient, handle: int, uid: str, pod: Netns, families: tuple[int, ...] = (4, 6)) -> int:
    """POD_ADD; returns the namespace's inode."""
    fd = netlink.open_namespace(pod.path)
    try:
        await client.add_pod(handle, uid, families, fd)
        return os.fstat(fd).st_ino
    finally:
        os.close(fd)


def listening(pod: Netns) -> list[tuple[str, str]]:
    """(address, port) of what listens in a namespace, as ss(8) says."""
    lines = pod.run("ss", "-Hltn").stdout.splitlines()
    return sorted((address, port) for address, _, port in (line.split()[3].rpartition(":") for line in lines))


def connected(pod: Netns, port: int, host: str = "127.0.0.1") -> str:
    """What comes back over a connection, made inside the namespace; "refused" when it is."""
    code = ("import socket, sys\n"
            "try: s = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=10); print(s.recv(100).decode().strip())\n"
            "except ConnectionRefusedError: print('refused')")
    return pod.python(code, host, str(port)).stdout.strip()


async def until_state(client: KeeperClient, state: WorkerState) -> WorkerChange:
    async with asyncio.timeout(10):
        async for event in client.events():
            if isinstance(event, WorkerChange) and event.state is state:
                return event
    raise AssertionError


async def test_a_pod_gets_every_listener_in_its_own_namespace_for_both_families(
        client: KeeperClient, namespaces: Namespaces) -> None:
    pod, other = namespaces.make("pod"), namespaces.make("other")
    await add(client, 1, "pod-1", pod)
    assert listening(pod) == [("*", "15001"), ("*", "15006"), ("*", "15008")]
    assert listening(other) == []
    assert "15001" not in subprocess.run(["ss", "-Hltn"], capture_output=True, text=True, check=True).stdout
    backlog = int(pod.run("sysctl", "-n", "net.core.somaxconn").stdout)
    assert {line.split()[2] for line in pod.run("ss", "-Hltn").stdout.splitlines()} == {str(min(4096, backlog))}


async def test_the_same_pod_again_changes_nothing_and_a_new_namespace_replaces_it(
        client: KeeperClient, namespaces: Namespaces) -> None:
    first, second = namespaces.make("first"), namespaces.make("second")
    inode = await add(client, 1, "pod", first)
    assert await add(client, 1, "pod", first) == inode
    assert [(pod.handle, pod.netns) for pod in (await client.inventory()).pods] == [(1, inode)]
    again = await add(client, 2, "pod", second)
    assert [(pod.handle, pod.netns) for pod in (await client.inventory()).pods] == [(2, again)]
    until(lambda: listening(first) == [], "the first namespace has no listener")
    await add(client, 3, "pod", second)
    assert [(pod.handle, pod.uid) for pod in (await client.inventory()).pods] == [(3, "pod")]
    with pytest.raises(KeeperRefused, match="handle 3 is pod pod"):
        await add(client, 3, "another", first)


async def test_a_deleted_pod_refuses_at_once_and_can_come_back(client: KeeperClient, namespaces: Namespaces) -> None:
    pod = namespaces.make("pod")
    for handle in range(1, 6):
        await add(client, handle, "pod", pod)
        await client.delete_pod(handle)
        assert listening(pod) == []
    assert connected(pod, 15001) == "refused"
    await client.delete_pod(99)


async def test_a_port_that_is_taken_is_refused_with_the_holders_name(client: KeeperClient, namespaces: Namespaces) -> None:
    pod = namespaces.make("pod")
    holder = pod.start(sys.executable, "-c", "import socket, time\ns = socket.create_server(('0.0.0.0', 15006))\n"
                       "print('up', flush=True)\ntime.sleep(60)", stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "up\n"
    with pytest.raises(KeeperRefused, match=rf"port 15006.*Address already in use; python3?[\d.]* \(pid {holder.pid}\)"):
        await add(client, 1, "pod", pod)
    assert listening(pod) == [("0.0.0.0", "15006")]
    assert (await client.inventory()).pods == ()


async def test_a_pod_without_ipv6_listens_on_ipv4(client: KeeperClient, namespaces: Namespaces) -> None:
    pod = namespaces.make("pod")
    await add(client, 1, "pod", pod, families=(4,))
    assert listening(pod) == [("0.0.0.0", "15001"), ("0.0.0.0", "15006"), ("0.0.0.0", "15008")]


async def test_an_agent_that_goes_leaves_everything_and_the_next_finds_it(
        keeper: Keeper, client: KeeperClient, namespaces: Namespaces) -> None:
    pod = namespaces.make("pod")
    await add(client, 7, "pod-7", pod)
    await client.commit([blobs.put_pod("pod-7", 7, "w", "ns=default", ()), blobs.put_note("n", b"x")])
    before, workers = await client.inventory(), await client.workers()
    await client.close()
    until(lambda: "the agent is gone" in keeper.text, "the keeper noticed")
    assert listening(pod) == [("*", "15001"), ("*", "15006"), ("*", "15008")]
    again = await connect(keeper.path)
    assert await again.inventory() == before
    assert await again.workers() == workers
    await again.close()


async def test_workers_have_no_privilege(client: KeeperClient) -> None:
    for worker in await client.workers():
        lines = Path(f"/proc/{worker.pid}/status").read_text().splitlines()
        status = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
        for name in ("CapEff", "CapPrm", "CapInh", "CapBnd", "CapAmb"):
            assert int(status[name][0], 16) == 0, name
        assert status["Uid"] == [str(UID)] * 4
        assert status["Gid"] == [str(UID)] * 4
        assert (status["Groups"], status["NoNewPrivs"]) == ([], ["1"])
        limits = Path(f"/proc/{worker.pid}/limits").read_text()
        assert "Max core file size        0                    0" in limits
        # not dumpable: the kernel gives its files to root
        assert os.stat(f"/proc/{worker.pid}/environ").st_uid == 0
        # control socket, two segments, epoll, standard streams: nothing of the keeper's
        targets = {os.readlink(f"/proc/{worker.pid}/fd/{fd}").split(":")[0] for fd in os.listdir(f"/proc/{worker.pid}/fd")}
        assert not {target for target in targets if target.startswith(("net", "/proc", "pipe"))}


async def test_sockets_are_made_in_the_pods_namespace_with_mark_and_transparency(
        puppets: Keeper, namespaces: Namespaces) -> None:
    pod = namespaces.make("pod")
    client = await connect(puppets.path)
    inode = await add(client, 1, "pod", pod)
    worker = next(one for one in await client.workers() if one.pods)

    def sockets() -> list[int]:
        """Of the worker's: those that are neither bound nor listening, TCP."""
        folder = f"/proc/{worker.pid}/fd"
        names = {int(fd): os.readlink(f"{folder}/{fd}") for fd in os.listdir(folder)}
        return [fd for fd, name in names.items() if name.startswith("socket:") and fd > 5]

    until(lambda: len(sockets()) == 3 + 3 + 2, "three listeners, three IPv4 and two IPv6 sockets are there")
    pidfd = os.pidfd_open(worker.pid)
    libc_pidfd_getfd, siocgskns = 438, 0x894C
    import ctypes
    import fcntl
    libc = ctypes.CDLL(None, use_errno=True)
    seen = []
    for fd in sockets():
        with socket.socket(fileno=libc.syscall(libc_pidfd_getfd, pidfd, fd, 0)) as one:
            netns = fcntl.ioctl(one.fileno(), siocgskns)
            assert os.fstat(netns).st_ino == inode
            os.close(netns)
            family = one.getsockopt(socket.SOL_SOCKET, socket.SO_DOMAIN)
            level, transparent, freebind = (41, 75, 78) if family == socket.AF_INET6 else (0, 19, 15)
            listens = one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            assert one.getsockopt(socket.SOL_SOCKET, socket.SO_MARK) == (0 if listens else 0x539)
            assert one.getsockopt(level, transparent) == 1
            assert not os.get_blocking(one.fileno())
            if not listens:
                assert one.getsockopt(level, freebind) == 1
                assert one.getsockopt(0, 24) == 1  # IP_BIND_ADDRESS_NO_PORT
                assert one.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
                seen.append(family)
    os.close(pidfd)
    assert sorted(seen) == [socket.AF_INET] * 3 + [socket.AF_INET6] * 2
    await client.close()


async def test_pods_are_spread_over_workers_and_back_after_a_death(puppets: Keeper, namespaces: Namespaces) -> None:
    pods = [namespaces.make(f"p{number}") for number in range(4)]
    client = await connect(puppets.path)
    for number, pod in enumerate(pods, 1):
        await add(client, number, f"pod-{number}", pod)
    assert [worker.pods for worker in await client.workers()] == [2, 2]
    assert {connected(pod, 15001).split()[0] for pod in pods} == {"1", "2"}
    os.kill((await client.workers())[0].pid, signal.SIGKILL)
    await until_state(client, WorkerState.REPLACED)
    assert [worker.pods for worker in await client.workers()] == [2, 2]
    now = {str(worker.pid) for worker in await client.workers()}
    assert {connected(pod, 15006).split()[1] for pod in pods} == now
    await client.close()


CONNECTS = """
import socket, sys, time
until, count, worst = time.monotonic() + 1.5, 0, 0.0
while time.monotonic() < until:
    began = time.monotonic()
    try:
        socket.create_connection(("127.0.0.1", 15001), timeout=5).close()
    except ConnectionResetError:
        pass    # accepted, and the real worker's answer to whoever dials the listener itself
    count, worst = count + 1, max(worst, time.monotonic() - began)
    time.sleep(0.001)
print(count, worst)
"""


@pytest.mark.parametrize("which", ["keeper", "puppets"])
async def test_no_connect_is_refused_while_workers_are_killed(
        request: pytest.FixtureRequest, namespaces: Namespaces, which: str) -> None:
    one: Keeper = request.getfixturevalue(which)
    pods = [namespaces.make("one"), namespaces.make("two")]
    client = await connect(one.path)
    for number, pod in enumerate(pods, 1):
        await add(client, number, f"pod-{number}", pod)
    loops = [pod.start(sys.executable, "-c", CONNECTS, stdout=subprocess.PIPE, text=True) for pod in pods]
    for index in (0, 1, 0):
        os.kill((await client.workers())[index].pid, signal.SIGKILL)
        await until_state(client, WorkerState.REPLACED)
    for loop in loops:
        said, _ = await asyncio.to_thread(loop.communicate, None, 20)
        assert loop.returncode == 0, "a connect failed"
        count, worst = said.split()
        assert int(count) > 100
        assert float(worst) < 1, "a connection waits in the backlog, it is not lost"
    assert [worker.restarts for worker in await client.workers()] == [2, 1]
    await client.close()


async def test_a_real_worker_killed_with_9_is_replaced_in_under_200_ms(client: KeeperClient, namespaces: Namespaces) -> None:
    pod = namespaces.make("pod")
    await add(client, 1, "pod", pod)
    times = []
    for _ in range(20):
        victim = max(await client.workers(), key=lambda worker: worker.pods)
        began = time.monotonic()
        os.kill(victim.pid, signal.SIGKILL)
        assert (await until_state(client, WorkerState.REPLACED)).index == victim.index
        times.append(time.monotonic() - began)
    assert sorted(times)[5] < 0.2, times  # the first quarter: on a loaded machine many are slow
    assert listening(pod) == [("*", "15001"), ("*", "15006"), ("*", "15008")]


async def test_a_worker_that_hangs_is_replaced_and_its_pods_are_served_on(client: KeeperClient, namespaces: Namespaces) -> None:
    pod = namespaces.make("pod")
    await add(client, 1, "pod", pod)
    victim = max(await client.workers(), key=lambda worker: worker.pods)
    os.kill(victim.pid, signal.SIGSTOP)
    began = time.monotonic()
    async with asyncio.timeout(20):
        async for event in client.events():
            if isinstance(event, WorkerChange) and event.state is WorkerState.REPLACED:
                break
    assert time.monotonic() - began < 14, "10 s without a turn, and a look each second"
    assert not Path(f"/proc/{victim.pid}").exists()
    assert sum(worker.pods for worker in await client.workers()) == 1
    assert listening(pod) == [("*", "15001"), ("*", "15006"), ("*", "15008")]


async def test_shutdown_leaves_no_process_socket_or_namespace(
        keeper: Keeper, client: KeeperClient, namespaces: Namespaces) -> None:
    pod = namespaces.make("pod")
    inode = await add(client, 1, "pod", pod)
    pids = [keeper.pid, *(worker.pid for worker in await client.workers())]
    await client.shutdown()
    assert keeper.process.wait(10) == 0
    assert listening(pod) == []
    assert list(keeper.run_dir.iterdir()) == []
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    netlink.delete_namespace(pod.name)
    until(lambda: str(inode) not in subprocess.run(["lsns", "-t", "net", "-n", "-o", "NS"], capture_output=True, text=True,
                                                   check=True).stdout, "nobody holds the namespace")


async def test_dns_sockets_wait_with_the_keeper_for_the_next_agent(keeper: Keeper, client: KeeperClient, namespaces: Namespaces) -> None:
    pod = namespaces.make("pod")
    netlink.set_link(pod.path, "lo", up=True)
    await add(client, 1, "pod", pod)
    first = [socket.socket(fileno=fd) for fd in await client.dns_sockets(1)]
    assert sorted((one.family, one.type, one.getsockname()[:2]) for one in first) == [
        (family, kind, (address, 15053)) for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"))
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM)]
    for one in first:
        one.close()
    pod.python("import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'waits', ('127.0.0.1', 15053))")
    again = [socket.socket(fileno=fd) for fd in await client.dns_sockets(1)]
    try:
        (udp,) = [one for one in again if (one.family, one.type) == (socket.AF_INET, socket.SOCK_DGRAM)]
        udp.setblocking(False)
        assert udp.recv(100) == b"waits"
    finally:
        for one in again:
            one.close()
    await client.delete_pod(1)
    assert "15053" not in pod.run("ss", "-Hlntu").stdout
    with pytest.raises(KeeperRefused, match="no pod has handle 1"):
        await client.dns_sockets(1)


async def test_a_dns_port_that_is_taken_is_told_and_leaves_nothing(keeper: Keeper, client: KeeperClient, namespaces: Namespaces) -> None:
    pod = namespaces.make("pod")
    netlink.set_link(pod.path, "lo", up=True)
    await add(client, 1, "pod", pod)
    with netlink.in_netns(pod.path, lambda: socket.create_server(("::1", 15053), family=socket.AF_INET6)):
        before = keeper.descriptors()
        for _ in range(20):
            with pytest.raises(KeeperRefused, match="DNS port 15053 in the pod's namespace: Address already in use; another program"):
                await client.dns_sockets(1)
        assert keeper.descriptors() < before + 20  # three of four sockets were made each time; workers take and give some meanwhile
    fds = await client.dns_sockets(1)
    assert len(fds) == 4
    for fd in fds:
        os.close(fd)


async def test_a_drained_keeper_refuses_new_connections_and_work(keeper: Keeper, client: KeeperClient,
                                                                   namespaces: Namespaces) -> None:
    pod = namespaces.make("pod")
    await add(client, 1, "pod", pod)
    await client.drain(5)
    assert connected(pod, 15001) == "refused"
    with pytest.raises(ConnectionError, match="draining"):
        await add(client, 2, "other", namespaces.make("other"))
    assert [one.listening for one in (await client.inventory()).pods] == [False]
    assert [(worker.pid, worker.state) for worker in await client.workers()] == [(0, WorkerState.DOWN)] * 2


def test_a_foreign_user_is_not_heard(keeper: Keeper) -> None:
    keeper.run_dir.chmod(0o711)
    keeper.path.chmod(0o666)
    code = ("import json, os, socket, sys\nos.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
            "s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); s.settimeout(5)\n"
            "s.connect(sys.argv[1])\n"
            "try:\n s.send(bytes([9, 0, 1, 0, 1, 0, 0, 0])); said = len(s.recv(100))\n"
            "except (BrokenPipeError, ConnectionResetError): said = 0\nprint(json.dumps(said))")
    for folder in keeper.run_dir.parents:
        if folder.stat().st_mode & 0o011 != 0o011:
            folder.chmod(folder.stat().st_mode | 0o011)
    said = subprocess.run([sys.executable, "-c", code, str(keeper.path)], capture_output=True, text=True, check=True).stdout
    assert json.loads(said) == 0
    assert "a connection of a foreign user is refused" in keeper.text
