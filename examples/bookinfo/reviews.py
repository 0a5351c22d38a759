"""reviews: what readers wrote. VERSION v1 shows no stars, v2 black ones, v3 red ones; v2 and v3 ask ratings for them."""
from __future__ import annotations

import os
import socket
from collections.abc import Mapping

from web import Answer, Unreachable, as_json, fetch, serve

VERSION = os.environ["VERSION"]
COLOR = {"v1": "", "v2": "black", "v3": "red"}[VERSION]
TEXTS = {"reviewer-1": "A farce that runs like clockwork: two pairs of twins and not one dull scene.",
         "reviewer-2": "Very funny, and thin where it should be warm. His later comedies are deeper."}


def route(path: str, headers: Mapping[str, str]) -> Answer:
    head, _, number = path.rpartition("/")
    if head != "/reviews" or not number.isdigit():
        return as_json({"error": f"nothing at {path}; try /reviews/0"}, 404)
    reviews = [{"reviewer": reviewer, "text": text} for reviewer, text in TEXTS.items()]
    answer = {"id": int(number), "version": VERSION, "pod": socket.gethostname(), "color": COLOR, "reviews": reviews}
    if COLOR:
        try:
            stars = fetch("ratings", f"/ratings/{number}", headers)["ratings"]
            for review in reviews:
                review["stars"] = stars.get(review["reviewer"], 0)
        except Unreachable as error:
            answer["error"] = str(error)  # reviews without stars are better than none
    return as_json(answer)


serve(f"reviews-{VERSION}", route)
