"""Namespaces, links, addresses, routes and rules of this machine.

Every function takes the namespace it works in as a path (`/run/netns/x`), an open descriptor of one, or
None for the caller's own, and plain values otherwise. setns(2) changes one thread only, so each call enters
the namespace in a fresh thread that ends with it: the caller's threads never move. Calls block for
milliseconds; an event loop uses `asyncio.to_thread`. pyroute2 costs 25 MB and 150 ms, so it is imported by
the first call that needs it.

Adding what is there already and deleting what is not there are no errors. Everything else raises
`NetlinkError`, whose text names the namespace and the object.
"""
from __future__ import annotations

from agent.netlink.inside import (
    Namespace,
    NetlinkError,
    families,
    in_netns,
    is_namespace,
    namespace_id,
    open_namespace,
    read_sysctl,
    visit,
    write_sysctl,
)
from agent.netlink.links import (
    Address,
    Interface,
    Link,
    add_address,
    add_bridge,
    add_veth,
    addresses,
    delete_address,
    delete_link,
    links,
    set_link,
)
from agent.netlink.namespaces import NAMESPACES, create_namespace, delete_namespace, list_namespaces
from agent.netlink.own import own_addresses
from agent.netlink.routes import (
    MAIN_TABLE,
    Network,
    Route,
    Rule,
    add_missing,
    add_route,
    add_rule,
    delete_route,
    delete_rule,
    routes,
    rules,
)

__all__ = [
    "MAIN_TABLE", "NAMESPACES", "Address", "Interface", "Link", "Namespace", "NetlinkError", "Network", "Route", "Rule",
    "add_address", "add_bridge", "add_missing", "add_route", "add_rule", "add_veth", "addresses", "create_namespace",
    "delete_address", "delete_link", "delete_namespace", "delete_route", "delete_rule", "families", "in_netns", "is_namespace",
    "links", "list_namespaces", "namespace_id", "open_namespace", "own_addresses", "read_sysctl", "routes", "rules", "set_link", "visit",
    "write_sysctl",
]
