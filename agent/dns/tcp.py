"""DNS by TCP: messages of a client that the mesh answers are answered, all others go to the resolver he dialled, on one connection of its
own.

What the resolver sends is passed on message by message as it comes (a zone transfer is many), so ids stay.
"""
from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from contextlib import suppress

from agent.dns.stock import Stock

IDLE = 30.0  # seconds without a byte of the client
CONNECT_SECONDS = 10.0  # as long as a client would wait itself
MESSAGE = 65_535
SO_ORIGINAL_DST = 80  # linux/netfilter_ipv4.h; the same number for IPv6
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close with a reset


def original(connection: socket.socket, port: int) -> tuple[str, int] | None:
    """The resolver that a redirected connection was made to; None when it was made to us."""
    try:
        if connection.family == socket.AF_INET6:
            raw = connection.getsockopt(socket.IPPROTO_IPV6, SO_ORIGINAL_DST, 28)
            found = socket.inet_ntop(socket.AF_INET6, raw[8:24]), int.from_bytes(raw[2:4], "big")
        else:
            raw = connection.getsockopt(socket.IPPROTO_IP, SO_ORIGINAL_DST, 16)
            found = socket.inet_ntop(socket.AF_INET, raw[4:8]), int.from_bytes(raw[2:4], "big")
    except OSError:
        return None
    return None if found[1] == port else found


class Session:
    """One client's connection. `answer(message)`: the mesh's or one that was kept, or None; `heard(message)` is told of what the resolver
    says, `failed(why)` of one that cannot be had."""

    def __init__(self, client: socket.socket, resolver: tuple[str, int], stock: Stock, answer: Callable[[bytes], bytes | None],
                 heard: Callable[[bytes], None], failed: Callable[[str], None]) -> None:
        self._client, self._resolver, self._stock, self._failed = client, resolver, stock, failed
        self._answer, self._heard = answer, heard
        self._upstream: asyncio.StreamWriter | None = None
        self._pump: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Until the client or the resolver ends it. Never raises on what they send."""
        try:
            reader, writer = await asyncio.open_connection(sock=self._client, limit=MESSAGE + 2)
        except OSError:  # the client has gone already
            self._client.close()
            return
        try:
            while (message := await _message(reader)) is not None:
                found = self._answer(message)
                if found is not None:
                    writer.write(struct.pack(">H", len(found)) + found)
                    await asyncio.wait_for(writer.drain(), IDLE)
                    continue
                if self._upstream is None:
                    await self._connect(writer)
                assert self._upstream is not None
                self._upstream.write(struct.pack(">H", len(message)) + message)
                await asyncio.wait_for(self._upstream.drain(), IDLE)
            if self._pump is not None and not self._pump.done():  # the client wrote its last; answers may be on their way
                if self._upstream is not None and self._upstream.can_write_eof():
                    self._upstream.write_eof()
                await asyncio.wait_for(asyncio.shield(self._pump), IDLE)
        except (OSError, TimeoutError, EOFError, RuntimeError):
            with suppress(OSError):
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        finally:
            if self._pump is not None:
                self._pump.cancel()
            if self._upstream is not None:
                self._upstream.close()
            writer.close()

    async def _connect(self, client: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[socket.socket | None] = loop.create_future()

        def taker(given: socket.socket | None) -> None:
            if not future.done():
                future.set_result(given)
            elif given is not None:
                given.close()

        family = socket.AF_INET6 if ":" in self._resolver[0] else socket.AF_INET
        self._stock.take((family, socket.SOCK_STREAM), taker)
        made = await future
        if made is None:
            self._failed("unreachable")
            raise OSError("no socket in the pod's namespace")
        try:
            await asyncio.wait_for(loop.sock_connect(made, self._resolver), CONNECT_SECONDS)
            reader, self._upstream = await asyncio.open_connection(sock=made, limit=MESSAGE + 2)
        except BaseException as error:
            made.close()
            if isinstance(error, OSError):
                self._failed("refused" if isinstance(error, ConnectionRefusedError) else
                             "timeout" if isinstance(error, TimeoutError) else "unreachable")
            raise
        self._pump = asyncio.create_task(_pass_on(reader, client, self._heard))


async def _pass_on(reader: asyncio.StreamReader, client: asyncio.StreamWriter, heard: Callable[[bytes], None]) -> None:
    """The resolver's messages, until it ends; then the client's connection ends too."""
    with suppress(OSError, TimeoutError, EOFError, RuntimeError):
        while (message := await _message(reader)) is not None:
            heard(message)
            client.write(struct.pack(">H", len(message)) + message)
            await asyncio.wait_for(client.drain(), IDLE)
    client.close()


async def _message(reader: asyncio.StreamReader) -> bytes | None:
    """The next one without its length; None at a proper end. Raises TimeoutError after IDLE, EOFError in the midst of one."""
    async with asyncio.timeout(IDLE):
        try:
            head = await reader.readexactly(2)
        except asyncio.IncompleteReadError as error:
            if error.partial:
                raise
            return None
        return await reader.readexactly(int.from_bytes(head, "big"))
