"""Links and their addresses."""
from __future__ import annotations

import errno
from dataclasses import dataclass
from ipaddress import IPv4Interface, IPv6Interface, ip_interface
from typing import Any

from agent.netlink.inside import Namespace, opened, where
from agent.netlink.rtnetlink import ask, index_of, names_of

Interface = IPv4Interface | IPv6Interface

_IFA_F_NODAD = 0x02


@dataclass(frozen=True, slots=True)
class Link:
    """A network device. `kind` is "" for hardware and lo; `master` is the bridge's name or ""."""

    index: int
    name: str
    kind: str
    up: bool
    mtu: int
    mac: str
    master: str


@dataclass(frozen=True, slots=True)
class Address:
    """An address of a link with its prefix length."""

    link: str
    address: Interface


def links(namespace: Namespace) -> list[Link]:
    """Every link of the namespace, by index."""

    def read(ip: Any) -> list[Link]:
        found = list(ip.get_links())
        names = {link["index"]: link.get_attr("IFLA_IFNAME") for link in found}
        return [_link(link, names) for link in sorted(found, key=lambda link: link["index"])]

    return ask(namespace, "list links", read)


def add_bridge(namespace: Namespace, name: str, *, up: bool = True) -> None:
    """Make a bridge, unless a link of that name is there."""
    ask(
        namespace, f"add bridge {name}", lambda ip: ip.link("add", ifname=name, kind="bridge"), {errno.EEXIST}
    )
    if up:
        set_link(namespace, name, up=True)


def add_veth(namespace: Namespace, name: str, peer: str, peer_namespace: Namespace = None) -> None:
    """Make a veth pair, its peer in `peer_namespace` (None: in the caller's own); both ends are down.

    A link `name` that exists already is taken as it is.
    """
    with opened(peer_namespace, own=True) as fd:
        ask(
            namespace,
            f"add veth {name} with peer {peer} in {where(peer_namespace)}",
            lambda ip: ip.link("add", ifname=name, kind="veth", peer={"ifname": peer, "net_ns_fd": fd}),
            {errno.EEXIST},
        )


def set_link(
    namespace: Namespace,
    name: str,
    *,
    up: bool | None = None,
    master: str | None = None,
    mtu: int | None = None,
    mac: str | None = None,
    hairpin: bool | None = None,
) -> None:
    """Change what is not None. `master` "": out of its bridge; `hairpin`: a bridge port's setting."""

    def change(ip: Any) -> None:
        index = index_of(ip, name)
        wanted: dict[str, Any] = {}
        if mtu is not None:
            wanted["mtu"] = mtu
        if mac is not None:
            wanted["address"] = mac
        if master is not None:
            wanted["master"] = index_of(ip, master) if master else 0
        if up is not None:
            wanted["state"] = "up" if up else "down"
        if wanted:
            ip.link("set", index=index, **wanted)
        if hairpin is not None:
            port = {"attrs": [["IFLA_BRPORT_MODE", int(hairpin)]]}
            info = {"attrs": [["IFLA_INFO_SLAVE_KIND", "bridge"], ["IFLA_INFO_SLAVE_DATA", port]]}
            ip.link("set", index=index, IFLA_LINKINFO=info)

    ask(namespace, f"change link {name}", change)


def delete_link(namespace: Namespace, name: str) -> None:
    """Delete a link (and with a veth its peer), if it is there."""
    ask(namespace, f"delete link {name}", lambda ip: ip.link("del", index=index_of(ip, name)), {errno.ENODEV})


def _link(link: Any, names: dict[int, str]) -> Link:
    info = link.get_attr("IFLA_LINKINFO")
    kind = info.get_attr("IFLA_INFO_KIND") if info is not None else ""
    return Link(
        link["index"],
        link.get_attr("IFLA_IFNAME"),
        kind or "",
        bool(link["flags"] & 1),
        link.get_attr("IFLA_MTU"),
        link.get_attr("IFLA_ADDRESS") or "",
        names.get(link.get_attr("IFLA_MASTER") or 0, ""),
    )


# ---- addresses ---------------------------------------------------------------------------------------


def addresses(namespace: Namespace, link: str | None = None) -> list[Address]:
    """Addresses of one link, or of all."""

    def read(ip: Any) -> list[Address]:
        names = names_of(ip)
        found = [
            Address(
                names.get(entry["index"], str(entry["index"])),
                ip_interface(
                    (entry.get_attr("IFA_LOCAL") or entry.get_attr("IFA_ADDRESS"), entry["prefixlen"])
                ),
            )
            for entry in ip.get_addr()
        ]
        return [entry for entry in found if link is None or entry.link == link]

    return ask(namespace, "list addresses", read)


def add_address(namespace: Namespace, link: str, address: str | Interface) -> None:
    """Give a link an address with prefix length. IPv6 comes without duplicate detection: usable at once."""
    value = _interface(address)

    def add(ip: Any) -> None:
        more = {"flags": _IFA_F_NODAD} if value.version == 6 else {}
        ip.addr(
            "add", index=index_of(ip, link), address=str(value.ip), prefixlen=value.network.prefixlen, **more
        )

    ask(namespace, f"add address {value} to {link}", add, {errno.EEXIST})


def delete_address(namespace: Namespace, link: str, address: str | Interface) -> None:
    """Take an address from a link, if it is there."""
    value = _interface(address)
    ask(
        namespace,
        f"delete address {value} from {link}",
        lambda ip: ip.addr(
            "del", index=index_of(ip, link), address=str(value.ip), prefixlen=value.network.prefixlen
        ),
        {errno.EADDRNOTAVAIL, errno.ENODEV},
    )


def _interface(value: str | Interface) -> Interface:
    return ip_interface(value) if isinstance(value, str) else value
