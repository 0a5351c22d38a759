"""The agent's end of the keeper's socket: requests with a deadline, and events as an async iterator.

    client = await connect(run_dir / "keeper.sock")        says HELLO: the newest agent is the one that is heard
    await client.commit(entries)
    async for event in client.events(): ...
    await client.close()

A client is for one connection. When the keeper goes away every waiting call raises KeeperAway, and so does every
later one; connecting again is the caller's business.
"""
from __future__ import annotations

import array
import asyncio
import fcntl
import itertools
import os
import socket
import struct
from collections import deque
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from agent.dataplane import blobs
from agent.dataplane.protocol import (
    DATAGRAM_BYTES,
    DESCRIPTORS_MAX,
    HEAD,
    U16,
    U32,
    VERSION,
    Event,
    Fields,
    Hello,
    KeyListing,
    Message,
    Miss,
    PodListing,
    ProtocolError,
    Reason,
    WorkerChange,
    WorkerListing,
    WorkerState,
    text,
)

REQUEST_SECONDS = 5.0  # for an answer; the keeper gives most in under a millisecond
COMMIT_SECONDS = 30.0  # a worker has 2 s, and the keeper waits 20 s for one to be there
DRAIN_SPARE = 5.0  # beyond the time that a drain may take
EVENTS_MAX = 10_000  # kept for a slow reader; the oldest MISS is said again anyway
ANSWERS_MAX = 1024  # requests without an answer
_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_RETRY = (BlockingIOError, InterruptedError)
_WORKER = struct.Struct("<IIBII")
_WORKER_EVENT = struct.Struct("<IIBi")


class KeeperAway(ConnectionError):
    """The keeper is not there, does not answer in time, or cannot do it now. Connect again later."""


class KeeperRefused(OSError):
    """The keeper understood and does not do it; nothing changed. The text says why, in words for an operator."""

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True, slots=True)
class Inventory:
    """What the keeper holds: the last transaction's id, every blob, every pod."""

    transaction: int
    blobs: tuple[blobs.Put, ...]
    pods: tuple[PodListing, ...]


@dataclass(frozen=True, slots=True)
class Segments:
    """Shared memory of one worker index as descriptors, which the caller closes (see readers.Reader)."""

    index: int
    statistics: int
    log: int

    def close(self) -> None:
        os.close(self.statistics)
        os.close(self.log)


@dataclass(slots=True)
class _Answer:
    kind: Message
    payload: bytes
    fds: list[int] = field(default_factory=list)

    def close(self) -> None:
        while self.fds:
            os.close(self.fds.pop())


async def connect(path: str | os.PathLike[str], *, hello: bool = True) -> KeeperClient:
    """A client that said HELLO. With hello=False it may only look (inventory, shm, workers) and disturbs no agent.

    Raises KeeperAway when nobody listens, KeeperRefused when the keeper speaks another version.
    """
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        peer.setblocking(False)
        peer.connect(os.fspath(path))  # a unix socket connects at once, or its backlog is full
    except OSError as error:
        peer.close()
        raise KeeperAway(f"no keeper answers at {os.fspath(path)}: {error.strerror}; is `narrows keeper` running with "
                         "this run directory?") from error
    client = KeeperClient(peer)
    if hello:
        try:
            client.hello = await client._hello()
        except BaseException:
            await client.close()
            raise
    return client


class KeeperClient:
    """See the head of this file. `hello` is what the keeper said of itself."""

    def __init__(self, peer: socket.socket) -> None:
        self._peer = peer
        self._loop = asyncio.get_running_loop()
        self._sequences = itertools.count(1)
        self._transactions = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[_Answer]] = {}
        self._events: deque[Event] = deque(maxlen=EVENTS_MAX)
        self._event = asyncio.Event()
        self._gone: KeeperAway | None = None
        self._writable = asyncio.Event()
        self.hello = Hello(0, "", 0, 0, 0)
        self._loop.add_reader(peer.fileno(), self._on_readable)

    @property
    def peer(self) -> int:
        """Process id of who listens, by the kernel's word (SO_PEERCRED, unix(7)) and as this process's pid namespace has it."""
        pid, _, _ = struct.unpack("3i", self._peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return int(pid)

    # ---- requests ----------------------------------------------------------------------------------------------

    async def inventory(self) -> Inventory:
        """Everything that is in force. The next commit gets the id after its last."""
        answer = await self._ask(Message.INVENTORY)
        try:
            fields = Fields(answer.payload)
            pods = tuple(
                PodListing(fields.u32(), fields.text(), fields.u64(), bool(fields.u8())) for _ in range(fields.u32())
            )
            if len(answer.fds) != 1:
                raise ProtocolError(f"INVENTORY came with {len(answer.fds)} descriptors, not one")
            txn_id, entries = blobs.decode_transaction(_read(answer.fds[0]))
        except blobs.BlobError as error:
            raise ProtocolError(f"the keeper's snapshot: {error}") from error
        finally:
            answer.close()
        self._transactions = itertools.count(txn_id + 1)
        return Inventory(txn_id, tuple(entry for entry in entries if isinstance(entry, blobs.Put)), pods)

    async def add_pod(self, handle: int, uid: str, families: tuple[int, ...], netns: int, identity: str = "") -> None:
        """Have listeners made inside a namespace (an open descriptor, which stays the caller's). families: 4, 6 or both.

        The same pod again is no error, and gives it the identity; the same uid with another namespace replaces it.
        """
        bits = sum({4: 1, 6: 2}[family] for family in set(families))
        payload = U32.pack(handle) + text(uid) + bytes((bits,)) + text(identity)
        (await self._ask(Message.POD_ADD, payload, (netns,))).close()

    async def dns_sockets(self, handle: int) -> list[int]:
        """Descriptors of a pod's DNS sockets, which the caller closes; the keeper keeps its own.

        KeeperRefused: the port is taken, there is no such pod, or the keeper is of a build that knows no DNS.
        """
        return (await self._ask(Message.POD_DNS, U32.pack(handle))).fds

    async def leave_pod(self, handle: int) -> None:
        """Tell the peers of its tunnels to go elsewhere (GOAWAY); what is open goes on. No error when there is no such pod.

        KeeperRefused: the keeper is of a build that does not know this.
        """
        (await self._ask(Message.POD_LEAVE, U32.pack(handle))).close()

    async def delete_pod(self, handle: int) -> None:
        """Close its listeners; live connections go on. No error when there is no such pod."""
        (await self._ask(Message.POD_DEL, U32.pack(handle))).close()

    async def make_key(self, identity: str) -> tuple[int, bytes]:
        """A new private key, which stays with the keeper: its number and a certificate request (PKCS#10, DER) signed with it.

        KeeperRefused: it is no identity, or there are too many keys.
        """
        answer = await self._ask(Message.KEY_MAKE, text(identity))
        answer.close()
        fields = Fields(answer.payload)
        return fields.u32(), fields.data()

    async def forget_key(self, key: int) -> None:
        """No worker has it from now on; no error when there is no such key."""
        (await self._ask(Message.KEY_FORGET, U32.pack(key))).close()

    async def keys(self) -> list[KeyListing]:
        """Every key that the keeper holds, also those of an earlier agent."""
        answer = await self._ask(Message.KEYS)
        answer.close()
        fields = Fields(answer.payload)
        return [KeyListing(fields.u32(), fields.text()) for _ in range(fields.u32())]

    async def commit(self, entries: Iterable[blobs.Entry], transaction: int | None = None) -> int:
        """Put entries in force, whole or not at all; returns the transaction's id once every worker has it.

        KeeperRefused: nothing changed. KeeperAway: it may be in force or not; read the inventory after connecting again.
        """
        txn_id = next(self._transactions) if transaction is None else transaction
        fd = _sealed(blobs.encode_transaction(txn_id, entries))
        try:
            (await self._ask(Message.COMMIT, b"", (fd,), COMMIT_SECONDS)).close()
        finally:
            os.close(fd)
        return txn_id

    async def shm(self) -> list[Segments]:
        """The shared memory of every worker index; it stays the same for the keeper's life."""
        answer = await self._ask(Message.SHM)
        fields = Fields(answer.payload)
        indexes = [fields.u32() for _ in range(fields.u32())]
        if len(answer.fds) != 2 * len(indexes):
            count = len(answer.fds)
            answer.close()
            raise ProtocolError(f"SHM came with {count} descriptors for {len(indexes)} workers")
        pairs = zip(answer.fds[::2], answer.fds[1::2], strict=True)
        return [Segments(index, *pair) for index, pair in zip(indexes, pairs, strict=True)]

    async def workers(self) -> list[WorkerListing]:
        answer = await self._ask(Message.WORKERS)
        fields = Fields(answer.payload)
        answer.close()
        found = []
        for _ in range(fields.u32()):
            index, pid, state, restarts, pods = fields.unpack(_WORKER)
            found.append(WorkerListing(index, pid, WorkerState(state), restarts, pods))
        return found

    async def drain(self, seconds: float) -> None:
        """No listener any more; returns when the last connection ended or the time is over. The keeper is of no use after."""
        payload = U32.pack(int(seconds * 1000))
        (await self._ask(Message.DRAIN, payload, deadline=seconds + DRAIN_SPARE)).close()

    async def shutdown(self) -> None:
        """End keeper and workers."""
        (await self._ask(Message.SHUTDOWN)).close()

    async def events(self) -> AsyncIterator[Event]:
        """MISS and WORKER as they come. Raises KeeperAway when the connection ends."""
        while True:
            while self._events:
                yield self._events.popleft()
            if self._gone is not None:
                raise self._gone
            self._event.clear()
            await self._event.wait()

    async def close(self) -> None:
        """Waiting calls raise KeeperAway. The keeper serves on."""
        self._end(KeeperAway("the connection to the keeper was closed"))

    # ---- messages ----------------------------------------------------------------------------------------------

    async def _hello(self) -> Hello:
        answer = await self._ask(Message.HELLO, U16.pack(VERSION) + U16.pack(VERSION))
        fields = Fields(answer.payload)
        answer.close()
        return Hello(fields.u16(), fields.text(), fields.u32(), fields.u64(), fields.u32())

    async def _ask(self, kind: Message, payload: bytes = b"", fds: Sequence[int] = (),
                   deadline: float = REQUEST_SECONDS) -> _Answer:
        if self._gone is not None:
            raise self._gone
        if len(self._waiting) >= ANSWERS_MAX:
            raise KeeperAway(f"{ANSWERS_MAX} requests have no answer from the keeper; it hangs")
        sequence = next(self._sequences) & 0xFFFFFFFF
        future: asyncio.Future[_Answer] = self._loop.create_future()
        self._waiting[sequence] = future
        try:
            async with asyncio.timeout(deadline):
                await self._send(HEAD.pack(kind, VERSION, sequence) + payload, fds)
                answer = await future
        except TimeoutError:
            raise KeeperAway(f"the keeper did not answer {kind.name} within {deadline:.0f} s; its log says what it does"
                             ) from None
        finally:
            self._waiting.pop(sequence, None)
            if future.cancelled() or not future.done():
                future.cancel()
        if answer.kind is Message.ERROR:
            answer.close()
            fields = Fields(answer.payload)
            reason, said = fields.u8(), fields.text()
            if reason == Reason.AWAY:
                raise KeeperAway(said)
            raise KeeperRefused(said)
        if answer.kind not in (kind, Message.OK):
            answer.close()
            raise ProtocolError(f"the keeper answered {kind.name} with {answer.kind.name}")
        return answer

    async def _send(self, message: bytes, fds: Sequence[int]) -> None:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        while self._gone is None:
            try:
                self._peer.sendmsg([message], ancillary, socket.MSG_NOSIGNAL)
                return
            except _RETRY:
                self._writable.clear()
                self._loop.add_writer(self._peer.fileno(), self._on_writable)
                await self._writable.wait()
            except OSError as error:
                self._end(KeeperAway(f"the keeper is gone: {error.strerror}"))
        raise self._gone

    def _on_writable(self) -> None:
        self._loop.remove_writer(self._peer.fileno())
        self._writable.set()

    def _on_readable(self) -> None:
        """One message a turn of the loop: a flood of events does not starve the agent's other work."""
        try:
            # not socket.recv_fds: that of Python 3.11 does not pass the flag on, and every child would inherit these
            data, control, flags, _ = self._peer.recvmsg(DATAGRAM_BYTES, socket.CMSG_SPACE(4 * DESCRIPTORS_MAX), socket.MSG_CMSG_CLOEXEC)
        except _RETRY:
            return
        except OSError as error:
            return self._end(KeeperAway(f"the keeper is gone: {error.strerror}"))
        fds = [fd for level, kind, packed in control if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
               for (fd,) in struct.iter_unpack("=i", packed[:len(packed) & ~3])]
        answer = _Answer(Message.OK, data[HEAD.size :], fds)
        if not data:
            answer.close()
            return self._end(KeeperAway("the keeper closed the connection: it ended, or a newer agent took over"))
        try:
            if len(data) < HEAD.size or flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise ProtocolError(f"a message of {len(data)} bytes from the keeper is cut")
            number, version, sequence = HEAD.unpack_from(data)
            if version != VERSION:
                raise ProtocolError(f"the keeper speaks version {version} of the protocol, this agent {VERSION}")
            if number not in set(Message):
                answer.close()  # a newer keeper may say more
                return None
            answer.kind = Message(number)
            self._take(answer, sequence)
        except (ProtocolError, struct.error, ValueError) as error:
            answer.close()
            self._end(KeeperAway(str(error)))
        return None

    def _take(self, answer: _Answer, sequence: int) -> None:
        fields = Fields(answer.payload)
        if answer.kind is Message.MISS:
            answer.close()
            self._put(Miss(fields.text()))
        elif answer.kind is Message.WORKER:
            answer.close()
            index, pid, state, status = fields.unpack(_WORKER_EVENT)
            self._put(WorkerChange(index, pid, WorkerState(state), status))
        else:
            future = self._waiting.get(sequence)
            if future is not None and not future.done():
                future.set_result(answer)
                return
            answer.close()  # its caller stopped waiting
            if answer.kind is Message.ERROR and sequence == 0:
                fields.u8()
                self._end(KeeperAway(fields.text()))

    def _put(self, event: Event) -> None:
        self._events.append(event)
        self._event.set()

    def _end(self, reason: KeeperAway) -> None:
        if self._gone is not None:
            return
        self._gone = reason
        with suppress(ValueError, OSError):
            self._loop.remove_reader(self._peer.fileno())
            self._loop.remove_writer(self._peer.fileno())
        self._peer.close()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(reason)
                future.exception()  # a caller that went away is no "exception was never retrieved"
        self._writable.set()
        self._event.set()


def _sealed(data: bytes) -> int:
    """A memfd with these bytes that nobody can change any more; the caller closes it."""
    fd = os.memfd_create("narrows-transaction", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _read(fd: int) -> bytes:
    size = os.fstat(fd).st_size
    parts, at = [], 0
    while at < size:
        part = os.pread(fd, size - at, at)
        if not part:
            break
        parts.append(part)
        at += len(part)
    return b"".join(parts)
