"""Questions on their way to a pod's resolver by UDP: one exchange each, shared by those who ask the same meanwhile.

    asked -> socket of the pod's namespace -> connected and sent -> answered | refused | timed out (silent, as the resolver is)

Only an answer from the address asked, with our id (random) and our question, is one. A client that asks again has the question sent
again: what was lost upstream is not to be waited for by everybody who joined.
"""
from __future__ import annotations

import asyncio
import errno
import secrets
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from agent.dns import wire
from agent.dns.cache import Key
from agent.dns.stock import Stock

TIMEOUT = 10.0  # seconds; clients give up after 5 and ask anew
WAITERS = 64  # on one exchange
DATAGRAM_BYTES = 65_535
RESENDS = 4  # of one exchange
STRANGERS = 64  # datagrams that are no answer, of one exchange: then it ends, as a flood costs the node

BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)  # seconds

_REFUSED = frozenset({errno.ECONNREFUSED})


@dataclass(frozen=True, slots=True)
class Client:
    """Who waits: the socket he asked (its family), from where, with which id."""

    family: int
    peer: tuple[str, int]
    id: int
    size: int  # bytes of his question


@dataclass(slots=True)
class Figures:
    """Counted since start, of the node. Seconds are of exchanges that were answered."""

    requests: dict[str, int] = field(default_factory=lambda: {"udp": 0, "tcp": 0})
    mesh: int = 0
    cached: int = 0
    upstream: int = 0
    failures: dict[str, int] = field(default_factory=lambda: {"timeout": 0, "refused": 0, "unreachable": 0})
    dropped: dict[str, int] = field(default_factory=lambda: {"malformed": 0, "no_resolver": 0, "pod_share": 0, "foreign_answer": 0})
    buckets: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS) + 1))
    seconds: float = 0.0

    def took(self, seconds: float) -> None:
        self.seconds += seconds
        self.buckets[next((at for at, bound in enumerate(BUCKETS) if seconds <= bound), len(BUCKETS))] += 1


class Exchange:
    """One question on its way. `done(answer)`: with the resolver's answer, its id not the client's, or None; `refused` says which None."""

    def __init__(self, key: Key, end: int, stock: Stock, figures: Figures, done: Callable[[Exchange, bytes | None], None]) -> None:
        self.key, self._end, self._figures, self._done = key, end, figures, done
        self.clients: dict[tuple[tuple[str, int], int], Client] = {}
        self.refused = False
        self._id = secrets.randbits(16)
        self._message = struct.pack(">H", self._id) + key[1]
        self._socket: socket.socket | None = None
        self._began = time.monotonic()
        self._resends = RESENDS
        self._strangers = STRANGERS
        self._ended = False
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(TIMEOUT, self._timed_out)
        self._stock = stock

    def begin(self) -> None:
        """Send it. It may have ended when this returns: whoever is to hear of that has to have joined before."""
        family = socket.AF_INET6 if ":" in self.key[0][0] else socket.AF_INET
        self._stock.take((family, socket.SOCK_DGRAM), self._begin)

    def join(self, client: Client) -> bool:
        """Another one asks the same, or one of them again. False: there are too many."""
        same = (client.peer, client.id)
        if same in self.clients:
            if self._resends and self._socket is not None:
                self._resends -= 1
                self._send()
            return True
        if len(self.clients) >= WAITERS:
            return False
        self.clients[same] = client
        return True

    def cancel(self) -> None:
        self._close()

    def _begin(self, made: socket.socket | None) -> None:
        if self._ended or made is None:
            if made is not None:
                made.close()
            elif not self._ended:
                self._fail("unreachable")
            return
        self._socket = made
        try:
            made.connect(self.key[0])
        except OSError:  # no route: without us the client's own connect or send would have said so
            self._fail("unreachable")
            return
        self._figures.upstream += 1
        self._loop.add_reader(made.fileno(), self._readable)
        self._send()

    def _send(self) -> None:
        if self._socket is None:
            return
        try:
            self._socket.send(self._message)
        except BlockingIOError:
            pass  # as if it were lost
        except OSError as error:
            self._failed(error)

    def _readable(self) -> None:
        for _ in range(4):
            if self._socket is None:
                return
            try:
                data = self._socket.recv(DATAGRAM_BYTES)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                self._failed(error)
                return
            if len(data) >= wire.HEADER.size and data[:2] == self._message[:2] and wire.answers(self._message, self._end, data):
                self._figures.took(time.monotonic() - self._began)
                self._finish(data)
                return
            self._figures.dropped["foreign_answer"] += 1
            self._strangers -= 1
            if not self._strangers:
                self._fail("timeout")
                return

    def _failed(self, error: OSError) -> None:
        self._fail("refused" if error.errno in _REFUSED else "unreachable")

    def _timed_out(self) -> None:
        self._fail("timeout")

    def _fail(self, why: str) -> None:
        self._figures.failures[why] += 1
        self.refused = why == "refused"
        self._finish(None)

    def _finish(self, answer: bytes | None) -> None:
        if not self._ended:
            self._close()
            self._done(self, answer)

    def _close(self) -> None:
        self._ended = True
        self._timer.cancel()
        if self._socket is not None:
            self._loop.remove_reader(self._socket.fileno())
            self._socket.close()
            self._socket = None
