"""As much of a DNS message (RFC 1035) as a proxy must know: bytes in, facts out; nothing here raises on hostile bytes.

Answers of others are passed on as they came, so no message is taken apart and put together again: that would lose what we do not know.
What is read: the question, EDNS (RFC 6891), and where the TTLs stand. `tests/unit/dns` holds this to dnslib, an independent reader.
"""
from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address

from agent.model.workload import IPAddress

HEADER = struct.Struct(">HHHHHH")  # id, flags, counts of questions, answers, authorities, additionals
QR, OPCODE, AA, TC, RD, RA, RCODE = 0x8000, 0x7800, 0x0400, 0x0200, 0x0100, 0x0080, 0x000F
A, NS, CNAME, SOA, AAAA, OPT = 1, 2, 5, 6, 28, 41
TRANSFERS = frozenset({251, 252})  # IXFR, AXFR: an answer may be many messages
IN = 1
NOERROR, NXDOMAIN = 0, 3
NAME_BYTES = 255  # RFC 1035 2.3.4
RECORDS = 4096  # of one message; a message of 64 KiB could claim 65,535 times three
PLAIN_UDP = 512  # bytes that a client without EDNS takes (RFC 1035 4.2.1)
OUR_UDP = 1232  # bytes that we take ourselves: what passes everywhere unfragmented

_RECORD = struct.Struct(">HHIH")  # type, class, TTL, bytes of data
_PRINTABLE = frozenset(range(0x21, 0x7F)) - {ord(".")}


@dataclass(frozen=True, slots=True)
class Query:
    """A question that was read. `name`: lower case, no final dot; "" when there is none, or none that could be a host's."""

    name: str
    type: int
    end: int  # of the question section
    payload: int  # bytes that the client takes by UDP
    edns: bool
    cacheable: bool  # nothing in it makes the answer this client's alone


def read_query(data: bytes) -> Query | None:
    """None: no query, and not to be answered. What is one but odd has no name: it is for the resolver to judge."""
    if len(data) < HEADER.size:
        return None
    _, flags, questions, answers, authorities, additionals = HEADER.unpack_from(data)
    if flags & QR:
        return None
    odd = Query("", 0, HEADER.size, PLAIN_UDP, False, False)
    if flags & OPCODE or questions != 1:
        return odd
    labels = _labels(data)
    if labels is None:
        return odd
    end = HEADER.size + sum(len(label) + 1 for label in labels) + 1 + 4
    if end > len(data):
        return odd
    kind, class_ = struct.unpack_from(">HH", data, end - 4)
    plain = class_ == IN and all(_PRINTABLE.issuperset(label) for label in labels)
    name = b".".join(labels).decode("ascii").lower() if plain else ""
    if answers or authorities or additionals > 1 or (not additionals and end != len(data)):
        return Query("", kind, end, PLAIN_UDP, False, False)
    if not additionals:
        return Query(name, kind, end, PLAIN_UDP, False, plain and kind not in TRANSFERS)
    if end + 11 > len(data) or data[end] != 0:  # EDNS stands at the root
        return Query("", kind, end, PLAIN_UDP, False, False)
    option, payload, _, length = _RECORD.unpack_from(data, end + 1)
    if option != OPT or end + 11 + length != len(data):
        return Query("", kind, end, PLAIN_UDP, False, False)
    # options (cookies, the client's subnet) may make the answer the client's own
    return Query(name, kind, end, max(payload, PLAIN_UDP), True, plain and length == 0 and kind not in TRANSFERS)


def _labels(data: bytes) -> list[bytes] | None:
    """Of the name behind the header; None when it is none. A question's name is never compressed."""
    labels: list[bytes] = []
    at = HEADER.size
    while at < len(data) and at - HEADER.size < NAME_BYTES:
        size = data[at]
        if size == 0:
            return labels
        if size > 63 or at + 1 + size > len(data):
            return None
        labels.append(data[at + 1:at + 1 + size])
        at += 1 + size
    return None


def answers(query: bytes, end: int, answer: bytes) -> bool:
    """Whether `answer` has the question of `query`, whose question section ends at `end` (some servers change the case of letters)."""
    if len(answer) < HEADER.size or not HEADER.unpack_from(answer)[1] & QR:
        return False
    if HEADER.unpack_from(answer)[2] == 0:  # some servers leave the question out of an error (FORMERR, REFUSED)
        return HEADER.unpack_from(answer)[1] & RCODE not in (NOERROR, NXDOMAIN)
    return answer[HEADER.size:end].lower() == query[HEADER.size:end].lower()


@dataclass(frozen=True, slots=True)
class Lifetime:
    """For how long an answer holds, in seconds, and where its TTLs stand."""

    seconds: int
    places: tuple[int, ...]


def lifetime(answer: bytes) -> Lifetime | None:
    """None: not to be kept. A negative answer holds as long as its SOA says (RFC 2308 5), one without SOA is not kept."""
    if len(answer) < HEADER.size:
        return None
    _, flags, questions, *counts = HEADER.unpack_from(answer)
    if flags & (TC | OPCODE) or flags & RCODE not in (NOERROR, NXDOMAIN) or questions != 1 or sum(counts) > RECORDS:
        return None
    at = _skip_name(answer, HEADER.size)
    if at is None:
        return None
    at += 4
    shortest, negative, places = 0xFFFFFFFF, False, []
    for section, count in enumerate(counts):
        for _ in range(count):
            start = _skip_name(answer, at)
            if start is None or start + _RECORD.size > len(answer):
                return None
            kind, _, ttl, length = _RECORD.unpack_from(answer, start)
            at = start + _RECORD.size + length
            if at > len(answer):
                return None
            if kind == OPT:
                continue
            ttl = 0 if ttl & 0x80000000 else ttl  # RFC 2181 8
            if kind == SOA and section == 1:
                if length < 22:
                    return None
                ttl = min(ttl, struct.unpack_from(">I", answer, at - 4)[0])
                negative = True
            shortest = min(shortest, ttl)
            places.append(start + 4)
    if (flags & RCODE == NXDOMAIN or counts[0] == 0) and not negative:
        return None
    return Lifetime(shortest, tuple(places)) if places and shortest else None


def aged(answer: bytes, places: Sequence[int], seconds: int) -> bytes:
    """The same answer `seconds` later."""
    found = bytearray(answer)
    for place in places:
        (ttl,) = struct.unpack_from(">I", found, place)
        struct.pack_into(">I", found, place, max(ttl - seconds, 0))
    return bytes(found)


def _skip_name(data: bytes, at: int) -> int | None:
    """The place behind a name, which may end in a pointer. Bounded: pointers are not followed."""
    limit = at + NAME_BYTES
    while at < len(data) and at < limit:
        size = data[at]
        if size == 0:
            return at + 1
        if size & 0xC0 == 0xC0:
            return at + 2
        if size > 63:
            return None
        at += 1 + size
    return None


def reply(query: bytes, read: Query, addresses: Sequence[IPAddress], ttl: int, *, alias: str = "", limit: int) -> bytes:
    """An authoritative answer of ours: these addresses (none: the name is there and has none of this family).

    `alias`: the name that the one asked for stands for, as a CNAME before them. More than `limit` bytes: truncated, so that the client
    asks by TCP.
    """
    (number, flags) = struct.unpack_from(">HH", query)
    flags = QR | AA | RA | (flags & RD)
    question = query[HEADER.size:read.end]
    owner, parts = b"\xc0\x0c", []
    if alias:
        target = _encoded(alias)
        parts.append(owner + _RECORD.pack(CNAME, IN, ttl, len(target)) + target)
        owner = struct.pack(">H", 0xC000 | read.end + 2 + _RECORD.size)
    parts += [owner + _RECORD.pack(A if isinstance(address, IPv4Address) else AAAA, IN, ttl, len(address.packed)) + address.packed
              for address in addresses]
    option = b"\0" + _RECORD.pack(OPT, OUR_UDP, 0, 0) if read.edns else b""
    body = b"".join(parts)
    if HEADER.size + len(question) + len(body) + len(option) > limit:
        flags, body, parts = flags | TC, b"", []
    return HEADER.pack(number, flags, 1, len(parts), 0, 1 if option else 0) + question + body + option


def _encoded(name: str) -> bytes:
    return b"".join(bytes((len(label),)) + label.encode("ascii") for label in name.split(".")) + b"\0"
