"""Connections of a captured pod that stay half open: raw SYNs, whose answers a rule in the pod's own namespace drops.

    with half_open(netns, address, port) as flood: ...      it has sent MANY different ones by then, and goes on with them until the end

They meet capture as the pod's own connections do. What each leaves is an entry in the namespace's table of tracked connections and, up
to the listener's backlog, a request that waits for an answer to its SYN; beyond it the kernel answers with cookies and keeps nothing.
"""
from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator

from tests.support.netns import Netns

MANY = 100_000
_SECOND = "198.18.0.1"  # RFC 2544: nobody's
_DROP = ("INPUT", "-i", "lo", "-p", "tcp", "--tcp-flags", "SYN,ACK", "SYN,ACK", "-j", "DROP")
_FLOOD = """
import socket, struct, sys, time
sources, target, port, many, rate = sys.argv[1].split(","), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])
raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
ends = [socket.inet_aton(source) + socket.inet_aton(target) for source in sources]
heads = [struct.pack("!BBHHHBBH8s", 0x45, 0, 40, 0, 0, 64, 6, 0, end) for end in ends]
sums = [sum(struct.unpack("!6H", end + struct.pack("!HH", 6, 20))) + 0x5002 + 1024 + port for end in ends]
def send(number):
    here, which = 10_000 + number // len(sources), number % len(sources)
    total = sums[which] + here + (number >> 16) + (number & 0xffff)
    total = (total & 0xffff) + (total >> 16)
    total = (total & 0xffff) + (total >> 16)
    try: raw.sendto(heads[which] + struct.pack("!HHIIHHHH", here, port, number, 0, 0x5002, 1024, ~total & 0xffff, 0), (target, 0))
    except OSError: pass
for number in range(many): send(number)
print("READY", flush=True)
while True:
    began = time.monotonic()
    for number in range(many):
        send(number)
        if rate and number % 4 == 3: time.sleep(max(0.0, began + number / rate - time.monotonic()))
"""


@contextlib.contextmanager
def half_open(netns: Netns, target: str, port: int, *, rate: int = 0, before: tuple[str, ...] = ()) -> Iterator[subprocess.Popen[str]]:
    """`rate`: SYNs per second after the first MANY; 0: as fast as it goes. `before`: a command to run it by (taskset, nice).

    They come from the pod's address and a second one that it gets for that: REDIRECT has 64,512 source ports for one.
    """
    netns.run("iptables-legacy", "-I", *_DROP)
    netns.run("ip", "address", "add", _SECOND, "dev", "lo")
    try:
        argv = (*before, sys.executable, "-I", "-c", _FLOOD, f"{netns.ip},{_SECOND}", target, str(port), str(MANY), str(rate))
        process: subprocess.Popen[str] = netns.start(*argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None and process.stdout.readline() == "READY\n", "the flood has ended"
            yield process
        finally:
            process.kill()
            process.wait(5)
    finally:
        netns.run("ip", "address", "delete", f"{_SECOND}/32", "dev", "lo")
        netns.run("iptables-legacy", "-D", *_DROP)
