"""Names of services for the pods of a node: one small server per node, UDP and TCP, on the node's own address.

It answers A and AAAA below the cluster's domain and nothing else; other names do not exist here, for the lab
has no way out. A pod expands `reviews` and `reviews.default` itself, by the search list of its resolv.conf.
"""
from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterable, Mapping
from typing import cast

import dnslib

from agent import netlink
from agent.lab.place import CLUSTER_DOMAIN
from agent.model.workload import IPAddress

TTL = 5  # seconds, as CoreDNS does: clients follow a changed service soon
MAX_QUESTION = 4096  # bytes over TCP; a question is some 50
MAX_UDP = 1232  # bytes of an answer without EDNS fragmentation trouble
TCP_IDLE = 5.0  # seconds a TCP client may be silent
MAX_TCP = 64  # open TCP connections per node


class Zone:
    """Names and their addresses; replaced as a whole."""

    def __init__(self) -> None:
        self._names: Mapping[str, tuple[IPAddress, ...]] = {}
        self._inner: frozenset[str] = frozenset()  # names that exist only as parents, as `svc.cluster.local`

    def replace(self, names: Iterable[tuple[str, tuple[IPAddress, ...]]]) -> None:
        self._names = {name.lower(): addresses for name, addresses in names}
        parents = {CLUSTER_DOMAIN, f"svc.{CLUSTER_DOMAIN}"}
        for name in self._names:
            labels = name.split(".")
            parents |= {".".join(labels[index:]) for index in range(1, len(labels))}
        self._inner = frozenset(parents)

    def answer(self, question: bytes, *, limit: int = 65535) -> bytes | None:
        """The answer to one message, or None when it is too broken to be answered."""
        try:
            request = dnslib.DNSRecord.parse(question)
        except Exception:  # dnslib raises many kinds on hostile bytes; each means the same
            return None
        if request.header.qr:
            return None  # an answer is never answered
        reply = request.reply(ra=1, aa=1)
        if request.header.opcode != dnslib.OPCODE.QUERY or len(request.questions) != 1:
            reply.header.rcode = dnslib.RCODE.NOTIMP
            return bytes(reply.pack())
        name = str(request.q.qname).rstrip(".").lower()
        found = self._names.get(name)
        if found is None and name not in self._inner:
            reply.header.rcode = dnslib.RCODE.NXDOMAIN
        kinds = {4: (dnslib.QTYPE.A, dnslib.A), 6: (dnslib.QTYPE.AAAA, dnslib.AAAA)}
        for address in found or ():
            number, record = kinds[address.version]
            if request.q.qtype in (number, dnslib.QTYPE.ANY):
                reply.add_answer(dnslib.RR(request.q.qname, number, rdata=record(str(address)), ttl=TTL))
        packed = bytes(reply.pack())
        if len(packed) > limit:
            packed = bytes(reply.truncate().pack())
        return packed


class Server:
    """Answers on one node, with sockets of the node's namespace."""

    def __init__(self, zone: Zone) -> None:
        self._zone = zone
        self._datagrams: list[asyncio.DatagramTransport] = []
        self._servers: list[asyncio.Server] = []
        self._clients = 0

    async def start(self, namespace: str, addresses: Iterable[IPAddress], port: int = 53) -> None:
        loop = asyncio.get_running_loop()
        for address in addresses:
            udp, tcp = await asyncio.to_thread(_sockets, namespace, address, port)
            transport, _ = await loop.create_datagram_endpoint(lambda: _Datagrams(self._zone), sock=udp)
            self._datagrams.append(transport)
            self._servers.append(await asyncio.start_server(self._serve, sock=tcp, limit=MAX_QUESTION + 2))

    def close(self) -> None:
        for transport in self._datagrams:
            transport.close()
        for server in self._servers:
            server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._clients += 1
        try:
            while self._clients <= MAX_TCP:
                size = int.from_bytes(await asyncio.wait_for(reader.readexactly(2), TCP_IDLE), "big")
                if size > MAX_QUESTION:
                    return
                answer = self._zone.answer(await asyncio.wait_for(reader.readexactly(size), TCP_IDLE))
                if answer is None:
                    return
                writer.write(len(answer).to_bytes(2, "big") + answer)
                await asyncio.wait_for(writer.drain(), TCP_IDLE)
        except (OSError, TimeoutError, asyncio.IncompleteReadError):
            pass  # a client that vanished or is slow: closed below
        finally:
            self._clients -= 1
            writer.close()


class _Datagrams(asyncio.DatagramProtocol):
    def __init__(self, zone: Zone) -> None:
        self._zone = zone
        self._transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        answer = self._zone.answer(data, limit=MAX_UDP)
        if answer is not None and self._transport is not None:
            self._transport.sendto(answer, addr)


def _sockets(namespace: str, address: IPAddress, port: int) -> tuple[socket.socket, socket.socket]:
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6

    def make() -> tuple[socket.socket, socket.socket]:
        udp = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        tcp = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        udp.bind((str(address), port))
        tcp.bind((str(address), port))
        tcp.listen(64)
        return udp, tcp

    return netlink.in_netns(namespace, make)
