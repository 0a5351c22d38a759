"""Namespaces, links, addresses, routes and rules of this machine: the only importer of pyroute2.

Every function takes the namespace it works in as a path (`/run/netns/x`), an open descriptor of one, or
None for the caller's own, and plain values otherwise. setns(2) changes one thread only, so each call enters
the namespace in a fresh thread that ends with it: the caller's threads never move. Calls block for
milliseconds; an event loop uses `asyncio.to_thread`. pyroute2 costs 25 MB and 150 ms, so it is imported by
the first call that needs it.

Adding what is there already and deleting what is not there are no errors. Everything else raises
`NetlinkError`, whose text names the namespace and the object.
"""
from __future__ import annotations

import ctypes
import errno
import os
import socket
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import (
    IPv4Interface,
    IPv4Network,
    IPv6Interface,
    IPv6Network,
    ip_address,
    ip_interface,
    ip_network,
)
from pathlib import Path
from typing import Any, TypeVar

from agent.model.workload import IPAddress

T = TypeVar("T")
Namespace = str | os.PathLike[str] | int | None
Interface = IPv4Interface | IPv6Interface
Network = IPv4Network | IPv6Network

NAMESPACES = Path("/run/netns")
MAIN_TABLE = 254

_CLONE_NEWNET = 0x40000000
_MS_BIND, _MS_REC, _MS_SHARED, _MNT_DETACH = 0x1000, 0x4000, 0x100000, 2
_IFA_F_NODAD = 0x02
_RT_SCOPE_HOST, _RT_SCOPE_LINK = 254, 253
# linux/rtnetlink.h, rtm_type
_ROUTE_TYPES = {
    1: "unicast",
    2: "local",
    3: "broadcast",
    4: "anycast",
    5: "multicast",
    6: "blackhole",
    7: "unreachable",
    8: "prohibit",
}
_ROUTE_NUMBERS = {name: number for number, name in _ROUTE_TYPES.items()}


class NetlinkError(OSError):
    """The kernel refused. `errno` is its number; the text names namespace, object and attempt."""

    def __str__(self) -> str:
        return str(self.strerror)


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


@dataclass(frozen=True, slots=True)
class Route:
    """A route. `type` is rtnetlink's (`unicast`, `local`, ...); no gateway: on the link itself."""

    destination: Network
    link: str
    gateway: IPAddress | None = None
    table: int = MAIN_TABLE
    type: str = "unicast"


@dataclass(frozen=True, slots=True)
class Rule:
    """A policy rule `fwmark mark/mask lookup table`; `family` is 4 or 6; mask 0 matches everything."""

    family: int
    priority: int
    table: int
    mark: int = 0
    mask: int = 0


# ---- namespaces --------------------------------------------------------------------------------------


def create_namespace(name: str) -> str:
    """Make the named namespace if it is missing, bring its lo up, and return its path."""
    path = _named(name)
    _share_directory()
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444))
    except FileExistsError:
        if is_namespace(path):
            return str(path)

    def make() -> None:
        _libc_call("unshare", ctypes.c_int(_CLONE_NEWNET))
        _libc_call(
            "mount", b"/proc/thread-self/ns/net", os.fsencode(path), None, ctypes.c_ulong(_MS_BIND), None
        )

    try:
        _in_thread(make)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise NetlinkError(
            error.errno or 0, f"cannot make namespace {name}: {error.strerror}; this needs root"
        ) from error
    set_link(path, "lo", up=True)
    return str(path)


def delete_namespace(name: str) -> bool:
    """Unname a namespace; the kernel frees it with its last process and socket. False if it was not there."""
    path = _named(name)
    while True:  # one mount lies over another when two makers raced; every one of them must go
        try:
            _libc_call("umount2", os.fsencode(path), ctypes.c_int(_MNT_DETACH))
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ENOENT):
                break
            raise NetlinkError(
                error.errno or 0, f"cannot delete namespace {name}: {error.strerror}"
            ) from error
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    return True


def list_namespaces(prefix: str = "") -> list[str]:
    """Names under /run/netns that start with `prefix`, sorted."""
    try:
        return sorted(entry.name for entry in NAMESPACES.iterdir() if entry.name.startswith(prefix))
    except FileNotFoundError:
        return []


def open_namespace(namespace: str | os.PathLike[str]) -> int:
    """A close-on-exec descriptor of the namespace at a path. NetlinkError if it is none."""
    try:
        fd = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise NetlinkError(
            error.errno or 0,
            f"cannot open namespace {os.fspath(namespace)}: {error.strerror}; its pod is probably gone",
        ) from error
    if not is_namespace(fd):
        os.close(fd)
        raise NetlinkError(
            errno.EINVAL,
            f"{os.fspath(namespace)} is not a network namespace; if it is a file in "
            "/run/netns, its mount is gone and it can be removed",
        )
    return fd


def is_namespace(namespace: str | os.PathLike[str] | int) -> bool:
    """Whether a path or descriptor is a network namespace (ioctl NS_GET_NSTYPE)."""
    import fcntl

    fd = namespace if isinstance(namespace, int) else -1
    try:
        if not isinstance(namespace, int):
            fd = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
        return fcntl.ioctl(fd, 0xB703) == _CLONE_NEWNET
    except OSError:
        return False
    finally:
        if not isinstance(namespace, int) and fd >= 0:
            os.close(fd)


def namespace_id(namespace: Namespace) -> tuple[int, int]:
    """(device, inode): equal for two paths or descriptors of the same namespace."""
    with _opened(namespace) as fd:
        found = os.fstat(fd) if fd is not None else os.stat("/proc/thread-self/ns/net")
    if not stat.S_ISREG(found.st_mode):
        raise NetlinkError(errno.EINVAL, f"{_where(namespace)} is not a network namespace")
    return found.st_dev, found.st_ino


def in_netns(namespace: Namespace, work: Callable[[], T]) -> T:
    """Run `work` in a fresh thread inside the namespace and return or raise what it does.

    Sockets that it makes stay in the namespace. `work` must not start threads or processes that outlive it.
    """
    with _opened(namespace) as fd:

        def entered() -> T:
            if fd is not None:
                try:
                    _libc_call("setns", ctypes.c_int(fd), ctypes.c_int(_CLONE_NEWNET))
                except OSError as error:
                    raise NetlinkError(
                        error.errno or 0,
                        f"cannot enter {_where(namespace)}: {error.strerror}; this needs CAP_SYS_ADMIN",
                    ) from error
            return work()

        return _in_thread(entered)


def visit(paths: Iterable[str], work: Callable[[str], T]) -> dict[str, T]:
    """Run `work(path)` inside one namespace after the other, all in one fresh thread: a visit costs 10 us, not a thread.

    A namespace that cannot be entered is left out, and so is one where `work` raises an OSError.
    """
    found: dict[str, T] = {}

    def walk() -> None:
        for path in paths:
            try:
                fd = open_namespace(path)
                try:
                    _libc_call("setns", ctypes.c_int(fd), ctypes.c_int(_CLONE_NEWNET))
                finally:
                    os.close(fd)
                found[path] = work(path)
            except OSError:
                continue

    _in_thread(walk)
    return found


def families(namespace: Namespace) -> tuple[int, ...]:
    """(4, 6), or (4,) when the namespace has no IPv6 or switched it off on lo."""
    try:
        off = read_sysctl(namespace, "net.ipv6.conf.lo.disable_ipv6") != "0"
    except NetlinkError as error:
        if error.errno != errno.ENOENT:
            raise
        off = True
    return (4,) if off else (4, 6)


# ---- links -------------------------------------------------------------------------------------------


def links(namespace: Namespace) -> list[Link]:
    """Every link of the namespace, by index."""

    def read(ip: Any) -> list[Link]:
        found = list(ip.get_links())
        names = {link["index"]: link.get_attr("IFLA_IFNAME") for link in found}
        return [_link(link, names) for link in sorted(found, key=lambda link: link["index"])]

    return _ask(namespace, "list links", read)


def add_bridge(namespace: Namespace, name: str, *, up: bool = True) -> None:
    """Make a bridge, unless a link of that name is there."""
    _ask(
        namespace, f"add bridge {name}", lambda ip: ip.link("add", ifname=name, kind="bridge"), {errno.EEXIST}
    )
    if up:
        set_link(namespace, name, up=True)


def add_veth(namespace: Namespace, name: str, peer: str, peer_namespace: Namespace = None) -> None:
    """Make a veth pair, its peer in `peer_namespace` (None: in the caller's own); both ends are down.

    A link `name` that exists already is taken as it is.
    """
    with _opened(peer_namespace, own=True) as fd:
        _ask(
            namespace,
            f"add veth {name} with peer {peer} in {_where(peer_namespace)}",
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
        index = _index(ip, name)
        wanted: dict[str, Any] = {}
        if mtu is not None:
            wanted["mtu"] = mtu
        if mac is not None:
            wanted["address"] = mac
        if master is not None:
            wanted["master"] = _index(ip, master) if master else 0
        if up is not None:
            wanted["state"] = "up" if up else "down"
        if wanted:
            ip.link("set", index=index, **wanted)
        if hairpin is not None:
            port = {"attrs": [["IFLA_BRPORT_MODE", int(hairpin)]]}
            info = {"attrs": [["IFLA_INFO_SLAVE_KIND", "bridge"], ["IFLA_INFO_SLAVE_DATA", port]]}
            ip.link("set", index=index, IFLA_LINKINFO=info)

    _ask(namespace, f"change link {name}", change)


def delete_link(namespace: Namespace, name: str) -> None:
    """Delete a link (and with a veth its peer), if it is there."""
    _ask(namespace, f"delete link {name}", lambda ip: ip.link("del", index=_index(ip, name)), {errno.ENODEV})


# ---- addresses ---------------------------------------------------------------------------------------


def addresses(namespace: Namespace, link: str | None = None) -> list[Address]:
    """Addresses of one link, or of all."""

    def read(ip: Any) -> list[Address]:
        names = _names(ip)
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

    return _ask(namespace, "list addresses", read)


def add_address(namespace: Namespace, link: str, address: str | Interface) -> None:
    """Give a link an address with prefix length. IPv6 comes without duplicate detection: usable at once."""
    value = _interface(address)

    def add(ip: Any) -> None:
        more = {"flags": _IFA_F_NODAD} if value.version == 6 else {}
        ip.addr(
            "add", index=_index(ip, link), address=str(value.ip), prefixlen=value.network.prefixlen, **more
        )

    _ask(namespace, f"add address {value} to {link}", add, {errno.EEXIST})


def delete_address(namespace: Namespace, link: str, address: str | Interface) -> None:
    """Take an address from a link, if it is there."""
    value = _interface(address)
    _ask(
        namespace,
        f"delete address {value} from {link}",
        lambda ip: ip.addr(
            "del", index=_index(ip, link), address=str(value.ip), prefixlen=value.network.prefixlen
        ),
        {errno.EADDRNOTAVAIL, errno.ENODEV},
    )


# ---- routes and rules --------------------------------------------------------------------------------


def routes(namespace: Namespace, table: int = MAIN_TABLE) -> list[Route]:
    """Routes of one table, both families."""

    def read(ip: Any) -> list[Route]:
        names = _names(ip)
        found = []
        for family in (socket.AF_INET, socket.AF_INET6):
            found += [
                _route(entry, names)
                for entry in ip.get_routes(family=family, table=table)
                if (entry.get_attr("RTA_TABLE") or entry["table"]) == table
            ]
        return found

    return _ask(namespace, f"list routes of table {table}", read)


def add_route(
    namespace: Namespace,
    destination: str | Network,
    *,
    link: str | None = None,
    gateway: str | IPAddress | None = None,
    table: int = MAIN_TABLE,
    type: str = "unicast",
) -> None:
    """Add a route: through a gateway, on a link, or of `type` "local" on lo, "blackhole" and the like.

    `destination` is a network, `0.0.0.0/0` and `::/0` being the defaults. The same route twice is no error.
    """
    spec, label = _route_spec(destination, gateway, table, type)

    def add(ip: Any) -> None:
        if link is not None:
            spec["oif"] = _index(ip, link)
        ip.route("add", **spec)

    _ask(namespace, f"add route {label}" + (f" dev {link}" if link else ""), add, {errno.EEXIST})


def delete_route(
    namespace: Namespace,
    destination: str | Network,
    *,
    link: str | None = None,
    gateway: str | IPAddress | None = None,
    table: int = MAIN_TABLE,
    type: str = "unicast",
) -> None:
    """Delete a route, if it is there."""
    spec, label = _route_spec(destination, gateway, table, type)

    def delete(ip: Any) -> None:
        if link is not None:
            spec["oif"] = _index(ip, link)
        ip.route("del", **spec)

    _ask(namespace, f"delete route {label}", delete, {errno.ESRCH, errno.ENODEV, errno.ENOENT})


def rules(namespace: Namespace, family: int) -> list[Rule]:
    """Policy rules of a family (4 or 6), by priority; the kernel's own three are among them."""

    def read(ip: Any) -> list[Rule]:
        found = []
        for entry in ip.get_rules(family=_af(family)):
            mark = entry.get_attr("FRA_FWMARK") or 0
            mask = entry.get_attr("FRA_FWMASK") or 0
            found.append(
                Rule(
                    family,
                    entry.get_attr("FRA_PRIORITY") or 0,
                    entry.get_attr("FRA_TABLE") or entry["table"],
                    mark,
                    mask,
                )
            )
        return sorted(found, key=lambda rule: rule.priority)

    return _ask(namespace, f"list IPv{family} rules", read)


def add_rule(namespace: Namespace, rule: Rule) -> None:
    """Add a policy rule, unless the very same is there."""
    _ask(namespace, f"add {rule}", lambda ip: ip.rule("add", **_rule_spec(rule)), {errno.EEXIST})


def delete_rule(namespace: Namespace, rule: Rule) -> None:
    """Delete a policy rule, if it is there."""
    _ask(
        namespace,
        f"delete {rule}",
        lambda ip: ip.rule("del", **_rule_spec(rule)),
        {errno.ENOENT, errno.ESRCH},
    )


def add_missing(namespace: Namespace, routes: Iterable[Route], rules: Iterable[Rule]) -> list[Route | Rule]:
    """Add what is not there, in one visit; returns what was added. Routes are on links, without a gateway."""
    from pyroute2.netlink.exceptions import NetlinkError as KernelError

    def add(ip: Any) -> list[Route | Rule]:
        added: list[Route | Rule] = []
        indices: dict[str, int] = {}
        wishes: list[Route | Rule] = [*routes, *rules]
        for wish in wishes:
            try:
                if isinstance(wish, Rule):
                    ip.rule("add", **_rule_spec(wish))
                else:
                    index = indices.get(wish.link) or indices.setdefault(wish.link, _index(ip, wish.link))
                    ip.route("add", oif=index, **_route_spec(wish.destination, None, wish.table, wish.type)[0])
            except KernelError as error:
                if error.code != errno.EEXIST:
                    raise
            else:
                added.append(wish)
        return added

    return _ask(namespace, "add routes and rules", add)


# ---- sysctl ------------------------------------------------------------------------------------------


def read_sysctl(namespace: Namespace, name: str) -> str:
    """The value of `net.…` in the namespace, without its newline."""
    path = _sysctl(name)
    try:
        return in_netns(namespace, lambda: path.read_text().strip())
    except NetlinkError:
        raise
    except OSError as error:
        raise NetlinkError(
            error.errno or 0, f"{_where(namespace)}: cannot read sysctl {name}: {error.strerror}"
        ) from error


def write_sysctl(namespace: Namespace, name: str, value: str | int) -> None:
    """Write `net.…` in the namespace."""
    path = _sysctl(name)
    try:
        in_netns(namespace, lambda: path.write_text(f"{value}\n"))
    except NetlinkError:
        raise
    except OSError as error:
        raise NetlinkError(
            error.errno or 0, f"{_where(namespace)}: cannot set sysctl {name} to {value}: {error.strerror}"
        ) from error


# ---- below: how it is done ---------------------------------------------------------------------------


def _ask(
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
            error.code, f"{_where(namespace)}: cannot {what}: {os.strerror(error.code)}"
        ) from error
    except NetlinkError as error:
        if error.errno in fine:
            return None  # type: ignore[return-value]
        raise NetlinkError(
            error.errno or 0, f"{_where(namespace)}: cannot {what}: {error.strerror}"
        ) from error


def _in_thread(work: Callable[[], T]) -> T:
    results: list[T] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # handed to the caller's thread, whatever it is
            failures.append(error)

    thread = threading.Thread(target=run, name="netns", daemon=True)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return results[0]


_libc: ctypes.CDLL | None = None


def _libc_call(name: str, *arguments: Any) -> None:
    global _libc
    if _libc is None:
        _libc = ctypes.CDLL(None, use_errno=True)
    if getattr(_libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _share_directory() -> None:
    """Make /run/netns a shared mount, as iproute2 does, so that names appear in other mount namespaces."""
    NAMESPACES.mkdir(mode=0o755, parents=True, exist_ok=True)
    target = os.fsencode(NAMESPACES)
    try:
        _libc_call("mount", b"", target, b"none", ctypes.c_ulong(_MS_SHARED | _MS_REC), None)
    except OSError as error:
        if error.errno != errno.EINVAL:  # EINVAL: not a mount point yet
            raise NetlinkError(
                error.errno or 0, f"cannot share {NAMESPACES}: {error.strerror}; this needs root"
            ) from error
        _libc_call("mount", target, target, b"none", ctypes.c_ulong(_MS_BIND | _MS_REC), None)
        _libc_call("mount", b"", target, b"none", ctypes.c_ulong(_MS_SHARED | _MS_REC), None)


def _named(name: str) -> Path:
    if not name or "/" in name or name in (".", "..") or len(os.fsencode(name)) > 255:
        raise NetlinkError(
            errno.EINVAL, f"{name!r} cannot name a namespace: one path component of 1 to 255 bytes"
        )
    return NAMESPACES / name


@contextmanager
def _opened(namespace: Namespace, *, own: bool = False) -> Iterator[int | None]:
    """The namespace as a descriptor. None stays None, or with `own` becomes the caller's own."""
    if isinstance(namespace, int):
        yield namespace
        return
    if namespace is None and not own:
        yield None
        return
    fd = open_namespace("/proc/thread-self/ns/net" if namespace is None else namespace)
    try:
        yield fd
    finally:
        os.close(fd)


def _where(namespace: Namespace) -> str:
    if namespace is None:
        return "own namespace"
    return f"namespace fd {namespace}" if isinstance(namespace, int) else f"namespace {os.fspath(namespace)}"


def _names(ip: Any) -> dict[int, str]:
    return {link["index"]: link.get_attr("IFLA_IFNAME") for link in ip.get_links()}


def _index(ip: Any, name: str) -> int:
    found = ip.link_lookup(ifname=name)
    if not found:
        raise NetlinkError(errno.ENODEV, f"no link {name}")
    return int(found[0])


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


def _interface(value: str | Interface) -> Interface:
    return ip_interface(value) if isinstance(value, str) else value


def _route(entry: Any, names: dict[int, str]) -> Route:
    any_address = "0.0.0.0" if entry["family"] == socket.AF_INET else "::"
    gateway = entry.get_attr("RTA_GATEWAY")
    return Route(
        ip_network((entry.get_attr("RTA_DST") or any_address, entry["dst_len"])),
        names.get(entry.get_attr("RTA_OIF") or 0, ""),
        ip_address(gateway) if gateway else None,
        entry.get_attr("RTA_TABLE") or entry["table"],
        _ROUTE_TYPES.get(entry["type"], str(entry["type"])),
    )


def _route_spec(
    destination: str | Network, gateway: str | IPAddress | None, table: int, type: str
) -> tuple[dict[str, Any], str]:
    network = ip_network(destination) if isinstance(destination, str) else destination
    if type not in _ROUTE_NUMBERS:
        raise NetlinkError(
            errno.EINVAL, f"route {network}: unknown type {type!r}, known are {', '.join(_ROUTE_NUMBERS)}"
        )
    spec: dict[str, Any] = {
        "family": _af(network.version),
        "dst": str(network.network_address),
        "dst_len": network.prefixlen,
        "table": table,
        "type": type,
    }
    if network.prefixlen == 0:
        del spec["dst"]
    if type == "local":
        spec["scope"] = _RT_SCOPE_HOST
    elif gateway is None and type == "unicast":
        spec["scope"] = _RT_SCOPE_LINK
    if network.version == 6:
        spec["scope"] = 0  # IPv6 has no scopes
    if gateway is not None:
        spec["gateway"] = str(gateway)
    return spec, f"{network}" + (f" via {gateway}" if gateway else "") + f" table {table}"


def _rule_spec(rule: Rule) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "family": _af(rule.family),
        "priority": rule.priority,
        "table": rule.table,
        "action": "to_tbl",
    }
    if rule.mark or rule.mask:
        spec |= {"fwmark": rule.mark, "fwmask": rule.mask}
    return spec


def _af(family: int) -> int:
    return int(socket.AF_INET if family == 4 else socket.AF_INET6)


def _sysctl(name: str) -> Path:
    parts = name.split(".")
    if parts[0] != "net" or any(part in ("", "..") or "\0" in part for part in parts):
        raise NetlinkError(errno.EINVAL, f"sysctl {name!r}: only net.* is per namespace")
    return Path("/proc/sys", *(part.replace("/", ".") for part in parts))
