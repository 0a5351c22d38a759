"""Cluster IPs, endpoints, the rules made of them, and the names that DNS answers."""
from __future__ import annotations

import dataclasses
from ipaddress import ip_address

import dnslib
import pytest

from agent.lab.dns import Zone
from agent.lab.place import SERVICE_RANGE_4, SERVICE_RANGE_6
from agent.lab.services import Backend, ClusterIPs, Exposed, ServiceError, members, names, ruleset, targets
from agent.lab.spec import Service, ServicePort, key_of

HTTP = ServicePort("http", 80, "web", "TCP", "")
WEB = Service("default", "web", {"app": "web"}, (HTTP,))


def pod(name: str, last: int, *, ready: bool = True, app: str = "web", port: int = 8080) -> Backend:
    return Backend("default", name, {"app": app, "x": "y"}, (ip_address(f"10.244.1.{last}"), ip_address(f"fd00::{last}")),
                   {"web": port}, ready, hostname=name, subdomain="db")


def test_a_name_gets_the_same_address_in_every_lab_and_keeps_it() -> None:
    one, two = ClusterIPs(), ClusterIPs()
    other = dataclasses.replace(WEB, name="other")
    first = one.assign(WEB)
    two.assign(other)
    assert one.assign(WEB) == two.assign(WEB) == first
    assert first[0] in SERVICE_RANGE_4
    assert one.assign(dataclasses.replace(WEB, families=(4, 6)))[0] == first[0]
    assert one.assign(dataclasses.replace(WEB, families=(6, 4)))[0] in SERVICE_RANGE_6


def test_an_address_is_given_once() -> None:
    ips = ClusterIPs()
    ips.assign(dataclasses.replace(WEB, cluster_ip="10.96.0.10"))
    with pytest.raises(ServiceError, match=r"belongs to service default/web already"):
        ips.assign(dataclasses.replace(WEB, name="two", cluster_ip="10.96.0.10"))
    with pytest.raises(ServiceError, match="not in the lab's range"):
        ips.assign(dataclasses.replace(WEB, name="two", cluster_ip="10.0.0.1"))
    ips.release(key_of(WEB))
    assert ips.assign(dataclasses.replace(WEB, name="two", cluster_ip="10.96.0.10")) == (ip_address("10.96.0.10"),)
    given = [ips.assign(dataclasses.replace(WEB, name=f"s{index}"))[0] for index in range(500)]
    assert len(set(given)) == 500


def test_a_service_selects_by_all_its_labels_and_nothing_without_a_selector() -> None:
    pods = [pod("b", 2), pod("a", 3), pod("c", 4, app="db"), dataclasses.replace(pod("d", 5), namespace="other")]
    assert [one.name for one in members(WEB, pods)] == ["a", "b"]
    assert members(dataclasses.replace(WEB, selector={}), pods) == []


def test_a_named_target_port_is_each_pods_own() -> None:
    pods = [pod("a", 2, port=1), pod("b", 3, port=2), dataclasses.replace(pod("c", 4), ports={})]
    assert targets(HTTP, pods, 4) == [(ip_address("10.244.1.2"), 1), (ip_address("10.244.1.3"), 2)]
    assert targets(dataclasses.replace(HTTP, target=9), pods[:1], 6) == [(ip_address("fd00::2"), 9)]


def test_rules_choose_evenly_among_ready_pods_and_leave_a_service_without_any_to_be_refused() -> None:
    address = (ip_address("10.96.1.1"),)
    pods = (pod("a", 2), pod("b", 3), pod("c", 4, ready=False))
    text = ruleset([Exposed(WEB, address, pods)])
    assert "numgen random mod 2 map { 0 : 10.244.1.2 . 8080, 1 : 10.244.1.3 . 8080 }" in text
    assert "10.96.1.1 . tcp . 80 : goto service-0" in text
    assert "10.244.1.2 . 10.244.1.2" in text  # a pod that reaches itself
    none = ruleset([Exposed(WEB, address, pods[2:])])
    assert "10.96.1.1" not in none
    assert "ip daddr 10.96.0.0/16 meta l4proto tcp reject with tcp reset" in none
    always = dataclasses.replace(WEB, publish_not_ready=True)
    assert "10.244.1.4 . 8080" in ruleset([Exposed(always, address, pods)])


def ask(zone: Zone, name: str, kind: str = "A") -> tuple[str, list[str]]:
    answer = zone.answer(bytes(dnslib.DNSRecord.question(name, kind).pack()))
    assert answer is not None
    parsed = dnslib.DNSRecord.parse(answer)
    return dnslib.RCODE[parsed.header.rcode], sorted(str(record.rdata) for record in parsed.rr)


@pytest.fixture
def zone() -> Zone:
    made = Zone()
    headless = Service("default", "db", {"app": "web"}, (HTTP,), cluster_ip="None")
    both = dataclasses.replace(headless, name="both", families=(4, 6))
    pods = (pod("a", 2), pod("b", 3), pod("c", 4, ready=False))
    made.replace(names([Exposed(WEB, (ip_address("10.96.1.1"),), pods), Exposed(headless, (), pods),
                        Exposed(both, (), pods)]))
    return made


def test_a_service_name_has_its_cluster_ip_in_the_families_it_has(zone: Zone) -> None:
    assert ask(zone, "web.default.svc.cluster.local") == ("NOERROR", ["10.96.1.1"])
    assert ask(zone, "WEB.default.SVC.cluster.local.") == ("NOERROR", ["10.96.1.1"])
    assert ask(zone, "web.default.svc.cluster.local", "AAAA") == ("NOERROR", [])
    assert ask(zone, "web.default.svc.cluster.local", "MX") == ("NOERROR", [])


def test_a_headless_name_has_the_ready_pods_and_each_by_its_hostname(zone: Zone) -> None:
    assert ask(zone, "db.default.svc.cluster.local") == ("NOERROR", ["10.244.1.2", "10.244.1.3"])
    assert ask(zone, "db.default.svc.cluster.local", "AAAA") == ("NOERROR", [])
    assert ask(zone, "both.default.svc.cluster.local", "AAAA") == ("NOERROR", ["fd00::2", "fd00::3"])
    assert ask(zone, "a.db.default.svc.cluster.local") == ("NOERROR", ["10.244.1.2"])


def test_a_name_that_is_not_there_does_not_exist_and_a_parent_is_empty(zone: Zone) -> None:
    for name in ("nobody.default.svc.cluster.local", "web", "web.default", "example.com"):
        assert ask(zone, name) == ("NXDOMAIN", [])
    for name in ("default.svc.cluster.local", "svc.cluster.local", "cluster.local"):
        assert ask(zone, name) == ("NOERROR", [])


def test_hostile_messages_are_not_answered_or_refused_and_never_a_crash(zone: Zone) -> None:
    question = bytes(dnslib.DNSRecord.question("web.default.svc.cluster.local").pack())
    for end in range(len(question)):
        zone.answer(question[:end])
    for at in range(len(question)):
        for value in (0, 0x40, 0x80, 0xC0, 0xFF):
            zone.answer(question[:at] + bytes([value]) + question[at + 1:])
    answer = zone.answer(question)
    assert answer is not None
    assert zone.answer(answer) is None  # an answer is not answered: two servers would talk for ever
    twice = dnslib.DNSRecord(q=dnslib.DNSQuestion("a"))
    twice.add_question(dnslib.DNSQuestion("b"))
    refused = zone.answer(bytes(twice.pack()))
    assert refused is not None
    assert dnslib.DNSRecord.parse(refused).header.rcode == dnslib.RCODE.NOTIMP


def test_an_answer_that_is_too_long_for_a_datagram_says_so() -> None:
    zone = Zone()
    zone.replace([("many.default.svc.cluster.local", tuple(ip_address(f"10.244.1.{n}") for n in range(2, 252)))])
    answer = zone.answer(bytes(dnslib.DNSRecord.question("many.default.svc.cluster.local").pack()), limit=1232)
    assert answer is not None
    assert len(answer) <= 1232
    assert dnslib.DNSRecord.parse(answer).header.tc == 1
