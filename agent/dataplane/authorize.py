"""Asks the workers' own code what policies would say of a connection, and why."""
from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from agent.dataplane import blobs
from ext.route import door


def verdict(entries: Iterable[blobs.Put], handle: int, identity: str | None, source: str, destination: str, port: int) -> dict[str, Any]:
    """What a worker that knows `entries` (POD, WORKLOAD and POLICY blobs) says of a connection to the pod `handle`.

    The verdict (allowed, policy, rule, would, would_policy, would_rule) and `applies`: every policy that applies, with what agrees in
    each rule. Raises LookupError when the pod or its workload is not among the entries, ValueError for no identity or no address.
    """
    tables = door.Tables()
    tables.load(blobs.encode_transaction(1, entries))
    asked = (handle, identity, source, destination, port)
    answer: dict[str, Any] = tables.authorize(*asked)
    return answer | {"applies": tables.explain(*asked)}
