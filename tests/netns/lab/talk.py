"""Both ends of a conversation for tests of tunnels; commands of pods, the standard library alone.

    talk.py serve                                     answers `GET /who` with the peer's address, `/echo` with the request's marker,
                                                      `/drip` with a byte ten times a second, `/bulk` until the other side goes
    talk.py ask HOST PATH [MARKER [COUNT [fresh]]]    a line for each: what was answered, or `failed ...`. `fresh`: a connection for each.
                                                      COUNT 0: until stdin ends
"""
from __future__ import annotations

import http.client
import http.server
import select
import sys
import time

PORT = 8080
DRIPS = 100  # in 10 s


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 65536  # an answer in one write: in two it would wait for the acknowledgement of the first

    def do_GET(self) -> None:
        if self.path == "/bulk":
            self.send_response(200)
            self.send_header("content-length", str(1 << 40))
            self.end_headers()
            while True:
                self.wfile.write(bytes(65536))
        if self.path == "/drip":
            self.send_response(200)
            self.send_header("content-length", str(DRIPS))
            self.end_headers()
            for _ in range(DRIPS):
                self.wfile.write(b".")
                self.wfile.flush()
                time.sleep(0.1)
            return
        said = self.client_address[0] if self.path == "/who" else self.headers.get("marker", "")
        self.send_response(200)
        self.send_header("content-length", str(len(said)))
        self.end_headers()
        self.wfile.write(said.encode())

    def log_message(self, *_: object) -> None:
        pass


def serve() -> None:
    http.server.ThreadingHTTPServer.request_queue_size = 512
    http.server.ThreadingHTTPServer(("0.0.0.0", PORT), Handler).serve_forever()


def ask(host: str, path: str, marker: str = "-", count: str = "1", fresh: str = "") -> None:
    connection = http.client.HTTPConnection(host, PORT, timeout=30)
    done = 0
    while done < int(count) or (count == "0" and not select.select([sys.stdin], [], [], 0)[0]):
        done += 1
        try:
            connection.request("GET", path, headers={"marker": marker})
            answer = connection.getresponse()
            said = ""
            while piece := answer.read(65536):
                said = (said + piece.decode())[-1000:]
            if answer.length:
                raise http.client.IncompleteRead(b"", answer.length)
            print(said if answer.status == 200 else f"failed {answer.status} {said}", flush=True)
        except (OSError, http.client.HTTPException) as error:
            print(f"failed {type(error).__name__} {error}", flush=True)
            connection.close()
            time.sleep(0.02)  # what is refused is refused at once
        if fresh:
            connection.close()


if __name__ == "__main__":
    {"serve": serve, "ask": ask}[sys.argv[1]](*sys.argv[2:])
