"""What it costs to find a route, by how many a host has.

    python -m tests.bench.routes

Tables as a worker's, asked for the last of 10 to 10,000 routes of one kind through the Python door: a call of the door is in each
figure (about the first row's, in us), so that differences between rows are the search's. Best of ten rounds, CPU time. A dash: more
expressions than one request may be asked of, which the tables refuse.
"""
from __future__ import annotations

import sys
import time
from dataclasses import replace

from agent.dataplane import blobs
from agent.model.routing import MatchKind, Route, RouteMatch, StringMatch, VirtualHost, WeightedCluster
from ext.route import asked_door, door
from tests.support.blobs import DESTINATION, POD, PUTS, V1, VIP, transaction

ALIKE, BOUND = "regex, beginnings alike", 100  # IN_TURN_MAX of ext/route/index.pxd
KINDS = {  # kind, the text of route {}, a path that only it matches
    "exact": (MatchKind.EXACT, "/api/v{}/items", "/api/v{}/items"),
    "prefix": (MatchKind.PREFIX, "/api/v{}/items", "/api/v{}/items"),
    "separated prefix": (MatchKind.PATH_SEPARATED_PREFIX, "/api/v{}/items", "/api/v{}/items"),
    "regex, beginnings differ": (MatchKind.REGEX, "/api/v{}/items/[0-9]+", "/api/v{}/items/12"),
    ALIKE: (MatchKind.REGEX, "/api/[^/]+/v{}", "/api/items/v{}"),
}
COUNTS = (10, 100, 1_000, 10_000)


def microseconds(name: str, count: int) -> float:
    kind, text, path = KINDS[name]
    routes = tuple(Route(f"r{i}", RouteMatch(StringMatch(kind, text.format(i))), (WeightedCluster(V1, 1),)) for i in range(count))
    put = blobs.put_destination(replace(DESTINATION, http=(VirtualHost("h", ("*",), routes),), tcp=None))
    tables = door.Tables()
    tables.load(transaction(PUTS["service"], PUTS["pod"], put))
    request = asked_door.Request(path.format(count - 1), "h")
    assert tables.route(POD, VIP, 9080, request)["route"] == f"r{count - 1}"
    calls, best = max(20, 100_000 // count), float("inf")
    for _ in range(10):
        began = time.thread_time()
        for _ in range(calls):
            tables.route(POD, VIP, 9080, request)
        best = min(best, time.thread_time() - began)
    return best / calls * 1e6


def figure(name: str, count: int) -> str:
    return "-" if name == ALIKE and count > BOUND else f"{microseconds(name, count):.1f}"


def main() -> int:
    print("| routes | " + " | ".join(KINDS) + " |\n|" + "---|" * (len(KINDS) + 1))
    for count in COUNTS:
        print(f"| {count:,} | " + " | ".join(figure(name, count) for name in KINDS) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
