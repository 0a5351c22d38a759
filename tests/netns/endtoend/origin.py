"""A server that can do everything a server may do: HTTP of every shape, TCP of every kind. One process, several ports.

8000 HTTP · 9000 reads to the end, then answers · 9001 accepts and reads nothing · 9002 accepts nobody (full backlog)
"""
from __future__ import annotations

import hashlib
import itertools
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

BLOCK = bytes(range(256)) * 256
connections = itertools.count(1)
seen: list[str] = []


class Origin(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.number = next(connections)

    def log_message(self, *_: Any) -> None:
        pass

    def blocks(self) -> Any:
        """The request's body, in pieces."""
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            while (line := self.rfile.readline().strip()):
                self.trailers.append(line.decode())
            return
        left = int(self.headers.get("Content-Length", 0))
        while left > 0:
            piece = self.rfile.read(min(left, 1 << 16))
            if not piece:
                raise ConnectionError("the client left within its body")
            left -= len(piece)
            yield piece

    def answer(self, body: bytes, code: int = 200, **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def pieces(self, size: int) -> Any:
        for at in range(0, size, len(BLOCK)):
            yield BLOCK[:min(len(BLOCK), size - at)]

    def do(self) -> None:
        self.trailers: list[str] = []
        url = urlsplit(self.path)
        ask = {key: value[0] for key, value in parse_qs(url.query).items()}
        seen.append(f"{self.command} {self.path}")
        what, size = url.path.strip("/").split("/")[0], int(ask.get("n", 0))
        if what == "upgrade":
            return self.upgrade()
        if what == "refuse":  # answers before it read the body
            self.close_connection = True
            return self.answer(b"no\n", 417, Connection="close")
        digest, length = hashlib.sha256(), 0
        for piece in self.blocks():
            digest.update(piece)
            length += len(piece)
        if what == "seen":
            self.answer(json.dumps(seen).encode())
        elif what == "length":
            self.send_response(200)
            self.send_header("Content-Length", str(size))
            self.end_headers()
            for piece in self.pieces(size):
                self.wfile.write(piece)
        elif what == "chunked":
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.send_header("Trailer", "X-Sum")
            self.end_headers()
            for piece in self.pieces(size):
                self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            self.wfile.write(b"0\r\nX-Sum: done\r\n\r\n")
        elif what == "close":
            self.close_connection = True
            self.send_response(200)
            self.send_header("Connection", "close")
            self.end_headers()
            for piece in self.pieces(size):
                self.wfile.write(piece)
        elif what == "status":
            code = int(ask["code"])
            if code in (204, 304):
                self.send_response(code)
                self.send_header("ETag", '"x"')
                self.end_headers()
            else:
                self.answer(b"as asked\n", code)
        elif what == "slow":
            time.sleep(float(ask["s"]))
            self.answer(b"late\n")
        elif what == "die":
            self.close_connection = True
        elif what == "half":
            self.close_connection = True
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nonly this")
        elif what == "garbage":
            self.close_connection = True
            self.wfile.write(b"220 this is not HTTP\r\n\r\n")
        else:
            self.answer(json.dumps({
                "connection": self.number, "client": self.client_address[0], "version": self.request_version, "path": self.path,
                "headers": {name.lower(): value for name, value in self.headers.items()}, "length": length,
                "sha256": digest.hexdigest(), "trailers": self.trailers}).encode() + b"\n")
        return None

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_OPTIONS = do

    def upgrade(self) -> None:
        self.close_connection = True
        self.wfile.write(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
        self.wfile.flush()
        while piece := self.connection.recv(65536):
            self.connection.sendall(piece)


class Server(ThreadingHTTPServer):
    request_queue_size = 128
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        pass  # clients that leave are what the tests are about


def read_to_the_end(connection: socket.socket) -> None:
    digest, length = hashlib.sha256(), 0
    with connection:
        while piece := connection.recv(65536):
            digest.update(piece)
            length += len(piece)
        connection.sendall(f"{length} {digest.hexdigest()}\n".encode())


def tcp(port: int, serve: Any) -> None:
    listener = socket.create_server(("", port))
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=serve, args=(connection,), daemon=True).start()


if __name__ == "__main__":
    asleep: list[socket.socket] = []
    full = socket.socket()
    full.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    full.bind(("", 9002))
    full.listen(0)
    waiting = [socket.socket() for _ in range(4)]
    for one in waiting:
        one.setblocking(False)
        one.connect_ex(("127.0.0.1", 9002))
    threading.Thread(target=tcp, args=(9000, read_to_the_end), daemon=True).start()
    threading.Thread(target=tcp, args=(9001, asleep.append), daemon=True).start()
    Server(("", 8000), Origin).serve_forever()
