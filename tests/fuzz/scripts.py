"""The inputs of connections.pyx as words: a person writes and reads them, `python -m tests.fuzz.scripts`

    explain FILE ...    what an input does, line by line
    write FOLDER        the scripts below and those made of tests/wire, as inputs to begin with
    found FOLDER        the scripts for which something did not hold once

A script is a head, `how tick commit`, and an operation a line; one that begins with + is not waited for: the next comes in the same turn.

    open PLACE [itself] [second] [small]       a client dials (second: of the second pod; small: it has little room for what it gets)
    c0 | s0  phrase N | says 'BYTES' | bulk N | shuts | resets | leaves | hears N      N of bulk and hears as in connections.pyx
    wait MS   commit N   sockets N   withhold   attach N   detach N   turn N   tick NS   hear   drain MS   orphan
"""
from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from hashlib import sha1
from pathlib import Path

from tests.fuzz.phrases import ANSWERS, QUESTIONS
from tests.support.smuggling import requests, responses

HOW = ("clients", "servers", "resets", "silence")
OPERATIONS = ("open", "client", "server", "wait", "commit", "sockets", "attach", "detach", "turn", "tick", "hear", "drain", "orphan")
DEEDS = ("phrase", "says", "bulk", "shuts", "resets", "leaves", "hears")
PLACES = ("web", "web-tcp", "auto", "late", "late-tcp", "late-auto", "broken", "broken-auto", "direct", "direct-tcp", "inbound",
          "inbound-tcp", "passed", "refused", "ourselves", "other", "other-tcp")
FLAGS = {"itself": 32, "second": 64, "small": 128}
TICKS = (0, 0, 0, 0, 500, 5_000, 30_000, 60_000, 120_000, 400_000, 2_000_000)
WAITS = (1, 10, 20, 50, 100, 250, 500, 1000, 1500, 5000, 10000, 30000, 60000, 300000, 600000, 3600000)
AT_ONCE = 0x80
MOST = 800  # bytes of a message: an input has at most 1,024


def encode(text: str) -> bytes:
    lines = [line.partition("     # ")[0].strip() for line in text.strip().splitlines()]
    how, tick, commit = lines[0].split()
    out = bytearray((HOW.index(how) | TICKS.index(int(tick), 3 if tick == "0" else 0) << 2, int(commit)))
    for line in lines[1:]:
        out += _operation(line)
    return bytes(out)


def _operation(line: str) -> bytes:
    at_once, line = line[0] == "+", line.lstrip("+ ")
    word, _, rest = line.partition(" ")
    flag = AT_ONCE * at_once
    if word[0] in "cs" and word[1:].isdigit():
        code = bytes((OPERATIONS.index("client" if word[0] == "c" else "server") | flag, int(word[1:])))
        return b"".join(code + deed for deed in _deeds(rest))
    if word == "withhold":
        return bytes((OPERATIONS.index("sockets") | flag, 64))
    code = bytes((OPERATIONS.index(word) | flag,))
    if word in ("hear", "orphan"):
        return code
    if word == "open":
        place, *flags = rest.split()
        return code + bytes((PLACES.index(place) | sum(FLAGS[one] for one in flags),))
    if word in ("wait", "drain"):
        return code + bytes((WAITS.index(int(rest)),))
    return code + bytes((TICKS.index(int(rest)) if word == "tick" else int(rest) - (word in ("attach", "detach", "turn")),))


def _deeds(text: str) -> list[bytes]:
    word, _, rest = text.partition(" ")
    code = bytes((DEEDS.index(word),))
    if word == "says":
        said = ast.literal_eval(f"b{rest}")
        return [code + bytes((len(said[at:at + 255]),)) + said[at:at + 255] for at in range(0, len(said), 255)]
    return [code + (bytes((int(rest),)) if rest else b"")]


def explain(data: bytes) -> Iterator[str]:
    feed = iter(data)

    def byte() -> int:
        return next(feed, 0)

    head = byte()
    yield f"{HOW[head & 3]} {TICKS[head >> 2 & 7]} {byte()}"
    while (op := next(feed, None)) is not None:
        word = OPERATIONS[(op & 127) % len(OPERATIONS)]
        arg = byte() if word not in ("hear", "orphan") else 0
        yield ("+ " if op & AT_ONCE else "") + _said(word, arg, byte)


def _said(word: str, arg: int, byte: object) -> str:
    assert callable(byte)
    if word == "open":
        return " ".join((word, PLACES[(arg & 31) % len(PLACES)], *(name for name, bit in FLAGS.items() if arg & bit)))
    if word in ("wait", "drain"):
        return f"{word} {WAITS[arg & 15]}"
    if word == "tick":
        return f"{word} {TICKS[arg % len(TICKS)]}"
    if word == "sockets":
        return "withhold" if arg & 64 else f"sockets {arg}"
    if word not in ("client", "server"):
        return f"{word} {arg + (word in ('attach', 'detach', 'turn'))}"
    deed = DEEDS[byte() % len(DEEDS)]
    n = byte() if deed in ("phrase", "says", "bulk", "hears") else 0
    said = f"{word[0]}{arg} {deed}"
    if deed == "says":
        return f"{said} {repr(bytes(byte() for _ in range(n)))[1:]}"
    if deed == "phrase":
        phrases = QUESTIONS if word == "client" else ANSWERS
        return f"{said} {n}     # {phrases[n % len(phrases)]!r:.80}"
    return f"{said} {n}" if deed in ("bulk", "hears") else said


BY_HAND = (
    "clients 0 0\nopen web\nc0 phrase 0\ns0 phrase 0\nc0 phrase 1\ns0 phrase 1\nhear",
    "servers 0 0\nopen web\nc0 phrase 10\ns0 phrase 0\ns0 phrase 0\ns0 phrase 3",
    "resets 0 0\nopen web\nopen web\nc0 phrase 0\nc1 phrase 2\ns0 phrase 0\ns1 phrase 1\nc1 phrase 0\nc0 phrase 0\ns0 phrase 0",
    "silence 0 0\nopen web\nc0 phrase 11\nc0 bulk 99\ns0 phrase 24",
    "silence 30000 0\nopen web\nc0 phrase 6\ns0 phrase 24\nc0 phrase 22\ns0 phrase 10\ns0 bulk 120\ns0 bulk 120\nhear",
    "clients 0 0\nopen web small\nc0 phrase 0\ns0 phrase 11\ns0 phrase 12\ns0 bulk 120\ns0 phrase 13\nwait 5000\nhear",
    "clients 0 0\nopen web\nc0 phrase 5\ns0 phrase 6\nc0 bulk 100\ns0 bulk 100\nhear\nc0 shuts\ns0 bulk 50\ns0 shuts",
    "clients 0 0\nopen web\nc0 phrase 4\ns0 phrase 7\nc0 bulk 100\ns0 bulk 100\ns0 shuts\nhear\nc0 bulk 3",
    "clients 0 0\nopen web\nc0 phrase 0\ns0 phrase 0\ns0 shuts\nc0 phrase 0\ns1 phrase 0",
    "clients 0 0\nopen web\nc0 phrase 0\ns0 phrase 0\n+ s0 resets\nc0 phrase 0\ns1 phrase 9",
    "clients 0 0\nopen web\nc0 phrase 0\ns0 phrase 15\nc0 phrase 0\ns0 phrase 0\ns1 phrase 0",
    "clients 0 0\nopen web\nc0 phrase 12\nwait 500\nwait 1000\nc0 phrase 0\ns1 phrase 4\ns1 shuts",
    "clients 0 0\nopen web\nc0 phrase 14\nc0 phrase 15\nc0 phrase 17\nc0 phrase 18\nc0 phrase 32\nc0 phrase 16\nwait 10000",
    "clients 0 0\nopen web\nc0 phrase 24\nwait 60000",
    "clients 0 0\nopen web\nc0 phrase 26\ns0 phrase 19\ns0 phrase 18\nc0 phrase 27\ns0 phrase 26\ns0 phrase 13",
    "clients 0 0\nopen web\nc0 phrase 19\nc0 phrase 20\ns0 phrase 0\nc0 phrase 20\nc0 phrase 21\nhear",
    "clients 0 0\nopen web\nc0 phrase 7\ns0 phrase 1\nhear",
    "clients 0 0\nopen web\nc0 phrase 8\ns0 phrase 0\nc0 phrase 13\ns0 phrase 30",
    "clients 0 0\nopen web-tcp\nc0 bulk 127\nc0 bulk 127\ns0 bulk 127\ns0 hears 255\nc0 shuts\ns0 bulk 127\nhear",
    "servers 60000 0\nopen web-tcp\nc0 bulk 127\nc0 bulk 127\nhear\nc0 bulk 127\nc0 bulk 127\nhear\ns0 bulk 127\ns0 bulk 127\nhear",
    "resets 0 0\nopen web-tcp small\ns0 bulk 127\ns0 bulk 127\ns0 bulk 127\ns0 bulk 127\nhear\ns0 bulk 127\ns0 bulk 127\ns0 resets\nhear",
    "silence 0 0\nopen web-tcp\nc0 bulk 20\ns0 shuts",
    "clients 0 0\nopen auto\nc0 phrase 0\ns0 phrase 0",
    "clients 0 0\nopen auto\nc0 bulk 20\ns0 bulk 20",
    "clients 0 0\nopen auto\nwait 50\ns0 phrase 25\nc0 bulk 2",
    "clients 0 0\nopen auto\nwait 50\nc0 phrase 0\ns1 phrase 0",
    "clients 0 0\nopen broken\nopen broken-auto\nwait 50\nc1 phrase 0\ns0 phrase 0",
    "clients 0 0\nopen late\nc0 phrase 0\ncommit 5\ns0 phrase 0\nopen late-tcp\nc1 bulk 9\ns1 bulk 9",
    "clients 0 0\nopen late\nopen late-auto\nopen late-tcp\nc0 phrase 0\nc1 phrase 0\nc2 bulk 5\nwait 1000\ncommit 6\nhear",
    "silence 0 0\nopen late\nopen late-auto\nopen late-tcp\nc0 phrase 3\nc2 bulk 5\nwait 5000\nhear",
    "clients 0 14\nopen late\nopen late\nopen web\nopen web\nc0 phrase 0\nc2 phrase 0\ns0 phrase 0\nwait 1500\nopen web\nwait 5000",
    "clients 0 15\nopen web small\nopen web small\nc0 phrase 11\nc0 bulk 127\nc1 phrase 10\ns0 phrase 10\ns0 bulk 127\nwait 1500\nopen web"
    "\nc2 phrase 1\nwait 5000\nhear",
    "clients 0 16\nopen web\nopen web\nopen web-tcp\nc0 phrase 26\nc1 phrase 0\nwait 1000\nopen web second\nc3 phrase 0\nwait 5000",
    "silence 0 17\nopen web\nc0 phrase 11\nwait 500\nopen web-tcp\nc1 bulk 3\nwait 1000\nopen web\nc2 phrase 24\nwait 500",
    "clients 0 13\nopen web\nc0 phrase 0\ns0 phrase 0\nopen web-tcp\nc1 bulk 5\nhear",
    "clients 0 0\nopen inbound\nc0 phrase 0\ns0 phrase 0\nopen inbound-tcp itself\n"
    "c1 bulk 4\ns1 bulk 4\nopen inbound itself\nc2 phrase 0\ns2 phrase 2",
    "clients 0 0\nopen direct\nc0 phrase 0\ns0 phrase 0\nopen direct-tcp\nc1 bulk 4\nopen passed\nc2 bulk 4\nopen refused\nopen ourselves",
    "clients 0 0\nwithhold\nopen web\nc0 phrase 0\nopen web\nc1 phrase 0\nopen web-tcp\nopen web-tcp\nopen web\nc4 phrase 0\nwait 250\n"
    "sockets 1\ns0 phrase 0\nwait 5000",
    "clients 0 0\nopen web\nc0 phrase 0\ncommit 4\ns0 phrase 0\nc0 phrase 0\ncommit 0\ns0 phrase 0",
    "clients 0 0\nopen web\nc0 phrase 0\n+ commit 1\n+ commit 18\ncommit 8\ns0 phrase 0\nc0 phrase 0\nhear\nwait 300000\nwait 60000",
    "clients 0 0\nopen web\nc0 phrase 0\ns0 phrase 0\ndetach 1\nc0 phrase 0\nattach 1\nopen web\nc1 phrase 0\ns1 phrase 0",
    "clients 0 0\nopen web\nopen web-tcp\nc0 phrase 0\ns0 phrase 0\nc1 bulk 9\ndrain 1000\nc1 bulk 9\nhear\nwait 1000",
    "clients 0 0\nopen web\nopen web-tcp\nc0 phrase 0\nc1 bulk 9\norphan\ns0 phrase 0\nhear\nwait 5000",
    "clients 0 1\nopen web\nopen web\nc0 phrase 0\ns0 phrase 0\n+ c1 phrase 0\ns0 phrase 0\ns1 phrase 0\nhear",
    "clients 0 1\nopen web\nopen web\nc0 phrase 11\ns0 phrase 0\nc1 phrase 0\ns1 phrase 0\nhear",
    "servers 0 0\nopen web-tcp small\ns0 bulk 40\ns0 bulk 40\ns0 bulk 40\ns0 bulk 40\ns0 shuts\nc0 hears 9\nhear\nc0 bulk 9",
    "resets 0 0\nopen web\nc0 phrase 12",
    "clients 120000 0\nopen web\nopen web second\nopen web-tcp\n+ c0 phrase 10\n+ c1 phrase 10\n+ c2 bulk 127\n"
    "turn 1\nturn 2\ns0 phrase 0\nhear",
    # the other pod, in memory: HTTP, TCP both ways, slow readers, ends and resets
    "clients 0 0\nopen other\nc0 phrase 0\ns0 phrase 0\nc0 phrase 2\ns0 phrase 1\nopen other\nc1 phrase 0\ns0 phrase 0\nhear",
    "clients 0 0\nopen other-tcp\nc0 bulk 9\ns0 bulk 9\nhear\nc0 bulk 127\ns0 bulk 127\nhear\nc0 shuts\ns0 bulk 9\nhear\ns0 shuts",
    "servers 0 0\nopen other-tcp small\nc0 bulk 127\nc0 bulk 127\nc0 bulk 127\ns0 bulk 127\ns0 bulk 127\ns0 bulk 127\ns0 bulk 127\nhear",
    "resets 0 0\nopen other-tcp\nopen other\nc0 bulk 50\ns0 bulk 50\nc1 phrase 11\ns1 resets\ns0 resets",
    "silence 0 29\nopen web\nopen web-tcp\nc0 phrase 0\nc1 bulk 60\ns0 phrase 0\ns1 bulk 60\nc0 phrase 10\ns0 phrase 15\nhear",
    "clients 0 0\nopen other-tcp\nc0 bulk 9\ns0 bulk 9\ndetach 2\nc0 bulk 9\ns0 bulk 9\nhear\nopen other-tcp\nopen other\nc2 phrase 0",
    # policies: denied, allowed, on trial, and again what is open
    "clients 0 19\nopen other\nopen other-tcp\nopen inbound\nopen inbound-tcp\nc0 phrase 0\nc1 bulk 9\nc2 phrase 0\nc3 bulk 9\nhear\n"
    "commit 22\nopen other\nc4 phrase 0\ns0 phrase 0",
    "clients 0 0\nopen other\nopen other-tcp\nopen inbound-tcp\nc0 phrase 0\nc1 bulk 9\nc2 bulk 9\ns0 phrase 0\ncommit 19\nc0 phrase 0\n"
    "c1 bulk 9\nhear",
    "clients 0 20\nopen other\nopen other-tcp\nc0 phrase 0\ns0 phrase 0\nc1 bulk 3\nhear",
    "clients 0 21\nopen other\nopen other-tcp\nc0 phrase 0\ns0 phrase 0\nc1 bulk 3\ns1 bulk 3",
    # the other pod, by a tunnel: the same, then lists, certificates and roots that come and go
    "clients 0 23\nopen other\nc0 phrase 0\ns0 phrase 0\nc0 phrase 2\ns0 phrase 1\nopen other\nc1 phrase 0\ns1 phrase 0\nhear",
    "clients 0 23\nopen other-tcp\nc0 bulk 9\ns0 bulk 9\nhear\nc0 bulk 127\ns0 bulk 127\nhear\nc0 shuts\ns0 bulk 9\nhear\ns0 shuts",
    "servers 0 23\nopen other-tcp small\nc0 bulk 127\nc0 bulk 127\nc0 bulk 127\ns0 bulk 127\ns0 bulk 127\ns0 bulk 127\nhear",
    "silence 0 23\nopen other-tcp\nopen other\nc0 bulk 9\nc1 phrase 0\ncommit 24\ns0 bulk 9\nopen other-tcp\nc2 bulk 9\ncommit 25\n"
    "open other-tcp\nc3 bulk 9\nhear",
    "resets 0 23\nopen other-tcp\nc0 bulk 9\n+ commit 24\nopen other\nc1 phrase 0\nhear\nwait 60000",
    "clients 0 23\nopen other-tcp\nc0 bulk 9\ncommit 26\nopen other-tcp\nc1 bulk 9\ns0 bulk 9\ns1 bulk 9\nhear",
    "clients 0 23\nopen other-tcp\nc0 bulk 9\ncommit 19\nopen other-tcp\nc1 bulk 9\nhear",
    "clients 0 23\n+ open other-tcp\n+ open other-tcp\n+ commit 24\nturn 2\ncommit 27\ncommit 28\nopen other-tcp\nwait 10000\n"
    "commit 25\nhear",
    "clients 0 23\nopen other-tcp\nc0 bulk 9\ndetach 2\nc0 bulk 9\ns0 bulk 9\nhear\nopen other-tcp\nwait 10000",
    "silence 0 33\nopen other-tcp\nc0 bulk 3\nwait 5000\nopen other\nc1 phrase 0\nwait 1500\ns1 phrase 0\nhear",
    "clients 0 34\nopen other\nopen other\nopen other-tcp\nc0 phrase 11\nc0 bulk 127\nc1 phrase 0\nwait 5000\nhear",
)


# What did not hold, and for which script. They stay in the corpus, whatever covers the same.
FOUND = {
    "no cluster is held: what detection chose early and found empty was chosen again": "clients 0 2\nopen auto\nwait 50\nwait 5000",
    "a pod goes once: detached, it went with its last tunnel, which was still shaking hands, and then once more":
        "resets 0 29\nopen web-tcp",
}


def scripts() -> Iterator[bytes]:
    yield from map(encode, BY_HAND)
    yield from map(encode, FOUND.values())
    for case in requests():
        if len(case.bytes) < MOST:
            said = repr(case.bytes)[1:]
            yield encode(f"clients 0 0\nopen web\nc0 says {said}\ns0 phrase 0\ns0 phrase 0\nc0 phrase 9\ns0 phrase 0\nhear")
    for answer in responses():
        question = 3 if answer.ask == b"HEAD" else 4 if answer.ask == b"CONNECT" else 0
        if len(answer.bytes) < MOST:
            said = repr(answer.bytes)[1:]
            yield encode(f"clients 0 0\nopen web\nc0 phrase {question}\ns0 says {said}\nc0 phrase 0\ns0 phrase 0\nhear\ns0 shuts")


def main(words: list[str]) -> int:
    if words[:1] == ["explain"] and words[1:]:
        for path in map(Path, words[1:]):
            print(path, *explain(path.read_bytes()), sep="\n    ")
        return 0
    if words[:1] in (["write"], ["found"]) and len(words) == 2:
        Path(words[1]).mkdir(parents=True, exist_ok=True)
        for data in scripts() if words[0] == "write" else map(encode, FOUND.values()):
            Path(words[1], sha1(data).hexdigest()).write_bytes(data)
        return 0
    print(__doc__, file=sys.stderr)
    return 64


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
