"""productpage: the page that a reader sees, made of details and reviews.

`/productpage` is HTML; `/api/v1/products/0` is the same as JSON, with the version of reviews that answered. Who the
reader is comes with the header `end-user`.
"""
from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

from web import Answer, Unreachable, as_json, fetch, serve

STYLE = ("body{font-family:Georgia,serif;max-width:46em;margin:3em auto;color:#222}h1{font-weight:normal}"
         "table{border-spacing:1em .2em}td:first-child{color:#777}blockquote{border-left:3px solid #ccc;padding-left:1em}"
         ".black{color:#000}.red{color:#c00}.off{color:#ddd}.error{color:#c00}footer{color:#777;font-size:.9em}")


def ask(service: str, headers: Mapping[str, str]) -> tuple[Any, str]:
    """What a service says about the book, or None and why it says nothing."""
    try:
        return fetch(service, f"/{service}/0", headers), ""
    except Unreachable as error:
        return None, str(error)


def stars(review: Mapping[str, Any], color: str) -> str:
    if "stars" not in review:
        return ""
    full = int(review["stars"])
    return f'<p><span class="{html.escape(color)}">{"★" * full}</span><span class="off">{"★" * (5 - full)}</span></p>'


def page(headers: Mapping[str, str]) -> Answer:
    details, no_details = ask("details", headers)
    reviews, no_reviews = ask("reviews", headers)
    parts = [f"<!doctype html><html lang=en><meta charset=utf-8><title>Bookinfo</title><style>{STYLE}</style>"]
    parts.append(f"<h1>{html.escape(details['title'] if details else 'A book')}</h1>")
    if details:
        rows = "".join(f"<tr><td>{html.escape(key)}</td><td>{html.escape(str(value))}</td></tr>"
                       for key, value in details.items() if key not in ("id", "title"))
        parts.append(f"<table>{rows}</table>")
    else:
        parts.append(f"<p class=error>Details are not to be had: {html.escape(no_details)}</p>")
    parts.append("<h2>Reviews</h2>")
    if reviews:
        for review in reviews["reviews"]:
            parts.append(f"<blockquote><p>{html.escape(review['text'])}</p>{stars(review, reviews['color'])}"
                         f"<footer>{html.escape(review['reviewer'])}</footer></blockquote>")
        parts.append(f"<footer>Reviews by {html.escape(reviews['pod'])} (reviews {html.escape(reviews['version'])})</footer>")
        if "error" in reviews:
            parts.append(f"<p class=error>No stars: {html.escape(reviews['error'])}</p>")
    else:
        parts.append(f"<p class=error>Reviews are not to be had: {html.escape(no_reviews)}</p>")
    user = headers.get("end-user", "")
    parts.append(f"<footer>{'Signed in as ' + html.escape(user) if user else 'Not signed in'}</footer></html>\n")
    return 200, "text/html", "".join(parts)


def product(headers: Mapping[str, str]) -> Answer:
    details, no_details = ask("details", headers)
    reviews, no_reviews = ask("reviews", headers)
    answer = {"details": details or {"error": no_details}, "reviews": reviews or {"error": no_reviews}}
    return as_json(answer, 200 if details and reviews else 503)


def route(path: str, headers: Mapping[str, str]) -> Answer:
    if path == "/productpage":
        return page(headers)
    if path == "/api/v1/products/0":
        return product(headers)
    if path == "/":
        return 200, "text/html", '<!doctype html><title>Bookinfo</title><a href="/productpage">The book</a>\n'
    return as_json({"error": f"nothing at {path}; try /productpage"}, 404)


serve("productpage", route)
