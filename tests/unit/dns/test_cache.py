"""Answers kept by TTL, aged, bounded in bytes."""
from __future__ import annotations

import dnslib

from agent.dns.cache import CACHE_BYTES, LONGEST, Cache, Key

RESOLVER = ("10.0.0.53", 53)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def pair(name: str, ttl: int, records: int = 1, rcode: int = 0) -> tuple[Key, bytes]:
    asked = dnslib.DNSRecord.question(name)
    reply = asked.reply()
    for number in range(records if not rcode else 0):
        reply.add_answer(dnslib.RR(name, dnslib.QTYPE.A, rdata=dnslib.A(f"10.0.{number // 250}.{number % 250}"), ttl=ttl))
    if rcode:
        reply.header.rcode = rcode
        reply.add_auth(dnslib.RR("example.com", dnslib.QTYPE.SOA, rdata=dnslib.SOA("ns", "root", (1, 2, 3, 4, ttl)), ttl=3600))
    return (RESOLVER, bytes(asked.pack())[2:]), bytes(reply.pack())


def test_an_answer_is_kept_for_its_ttl_and_ages() -> None:
    clock = Clock()
    cache = Cache(clock)
    key, answer = pair("a.example.com", 20)
    cache.put(key, answer)
    clock.now += 15.5
    found = cache.get(key)
    assert found is not None and dnslib.DNSRecord.parse(found).rr[0].ttl == 5
    assert cache.get((("10.0.0.54", 53), key[1])) is None  # another resolver may say another thing
    clock.now += 4.5
    assert cache.get(key) is None
    assert (len(cache), cache.bytes) == (0, 0)


def test_a_name_that_does_not_exist_is_kept_as_long_as_the_soa_says() -> None:
    clock = Clock()
    cache = Cache(clock)
    key, answer = pair("no.example.com", 10, rcode=3)
    cache.put(key, answer)
    clock.now += 9
    found = cache.get(key)
    assert found is not None and dnslib.DNSRecord.parse(found).header.rcode == 3
    clock.now += 1
    assert cache.get(key) is None


def test_nothing_is_kept_for_longer_than_the_bound() -> None:
    clock = Clock()
    cache = Cache(clock)
    key, answer = pair("a.example.com", 86400)
    cache.put(key, answer)
    clock.now += LONGEST
    assert cache.get(key) is None


def test_the_bytes_are_bounded_and_the_least_recently_used_goes() -> None:
    cache = Cache(Clock())
    first, answer = pair("first.example.com", 100)
    cache.put(first, answer)
    for number in range(2000):
        cache.put(*pair(f"n{number}.example.com", 100))
        assert cache.get(first) is not None
        assert cache.bytes <= CACHE_BYTES
    assert 100 < len(cache) < 2000
    big, answer = pair("big.example.com", 100, records=3000)
    cache.put(big, answer)
    assert cache.get(big) is None and cache.get(first) is not None  # one answer does not drive out all others
