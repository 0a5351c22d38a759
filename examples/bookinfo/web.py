"""What the four programs of Bookinfo share: a small HTTP server and client with keep-alive, on the standard library.

Headers of tracing and of the user's session are passed on, as every application behind a mesh should do: a proxy sees
requests come in and go out, but only the application knows which belong together.
"""
from __future__ import annotations

import http.client
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PORT = 9080
TIMEOUT = float(os.environ.get("TIMEOUT", "5"))  # seconds for an answer of another service
# Istio's list of headers to pass on, and `end-user`, by which the exercises route.
FORWARDED = ("x-request-id", "x-b3-traceid", "x-b3-spanid", "x-b3-parentspanid", "x-b3-sampled", "x-b3-flags", "b3",
             "traceparent", "tracestate", "baggage", "end-user", "user-agent")

Answer = tuple[int, str, str]  # status, content type, text
Route = Callable[[str, Mapping[str, str]], Answer]


class Unreachable(Exception):
    """A service did not answer, or not with 200; the text says which and how."""


class Server(ThreadingHTTPServer):
    """One thread per connection; listens on IPv6 and IPv4 at once where the machine has both."""

    daemon_threads = True
    request_queue_size = 128


def serve(name: str, route: Route) -> None:
    """Serve until SIGTERM. `route` gets the path and the headers (names in lower case)."""
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        server_version = f"bookinfo-{name}"
        timeout = 60  # seconds a kept-alive connection may be silent
        # Head and body leave in one segment. Two of them, with Nagle's algorithm against delayed acknowledgements,
        # make every answer on a kept connection 40 ms late.
        wbufsize = 1 << 16
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            headers = {key.lower(): value for key, value in self.headers.items()}
            try:
                status, kind, text = (200, "text/plain", "ok\n") if path == "/health" else route(path, headers)
            except Unreachable as error:
                status, kind, text = as_json({"error": str(error)}, 503)
            body = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, form: str, *values: Any) -> None:
            if not self.path.startswith("/health"):
                print(f"{name} {self.client_address[0]} {form % values}", file=sys.stderr, flush=True)

    server = Server(("", PORT), Handler)
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
    print(f"{name} listens on {PORT}", file=sys.stderr, flush=True)
    server.serve_forever(poll_interval=0.2)


def as_json(value: Any, status: int = 200) -> Answer:
    return status, "application/json", json.dumps(value, indent=1) + "\n"


_connections = threading.local()  # one connection per thread and service: http.client is not shared between threads


def fetch(service: str, path: str, headers: Mapping[str, str]) -> Any:
    """JSON of `http://<service>:9080<path>`, over a connection that is kept. Unreachable when there is none."""
    kept: dict[str, http.client.HTTPConnection] = _connections.__dict__.setdefault("kept", {})
    passed = {key: headers[key] for key in FORWARDED if key in headers}
    for attempt in (1, 2):
        connection = kept.get(service) or http.client.HTTPConnection(service, PORT, timeout=TIMEOUT)
        fresh = connection.sock is None
        kept[service] = connection
        try:
            connection.request("GET", path, headers=passed)
            answer = connection.getresponse()
            text = answer.read()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            if fresh or attempt == 2 or isinstance(error, TimeoutError):
                raise Unreachable(f"{service} does not answer: {type(error).__name__} {error}") from error
            continue  # a kept connection that the other side closed meanwhile: once more on a new one
        if answer.status != 200:
            raise Unreachable(f"{service} answered {answer.status}")
        return json.loads(text)
    raise AssertionError("unreachable")
