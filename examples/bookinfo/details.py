"""details: facts about a book."""
from __future__ import annotations

from collections.abc import Mapping

from web import Answer, as_json, serve

BOOK = {"title": "The Comedy of Errors", "author": "William Shakespeare", "year": 1594, "type": "paperback", "pages": 200,
        "publisher": "Folio", "language": "English"}


def route(path: str, headers: Mapping[str, str]) -> Answer:
    del headers
    head, _, number = path.rpartition("/")
    if head != "/details" or not number.isdigit():
        return as_json({"error": f"nothing at {path}; try /details/0"}, 404)
    return as_json({"id": int(number), **BOOK})


serve("details", route)
