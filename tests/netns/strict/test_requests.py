"""The corpus of hostile requests, through the worker to real back ends: nobody ever disagrees about where a message ends."""
from __future__ import annotations

import os
import re
import threading
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.support import smuggling
from tests.support.backends import NAMES, Stage, stage
from tests.support.capture import ByHand
from tests.support.netns import Namespaces
from tests.support.smuggling import NEXT, Sent

pytestmark = pytest.mark.netns
Record = dict[str, Any]
Heard = dict[tuple[str, str], tuple[int, int]]  # (back end, case): the local ports of its connection and of the one after it
AFTER = b"GET /%s/after HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"


@pytest.fixture(scope="module")
def made(module_namespaces: Namespaces, by_hand: ByHand, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with stage(module_namespaces, by_hand, tmp_path_factory.mktemp("strict")) as found:
        yield found


def play(stage: Stage, name: str, heard: Heard, errors: list[str]) -> None:
    for number, case in enumerate(smuggling.requests()):
        data, _ = case.marked(number)
        mark = smuggling.mark(number)
        try:
            local, _ = stage.say(name, data + (NEXT % mark if case.final != "cut" else b""), hang_up=case.final == "cut")
            later, reply = stage.say(name, AFTER % mark)
            if reply.count(b"x-seen: /%s/after" % mark) != 1:
                errors.append(f"{name} {case.name}: the next client got {reply!r}")
        except (AssertionError, OSError) as error:
            errors.append(f"{name} {case.name}: {error!r}")
            local = later = 0
        heard[name, case.name] = (local, later)


@pytest.fixture(scope="module")
def heard(made: Stage) -> Heard:
    """Every case through every back end, each back end's in order, all back ends at once."""
    found: Heard = {}
    errors: list[str] = []
    threads = [threading.Thread(target=play, args=(made, name, found, errors)) for name in NAMES]
    for one in threads:
        one.start()
    for one in threads:
        while one.is_alive():
            made.drain()
            one.join(0.05)
    made.settle()
    assert not errors, "\n".join(errors[:50])
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_back_end_reads_exactly_the_requests_that_were_counted(name: str, made: Stage, heard: Heard) -> None:
    told = by_case(made.backends.told()[name])
    wrong = [f"requests of no case: {told[-1]}"] if -1 in told else []
    refused = []
    for number, case in enumerate(smuggling.requests()):
        _, wanted = case.marked(number)
        wanted = wanted if case.final else [*wanted, Sent(b"GET", b"/%s/next" % smuggling.mark(number))]
        local, later = heard[name, case.name]
        found = judge(wanted, case.final, made.records(local), made.records(later), told.get(number, []),
                      Sent(b"GET", b"/%s/after" % smuggling.mark(number)))
        if found:
            wrong.append(f"{case.name}: {found}")
        if any(one["details"] == "via_upstream" and one["code"] != 200 for one in made.records(local)):
            refused.append(case.name)
    print(f"{name}: {len(smuggling.requests())} cases, {sum(map(len, told.values()))} requests read, refused by itself: {refused}")
    assert not wrong, "\n".join(wrong)


def by_case(told: list[Sent]) -> dict[int, list[Sent]]:
    """-1: those without a mark, as of a preface taken for a request."""
    found = defaultdict(list)
    for one in told:
        number = smuggling.number(one)
        found[-1 if number is None else number].append(one)
    return found


def judge(wanted: list[Sent], final: str, records: list[Record], later: list[Record], told: list[Sent], after: Sent) -> str:
    """What is wrong, "" for nothing. A back end may refuse what we passed on (then it tells of nothing); it may not read it otherwise."""
    seen = [(one["method"], one["received"]) for one in records]
    want = [(one.method.decode(), len(one.body)) for one in wanted]
    ended = bool(records) and records[-1]["code"] != 200 and (records[-1]["details"] == "via_upstream" or records[-1]["flag"] == "UC")
    if seen[:len(want)] != (want[:len(seen)] if ended else want):
        return f"we counted {seen}, not {want}"
    answers = [(one["code"], one["flag"]) for one in records[len(want):]]
    if final.isdigit() and answers != [(int(final), "DPE")] and not (ended and len(records) <= len(want)):
        return f"we answered {answers}, not {final} DPE"
    if not final.isdigit() and len(answers) != (final == "cut") and not (ended and len(records) <= len(want)):
        return f"we counted {answers} besides"
    hosts = [one["authority"].encode("latin-1") for one in records if one["code"] == 200]
    passed = [one for one, record in zip(wanted, records, strict=False) if record["code"] == 200]
    if [one["code"] for one in later] != [200]:
        return f"the request after it was answered with {later}"
    if told != [*passed, after]:
        return f"we passed on {[*passed, after]}, the back end read {told}"
    if [one.host for one in told[:-1]] != hosts:
        return f"we passed them on to the hosts {hosts}, the back end read {[one.host for one in told]}"
    return ""


# ---- the same bytes without us ----------------------------------------------------------------------------------------------

Direct = dict[tuple[str, int], tuple[list[Sent], str]]  # (back end, case): requests read, and the status of an answer that refuses


def first_refusal(reply: bytes) -> str:
    """The status of the first answer that is none of the recorder's; "-" if there is none."""
    return next((status.decode() for status in re.findall(rb"HTTP/1\.[01] (\d{3})", reply) if status[:1] not in b"12"), "-")


@pytest.fixture(scope="module")
def directly(made: Stage, heard: Heard) -> Direct:
    """Every case straight to every back end but Narrows. Marks go on behind those of `heard`."""
    cases = smuggling.requests()

    def say(one: tuple[str, int]) -> tuple[tuple[str, int], str]:
        name, at = one
        case, number = cases[at], len(cases) + at
        data = case.marked(number)[0] + (NEXT % smuggling.mark(number) if case.final != "cut" else b"")
        return one, first_refusal(made.say(name, data, direct=True, hang_up=case.final == "cut", patience=0.7)[1])

    with ThreadPoolExecutor(24) as pool:
        answers = dict(pool.map(say, [(name, at) for at in range(len(cases)) for name in NAMES if name != "narrows"]))
    told = made.backends.told()
    read = {name: by_case(told[name]) for name in NAMES if name != "narrows"}
    return {(name, at): (read[name].get(len(cases) + at, []), status) for (name, at), status in answers.items()}


def prefix(one: list[Sent], other: list[Sent]) -> bool:
    return one == other[:len(one)]


def test_without_us_the_back_ends_would_have_disagreed(directly: Direct) -> None:
    """The printed fact of docs/http1.md; and that the corpus is worth its name."""
    cases = smuggling.requests()
    names = [name for name in NAMES if name != "narrows"]
    odd: dict[str, list[str]] = defaultdict(list)
    split = []
    for at, case in enumerate(cases):
        number = len(cases) + at
        ours = case.marked(number)[1]
        ours = ours if case.final else [*ours, Sent(b"GET", b"/%s/next" % smuggling.mark(number))]
        readings = [directly[name, at][0] for name in names]
        for name, reading in zip(names, readings, strict=True):
            if not prefix(reading, ours):
                odd[name].append(case.name)
        if any(not prefix(one, other) and not prefix(other, one) for one in readings for other in readings):
            split.append(case.name)
    print(f"{len(cases)} cases sent directly: two of the six back ends read different requests in {len(split)}: {' '.join(split)}")
    for name in names:
        print(f"{name} reads what we do not pass on, or otherwise, in {len(odd[name])}: {' '.join(odd[name])}")
    assert len(split) >= 10


def test_envoy_does_with_the_same_bytes_what_the_corpus_says(directly: Direct) -> None:
    """NARROWS_GOLDEN=write writes what was seen into the corpus."""
    seen = {case.name: f"{len(directly['envoy', at][0])} {directly['envoy', at][1]}" for at, case in enumerate(smuggling.requests())}
    if os.environ.get("NARROWS_GOLDEN") == "write":
        smuggling.write_envoy(seen)
        return
    assert {name: one for name, one in seen.items() if one != smuggling.by_name()[name].envoy} == {}
