"""Answers `served <path> to <client>`; `/hold` only once somebody asks for `/go`."""
from __future__ import annotations

import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

go = threading.Event()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path == "/hold":
            go.wait(60)
        elif self.path == "/go":
            go.set()
        body = f"served {self.path} to {self.client_address[0].removeprefix('::ffff:')}".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    address_family = socket.AF_INET6  # and IPv4 through it


server = Server(("::", 8080), Handler)
print("listening", flush=True)
server.serve_forever()
