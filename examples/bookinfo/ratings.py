"""ratings: how many stars each reviewer gave."""
from __future__ import annotations

from collections.abc import Mapping

from web import Answer, as_json, serve

STARS = {"reviewer-1": 5, "reviewer-2": 4}


def route(path: str, headers: Mapping[str, str]) -> Answer:
    del headers
    head, _, number = path.rpartition("/")
    if head != "/ratings" or not number.isdigit():
        return as_json({"error": f"nothing at {path}; try /ratings/0"}, 404)
    return as_json({"id": int(number), "ratings": STARS})


serve("ratings", route)
