"""Where pods go and what they are called: pure decisions."""
from __future__ import annotations

import secrets
from collections.abc import Collection, Iterable, Mapping

from agent.lab.place import PODS_PER_NODE

_LETTERS = "bcdfghjklmnpqrstvwxz2456789"  # as Kubernetes names pods


class NoRoom(RuntimeError):
    """A node has no address left for another pod."""


def default_nodes(named: Iterable[str], count: int | None) -> list[str]:
    """Nodes of a lab: those that manifests name, and n1, n2, ... until there are `count` (at least one)."""
    nodes = sorted(set(named))
    wanted = max(count or 0, len(nodes), 1)
    number = 1
    while len(nodes) < wanted:
        if f"n{number}" not in nodes:
            nodes.append(f"n{number}")
        number += 1
    return nodes


def choose(pods_per_node: Mapping[str, int]) -> str:
    """The node with the fewest pods; of several, the one that was made first."""
    return min(pods_per_node, key=lambda node: pods_per_node[node])


def free_number(used: Collection[int], last: int) -> int:
    """The next number of a pod on its node after `last`, so that an address is not soon given to another pod."""
    for step in range(PODS_PER_NODE):
        number = 2 + (last - 2 + 1 + step) % PODS_PER_NODE
        if number not in used:
            return number
    raise NoRoom(f"all {PODS_PER_NODE} addresses of the node are in use")


def pod_name(deployment: str, template_hash: str, used: Collection[str]) -> str:
    """`<deployment>-<hash>-<id>`, as a Deployment's pods are called."""
    while True:
        name = f"{deployment}-{template_hash}-{''.join(secrets.choice(_LETTERS) for _ in range(5))}"
        if name not in used:
            return name
