"""DNS in tests: a client inside a namespace, and resolvers there: dnsmasq, and one whose answers a test writes itself."""
from __future__ import annotations

import contextlib
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import dnslib

from agent import netlink
from tests.support.cgroup import visited
from tests.support.netns import Netns
from tests.support.wait import PATIENCE, until

Made = bytes | list[bytes] | None  # what a resolver sends for a question: one message, several, or nothing


def question(name: str, kind: str = "A", *, edns: int | None = None) -> dnslib.DNSRecord:
    record = dnslib.DNSRecord.question(name, kind)
    if edns is not None:
        record.add_ar(dnslib.EDNS0(udp_len=edns))
    return record


def udp(netns: Netns, family: int = socket.AF_INET) -> socket.socket:
    return netlink.in_netns(netns.path, lambda: socket.socket(family, socket.SOCK_DGRAM))


def ask(netns: Netns, server: str, name: str, kind: str = "A", *, edns: int | None = None, connected: bool = True,
        timeout: float = 5 * PATIENCE) -> dnslib.DNSRecord:
    """The answer by UDP, which has to come from the server that was asked. Raises OSError (TimeoutError: silence)."""
    record = question(name, kind, edns=edns)
    with udp(netns, socket.AF_INET6 if ":" in server else socket.AF_INET) as client:
        client.settimeout(timeout)
        if connected:
            client.connect((server, 53))
            client.send(record.pack())
            data = client.recv(65535)
        else:
            client.sendto(record.pack(), (server, 53))
            data, peer = client.recvfrom(65535)
            assert peer[:2] == (server, 53), peer
    answer = dnslib.DNSRecord.parse(data)
    assert answer.header.id == record.header.id and answer.q == record.q
    return answer


def ask_tcp(netns: Netns, server: str, *names: str, kind: str = "A", timeout: float = 5 * PATIENCE) -> list[dnslib.DNSRecord]:
    """Questions on one connection, all sent at once; the answers in their order of coming."""
    family = socket.AF_INET6 if ":" in server else socket.AF_INET
    with visited(netns.cgroup) if netns.cgroup else contextlib.nullcontext():
        client = netlink.in_netns(netns.path, lambda: socket.socket(family, socket.SOCK_STREAM))
    with client:
        client.settimeout(timeout)
        client.connect((server, 53))
        client.sendall(b"".join(len(packed := question(name, kind).pack()).to_bytes(2, "big") + packed for name in names))
        found = []
        with client.makefile("rb") as stream:
            while len(found) < len(names):
                head = stream.read(2)
                if len(head) < 2:
                    raise ConnectionError(f"the connection ended after {len(found)} answers")
                found.append(dnslib.DNSRecord.parse(stream.read(int.from_bytes(head, "big"))))
    return found


def addresses(answer: dnslib.DNSRecord) -> list[str]:
    return sorted(str(one.rdata) for one in answer.rr if one.rtype in (1, 28))


@dataclass
class Resolver:
    """Answers every question with what `make` makes of it; `heard` are the names, in order, `ports` the askers' ports."""

    make: Callable[[dnslib.DNSRecord], Made]
    heard: list[str]
    ports: list[int]

    def count(self, name: str) -> int:
        return sum(one == name for one in list(self.heard))


@contextlib.contextmanager
def resolver(netns: Netns, make: Callable[[dnslib.DNSRecord], Made], family: int = socket.AF_INET) -> Iterator[Resolver]:
    """By UDP, on every address of a namespace."""
    def bound() -> socket.socket:
        made = socket.socket(family, socket.SOCK_DGRAM)
        made.bind(("::" if family == socket.AF_INET6 else "0.0.0.0", 53))
        return made

    server = netlink.in_netns(netns.path, bound)
    server.settimeout(0.1)
    one, ending = Resolver(make, [], []), threading.Event()

    def serve() -> None:
        while not ending.is_set():
            try:
                data, peer = server.recvfrom(65535)
            except OSError:
                continue
            asked = dnslib.DNSRecord.parse(data)
            one.heard.append(str(asked.q.qname).rstrip("."))
            one.ports.append(peer[1])
            answers = one.make(asked)
            for answer in answers if isinstance(answers, list) else [answers] if answers else []:
                server.sendto(answer, peer)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield one
    finally:
        ending.set()
        thread.join()
        server.close()


def reply(asked: dnslib.DNSRecord, *lines: str, rcode: int = 0, soa: str = "") -> bytes:
    """An answer with records as a zone file has them."""
    made = asked.reply()
    for line in lines:
        made.add_answer(*dnslib.RR.fromZone(line))
    if soa:
        made.add_auth(*dnslib.RR.fromZone(soa))
    made.header.rcode = rcode
    return bytes(made.pack())


def dnsmasq(netns: Netns, *options: str) -> subprocess.Popen[bytes]:
    """A real resolver on every address of a namespace, which knows what `options` say and nothing else."""
    process = netns.start("dnsmasq", "--keep-in-foreground", "--no-resolv", "--no-hosts", "--no-daemon", "--conf-file=/dev/null",
                          "--pid-file=", "--user=root", "--local=/example.test/", "--edns-packet-max=4096", *options,
                          stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until(lambda: ":53 " in netns.run("ss", "-Hlnut").stdout, "dnsmasq listens")
    return process
