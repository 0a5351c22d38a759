"""Answers with who answers and what was asked, as JSON; the query may ask it to take its time."""
from __future__ import annotations

import json
import os
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        query = parse_qs(urlsplit(self.path).query)
        time.sleep(float(query.get("sleep", ["0"])[0]))
        fields = {name.lower(): self.headers.get_all(name) for name in self.headers}
        body = json.dumps({"version": os.environ["VERSION"], "headers": fields}).encode()
        self.send_response(200)
        for name, value in (("Content-Length", str(len(body))), ("x-old", "application"), ("x-set", "application")):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    do_DELETE = do_GET

    def log_message(self, *_: object) -> None:
        pass


ThreadingHTTPServer(("", 8080), Handler).serve_forever()
