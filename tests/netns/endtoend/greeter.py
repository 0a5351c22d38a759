"""A server that speaks first, as SMTP and MySQL do, then echoes lines."""
from __future__ import annotations

import socketserver


class Greeter(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        self.wfile.write(b"220 welcome\r\n")
        for line in self.rfile:
            self.wfile.write(b"250 " + line)


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True


if __name__ == "__main__":
    Server(("", 2525), Greeter).serve_forever()
