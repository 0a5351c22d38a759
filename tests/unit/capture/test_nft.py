"""The plan in nftables' language, and the choice between the two backends."""
from __future__ import annotations

from ipaddress import ip_network

import pytest

from agent.capture.nft import rule_text, script
from agent.capture.plan import plan
from agent.capture.reconcile import CaptureError, choose
from agent.capture.rules import Extension, Rule
from agent.model.pod import CaptureSettings


def test_every_rule_of_a_plan_has_a_line_in_the_chain_of_its_table_and_hook() -> None:
    made = plan(CaptureSettings((1, 2), (3,), (ip_network("10.0.0.0/8"), ip_network("fd00::/8")), (ip_network("10.96.0.0/12"),)),
                (4, 6), "test")
    text = script(made.tables, made.prefix)
    for table in made.tables:
        label = f"table {'ip6' if table.family == 6 else 'ip'} NARROWS_"
        part = text[text.index(label, text.index(f"delete {label}") + 8):]
        for chain in table.chains:
            body = part[part.index(f" chain {table.name}_{chain.hook} {{"):]
            lines = [line.strip() for line in body[:body.index("\n }")].splitlines()[1:]]
            assert lines[0].endswith("policy accept;") and f"hook {chain.hook.lower()} " in lines[0]
            assert lines[1:] == [rule_text(table.family, rule) for rule in chain.rules]


def test_a_script_replaces_the_table_in_one_transaction_whether_it_was_there_or_not() -> None:
    made = plan(CaptureSettings(), (4,), "test")
    lines = script(made.tables, made.prefix).splitlines()
    name = made.prefix.rstrip("_")
    assert lines[:3] == [f"add table ip {name}", f"delete table ip {name}", f"table ip {name} {{"]
    assert "ip6" not in "\n".join(lines)


@pytest.mark.parametrize(("rule", "text"), [
    (Rule(Extension("REDIRECT", (("to-ports", "15001"),)), destination="!127.0.0.1/32", protocol="tcp",
          matches=(Extension("mark", (("!mark", "0x539/0xfff"),)),)),
     "meta l4proto tcp ip daddr != 127.0.0.1/32 meta mark & 0xfff != 0x539 redirect to :15001"),
    (Rule(Extension("CONNMARK", (("set-xmark", "0x111/0xfff"),))), "ct mark set ct mark & 0xfffff000 | 0x111"),
    (Rule(Extension("ACCEPT"), out_interface="lo", source="10.0.0.0/8"), 'ip saddr 10.0.0.0/8 oifname "lo" accept'),
])
def test_a_rule_is_translated(rule: Rule, text: str) -> None:
    assert rule_text(4, rule) == text


@pytest.mark.parametrize("strange", [
    Rule(Extension("DNAT", (("to", "1.2.3.4"),))), Rule(Extension("ACCEPT"), matches=(Extension("owner", (("uid-owner", "0"),)),)),
    Rule(Extension("REDIRECT", (("to-ports", "1"), ("random", "")))), Rule(Extension("ACCEPT", (("x", "y"),)))])
def test_what_nobody_has_translated_is_refused(strange: Rule) -> None:
    with pytest.raises(ValueError, match="has no translation to nftables"):
        rule_text(4, strange)


def test_iptables_comes_first_nftables_says_why_and_without_both_the_error_says_what_is_missing() -> None:
    assert choose({"iptables": "", "nftables": ""}).name == "iptables"
    chosen = choose({"iptables": "no nat table", "nftables": ""})
    assert (chosen.name, chosen.reason) == ("nftables", "no legacy tables (no nat table)")
    with pytest.raises(CaptureError, match="neither iptables nor nftables works here: no nat table; no nf_tables"):
        choose({"iptables": "no nat table", "nftables": "no nf_tables"})
