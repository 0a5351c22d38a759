"""A server for tests over both families: who answers and who asks over HTTP (8080, and 7000, which no service knows) and
TCP (9000), echo over TCP and UDP (9001). Standard library alone.
"""
from __future__ import annotations

import os
import signal
import socket
import socketserver
import threading
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

NAME = f"{socket.gethostname()} {uuid.uuid4().hex}"  # a pod made again under its name is another one


def who(peer: Any) -> bytes:
    return f"{NAME} {peer[0].removeprefix('::ffff:')}\n".encode()


class Http(BaseHTTPRequestHandler):
    protocol_version, wbufsize = "HTTP/1.1", -1

    def do_GET(self) -> None:
        body = who(self.client_address)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        return


class Who(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        while self.rfile.readline():
            self.wfile.write(who(self.client_address))


class Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        while data := self.request.recv(1 << 16):
            self.request.sendall(data)


class EchoDatagrams(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        data, plug = self.request
        plug.sendto(data, self.client_address)


class Web(ThreadingHTTPServer):
    address_family, request_queue_size = socket.AF_INET6, 1024


class Tcp(socketserver.ThreadingTCPServer):
    address_family, allow_reuse_address, daemon_threads, request_queue_size = socket.AF_INET6, True, True, 1024


class Udp(socketserver.UDPServer):
    address_family = socket.AF_INET6


signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # the first process of a pid namespace has no default for it
servers: list[socketserver.BaseServer] = [Web(("::", 7000), Http), Tcp(("::", 9000), Who), Tcp(("::", 9001), Echo),
                                          Udp(("::", 9001), EchoDatagrams)]
for server in servers:
    threading.Thread(target=server.serve_forever, daemon=True).start()
Web(("::", 8080), Http).serve_forever()
