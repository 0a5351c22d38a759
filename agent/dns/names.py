"""What the mesh says of a name: the rules by which Istio's node proxy answers (ztunnel's DNS proxy), over any table of hosts.

A name is looked up as it is; then without a search domain of the pod, since a resolver with `ndots:5` asks for
`reviews.shop.svc.cluster.local.shop.svc.cluster.local` first and would take four questions to the answer; then, if it is short, with the
search domains. Whoever is asked for without its search domain is answered with a CNAME, so that the client sees which name it was.

What the mesh does not know, or knows without any address (a headless service without endpoints, a ServiceEntry that is to be resolved by
DNS), is for the pod's own resolver: it may know better.
"""
from __future__ import annotations

import random
from collections.abc import Callable

from agent.dns import wire
from agent.model.workload import IPAddress

TTL = 30  # seconds, as Istio's
ADDRESSES = 1000  # of one answer; an answer by TCP ends at 64 KiB
SHORT_LABELS = 3  # `reviews`, `reviews.shop`, `reviews.shop.svc`

# (host, client's namespace) -> addresses; () for a host that is not known or has none
Hosts = Callable[[str, str], tuple[IPAddress, ...]]


def answer(query: bytes, read: wire.Query, namespace: str, hosts: Hosts, domain: str, limit: int) -> bytes | None:
    """The mesh's answer for a pod of `namespace`; None when the question is for the pod's resolver."""
    if read.type not in (wire.A, wire.AAAA) or not read.name:
        return None
    for host, alias in candidates(read.name, namespace, domain):
        if found := hosts(host, namespace):
            version = 4 if read.type == wire.A else 6
            addresses = [address for address in found if address.version == version]
            random.shuffle(addresses)
            return wire.reply(query, read, addresses[:ADDRESSES], TTL, alias=alias, limit=limit)
    return None


def candidates(name: str, namespace: str, domain: str) -> list[tuple[str, str]]:
    """Hosts that a name may mean, best first, each with the alias that the answer shows ("" for none)."""
    searches = (f"{namespace}.svc.{domain}", f"svc.{domain}", domain)
    found = [(name, "")]
    for search in searches:
        if name.endswith("." + search) and (stripped := name[:-len(search) - 1]):
            found.append((stripped, stripped))
    if name.count(".") < SHORT_LABELS:
        found += [(f"{name}.{search}", "") for search in searches]
    return found
