"""The plan is the same text for the same settings; the kernel's view of it is in tests/netns/capture."""
from __future__ import annotations

import json
import subprocess
import sys
from ipaddress import ip_network
from pathlib import Path

import pytest

from agent.capture.plan import chain_prefix, plan
from agent.capture.rules import CHAIN_NAME_LIMIT, table_from_json
from agent.model.pod import CaptureSettings

GOLDEN = Path(__file__).parents[2] / "golden/capture"
SETTINGS = {
    "default": CaptureSettings(),
    "excluded-ports": CaptureSettings(exclude_outbound_ports=(3306, 6379), exclude_inbound_ports=(9090,)),
    "excluded-ranges": CaptureSettings(exclude_outbound_ranges=(ip_network("10.0.0.0/8"), ip_network("fd00::/8"))),
    "included-ranges": CaptureSettings(exclude_outbound_ranges=(ip_network("10.96.1.0/24"),),
                                       include_outbound_ranges=(ip_network("10.96.0.0/12"), ip_network("::/0"))),
    "nothing-outbound": CaptureSettings(include_outbound_ranges=()),
    "inbound-alone": CaptureSettings(exclude_inbound_ports=(9090,)),
    "outbound-alone": CaptureSettings(exclude_outbound_ports=(3306,), exclude_inbound_ports=(9090,)),
    "dns": CaptureSettings(exclude_outbound_ports=(3306,)),
    "dns-inbound-alone": CaptureSettings(),
    "dns-alone": CaptureSettings(),
}
INBOUND_ALONE = {"inbound-alone", "dns-inbound-alone", "dns-alone"}  # what goes out is captured by socket hooks
OUTBOUND_ALONE = {"outbound-alone", "dns-alone"}  # what comes in is


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_plan_is_the_text_that_was_reviewed(name: str, family: int) -> None:
    golden = GOLDEN / f"{name}.ipv{family}.rules"
    hooks = name in INBOUND_ALONE
    made = plan(SETTINGS[name], (6, 4), "default", redirect=not hooks, hooks=hooks, inbound=name not in OUTBOUND_ALONE,
                dns=name.startswith("dns"))
    assert made.text(family) == golden.read_text()


def test_what_is_left_to_hooks_both_ways_keeps_the_way_back_and_no_table() -> None:
    made, rules = (plan(CaptureSettings(), (4, 6), "default", **how) for how in ({"redirect": False, "hooks": True, "inbound": False}, {}))
    assert made.tables == ()
    assert (made.rules, made.routes) == (rules.rules, rules.routes)


def test_every_golden_plan_is_tested() -> None:
    assert {path.name for path in GOLDEN.iterdir()} == {f"{name}.ipv{family}.rules" for name in SETTINGS for family in (4, 6)}


def test_marks_come_before_redirects_and_nat_is_the_only_redirect() -> None:
    made = plan(CaptureSettings(), (4, 6), "default")
    assert [table.label for table in made.tables] == [
        "IPv4 raw", "IPv4 mangle", "IPv4 filter", "IPv6 raw", "IPv6 mangle", "IPv6 filter", "IPv4 nat", "IPv6 nat"]
    for table in made.tables:
        assert ("REDIRECT" in table.text()) == (table.name == "nat")


@pytest.mark.parametrize("instance", ["", "default", "node-7.example.com", "n" * 300, "ünïcode"])
def test_chain_names_fit_the_kernel_whatever_the_instance_is_called(instance: str) -> None:
    names = [chain.name for table in plan(CaptureSettings(), (4, 6), instance).tables for chain in table.chains]
    assert max(map(len, names)) <= CHAIN_NAME_LIMIT and all(name.startswith(chain_prefix(instance)) for name in names)


def test_two_instances_have_different_chains() -> None:
    assert chain_prefix("a") != chain_prefix("b")


@pytest.mark.parametrize("families", [(), (5,), (4, 5)])
def test_families_other_than_4_and_6_are_refused(families: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="families of a pod are 4 and 6"):
        plan(CaptureSettings(), families, "default")


def test_a_pod_without_ipv6_has_no_ipv6_rules() -> None:
    made = plan(SETTINGS["excluded-ranges"], (4,), "default")
    assert {table.family for table in made.tables} == {rule.family for rule in made.rules} == {4}
    assert ":" not in "".join(str(route.destination) for route in made.routes)


def test_tables_come_to_the_child_as_they_were_sent() -> None:
    for settings in SETTINGS.values():
        for table in plan(settings, (4, 6), "default").tables:
            assert table_from_json(json.loads(json.dumps(table))) == table


def test_the_childs_vocabulary_imports_nothing_heavy() -> None:
    """The child lives for 50 ms; each of these would cost it 5 to 150."""
    code = ("import sys; import agent.capture.rules; "
            "print([name for name in ('dataclasses', 'asyncio', 'pyroute2', 'click', 'ipaddress') if name in sys.modules])")
    root = str(Path(__file__).parents[3])
    done = subprocess.run([sys.executable, "-S", "-E", "-c", f"import sys; sys.path.insert(0, {root!r}); {code}"],
                          capture_output=True, text=True, check=True, timeout=20)
    assert done.stdout.strip() == "[]"
