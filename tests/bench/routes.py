"""What it costs to find a route, by how many a host has.

    python -m tests.bench.routes

Tables as a worker's, asked for the last of 10 to 10,000 routes of one kind through the Python door: a call of the door is in each
figure (about the first row's), so that differences between rows are the search's. Best of ten rounds, wall time.
"""
from __future__ import annotations

import sys
import time
from dataclasses import replace

from agent.dataplane import blobs
from agent.model.routing import MatchKind, Route, RouteMatch, StringMatch, VirtualHost, WeightedCluster
from ext.route import door
from tests.support.blobs import DESTINATION, POD, PUTS, V1, VIP, transaction

KINDS = (MatchKind.EXACT, MatchKind.PREFIX, MatchKind.PATH_SEPARATED_PREFIX, MatchKind.REGEX)
COUNTS = (10, 100, 1_000, 10_000)


def microseconds(kind: MatchKind, count: int) -> float:
    routes = tuple(Route(f"r{i}", RouteMatch(StringMatch(kind, f"/api/v{i}/items")), (WeightedCluster(V1, 1),)) for i in range(count))
    put = blobs.put_destination(replace(DESTINATION, http=(VirtualHost("h", ("*",), routes),), tcp=None))
    tables = door.Tables()
    tables.load(transaction(PUTS["service"], PUTS["pod"], put))
    request = door.Request(f"/api/v{count - 1}/items", "h")
    assert tables.route(POD, VIP, 9080, request)["route"] == f"r{count - 1}"
    calls, best = max(20, 100_000 // count), float("inf")
    for _ in range(10):
        began = time.perf_counter()
        for _ in range(calls):
            tables.route(POD, VIP, 9080, request)
        best = min(best, time.perf_counter() - began)
    return best / calls * 1e6


def main() -> int:
    print("| routes | " + " | ".join(f"{kind.name.lower()}, us" for kind in KINDS) + " |\n|" + "---|" * (len(KINDS) + 1))
    for count in COUNTS:
        print(f"| {count:,} | " + " | ".join(f"{microseconds(kind, count):.1f}" for kind in KINDS) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
