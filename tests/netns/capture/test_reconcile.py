"""Plan to kernel and back, read with iptables-save and ip."""
from __future__ import annotations

import asyncio
import dataclasses
from ipaddress import ip_network

import pytest

from agent import netlink
from agent.capture.plan import chain_prefix, plan
from agent.capture.reconcile import CaptureError, Reconciler
from agent.capture.rules import Table
from agent.capture.watch import Target, prints
from agent.model.pod import CaptureSettings, Network
from tests.netns.capture.conftest import INSTANCE, planned, print_of, state, tables
from tests.support.netns import Namespaces, Netns

pytestmark = pytest.mark.netns
P = chain_prefix(INSTANCE)
TABLES = ("raw", "mangle", "filter", "nat")


async def test_what_iptables_prints_is_what_was_planned(pod: Netns, reconciler: Reconciler) -> None:
    wanted = planned(CaptureSettings((22, 3306), (9090,), networks("10.0.0.0/8", "fd00::/8"), networks("10.96.0.0/12")))
    await reconciler.apply(pod.path, wanted)
    for family in (4, 6):
        printed = pod.iptables_save(family).splitlines()
        for table in (table for table in wanted.tables if table.family == family):
            assert rules_of(table) == [line for chain in table.chains for line in printed
                                       if line.startswith(f"-A {chain.name} ") and line in section(printed, table.name)]
            for chain in table.chains:
                assert f"-A {chain.hook} -j {chain.name}" in section(printed, table.name)


EDITS = [
    f"iptables-legacy -t nat -F {P}OUTPUT",
    f"iptables-legacy -t nat -D {P}PREROUTING 2",
    f"iptables-legacy -t nat -I {P}OUTPUT -j RETURN",
    f"iptables-legacy -t nat -A {P}OUTPUT -p tcp -j RETURN",
    f"ip6tables-legacy -t nat -R {P}OUTPUT 4 -p tcp -j REDIRECT --to-ports 1",
    f"iptables-legacy -t nat -D OUTPUT -j {P}OUTPUT",
    f"iptables-legacy -t nat -D OUTPUT -j {P}OUTPUT && iptables-legacy -t nat -A OUTPUT -p udp -j {P}OUTPUT",
    f"iptables-legacy -t nat -A OUTPUT -j {P}OUTPUT",
    f"iptables-legacy -t nat -N OTHER && iptables-legacy -t nat -A OTHER -j {P}OUTPUT",
    f"iptables-legacy -t nat -N {P}STRAY",
    f"iptables-legacy -t mangle -D {P}OUTPUT 1",
    f"ip6tables-legacy -t mangle -F PREROUTING && ip6tables-legacy -t mangle -F {P}PREROUTING && "
    f"ip6tables-legacy -t mangle -X {P}PREROUTING",
    "iptables-legacy -F INPUT",
    "ip rule del priority 32764", "ip -6 rule del priority 32764",
    "ip route flush table 100", "ip -6 route flush table 100",
]
# somebody's rule in front of our jump: what it accepts never comes to us
IN_FRONT = ["iptables-legacy -t nat -I OUTPUT -p tcp -j ACCEPT", "ip6tables-legacy -t nat -I PREROUTING -j RETURN",
            "iptables-legacy -t mangle -I PREROUTING -j ACCEPT", "ip6tables-legacy -I INPUT -p tcp -j ACCEPT",
            f"iptables-legacy -t raw -D OUTPUT -j {P}OUTPUT && iptables-legacy -t raw -A OUTPUT -p udp -j ACCEPT && "
            f"iptables-legacy -t raw -A OUTPUT -j {P}OUTPUT"]


@pytest.mark.parametrize("edit", EDITS)
async def test_a_foreign_edit_is_seen_and_repaired(pod: Netns, reconciler: Reconciler, edit: str) -> None:
    await reconciler.apply(pod.path, planned())
    then = state(pod)
    pod.run("sh", "-ec", edit)
    assert state(pod) != then
    wrong = await reconciler.verify(pod.path, planned())
    assert len(wrong) in (1, 2), wrong
    assert (await reconciler.apply(pod.path, planned())).changed
    assert [text.replace(":OTHER -\n", "") for text in state(pod)] == then
    assert await reconciler.verify(pod.path, planned()) == ()


@pytest.mark.parametrize("edit", EDITS)
async def test_repair_says_what_was_wrong_and_twice_finds_nothing(pod: Netns, reconciler: Reconciler, edit: str) -> None:
    await reconciler.apply(pod.path, planned())
    then = state(pod)
    pod.run("sh", "-ec", edit)
    wrong = await reconciler.verify(pod.path, planned())
    assert await reconciler.repair(pod.path, planned()) == wrong != ()
    assert [text.replace(":OTHER -\n", "") for text in state(pod)] == then
    assert await reconciler.repair(pod.path, planned()) == ()


@pytest.mark.parametrize("edit", IN_FRONT)
async def test_a_rule_that_somebody_put_in_front_of_our_jump_comes_behind_it(pod: Netns, reconciler: Reconciler, edit: str
                                                                             ) -> None:
    await reconciler.apply(pod.path, planned())
    pod.run("sh", "-ec", edit)
    wrong = await reconciler.repair(pod.path, planned())
    assert len(wrong) == 1 and " first, " in wrong[0], wrong
    for family in (4, 6):
        for table in (table for table in planned().tables if table.family == family):
            for chain in table.chains:
                (first, *others) = [line for line in section(pod.iptables_save(family).splitlines(), table.name)
                                    if line.startswith(f"-A {chain.hook} ")]
                assert first == f"-A {chain.hook} -j {chain.name}" and first not in others
    assert await reconciler.verify(pod.path, planned()) == ()
    await reconciler.remove(pod.path)
    kept = pod.iptables_save(4) + pod.iptables_save(6)
    assert ("-j ACCEPT" in kept or "-j RETURN" in kept) and "NARROWS" not in kept, "their rule is still theirs"


@pytest.mark.parametrize("edit", EDITS + IN_FRONT)
async def test_the_print_of_a_namespace_changes_with_every_edit(pod: Netns, reconciler: Reconciler, edit: str) -> None:
    await reconciler.apply(pod.path, planned())
    before = print_of(pod, TABLES)
    assert before and print_of(pod, TABLES) == before
    pod.run("sh", "-ec", edit)
    assert print_of(pod, TABLES) not in (before, b"")
    await reconciler.repair(pod.path, planned())
    assert "NARROWS" in pod.iptables_save(4)


async def test_the_print_of_a_namespace_does_not_change_with_traffic(pod: Netns, reconciler: Reconciler) -> None:
    await reconciler.apply(pod.path, planned())
    before = print_of(pod, TABLES)
    packets = packets_of(pod)
    for address in ("127.0.0.1", "[::1]", "192.0.2.1", "[2001:db8::1]"):
        pod.run("curl", "-s", "-m", "1", f"http://{address}:9/", check=False)
    assert packets_of(pod) != packets
    assert print_of(pod, TABLES) == before


async def test_a_namespace_that_is_gone_has_no_print(pod: Netns, reconciler: Reconciler) -> None:
    await reconciler.apply(pod.path, planned())
    target = Target((4, 6), TABLES)
    assert set(prints({"/run/netns/gone": target, "/etc/hostname": target, pod.path: target})) == {pod.path}


async def test_removal_leaves_other_peoples_rules_as_they_were(pod: Netns, reconciler: Reconciler) -> None:
    for command in ("iptables-legacy", "ip6tables-legacy"):
        for rule in ("-t raw -A OUTPUT -p udp -j ACCEPT", "-t nat -A OUTPUT -p udp -j ACCEPT", "-t nat -N OTHER",
                     "-t nat -A OTHER -p tcp -j RETURN", "-t mangle -A PREROUTING -p udp -j MARK --set-mark 7",
                     "-A INPUT -p tcp --dport 99 -j DROP"):
            pod.run(command, *rule.split())
    pod.run("ip", "rule", "add", "fwmark", "7", "priority", "100", "lookup", "7")
    before = state(pod)
    await reconciler.apply(pod.path, planned())
    assert state(pod) != before
    await reconciler.remove(pod.path)
    assert state(pod) == before
    assert (await reconciler.remove(pod.path)).changed == ()


async def test_removal_where_capture_never_was_touches_nothing(pod: Netns, reconciler: Reconciler) -> None:
    assert (await reconciler.remove(pod.path)).changed == ()
    assert await reconciler.chains(pod.path) == {}
    assert len(await reconciler.verify(pod.path, planned())) == 12
    assert pod.run("cat", "/proc/net/ip_tables_names", "/proc/net/ip6_tables_names").stdout == ""


async def test_a_namespace_without_ipv6_gets_ipv4_alone(pod: Netns, reconciler: Reconciler) -> None:
    pod.run("sh", "-c", "echo 1 > /proc/sys/net/ipv6/conf/lo/disable_ipv6")
    families = netlink.families(pod.path)
    assert families == (4,)
    await reconciler.apply(pod.path, plan(CaptureSettings(), families, INSTANCE))
    assert "REDIRECT" in pod.iptables_save(4) and pod.iptables_save(6) == ""
    await reconciler.remove(pod.path)
    assert tables(state(pod))[0] == ""


@pytest.mark.parametrize(("first", "second"), [("iptables", "nftables"), ("nftables", "iptables")])
async def test_an_agent_with_another_backend_takes_over_and_leaves_nothing_of_the_first(
        namespaces: Namespaces, first: str, second: str) -> None:
    """Both are there for a moment, which redirects once: the second redirect of a connection does nothing."""
    pod = namespaces.make("pod")
    old, new = Reconciler(INSTANCE, backend=first), Reconciler(INSTANCE, backend=second)
    await old.apply(pod.path, planned())
    changed = (await new.apply(pod.path, planned())).changed
    assert sum("of the other backend" in text for text in changed) == 8
    ruleset = pod.run("nft", "list", "ruleset").stdout
    assert ("NARROWS" in ruleset, "NARROWS" in pod.iptables_save(4)) == (second == "nftables", second == "iptables")
    await new.remove(pod.path)
    assert "NARROWS" not in pod.run("nft", "list", "ruleset").stdout + pod.iptables_save(4) + pod.iptables_save(6)


async def test_a_pod_that_is_gone_or_not_a_namespace_is_named(reconciler: Reconciler) -> None:
    with pytest.raises(CaptureError, match=r"cannot open namespace /run/netns/gone: .*; its pod is probably gone"):
        await reconciler.apply("/run/netns/gone", planned())
    with pytest.raises(CaptureError, match="/etc/hostname is not a network namespace"):
        await reconciler.remove("/etc/hostname")


async def test_a_child_that_takes_too_long_is_ended_and_reported(pod: Netns) -> None:
    with pytest.raises(CaptureError, match=f"namespace {pod.path}: work on the rules took longer than 0.001 s"):
        await Reconciler(INSTANCE, deadline=0.001).apply(pod.path, planned())


async def test_when_one_family_fails_the_other_is_not_captured(pod: Netns, reconciler: Reconciler) -> None:
    good = planned()
    broken = good.redirects[1]._replace(name="nosuch")
    with pytest.raises(CaptureError, match=r"IPv6 nosuch table: .*; the pod is not captured"):
        await reconciler.apply(pod.path, dataclasses.replace(good, redirects=(good.redirects[0], broken)))
    assert "REDIRECT" not in pod.iptables_save(4)


async def test_an_apply_that_is_cancelled_is_never_half_done(pod: Netns, reconciler: Reconciler) -> None:
    """Cancelled at moments from the start of the child to its end: both families, or none."""
    for step in range(0, 48, 4):
        task = asyncio.create_task(reconciler.apply(pod.path, planned()))
        await asyncio.wait([task], timeout=step * 0.002)
        task.cancel()
        await asyncio.wait([task])
        found = ["REDIRECT" in pod.iptables_save(family) for family in (4, 6)]
        assert found in ([True, True], [False, False]), f"cancelled after {step * 2} ms"
        await reconciler.remove(pod.path)


def packets_of(pod: Netns) -> str:
    return pod.run("iptables-legacy-save", "-c").stdout + pod.run("ip6tables-legacy-save", "-c").stdout


def networks(*texts: str) -> tuple[Network, ...]:
    return tuple(ip_network(text) for text in texts)


def rules_of(table: Table) -> list[str]:
    return [rule.text(chain.name) for chain in table.chains for rule in chain.rules]


def section(printed: list[str], table: str) -> list[str]:
    start = printed.index(f"*{table}")
    return printed[start:printed.index("COMMIT", start)]
