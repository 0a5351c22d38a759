"""The same contract where the kernel has no legacy tables: read, apply, verify, repair, remove, read back with `nft`."""
from __future__ import annotations

import dataclasses
import subprocess
import sys
from ipaddress import ip_network

import pytest

from agent.capture.nft import table_name
from agent.capture.plan import chain_prefix
from agent.capture.reconcile import CaptureError, Reconciler
from agent.capture.rules import Extension, Rule
from agent.model.pod import CaptureSettings
from tests.netns.capture.conftest import INSTANCE, planned, print_of, state
from tests.support import hidden
from tests.support.netns import Netns

pytestmark = pytest.mark.netns
BACKEND = "nftables"
P = chain_prefix(INSTANCE)
T = table_name(P)
EDITS = [
    f"nft flush chain ip {T} nat_OUTPUT", f"nft delete table ip6 {T}", "nft flush ruleset",
    f"nft insert rule ip {T} nat_OUTPUT return", f"nft add rule ip6 {T} nat_OUTPUT meta l4proto tcp return",
    f"nft add chain ip {T} stray", f"nft 'add set ip {T} stray {{ type ipv4_addr; }}'",
    f"nft 'chain ip {T} filter_INPUT {{ policy drop; }}'",
    f"nft flush chain ip6 {T} mangle_OUTPUT && nft delete chain ip6 {T} mangle_OUTPUT",
    f"nft 'flush chain ip {T} raw_OUTPUT; add rule ip {T} raw_OUTPUT meta l4proto tcp accept'",
    "ip rule del priority 32764", "ip -6 route flush table 100",
]


def ruleset(pod: Netns) -> str:
    return pod.run("nft", "-s", "list", "ruleset").stdout


async def test_a_node_without_legacy_tables_chooses_nftables_and_says_why(reconciler: Reconciler) -> None:
    chosen = await reconciler.backend()
    assert chosen.name == "nftables"
    assert "no legacy tables (IPv4 " in chosen.reason and "iptables who?" in chosen.reason


def test_hidden_is_hidden_from_the_real_iptables_too() -> None:
    done = subprocess.run([sys.executable, hidden.__file__, "iptables-legacy", "-t", "nat", "-S"], capture_output=True, text=True,
                          check=False, timeout=20)
    assert done.returncode != 0 and "can't initialize iptables table" in done.stderr
    assert subprocess.run(["iptables-legacy", "-t", "nat", "-S"], capture_output=True, check=False, timeout=20).returncode == 0


async def test_the_plan_is_in_force_twice_is_a_no_op_and_removal_leaves_nothing(pod: Netns, reconciler: Reconciler) -> None:
    before = state(pod)
    settings = CaptureSettings((22, 3306), (9090,), (ip_network("10.0.0.0/8"), ip_network("fd00::/8")), (ip_network("10.96.0.0/12"),))
    first = await reconciler.apply(pod.path, planned(settings))
    assert len(first.changed) == 12  # eight tables, two rules, two routes
    then = ruleset(pod)
    for words in ("redirect to :15001", "redirect to :15006", "tcp dport 3306 return", "ip daddr 10.96.0.0/12", "ip6 daddr fd00::/8 return",
                  "ct original zone set 1337", "ct original proto-dst 15001 reject with tcp reset", "meta mark set ct mark"):
        assert words in then.replace("meta l4proto tcp ", ""), words
    assert pod.iptables_save(4) == pod.iptables_save(6) == ""
    again = await reconciler.apply(pod.path, planned(settings))
    assert again.changed == () and ruleset(pod) == then and await reconciler.verify(pod.path, planned(settings)) == ()
    assert sorted(await reconciler.chains(pod.path)) == sorted(table.label for table in planned().tables)
    assert len((await reconciler.remove(pod.path)).changed) == 12
    assert state(pod) == before
    assert (await reconciler.remove(pod.path)).changed == ()


@pytest.mark.parametrize("edit", EDITS)
async def test_a_foreign_edit_changes_the_print_and_is_said_and_repaired(pod: Netns, reconciler: Reconciler, edit: str) -> None:
    await reconciler.apply(pod.path, planned())
    then, before = state(pod), print_of(pod)
    assert before and print_of(pod) == before
    pod.run("sh", "-ec", edit)
    assert state(pod) != then and print_of(pod) not in (before, b"")
    wrong = await reconciler.verify(pod.path, planned())
    assert wrong
    assert await reconciler.repair(pod.path, planned()) == wrong
    assert state(pod) == then
    assert await reconciler.repair(pod.path, planned()) == ()


async def test_other_peoples_tables_stay_as_they_are(pod: Netns, reconciler: Reconciler) -> None:
    pod.run("nft", "add table ip mine; add chain ip mine out { type nat hook output priority -100; }; "
            "add rule ip mine out udp dport 5 accept; add table ip NARROWS_other")
    before = ruleset(pod)
    await reconciler.apply(pod.path, planned())
    assert before in ruleset(pod)
    await reconciler.remove(pod.path)
    assert ruleset(pod) == before


async def test_a_rule_that_nobody_has_translated_is_refused_and_nothing_is_captured(pod: Netns, reconciler: Reconciler) -> None:
    good = planned()
    table = good.redirects[1]
    strange = Rule(Extension("TPROXY", (("on-port", "1"),)), protocol="tcp")
    broken = table._replace(chains=(table.chains[0]._replace(rules=(strange,)), table.chains[1]))
    with pytest.raises(CaptureError, match=r"the target `TPROXY --on-port 1` has no translation to nftables; the pod is not captured"):
        await reconciler.apply(pod.path, dataclasses.replace(good, redirects=(good.redirects[0], broken)))
    assert ruleset(pod) == ""

