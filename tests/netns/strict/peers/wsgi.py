"""What gunicorn reads, one JSON line for each whole request.

A body that its length announced and that did not come reads as a short one in WSGI: an application has to compare, as here.
"""
from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from typing import Any


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    body = environ["wsgi.input"].read()
    if "CONTENT_LENGTH" in environ and len(body) != int(environ["CONTENT_LENGTH"] or 0):
        raise ValueError("the body is cut short")
    sys.stdout.write(json.dumps({"at": "gunicorn", "method": environ["REQUEST_METHOD"], "target": environ["RAW_URI"],
                                 "body": body.decode("latin-1"), "host": environ.get("HTTP_HOST", "")}) + "\n")
    sys.stdout.flush()
    start_response("200 OK", [("x-seen", environ["RAW_URI"][:100]), ("content-length", "4")])
    return [b"" if environ["REQUEST_METHOD"] == "HEAD" else b"seen"]
