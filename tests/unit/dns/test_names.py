"""Which host a name means for a pod, and what the mesh says of it."""
from __future__ import annotations

from ipaddress import ip_address

import dnslib
import pytest

from agent.dns import names, wire
from agent.model.workload import IPAddress

TABLE = {"reviews.shop.svc.cluster.local": ("10.0.0.1", "fd00::1"), "only4.shop.svc.cluster.local": ("10.0.0.2",),
         "api.example.com": ("240.240.0.1",), "empty.shop.svc.cluster.local": ()}


def hosts(host: str, namespace: str) -> tuple[IPAddress, ...]:
    return tuple(map(ip_address, TABLE.get(host, ())))


def ask(name: str, kind: str = "A", namespace: str = "shop") -> dnslib.DNSRecord | None:
    data = bytes(dnslib.DNSRecord.question(name, kind).pack())
    read = wire.read_query(data)
    assert read is not None
    found = names.answer(data, read, namespace, hosts, "cluster.local", 512)
    return dnslib.DNSRecord.parse(found) if found is not None else None


@pytest.mark.parametrize(("name", "alias"), [
    ("reviews.shop.svc.cluster.local", ""), ("reviews", ""), ("reviews.shop", ""), ("reviews.shop.svc", ""), ("REVIEWS.shop", ""),
    ("reviews.shop.svc.cluster.local.shop.svc.cluster.local", "reviews.shop.svc.cluster.local"),
    ("reviews.shop.svc.cluster.local.svc.cluster.local", "reviews.shop.svc.cluster.local"),
    ("reviews.shop.svc.cluster.local.cluster.local", "reviews.shop.svc.cluster.local")])
def test_a_service_is_found_by_each_way_to_write_it(name: str, alias: str) -> None:
    found = ask(name)
    assert found is not None
    assert [str(one.rdata) for one in found.rr if one.rtype == wire.A] == ["10.0.0.1"]
    assert [str(one.rdata).rstrip(".") for one in found.rr if one.rtype == wire.CNAME] == ([alias] if alias else [])
    assert {one.ttl for one in found.rr} == {30}


def test_a_short_name_is_the_pods_own_namespaces() -> None:
    assert ask("reviews", namespace="other") is None
    assert ask("reviews.shop", namespace="other") is not None


def test_a_host_of_a_service_entry_is_found_with_and_without_a_search_domain() -> None:
    assert ask("api.example.com") is not None
    found = ask("api.example.com.shop.svc.cluster.local")
    assert found is not None and str(found.rr[0].rdata) == "api.example.com."


def test_a_family_that_the_service_has_not_is_empty_and_not_an_error() -> None:
    found = ask("only4.shop.svc.cluster.local", "AAAA")
    assert found is not None and found.header.rcode == 0 and found.header.aa == 1 and not found.rr


@pytest.mark.parametrize(("name", "kind"), [
    ("www.example.com", "A"), ("reviews.shop.svc.cluster.local", "MX"), ("reviews.shop.svc.cluster.local", "ANY"),
    ("empty.shop.svc.cluster.local", "A"), ("reviews.shop.svc.cluster.local.elsewhere", "A"), ("shop.svc.cluster.local", "A"), (".", "A")])
def test_all_else_is_for_the_pods_resolver(name: str, kind: str) -> None:
    assert ask(name, kind) is None
