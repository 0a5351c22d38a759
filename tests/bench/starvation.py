"""How much slower a pod gets while another pod of the same worker attacks: `make bench CASES=starvation`, or
`CASES=starvation:pipeline,flood` for some of ATTACKS.

Two captured pods, one worker on one core. The victim asks at a fixed rate (open loop); its p99 alone, right before each attack, is
compared with that under the attack, which has run for a second by then; the median of the rounds' ratios is to be at most 2.
The `tunnel-` attacks (flood.py) come from outside, at the attacked pod's port 15008: by somebody whom the mesh believes, or by nobody.
The attacker runs on the load core at the lowest priority, so that what it costs there (which is no part of the claim) is hardly
charged to the victim; for certain under `chrt -r 1`, which the victim's load inherits and the attacker does not. A request
of the victim that fails ends the run.
"""
from __future__ import annotations

import asyncio
import contextlib
import os
import re
import select
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from agent import netlink
from agent.dataplane import blobs
from agent.dataplane.client import connect
from agent.model.identity import Certificate, Trust
from tests.bench import ends, pairs
from tests.bench.cases import request
from tests.bench.proxies import SCOPE, entries
from tests.bench.tools import HTTP_PORT, SOURCE_PORT, load, start_origin
from tests.bench.topology import CAPTURED_PORT, LOAD_CORE, PROXY_CORE, VIP, BenchError, Site, Topology, family, pin, wait_listening
from tests.support import halfopen
from tests.support.keeper import Keeper
from tests.support.netns import Netns
from tests.support.wait import until

RATE, CONNECTIONS = 1_000, 16  # of the victim: far below what a worker can do
AT_MOST = 2.0
READY_SECONDS = 20
# Runs until it is killed; says READY when the attack is under way.
ATTACKER = """
import select, socket, sys, time
how, host, port, many = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
HEAD = f"GET /64k HTTP/1.1\\r\\nHost: {sys.argv[5]}\\r\\n\\r\\n".encode()
SMALL = HEAD.replace(b"/64k", b"/1k")
def dial():
    one = socket.socket()
    if how == "unread": one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    one.setblocking(False); one.connect_ex((host, port))
    return one
say = {"slowhead": SMALL[:-2], "slowbody": SMALL.replace(b"GET", b"POST")[:-2] + b"Content-Length: 9\\r\\n\\r\\n1", "unread": HEAD * 20,
       "pipeline": SMALL * 200, "busy": SMALL, "bighead": SMALL[:-2] + b"X-Long: " + b"a" * (1 << 20), "flood": b""}[how]
poll, all_, told = select.epoll(), {}, False
while True:
    while len(all_) < many:
        one = dial(); all_[one.fileno()] = one
        poll.register(one, select.EPOLLOUT | select.EPOLLIN | select.EPOLLET)
        if len(all_) % 100 == 0: break
    if len(all_) >= many and not told:
        told = True; print("READY", flush=True)
    for fd, what in poll.poll(0.01 if len(all_) >= many else 0):
        one = all_[fd]
        try:
            if what & (select.EPOLLERR | select.EPOLLHUP): raise OSError
            if how == "flood":
                if what & select.EPOLLOUT: raise OSError
                continue
            if what & select.EPOLLIN and how in ("busy", "pipeline", "bighead"):
                if not one.recv(1 << 20): raise OSError
                one.send(say)
            elif what & select.EPOLLOUT: one.send(say)
        except BlockingIOError: pass
        except OSError:
            del all_[fd]; one.close()
"""
HALF_OPEN = "halfopen"
FLOOD = Path(__file__).with_name("flood.py")
TUNNEL = "tunnel-"
ATTACKS = {  # name: what it does, connections
    "busy": ("keep-alive requests on 5,000 connections", 5_000),
    "pipeline": ("200 requests at once on 64 connections", 64),
    "flood": ("connects and closes", 64),
    "unread": ("20 x 64 KiB asked for, nothing read, 1,000 connections", 1_000),
    "slowhead": ("heads that do not end, 4,000 connections", 4_000),
    "slowbody": ("bodies that do not come, 4,000 connections", 4_000),
    "bighead": ("heads of 1 MiB, 64 connections", 64),
    HALF_OPEN: ("100,000 half-open connections, and 2,000 of their SYNs again each second", halfopen.MANY),
    f"{TUNNEL}stall": ("15008: 4,096 connections that stop within their first record", 4_096),
    f"{TUNNEL}unfinished": ("15008: connections that never finish TLS, 4,000 at a time", 4_000),
    f"{TUNNEL}resets": ("15008: rapid reset, one tunnel after the other", 1),
    f"{TUNNEL}pings": ("15008: PINGs without end", 1),
    f"{TUNNEL}settings": ("15008: SETTINGS without end", 1),
    f"{TUNNEL}headers": ("15008: headers of 30 MB each, 12 KB compressed", 1),
    f"{TUNNEL}unread": ("15008: 160 streams of bytes without end, windows wide open, sockets that nobody reads", 8),
    f"{TUNNEL}windows": ("15008: windows beyond their end", 1),
}
MADE: Counter[str] = Counter()  # connections of the floods, all rounds together


async def configure(keeper: Keeper, victim: Site, attacked: Site, authority: pairs.Authority) -> None:
    identity = pairs.SERVER
    client = await connect(keeper.path)
    try:
        key, asked = await client.make_key(identity)
        issued = authority.sign(x509.load_der_x509_csr(asked), identity)
        begins, ends = (int(when.timestamp()) for when in (issued.not_valid_before_utc, issued.not_valid_after_utc))
        await client.commit([*entries("http", victim, HTTP_PORT),
                             blobs.put_pod("pod-attacker", 2, "w-client", SCOPE, (ip_address(attacked.netns.ip),), identity),
                             blobs.put_trust(Trust("cluster.local", (authority.certificate.public_bytes(Encoding.DER),))),
                             blobs.put_certificate(Certificate(identity, key, begins, ends, (issued.public_bytes(Encoding.DER),)))])
        for handle, uid, site, who in ((1, "pod-client", victim, ""), (2, "pod-attacker", attacked, identity)):
            fd = netlink.open_namespace(site.netns.path)
            try:
                await client.add_pod(handle, uid, (4,), fd, who)
            finally:
                os.close(fd)
    finally:
        await client.close()


@contextlib.contextmanager
def under(attack: str, site: Site, outside: Netns, folder: Path) -> Iterator[None]:
    """The attack is under way inside the block. `folder`: what `outside` shows on 15008."""
    meek = ("taskset", "-c", str(LOAD_CORE), "chrt", "-o", "0", "nice", "-n", "19")
    if attack == HALF_OPEN:
        with halfopen.half_open(site.netns, VIP, HTTP_PORT, rate=2_000, before=meek):
            time.sleep(1.0)
            yield
        return
    if attack.startswith(TUNNEL):
        how = attack.removeprefix(TUNNEL)
        port = SOURCE_PORT if how == "unread" else HTTP_PORT
        argv = (*meek, sys.executable, "-I", str(FLOOD), how, site.netns.ip, str(port), str(folder))
        process = outside.start(*argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    else:
        argv = (*meek, sys.executable, "-I", "-c", ATTACKER, attack, VIP, str(HTTP_PORT), str(ATTACKS[attack][1]), VIP)
        process = site.netns.start(*argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        if not select.select([process.stdout], [], [], READY_SECONDS)[0] or process.stdout.readline() != "READY\n":
            process.kill()
            raise BenchError(f"the attacker ({attack}) ended with {process.wait(5)}")
        time.sleep(1.0)  # a part of the measurement: the attack is to have reached its bound
        yield
    finally:
        if attack.startswith(TUNNEL):
            process.terminate()
            told = re.findall(r"\d+", process.communicate(timeout=10)[0])
            MADE[attack] += int(told[0]) if told else 0
            MADE[f"{attack} frames"] += int(told[1]) if told else 0
        process.kill()
        process.wait(5)


def p99(site: Site, seconds: float) -> float:
    return load(site, HTTP_PORT, seconds, do="exchange", connections=CONNECTIONS, rate=RATE, request=request("/1k"))["p99_us"]


def run(names: list[str], rounds: int, seconds: float) -> dict[str, list[tuple[float, float]]]:
    """By attack: (p99 alone, p99 under attack) of each round, in us."""
    folder = Path(tempfile.mkdtemp(prefix="narrows-starvation-", dir="/dev/shm"))
    topology = Topology()
    keeper = None
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    try:
        start_origin(topology.origin, folder / "origin.out")
        victim, attacker = (topology.site(label, captured=True) for label in ("victim", "attacker"))
        start_origin(attacker.netns, folder / "attacked.out")  # what tunnels lead to
        authority = pairs.certificates(folder)
        keeper = Keeper(folder / "run", "--workers", "1").wait()
        until(lambda: "is ready" in keeper.text, "the worker is ready", timeout=15)
        asyncio.run(configure(keeper, victim, attacker, authority))
        wait_listening(victim.netns, CAPTURED_PORT, None, keeper.log)
        pin(family(keeper.pid), PROXY_CORE)
        for pid in family(keeper.pid):  # the kernel takes 50 ms of each second from a busy real-time process
            os.sched_setscheduler(pid, os.SCHED_OTHER, os.sched_param(0))
            os.setpriority(os.PRIO_PROCESS, pid, -20)
        p99(victim, 1.0)
        for number in range(rounds):
            for name in names:
                alone = p99(victim, seconds)
                with under(name, attacker, topology.origin, folder):
                    found[name].append((alone, p99(victim, seconds)))
            print(f"starvation: round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    finally:
        if keeper is not None:
            keeper.stop()
        topology.close()
        shutil.rmtree(folder, ignore_errors=True)
    return found


def table(found: dict[str, list[tuple[float, float]]]) -> str:
    """Beside the medians the lowest p99 of each side: on a machine that others use too, most rounds measure them."""
    lines = ["| attack | p99 alone, us | under attack, us | ratio (at most 2) | in the quietest rounds |", "|---|---|---|---|---|"]
    for name, rounds in found.items():
        ratios = [after / before for before, after in rounds]
        ratio = statistics.median(ratios)
        alone, attacked = (statistics.median(side) for side in zip(*rounds, strict=True))
        verdict = f"{ratio:.2f} ({min(ratios):.2f}-{max(ratios):.2f}){'' if ratio <= AT_MOST else ' missed'}"
        least = [min(side) for side in zip(*rounds, strict=True)]
        quiet = f"{least[1] / least[0]:.2f} ({least[0]:,.0f}, {least[1]:,.0f})"
        lines.append(f"| {ATTACKS[name][0]} | {alone:,.0f} | {attacked:,.0f} | {verdict} | {quiet} |")
    lines += [f"{what}: {many:,}" for what, many in MADE.items() if many]
    return "\n".join(lines)


def main(rounds: int = 3, seconds: float = 2.0, names: tuple[str, ...] = ()) -> int:
    print(table(run(list(names or ATTACKS), rounds, seconds)))
    return 0


if __name__ == "__main__":
    sys.exit(ends.run(main))
