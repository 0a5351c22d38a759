"""A conversation with rtnetlink in a namespace: the only importer of pyroute2, by the first call, since it costs 25 MB and 150 ms."""
from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any

from agent.netlink.inside import Namespace, NetlinkError, T, in_netns, where


def ask(
    namespace: Namespace, what: str, work: Callable[[Any], T], fine: frozenset[int] | set[int] = frozenset()
) -> T:
    """Run `work` with an rtnetlink socket of the namespace; an errno in `fine` counts as done."""
    from pyroute2 import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError as KernelError

    def inside() -> T:
        with IPRoute() as ip:
            return work(ip)

    try:
        return in_netns(namespace, inside)
    except KernelError as error:
        if error.code in fine:
            return None  # type: ignore[return-value]
        raise NetlinkError(
            error.code, f"{where(namespace)}: cannot {what}: {os.strerror(error.code)}"
        ) from error
    except NetlinkError as error:
        if error.errno in fine:
            return None  # type: ignore[return-value]
        raise NetlinkError(
            error.errno or 0, f"{where(namespace)}: cannot {what}: {error.strerror}"
        ) from error


def was_added(change: Callable[..., object], **spec: Any) -> bool:
    """`change("add", **spec)` within one `ask`; False: it is there already."""
    from pyroute2.netlink.exceptions import NetlinkError as KernelError

    try:
        change("add", **spec)
    except KernelError as error:
        if error.code != errno.EEXIST:
            raise
        return False
    return True


def names_of(ip: Any) -> dict[int, str]:
    return {link["index"]: link.get_attr("IFLA_IFNAME") for link in ip.get_links()}


def index_of(ip: Any, name: str) -> int:
    found = ip.link_lookup(ifname=name)
    if not found:
        raise NetlinkError(errno.ENODEV, f"no link {name}")
    return int(found[0])
