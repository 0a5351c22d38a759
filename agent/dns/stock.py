"""Sockets for questions to a pod's resolver, made inside its namespace: its routes, policies and address apply, and its capture does not
(SO_MARK).

Each is used once, so that every question has a source port of its own that the kernel chose at random (RFC 5452 9.2). They are made some
at a time, because entering a namespace takes a thread.
"""
from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from agent import netlink
from agent.model.reserved import SOCKET_MARK

BATCH = 8
WAITING = 512  # of a pod and kind, for the next batch

Kind = tuple[int, int]  # socket family, socket type
Taker = Callable[[socket.socket | None], None]


class Stock:
    """Of one pod. `take` gives a socket to its caller, who closes it."""

    def __init__(self, netns: str) -> None:
        self._netns = netns
        self._ready: dict[Kind, deque[socket.socket]] = {}
        self._takers: dict[Kind, deque[Taker]] = {}
        self._filling: dict[Kind, asyncio.Task[None]] = {}
        self._closed = False

    def take(self, kind: Kind, taker: Taker) -> None:
        """Calls `taker` with a socket, now or soon; with None when there is none to be had."""
        ready = self._ready.setdefault(kind, deque())
        if ready:
            taker(ready.popleft())
            return
        takers = self._takers.setdefault(kind, deque())
        if self._closed or len(takers) >= WAITING:
            taker(None)
            return
        takers.append(taker)
        if kind not in self._filling:
            self._filling[kind] = asyncio.create_task(self._fill(kind))

    async def _fill(self, kind: Kind) -> None:
        takers, ready = self._takers[kind], self._ready[kind]
        try:
            while takers and not self._closed:
                made = await asyncio.to_thread(_make, self._netns, kind, max(BATCH, min(len(takers), 8 * BATCH)))
                ready.extend(made)
                while takers and ready:
                    takers.popleft()(ready.popleft())
                if not made:
                    break
        finally:
            del self._filling[kind]
            while takers:
                takers.popleft()(None)
            if self._closed:
                self._empty()

    def close(self) -> None:
        self._closed = True
        self._empty()

    def _empty(self) -> None:
        for ready in self._ready.values():
            while ready:
                ready.popleft().close()


def _make(netns: str, kind: Kind, count: int) -> list[socket.socket]:
    """Blocking. Fewer, or none, when the namespace is gone or descriptors run out."""
    made: list[socket.socket] = []

    def inside() -> None:
        for _ in range(count):
            one = socket.socket(kind[0], kind[1] | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
            made.append(one)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, SOCKET_MARK)

    with suppress(OSError):
        netlink.in_netns(netns, inside)
    return made
