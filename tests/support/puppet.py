"""A worker that does what the transactions tell it: for tests of what the keeper does when a worker misbehaves.

It speaks the worker's end of ext/core/protocol.pxd on descriptor 3. A transaction that holds one of these words makes it

    poison       answer FAILED                poison-only-INDEX   the same, in the worker of that index alone
    full         answer FAILED as one that has no descriptor left to take it with
    silence      not answer at all            crash               end with status 3
    greedy       ask for sockets of a pod that it does not have, and of an unknown family

    noise-only-INDEX SEED    say random things with random descriptors for ever, by the seed and the number of its life
    flood-only-INDEX         send MISS and NEED_SOCKETS of its pods as fast as the keeper takes them

Of a captured connection it reads nothing; it writes `INDEX PID` and closes. Sockets that it gets it keeps, keys until it is to
forget them.
"""
from __future__ import annotations

import contextlib
import mmap
import os
import random
import re
import select
import socket
import struct
import sys
import time

HEAD = struct.Struct("<HHI")
GOT = 4072  # beside it: sockets that a flood got
LIVES = 4080  # in the page of the statistics' header, where nobody counts: it outlives a worker, so that each is another
COMMIT, READY, APPLIED, FAILED, ATTACH, DETACH, SOCKETS, NEED, DRAINED, DRAIN, MISS = 7, 64, 65, 66, 67, 68, 69, 70, 71, 10, 32
KEY, KEY_FORGET = 72, 13


def noise(control: socket.socket, header: mmap.mmap, seed: int) -> None:
    life = struct.unpack_from("<Q", header, LIVES)[0]
    struct.pack_into("<Q", header, LIVES, life + 1)
    dice = random.Random(seed * 1_000_003 + life)
    fds = [os.open("/dev/null", os.O_RDWR), *os.pipe(), os.memfd_create("noise")]
    while True:
        struct.pack_into("<Q", header, 16, time.monotonic_ns())
        kind = dice.choice((READY, APPLIED, FAILED, NEED, MISS, DRAINED, COMMIT, dice.randrange(1 << 16)))
        body = dice.choice((b"", dice.randbytes(7), dice.randbytes(8), struct.pack("<IBH", dice.randrange(4), 4, 65535),
                            struct.pack("<I", 4) + b"a|b:", dice.randbytes(dice.randrange(3000))))
        given = dice.choices(fds, k=dice.choice((0, 0, 1, 5)))
        version = dice.choice((1,) * 30 + (0,))
        control.sendmsg([HEAD.pack(kind, version, dice.randrange(99)) + body],
                        [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(given)}i", *given))] if given else [])


def flood(control: socket.socket, header: mmap.mmap, _: int) -> None:
    got = 0
    while True:
        struct.pack_into("<Q", header, 16, time.monotonic_ns())
        with contextlib.suppress(BlockingIOError):
            while True:
                # socket.recv_fds of Python 3.11 takes flags and does not pass them on: it would wait here for ever
                data, control_data, _, _ = control.recvmsg(65536, socket.CMSG_SPACE(253 * 4), socket.MSG_DONTWAIT)
                fds = [fd for _, _, packed in control_data for (fd,) in struct.iter_unpack("=i", packed)]
                for fd in fds:
                    os.close(fd)
                if not data:
                    os._exit(0)
                kind, _, sequence = HEAD.unpack_from(data)
                if kind == SOCKETS:
                    got += len(fds)
                    struct.pack_into("<Q", header, GOT, got)
                if kind == COMMIT:
                    control.send(HEAD.pack(APPLIED, 1, sequence) + bytes(8))
        for _ in range(20):
            control.send(HEAD.pack(NEED, 1, 0) + struct.pack("<IBH", 1, 4, 65535))
            control.send(HEAD.pack(MISS, 1, 0) + struct.pack("<I", 12) + b"ns=x|host:80")


def main() -> None:
    index = int(sys.argv[1])
    control = socket.socket(fileno=3)
    control.setblocking(True)
    header = mmap.mmap(4, mmap.PAGESIZE)
    poll = select.poll()
    poll.register(3, select.POLLIN)
    listeners: dict[int, tuple[int, socket.socket]] = {}
    kept: list[int] = []
    keys: dict[bytes, int] = {}
    ready = False

    def send(kind: int, sequence: int, payload: bytes = b"") -> None:
        control.send(HEAD.pack(kind, 1, sequence) + payload)

    while True:
        struct.pack_into("<Q", header, 16, time.monotonic_ns())
        for fd, _ in poll.poll(500):
            if fd != 3:
                with contextlib.suppress(OSError, KeyError):  # detached, or the client is gone
                    peer, _ = listeners[fd][1].accept()
                    with peer:
                        peer.send(f"{index} {os.getpid()}\n".encode())
                continue
            data, fds, _, _ = socket.recv_fds(control, 65536, 253)
            if not data:
                os._exit(0)
            kind, _, sequence = HEAD.unpack_from(data)
            payload = data[8:]
            if kind == COMMIT:
                with mmap.mmap(fds[0], 0, mmap.MAP_PRIVATE, mmap.PROT_READ) as whole:
                    words = bytes(whole)
                txn_id = words[8:16]
                os.close(fds[0])
                if b"crash" in words:
                    os._exit(3)
                if b"silence" in words:
                    continue
                if b"full" in words:
                    send(FAILED, sequence, bytes(8) + struct.pack("<I", 4) + b"full")
                    continue
                for way in (noise, flood):
                    if told := re.search(rb"%s-only-%d (\d+)" % (way.__name__.encode(), index), words):
                        send(APPLIED, sequence, txn_id)
                        if not ready:
                            send(READY, 0, txn_id)
                        way(control, header, int(told[1]))
                if b"greedy" in words:
                    send(NEED, 0, struct.pack("<IBH", 4711, 4, 65535))
                only = b"poison-only-%d" % index
                if only in words or (b"poison" in words and b"poison-only" not in words):
                    send(FAILED, sequence, txn_id + struct.pack("<I", 6) + b"poison")
                    continue
                send(APPLIED, sequence, txn_id)
                if not ready:
                    ready = True
                    send(READY, 0, txn_id)
            elif kind == ATTACH:
                handle = struct.unpack_from("<I", payload)[0]
                for fd in fds:
                    listener = socket.socket(fileno=fd)
                    listeners[fd] = (handle, listener)
                    poll.register(fd, select.POLLIN)
                send(NEED, 0, struct.pack("<IBH", handle, 4, 3))
                send(NEED, 0, struct.pack("<IBH", handle, 6, 2))
            elif kind == DETACH:
                handle = struct.unpack_from("<I", payload)[0]
                for fd, (owner, listener) in list(listeners.items()):
                    if owner == handle:
                        poll.unregister(fd)
                        listener.close()
                        del listeners[fd]
            elif kind == KEY:
                keys[payload[:4]] = fds[0]
            elif kind == KEY_FORGET:
                os.close(keys.pop(payload[:4]))
            elif kind == SOCKETS:
                kept.extend(fds)
            elif kind == DRAIN:
                send(DRAINED, sequence)
                os._exit(0)
