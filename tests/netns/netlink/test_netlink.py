"""agent.netlink against iproute2: what one made, the other reads."""
from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from agent import netlink
from agent.netlink import NetlinkError, Rule
from tests.support.netns import Namespaces, Netns, Node

pytestmark = pytest.mark.netns


def test_pods_of_a_node_reach_each_other_in_both_families(node: Node) -> None:
    a, b = node.pod("a"), node.pod("b")
    _connect(a, b.ip, socket.AF_INET)
    _connect(a, b.ip6, socket.AF_INET6)


def test_what_was_added_is_what_iproute2_shows_and_twice_is_no_error(node: Node) -> None:
    pod = node.pod("a")
    for _ in range(2):
        for family, everything in ((4, "0.0.0.0/0"), (6, "::/0")):
            netlink.add_route(pod.path, everything, link="lo", table=100, type="local")
            netlink.add_rule(pod.path, Rule(family, 32764, 100, 0x111, 0xFFF))
    for flag in ("-4", "-6"):
        [rule] = [rule for rule in pod.ip_json(flag, "rule") if rule["priority"] == 32764]
        assert (rule["fwmark"], rule["fwmask"], rule["table"]) == ("0x111", "0xfff", "100")
        [route] = pod.ip_json(flag, "route", "show", "table", "100")
        assert (route["type"], route["dst"], route["dev"]) == ("local", "default", "lo")
    assert Rule(4, 32764, 100, 0x111, 0xFFF) in netlink.rules(pod.path, 4)
    assert [(str(route.destination), route.type, route.link) for route in netlink.routes(pod.path, 100)] == \
        [("0.0.0.0/0", "local", "lo"), ("::/0", "local", "lo")]


def test_what_was_deleted_is_gone_and_twice_is_no_error(node: Node) -> None:
    pod = node.pod("a")
    before = [pod.run("ip", flag, what).stdout for flag in ("-4", "-6") for what in ("rule", "route")]
    for family, everything in ((4, "0.0.0.0/0"), (6, "::/0")):
        netlink.add_route(pod.path, everything, link="lo", table=100, type="local")
        netlink.add_rule(pod.path, Rule(family, 32764, 100, 0x111, 0xFFF))
        for _ in range(2):
            netlink.delete_route(pod.path, everything, link="lo", table=100, type="local")
            netlink.delete_rule(pod.path, Rule(family, 32764, 100, 0x111, 0xFFF))
    assert [pod.run("ip", flag, what).stdout for flag in ("-4", "-6") for what in ("rule", "route")] == before
    assert netlink.routes(pod.path, 100) == []


def test_a_link_gets_the_settings_asked_for(node: Node) -> None:
    node.pod("a")
    netlink.set_link(node.netns.path, "p10", mtu=1400, hairpin=True)
    [link] = node.netns.ip_json("-d", "link", "show", "p10")
    assert link["mtu"] == 1400 and link["master"] == "br0" and link["linkinfo"]["info_slave_data"]["hairpin"] is True
    netlink.delete_link(node.netns.path, "p10")
    netlink.delete_link(node.netns.path, "p10")
    assert [link["ifname"] for link in node.netns.ip_json("link")] == ["lo", "br0"]


def test_a_sysctl_is_written_in_the_namespace_and_not_here(namespaces: Namespaces) -> None:
    inside = namespaces.make("a")
    here = Path("/proc/sys/net/ipv4/ip_default_ttl").read_text()
    netlink.write_sysctl(inside.path, "net.ipv4.ip_default_ttl", 99)
    assert inside.run("cat", "/proc/sys/net/ipv4/ip_default_ttl").stdout == "99\n"
    assert Path("/proc/sys/net/ipv4/ip_default_ttl").read_text() == here
    with pytest.raises(NetlinkError, match=r"only net\.\* is per namespace"):
        netlink.write_sysctl(inside.path, "kernel.hostname", "x")


def test_a_namespace_named_twice_is_one_and_its_name_goes_away(namespaces: Namespaces) -> None:
    inside = namespaces.make("a")
    inode = os.stat(inside.path).st_ino
    assert netlink.create_namespace(inside.name) == inside.path and os.stat(inside.path).st_ino == inode
    assert netlink.namespace_id(inside.path)[1] == inode
    assert inside.name in netlink.list_namespaces(inside.name[:8])
    assert netlink.delete_namespace(inside.name) and not netlink.delete_namespace(inside.name)
    assert not os.path.exists(inside.path)


def test_work_inside_leaves_this_thread_where_it_was(namespaces: Namespaces) -> None:
    inside = namespaces.make("a")
    here = os.stat("/proc/thread-self/ns/net").st_ino
    there = netlink.in_netns(inside.path, lambda: os.stat("/proc/thread-self/ns/net").st_ino)
    assert there == os.stat(inside.path).st_ino != here
    with pytest.raises(ZeroDivisionError):
        netlink.in_netns(inside.path, lambda: 1 // 0)
    assert os.stat("/proc/thread-self/ns/net").st_ino == here


def test_ipv6_switched_off_is_seen(namespaces: Namespaces) -> None:
    inside = namespaces.make("a")
    assert netlink.families(inside.path) == (4, 6)
    inside.run("sh", "-c", "echo 1 > /proc/sys/net/ipv6/conf/lo/disable_ipv6")
    assert netlink.families(inside.path) == (4,)


def test_own_addresses_are_those_that_others_reach_and_who_stays_comes_first(node: Node) -> None:
    pod, bare = node.pod("a"), node.pod("b")
    bare.run("ip", "address", "flush", "dev", "eth0")
    pod.run("sh", "-c", "echo 1000 > /proc/sys/net/ipv6/conf/eth0/dad_transmits")
    for address, how in ((f"{pod.ip6}1/64", ("nodad", "preferred_lft", "0")), (f"{pod.ip6}2/64", ("nodad",)),
                         (f"{pod.ip6}3/64", ()), ("169.254.1.1/16", ("scope", "link")), ("10.244.1.99/24", ())):
        pod.run("ip", "address", "add", address, "dev", "eth0", *how)
    shown = {one["local"]: one for link in pod.ip_json("address", "show", "dev", "eth0") for one in link["addr_info"]}
    assert shown[f"{pod.ip6}1"]["deprecated"] and shown[f"{pod.ip6}3"]["tentative"] and shown["10.244.1.99"]["secondary"]
    found = netlink.own_addresses([pod.path, bare.path, "/run/netns/none"])
    assert set(found) == {pod.path, bare.path} and found[bare.path] == ()
    assert [str(one) for one in found[pod.path] if one.version == 4] == [pod.ip, "10.244.1.99"]
    six = [str(one) for one in found[pod.path] if one.version == 6]
    assert set(six[:-1]) == {pod.ip6, f"{pod.ip6}2"} and six[-1] == f"{pod.ip6}1"


def test_an_error_names_the_namespace_and_the_object(namespaces: Namespaces, tmp_path: Path) -> None:
    inside = namespaces.make("a")
    with pytest.raises(NetlinkError, match=f"namespace {inside.path}: cannot change link nope: no link nope"):
        netlink.set_link(inside.path, "nope", up=True)
    with pytest.raises(NetlinkError, match=r"add route 10\.0\.0\.0/8 via 1\.2\.3\.4 table 254: Network is unreachable"):
        netlink.add_route(inside.path, "10.0.0.0/8", gateway="1.2.3.4")
    with pytest.raises(NetlinkError, match=f"cannot open namespace {tmp_path}/gone"):
        netlink.links(str(tmp_path / "gone"))
    (tmp_path / "file").touch()
    with pytest.raises(NetlinkError, match=f"{tmp_path}/file is not a network namespace"):
        netlink.links(str(tmp_path / "file"))
    with pytest.raises(NetlinkError, match="cannot name a namespace"):
        netlink.create_namespace("a/b")


def _connect(pod: Netns, address: str, family: int) -> None:
    """A refused connect proves the way there and back: the far side answers with a reset."""
    code = f"import socket; s = socket.socket({int(family)}); s.settimeout(3); print(s.connect_ex(({address!r}, 9)))"
    assert pod.python(code).stdout.strip() == "111"
