"""One captured pod's DNS: its sockets, its exchanges, its cache, and its share of the node.

    datagram -> the mesh's name? answered
             -> whose resolver?  (conntrack; none: nobody redirected it, dropped)
             -> cached? answered      -> on its way already? joins      -> an exchange of its own

Whoever asks more than his share is not heard until the next part of a second: his datagrams wait in his socket and what does not fit
there is lost, as at a resolver that is busy. Other pods are not touched.
"""
from __future__ import annotations

import asyncio
import socket
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from agent import netlink
from agent.dns import names, tcp, wire
from agent.dns.cache import Cache, Key
from agent.dns.forward import Client, Exchange, Figures
from agent.dns.stock import Stock
from agent.dns.unreachable import Unreachable
from agent.model.reserved import DNS_PORT
from agent.netlink.conntrack import Originals

DATAGRAM_BYTES = 4096  # of a question; longer ones are cut, and then malformed
A_TURN = 16  # datagrams of a pod between two looks at the others
SHARE, SHARE_SECONDS = 200, 0.1  # datagrams in so many seconds; to read and answer one takes 9 us beside its system calls
EXCHANGES = 256  # of a pod at once
CONNECTIONS = 64  # by TCP
ASKED = 64  # questions of one of them whose answers are to be kept when they come
# Goes before a question by TCP in the cache: its answer may be too long for UDP. No question by UDP that is kept begins so (its flags
# would say opcode 14).
BY_TCP = b"tcp"


@dataclass(frozen=True, slots=True)
class Who:
    """The pod that is served."""

    uid: str
    ref: str
    namespace: str
    netns: str  # path


class PodDns:
    """Made by `open_pod`. Owns its sockets."""

    def __init__(self, who: Who, sockets: Sequence[socket.socket], originals: Originals, unreachable: Unreachable,
                 hosts: names.Hosts, domain: str, figures: Figures, now: Callable[[], float] = time.monotonic) -> None:
        self.who = who
        self.cache = Cache(now)
        self.requests = self.answered = self.hits = 0  # questions; of these by the mesh's names, and from the cache
        self._originals, self._unreachable = originals, unreachable
        self._hosts, self._domain, self._figures = hosts, domain, figures
        self._stock = Stock(who.netns)
        self._exchanges: dict[tuple[tuple[str, int], bytes], Exchange] = {}
        self._sessions: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._left = SHARE
        self._refill: asyncio.TimerHandle | None = None
        self._datagrams: dict[int, socket.socket] = {one.family: one for one in sockets if one.type == socket.SOCK_DGRAM}
        self._listeners = [one for one in sockets if one.type == socket.SOCK_STREAM]
        self._listen()

    @property
    def waiting(self) -> int:
        """Exchanges on their way."""
        return len(self._exchanges)

    def _listen(self) -> None:
        for one in self._datagrams.values():
            self._loop.add_reader(one.fileno(), self._readable, one)
        for one in self._listeners:
            self._loop.add_reader(one.fileno(), self._accept, one)

    def _deafen(self) -> None:
        for one in (*self._datagrams.values(), *self._listeners):
            self._loop.remove_reader(one.fileno())

    def close(self) -> None:
        """What is on its way is forgotten; what waits in the sockets is there for the next who has them."""
        self._deafen()
        if self._refill is not None:
            self._refill.cancel()
        for exchange in list(self._exchanges.values()):
            exchange.cancel()
        self._exchanges.clear()
        for session in self._sessions:
            session.cancel()
        for one in (*self._datagrams.values(), *self._listeners):
            one.close()
        self._stock.close()
        self._originals.close()
        self._unreachable.close()

    # -- the pod's share --------------------------------------------------------------------------------------------

    def _spend(self) -> bool:
        """Whether the pod may ask one more now."""
        if self._left <= 0:
            self._figures.dropped["pod_share"] += 1
            self._deafen()
            return False
        self._left -= 1
        if self._refill is None:
            self._refill = self._loop.call_later(SHARE_SECONDS, self._replenish)
        return True

    def _replenish(self) -> None:
        self._refill = None
        if self._left <= 0:
            self._listen()
        self._left = SHARE

    # -- UDP --------------------------------------------------------------------------------------------------------

    def _readable(self, one: socket.socket) -> None:
        for _ in range(A_TURN):
            if not self._spend():
                return
            try:
                data, peer = one.recvfrom(DATAGRAM_BYTES)
            except OSError:  # nothing more; or what an ICMP message to one of our answers said
                return
            self._ask(one, data, (peer[0], peer[1]))

    def _ask(self, one: socket.socket, data: bytes, peer: tuple[str, int]) -> None:
        read = wire.read_query(data)
        if read is None:
            self._figures.dropped["malformed"] += 1
            return
        self._figures.requests["udp"] += 1
        self.requests += 1
        found = names.answer(data, read, self.who.namespace, self._hosts, self._domain, read.payload)
        if found is not None:
            self._figures.mesh += 1
            self.answered += 1
            _send(one, found, peer)
            return
        resolver = self._originals.find(one.getsockname()[:2], peer)
        if resolver is None or resolver[1] == DNS_PORT:
            self._figures.dropped["no_resolver"] += 1
            return
        key = (resolver, data[2:])
        if read.cacheable and (kept := self.cache.get(key)) is not None:
            self._figures.cached += 1
            self.hits += 1
            _send(one, data[:2] + kept[2:], peer)
            return
        client = Client(one.family, peer, struct.unpack_from(">H", data)[0], len(data))
        exchange = self._exchanges.get(key)
        if exchange is None:
            if len(self._exchanges) >= EXCHANGES:
                self._figures.dropped["pod_share"] += 1
                return
            exchange = Exchange(key, read.end, self._stock, self._figures,
                                lambda ended, answer: self._answered(ended, answer, read.cacheable))
            self._exchanges[key] = exchange
            exchange.join(client)
            exchange.begin()
        elif not exchange.join(client):
            self._figures.dropped["pod_share"] += 1

    def _answered(self, exchange: Exchange, answer: bytes | None, cacheable: bool) -> None:
        self._exchanges.pop(exchange.key, None)
        if answer is not None and cacheable:
            self.cache.put(exchange.key, answer)
        for client in exchange.clients.values():
            one = self._datagrams[client.family]
            if answer is not None:
                _send(one, struct.pack(">H", client.id) + answer[2:], client.peer)
            elif exchange.refused:
                self._unreachable.tell(one.getsockname()[:2], client.peer, client.size)

    # -- TCP --------------------------------------------------------------------------------------------------------

    def _accept(self, one: socket.socket) -> None:
        if not self._spend():
            return
        try:
            client, _ = one.accept()
        except OSError:
            return
        client.setblocking(False)
        resolver = tcp.original(client, DNS_PORT)
        if resolver is None or len(self._sessions) >= CONNECTIONS:
            self._figures.dropped["no_resolver" if resolver is None else "pod_share"] += 1
            client.close()
            return
        asked: dict[int, tuple[Key, int]] = {}
        session = tcp.Session(client, resolver, self._stock, lambda message: self._by_tcp(resolver, asked, message),
                              lambda message: self._heard(asked, message), self._failed)
        task = asyncio.create_task(session.run(), name=f"dns {self.who.ref}")
        self._sessions.add(task)
        task.add_done_callback(self._sessions.discard)

    def _by_tcp(self, resolver: tuple[str, int], asked: dict[int, tuple[Key, int]], message: bytes) -> bytes | None:
        """`asked`: by id what is asked of the resolver on this connection, and where the question section ends."""
        read = wire.read_query(message)
        self._figures.requests["tcp"] += 1
        self.requests += 1
        if read is None:
            return None
        found = names.answer(message, read, self.who.namespace, self._hosts, self._domain, tcp.MESSAGE)
        if found is not None:
            self._figures.mesh += 1
            self.answered += 1
            return found
        if read.cacheable:
            key = resolver, BY_TCP + message[2:]
            if (kept := self.cache.get(key)) is not None:
                self._figures.cached += 1
                self.hits += 1
                return message[:2] + kept[2:]
            (number,) = struct.unpack_from(">H", message)
            if number in asked:
                del asked[number]  # two of one id: which of them is answered first cannot be told
            elif len(asked) < ASKED:
                asked[number] = key, read.end
        self._figures.upstream += 1
        return None

    def _heard(self, asked: dict[int, tuple[Key, int]], message: bytes) -> None:
        if len(message) < wire.HEADER.size:
            return
        if (found := asked.pop(struct.unpack_from(">H", message)[0], None)) is not None:
            key, end = found
            if wire.answers(b"\0\0" + key[1].removeprefix(BY_TCP), end, message):
                self.cache.put(key, message)

    def _failed(self, why: str) -> None:
        self._figures.failures[why] += 1


def _send(one: socket.socket, data: bytes, peer: tuple[str, int]) -> None:
    try:
        one.sendto(data, peer)
    except OSError:
        return  # the client is gone, or its socket is full: it asks again


def open_pod(who: Who, descriptors: Sequence[int], hosts: names.Hosts, domain: str, figures: Figures) -> PodDns:
    """Serve a pod from now on by sockets of the keeper, which are taken over.

    Blocks for a thread's start. Raises OSError; nothing is left then."""
    sockets = [socket.socket(fileno=one) for one in descriptors]
    tools: list[Originals | Unreachable] = []
    try:
        for one in sockets:
            one.setblocking(False)
        originals, unreachable = netlink.in_netns(who.netns, lambda: (Originals(), Unreachable()))
        tools += [originals, unreachable]
        return PodDns(who, sockets, originals, unreachable, hosts, domain, figures)
    except BaseException:
        for thing in (*sockets, *tools):
            thing.close()
        raise
