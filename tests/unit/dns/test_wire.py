"""Messages: what is read of them, what is written, and that no bytes whatever raise. dnslib is the independent reader and writer."""
from __future__ import annotations

import struct
from ipaddress import ip_address

import dnslib
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.dns import wire


def query(name: str, kind: str = "A", *, edns: int | None = None) -> bytes:
    record = dnslib.DNSRecord.question(name, kind)
    if edns is not None:
        record.add_ar(dnslib.EDNS0(udp_len=edns))
    return bytes(record.pack())


def answer_to(asked: bytes, *lines: str, rcode: int = 0, authority: str = "") -> bytes:
    reply = dnslib.DNSRecord.parse(asked).reply()
    for line in lines:
        reply.add_answer(*dnslib.RR.fromZone(line))
    if authority:
        reply.add_auth(*dnslib.RR.fromZone(authority))
    reply.header.rcode = rcode
    return bytes(reply.pack())


SOA = "example.com. 60 SOA ns.example.com. root.example.com. 1 3600 600 86400 20"


def test_a_question_is_read_with_its_name_in_lower_case_and_what_the_client_takes() -> None:
    for edns, takes in ((None, 512), (4096, 4096), (100, 512)):
        data = query("Reviews.Shop.svc.cluster.LOCAL", "AAAA", edns=edns)
        read = wire.read_query(data)
        assert read is not None
        assert (read.name, read.type, read.payload, read.edns, read.cacheable) == (
            "reviews.shop.svc.cluster.local", wire.AAAA, takes, edns is not None, True)


def test_an_answer_is_no_question_and_odd_ones_have_no_name() -> None:
    plain = query("a.example.com")
    assert wire.read_query(answer_to(plain, "a.example.com 5 A 1.2.3.4")) is None
    assert wire.read_query(plain[:11]) is None
    two = dnslib.DNSRecord(dnslib.DNSHeader(id=1), questions=[dnslib.DNSQuestion("a"), dnslib.DNSQuestion("b")])
    update = bytearray(plain)
    update[2] |= 0x28  # opcode UPDATE
    chaos = dnslib.DNSRecord.question("version.bind", "TXT", "CH")
    dotted = wire.HEADER.pack(1, 0, 1, 0, 0, 0) + b"\x03a.b\x00" + struct.pack(">HH", 1, 1)
    pointer = wire.HEADER.pack(1, 0, 1, 0, 0, 0) + b"\xc0\x0c" + struct.pack(">HH", 1, 1)
    for odd in (bytes(two.pack()), bytes(update), bytes(chaos.pack()), dotted, pointer, plain[:-3], plain + b"x"):
        read = wire.read_query(odd)
        assert read is not None and read.name == "" and not read.cacheable


def test_options_of_edns_make_an_answer_the_clients_own() -> None:
    record = dnslib.DNSRecord.question("a.example.com")
    record.add_ar(dnslib.EDNS0(udp_len=1232, opts=[dnslib.EDNSOption(10, b"12345678")]))
    read = wire.read_query(bytes(record.pack()))
    assert read is not None and read.name == "a.example.com" and not read.cacheable


@pytest.mark.parametrize("kind", ["AXFR", "IXFR"])
def test_a_zone_transfer_is_not_kept(kind: str) -> None:
    for edns in (None, 1232):
        read = wire.read_query(query("example.com", kind, edns=edns))
        assert read is not None and read.name == "example.com" and not read.cacheable


@pytest.mark.parametrize("edns", [None, 1232])
@pytest.mark.parametrize("alias", ["", "reviews.shop.svc.cluster.local"])
def test_an_answer_of_ours_is_read_by_an_independent_reader(edns: int | None, alias: str) -> None:
    asked = query("Reviews.shop.svc.cluster.local.shop.svc.cluster.local", edns=edns)
    read = wire.read_query(asked)
    assert read is not None
    answer = wire.reply(asked, read, [ip_address("10.0.0.1"), ip_address("10.0.0.2")], 30, alias=alias, limit=read.payload)
    parsed = dnslib.DNSRecord.parse(answer)
    assert parsed.header.id == dnslib.DNSRecord.parse(asked).header.id
    assert (parsed.header.aa, parsed.header.ra, parsed.header.rd, parsed.header.tc, parsed.header.rcode) == (1, 1, 1, 0, 0)
    assert parsed.q == dnslib.DNSRecord.parse(asked).q
    owner = alias or "Reviews.shop.svc.cluster.local.shop.svc.cluster.local"
    assert [(str(one.rname).rstrip("."), str(one.rdata), one.ttl) for one in parsed.rr if one.rtype == 1] == [
        (owner, "10.0.0.1", 30), (owner, "10.0.0.2", 30)]
    assert [str(one.rdata).rstrip(".") for one in parsed.rr if one.rtype == 5] == ([alias] if alias else [])
    assert len(parsed.ar) == (edns is not None)
    assert wire.answers(asked, read.end, answer)


def test_an_answer_that_does_not_fit_is_truncated_and_a_missing_family_is_empty() -> None:
    asked = query("many.shop.svc.cluster.local", "AAAA", edns=1232)
    read = wire.read_query(asked)
    assert read is not None
    many = [ip_address(f"fd00::{number:x}") for number in range(200)]
    cut = dnslib.DNSRecord.parse(wire.reply(asked, read, many, 30, limit=read.payload))
    assert cut.header.tc == 1 and not cut.rr
    whole = dnslib.DNSRecord.parse(wire.reply(asked, read, many, 30, limit=65535))
    assert whole.header.tc == 0 and len(whole.rr) == 200
    none = dnslib.DNSRecord.parse(wire.reply(asked, read, [], 30, limit=read.payload))
    assert none.header.rcode == 0 and not none.rr


def test_lifetimes_are_the_shortest_ttl_and_of_negative_answers_the_soas() -> None:
    asked = query("a.example.com")
    assert wire.lifetime(answer_to(asked, "a.example.com 50 CNAME b.example.com", "b.example.com 7 A 1.2.3.4")).seconds == 7  # type: ignore[union-attr]
    assert wire.lifetime(answer_to(asked, rcode=3, authority=SOA)).seconds == 20  # type: ignore[union-attr]
    assert wire.lifetime(answer_to(asked, authority=SOA)).seconds == 20  # type: ignore[union-attr]
    for kept in (answer_to(asked, rcode=3), answer_to(asked), answer_to(asked, rcode=2), answer_to(asked, "a.example.com 0 A 1.2.3.4")):
        assert wire.lifetime(kept) is None
    cut = bytearray(answer_to(asked, "a.example.com 9 A 1.2.3.4"))
    cut[2] |= 2
    assert wire.lifetime(bytes(cut)) is None


def test_an_aged_answer_has_less_ttl_everywhere_and_nothing_else_changed() -> None:
    asked = query("a.example.com", edns=1232)
    answer = answer_to(asked, "a.example.com 50 CNAME b.example.com", "b.example.com 7 A 1.2.3.4")
    life = wire.lifetime(answer)
    assert life is not None
    before, after = dnslib.DNSRecord.parse(answer), dnslib.DNSRecord.parse(wire.aged(answer, life.places, 5))
    assert [one.ttl for one in after.rr] == [45, 2]
    assert [str(one.rdata) for one in after.rr] == [str(one.rdata) for one in before.rr]


def test_an_answer_to_another_question_is_none() -> None:
    asked = query("a.example.com")
    read = wire.read_query(asked)
    assert read is not None
    assert wire.answers(asked, read.end, answer_to(query("A.example.COM"), "a.example.com 5 A 1.2.3.4"))
    for other in (query("b.example.com"), query("a.example.com", "AAAA")):
        assert not wire.answers(asked, read.end, answer_to(other))
    assert not wire.answers(asked, read.end, asked) and not wire.answers(asked, read.end, b"")


ASKED, DEEP = query("a.example.com", edns=900), query("a.b.c.example.com", edns=900)
ANSWERED = answer_to(ASKED, "a.example.com 50 CNAME b.example.com", authority=SOA)


@settings(max_examples=300, deadline=None)
@given(st.one_of(
    st.binary(max_size=600),
    st.builds(lambda data, at, bits: _flipped(data, at, bits), st.sampled_from([ANSWERED, ASKED, DEEP]), st.integers(0, 10_000),
              st.binary(min_size=1, max_size=8))))
def test_no_bytes_raise(data: bytes) -> None:
    read = wire.read_query(data)
    if read is not None:
        assert wire.HEADER.size <= read.end <= len(data)
        wire.answers(data, read.end, data)
        wire.reply(data, read, [ip_address("10.0.0.1")], 30, alias="a.b", limit=512)
    life = wire.lifetime(data)
    if life is not None:
        assert len(wire.aged(data, life.places, 3)) == len(data)


def _flipped(data: bytes, at: int, bits: bytes) -> bytes:
    at %= len(data)
    return data[:at] + bits + data[at + len(bits):]
